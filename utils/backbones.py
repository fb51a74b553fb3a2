"""Name → `nn.Module` that takes raw pixels in [0, 1] and returns four logits; its checkpoint file and back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.utils_funcs import CLASSES, MODELS, UserError, atomic_path

#: Seconds that a hub gets to answer before the model starts from random weights.
HUB_TIMEOUT = 8
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TIMM_NAMES = {"Resnet": "resnet34.a1_in1k", "Efficientnet": "efficientnet_b0.ra_in1k"}
DINOV2_NAME = "facebook/dinov2-small"
PATCH = 14


class PixelClassifier(nn.Module):
    """Raw pixels → logits: resizes, repeats to three channels and normalises inside, differentiably, so that an attack
    perturbs what this data set delivers (one channel, native resolution).

    Input `float32` (N, 1, H, W) in [0, 1]; output (N, 4) logits.
    """

    def __init__(self, body: nn.Module, *, name: str, init: str, input_size: int | None) -> None:
        super().__init__()
        self.body, self.name, self.init, self.input_size = body, name, init, input_size
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def pixels_to_input(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 1:
            raise UserError(
                f"The model takes images of shape (N, 1, H, W) in [0, 1], not {tuple(images.shape)}."
            )
        if self.input_size and images.shape[-2:] != (self.input_size, self.input_size):
            shrink = images.shape[-1] > self.input_size
            images = F.interpolate(
                images,
                size=(self.input_size, self.input_size),
                mode="bilinear",
                align_corners=False,
                antialias=shrink,
            )
        return (images.expand(-1, 3, -1, -1) - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        return self.body(self.pixels_to_input(images))

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features (N, D): what the linear head sees."""
        inputs = self.pixels_to_input(images)
        if isinstance(self.body, DinoClassifier):
            return self.body.features(inputs)
        return self.body.forward_head(self.body.forward_features(inputs), pre_logits=True)


class Depthwise(nn.Conv2d):
    """A depthwise convolution with stride or a large kernel that stays in float32 under bfloat16 autocast on a CPU: there its
    backward pass in bfloat16 is the slower one, while what surrounds it gains. Elsewhere a plain `nn.Conv2d`."""

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(inputs)
        with torch.autocast("cpu", enabled=False):
            return super().forward(inputs.float()).to(inputs.dtype)


def _attention(module: nn.Module, query: Tensor, *rest, **options) -> tuple[Tensor, Tensor | None]:
    """Fused attention, but plain products in bfloat16 on a CPU, where the fused backward pass is the slower one."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.dinov2.modeling_dinov2 import eager_attention_forward

    plain = query.device.type == "cpu" and query.dtype == torch.bfloat16
    return (eager_attention_forward if plain else sdpa_attention_forward)(
        module, query, *rest, **options
    )


class DinoClassifier(nn.Module):
    """DINOv2 ViT-S/14 with the linear head of its authors' evaluation: CLS token and mean of the patch tokens
    (Oquab et al. 2023, arXiv:2304.07193)."""

    def __init__(self, backbone: nn.Module, classes: int = len(CLASSES)) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2 * backbone.config.hidden_size, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def features(self, inputs: Tensor) -> Tensor:
        tokens = self.backbone(pixel_values=inputs).last_hidden_state
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.features(inputs))


def build_model(
    name: str, *, pretrained: bool = True, input_size: int | None = None
) -> PixelClassifier:
    """A fresh model in eval mode, with `.init` saying which weights were really loaded.

    Args:
        name: one of `MODELS`; a clean model and its `_atk` twin are the same network.
        pretrained: look for weights in the folder `ALZHEIMER_WEIGHTS`, then on their hub; where neither answers, say so
            in one line and start from random weights (`init = "random"`).
        input_size: side in pixels that the backbone sees; None keeps the native size (DINOv2: 126 for 128).

    Raises:
        StudyError: unknown name, or a DINOv2 size that is no multiple of 14 (it would ignore the remainder in silence).
    """
    if name not in MODELS:
        raise UserError(f"Unknown model {name!r}: expected one of {', '.join(MODELS)}.")
    backbone = name.removesuffix("_atk")
    if backbone == "Dinov2":
        input_size = input_size or 126
        if input_size % PATCH:
            raise UserError(
                f"Dinov2 was asked for {input_size} px, but its patch is 14: use a multiple of it, as 126 or 224."
            )
        build, tag = _build_dinov2, "lvd142m"
    else:
        build, tag = lambda folder, load: _build_timm(backbone, folder, load), "imagenet1k"
    body, init = _with_weights(build, name, tag) if pretrained else (build(None, False), "random")
    # Convolutions run up to 1.5 times faster on channels-last weights, in training and under attack (CPU and GPU).
    return (
        PixelClassifier(body, name=name, init=init, input_size=input_size)
        .to(memory_format=torch.channels_last)
        .eval()
    )


def _with_weights(
    build: Callable[[Path | None, bool], nn.Module], name: str, tag: str
) -> tuple[nn.Module, str]:
    folder = os.environ.get("ALZHEIMER_WEIGHTS")
    if folder:
        if not Path(folder).is_dir():
            raise UserError(
                f"ALZHEIMER_WEIGHTS names {folder}, which is no folder: point it to the folder of weights or unset it."
            )
        return build(Path(folder), True), tag
    reason = _hub_problem()
    if reason is None:
        try:
            return build(None, True), tag
        except Exception as error:  # noqa: BLE001  any hub failure means the same to the user: no weights
            reason = f"{type(error).__name__}"
    if name not in _TOLD:
        _TOLD.add(name)
        print(
            f"{name}: pretrained weights not available ({reason}); starting from random weights (init: random)."
        )
    return build(None, False), "random"


def _hub_problem() -> str | None:
    """Why the hub cannot be asked (None: it can). Checked first because hub clients retry for minutes without a network."""
    import urllib.error
    import urllib.request

    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return "HF_HUB_OFFLINE=1"
    if "hub" not in _HUB:
        from huggingface_hub.constants import ENDPOINT

        try:
            urllib.request.urlopen(
                urllib.request.Request(ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT
            ).close()
            _HUB["hub"] = None
        except urllib.error.HTTPError as error:  # a proxy that refuses also answers with a status
            _HUB["hub"] = f"the hub answered {error.code}" if error.code >= 400 else None
        except OSError as error:
            _HUB["hub"] = f"no hub: {type(error).__name__}"
    return _HUB["hub"]


_HUB: dict[str, str | None] = {}  # asked once a process
_TOLD: set[str] = set()  # models whose missing weights were announced in this process


def _build_timm(backbone: str, folder: Path | None, load: bool) -> nn.Module:
    import timm

    timm_name = TIMM_NAMES[backbone]
    if folder is None:
        return _tuned(
            timm.create_model(
                timm_name if load else timm_name.split(".")[0],
                pretrained=load,
                num_classes=len(CLASSES),
            )
        )
    files = sorted(folder.glob(f"{timm_name}*.safetensors")) + sorted(
        (folder / timm_name).glob("*.safetensors")
    )
    if not files:
        raise UserError(
            f"{folder} holds no {timm_name}*.safetensors: download it from its hub or unset ALZHEIMER_WEIGHTS."
        )
    overlay = dict(file=str(files[0]))
    return _tuned(
        timm.create_model(
            timm_name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=len(CLASSES)
        )
    )


def _tuned(body: nn.Module) -> nn.Module:
    """EfficientNet with fast layers, which compute the same, and with a head near zero, all classes alike. timm draws it
    from ±1/sqrt(classes), which for four classes instead of a thousand makes logits of several units: a loss far above
    that of not knowing, and epochs spent on unlearning it. ResNet's head starts small by itself."""
    if hasattr(body, "conv_head"):
        for layer in body.modules():
            if isinstance(layer, nn.SiLU):
                layer.inplace = False  # in place, autograd copies the input first
            for name, child in layer.named_children():
                if (
                    isinstance(child, nn.Conv2d)
                    and child.groups > 1
                    and (child.stride, child.kernel_size) != ((1, 1), (3, 3))
                ):
                    setattr(layer, name, _as_depthwise(child))
        nn.init.trunc_normal_(body.classifier.weight, std=0.02)
        nn.init.zeros_(body.classifier.bias)
    return body


def _as_depthwise(layer: nn.Conv2d) -> Depthwise:
    # Without drawing weights: what a seed gives stays what it was.
    own = nn.utils.skip_init(
        Depthwise,
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        bias=layer.bias is not None,
    )
    own.load_state_dict(layer.state_dict())
    return own


def _build_dinov2(folder: Path | None, load: bool) -> nn.Module:
    from transformers import AttentionInterface, Dinov2Config, Dinov2Model

    AttentionInterface.register("fastest", _attention)
    # The mask token takes part in pretraining alone: left in, several processes would wait for its gradient.
    # Attention rollout needs the attention matrices, which only the eager implementation returns; it is switched on
    # there (`grad_cam.py`), everything else runs the faster one of `_attention`.
    if not load:
        config = Dinov2Config(
            hidden_size=384,
            num_hidden_layers=12,
            num_attention_heads=6,
            patch_size=PATCH,
            image_size=518,
            use_mask_token=False,
            attn_implementation="fastest",
        )
        return DinoClassifier(Dinov2Model(config))
    if folder is None:
        return DinoClassifier(
            Dinov2Model.from_pretrained(
                DINOV2_NAME, use_mask_token=False, attn_implementation="fastest"
            )
        )
    local = folder / DINOV2_NAME.split("/")[1]
    if not (local / "config.json").is_file():
        raise UserError(
            f"{local} holds no DINOv2 (config.json is missing): put the hub's files there or unset ALZHEIMER_WEIGHTS."
        )
    return DinoClassifier(
        Dinov2Model.from_pretrained(
            local, local_files_only=True, use_mask_token=False, attn_implementation="fastest"
        )
    )


def save_model(
    model: PixelClassifier,
    path: Path | str,
    metadata: dict[str, object] | None = None,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Atomically writes the weights (or `state`, an average of them) as safetensors, with what `load_model` needs."""
    from safetensors.torch import save_file

    header = {
        "model": model.name,
        "init": model.init,
        "input_size": model.input_size,
        **(metadata or {}),
    }
    tensors = {
        key: value.detach().cpu().contiguous()
        for key, value in (state or model.state_dict()).items()
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"alzheimer": json.dumps(header)})


def save_half(checkpoint: Path | str, path: Path | str) -> None:
    """A copy of a checkpoint of half the size, for the repository: matrices and kernels in float16, what is small and
    delicate (biases, BatchNorm's statistics) as it was. `load_model` reads it like any other."""
    from safetensors.torch import load_file, save_file

    header = read_metadata(checkpoint) | {"precision_of_file": "fp16"}
    tensors = {
        key: value.half() if value.is_floating_point() and value.ndim > 1 else value
        for key, value in load_file(checkpoint).items()
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"alzheimer": json.dumps(header)})


def read_metadata(path: Path | str) -> dict:
    """The checkpoint's header: model, init, input_size and what its maker added."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise UserError(
            f"No checkpoint at {path}: train it first (`python -m utils.experiment train --help`)."
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("alzheimer")
    except SafetensorError as error:
        raise UserError(
            f"{path} is no readable safetensors file ({error}): delete it and train again."
        ) from error
    if header is None:
        raise UserError(
            f"{path} was not written by this project (its header names no model): use a file that `save_model` made."
        )
    return json.loads(header)


def load_model(path: Path | str) -> PixelClassifier:
    """Restores a model, in eval mode and float32, from its checkpoint.

    Raises:
        StudyError: no such file, not ours, or weights that do not fit the model that the header names.
    """
    from safetensors.torch import load_file

    header = read_metadata(path)
    model = build_model(header["model"], pretrained=False, input_size=header["input_size"])
    model.init = header["init"]
    load_weights(
        model,
        {
            key: value.float() if value.is_floating_point() else value
            for key, value in load_file(path).items()
        },
        path,
    )
    return model.eval()


def load_weights(model: nn.Module, state: dict[str, Tensor], source: Path | str) -> None:
    """`load_state_dict` with an error that says which file does not fit which model."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(
            f"{source} does not fit {getattr(model, 'name', 'this model')} ({detail[:160]}): "
            "give the checkpoint of the same backbone."
        ) from error
