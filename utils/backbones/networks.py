"""The networks: each a function that builds one with four classes, registered by name.

A new backbone is such a function, decorated with `register`, and its name in
`utils.utils_funcs.BACKBONES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from utils.utils_funcs import CLASSES, UserError

if TYPE_CHECKING:
    from transformers import Dinov2Model

DINOV2_NAME = "facebook/dinov2-small"
#: Side of a patch of DINOv2 in pixels.
PATCH = 14
#: Name of the attention that `fastest_attention` registers with transformers.
ATTENTION = "fastest"

#: From (folder of weights or None for the hub, whether to load weights at all) to a network with
#: four classes that follows `utils.backbones.classifier.Body`.
Build = Callable[[Path | None, bool], nn.Module]


@dataclass(frozen=True)
class Network:
    """How a backbone is built, and on which sizes it works."""

    build: Build
    init: str
    """What its pretrained weights are called in checkpoints and records."""
    input_size: int | None = None
    """Side in pixels that it sees where none is asked for (None: the native size)."""
    multiple_of: int = 1
    """What every input size must be a multiple of."""


#: Backbone → how it is built.
NETWORKS: dict[str, Network] = {}


def register(
    name: str, *, init: str, input_size: int | None = None, multiple_of: int = 1
) -> Callable[[Build], Build]:
    """Decorator that adds a building function to `NETWORKS`; arguments as in `Network`."""

    def add(build: Build) -> Build:
        NETWORKS[name] = Network(build, init, input_size, multiple_of)
        return build

    return add


# -- networks of timm ------------------------------------------------------------------------------


@register("Resnet", init="imagenet1k")
def build_resnet(folder: Path | None, load: bool) -> nn.Module:
    """ResNet-34."""
    return build_timm("resnet34.a1_in1k", folder, load)


@register("Efficientnet", init="imagenet1k")
def build_efficientnet(folder: Path | None, load: bool) -> nn.Module:
    """EfficientNet-B0, with faster layers that compute the same, and a head near zero.

    timm draws the head from ±1/sqrt(classes), which for four classes instead of a thousand makes
    logits of several units: a loss far above that of equal probabilities, and epochs spent on
    unlearning it. ResNet's head starts small by itself.
    """
    body = build_timm("efficientnet_b0.ra_in1k", folder, load)
    use_faster_layers(body)
    head = body.get_submodule("classifier")
    assert isinstance(head, nn.Linear)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return body


def build_timm(name: str, folder: Path | None, load: bool) -> nn.Module:
    """A network of timm with four classes.

    Args:
        name: architecture and tag of the pretrained weights, such as `resnet34.a1_in1k`.
        folder: of weights (None: the hub's).
        load: whether to load weights at all.

    Raises:
        UserError: the folder does not hold the weights.
    """
    import timm

    weights = None
    if folder is not None:
        files = [
            *sorted(folder.glob(f"{name}*.safetensors")),
            *sorted((folder / name).glob("*.safetensors")),
        ]
        if not files:
            raise UserError(
                f"{folder} holds no {name}*.safetensors: download it from its hub or unset "
                "ALZHEIMER_WEIGHTS."
            )
        weights = {"file": str(files[0])}
    elif not load:
        name = name.split(".")[0]
    return timm.create_model(
        name, pretrained=load, pretrained_cfg_overlay=weights, num_classes=len(CLASSES)
    )


class Depthwise(nn.Conv2d):
    """A depthwise convolution that stays in float32 under bfloat16 autocast on a CPU.

    For those with a stride or a large kernel the backward pass in bfloat16 is the slower one
    there, while the layers around them gain. Elsewhere a plain `nn.Conv2d`.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """The convolution (N, C, h, w) of inputs (N, C, H, W), in their type."""
        if inputs.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(inputs)
        with torch.autocast("cpu", enabled=False):
            return super().forward(inputs.float()).to(inputs.dtype)


def use_faster_layers(body: nn.Module) -> None:
    """Replaces layers of timm's EfficientNet by faster ones that compute the same."""
    for layer in body.modules():
        if isinstance(layer, nn.SiLU):
            layer.inplace = False  # in place, autograd copies the input first
        for name, child in layer.named_children():
            if isinstance(child, nn.Conv2d) and child.groups > 1:
                small = child.stride == (1, 1) and child.kernel_size == (3, 3)
                if not small:
                    setattr(layer, name, as_depthwise(child))


def as_depthwise(layer: nn.Conv2d) -> Depthwise:
    """The same convolution, with the same weights, as `Depthwise`."""
    # Without drawing weights: the random numbers that follow stay what they were.
    copy = nn.utils.skip_init(
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
    copy.load_state_dict(layer.state_dict())
    return copy


# -- DINOv2 ----------------------------------------------------------------------------------------


@register("Dinov2", init="lvd142m", input_size=126, multiple_of=PATCH)
def build_dinov2(folder: Path | None, load: bool) -> nn.Module:
    """DINOv2 ViT-S/14 with a fresh head.

    It has no mask token, which takes part in pretraining alone: several processes would wait for
    its gradient. Its attention does not return the attention matrices, which attention rollout
    needs; `utils.explain` switches to the eager implementation there.

    Args:
        folder: that holds the hub's files in `dinov2-small` (None: the hub's).
        load: whether to load weights at all.

    Raises:
        UserError: the folder does not hold the weights.
    """
    from transformers import AttentionInterface, Dinov2Config, Dinov2Model

    AttentionInterface.register(ATTENTION, fastest_attention)
    if not load:
        config = Dinov2Config(
            hidden_size=384,
            num_hidden_layers=12,
            num_attention_heads=6,
            patch_size=PATCH,
            image_size=518,
            use_mask_token=False,
            attn_implementation=ATTENTION,  # type: ignore[call-arg]
        )
        return DinoClassifier(Dinov2Model(config))
    local = None if folder is None else folder / DINOV2_NAME.split("/")[1]
    if local is not None and not (local / "config.json").is_file():
        raise UserError(
            f"{local} holds no DINOv2 (config.json is missing): put the hub's files there or unset "
            "ALZHEIMER_WEIGHTS."
        )
    body = Dinov2Model.from_pretrained(
        DINOV2_NAME if local is None else local,
        local_files_only=local is not None,
        use_mask_token=False,
        attn_implementation=ATTENTION,
    )
    return DinoClassifier(body)


class DinoClassifier(nn.Module):
    """DINOv2 ViT-S/14 with the linear head of its authors' evaluation.

    The head sees the CLS token and the mean of the patch tokens (Oquab et al. 2023,
    arXiv:2304.07193).
    """

    def __init__(self, backbone: Dinov2Model, classes: int = len(CLASSES)) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2 * backbone.config.hidden_size, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward_features(self, inputs: Tensor) -> Tensor:
        """Tokens (N, 1 + patches, D), the CLS token first, from normalized images (N, 3, S, S)."""
        return self.backbone(pixel_values=inputs).last_hidden_state

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (N, 4) of tokens, or what the linear layer sees (N, 2·D)."""
        pooled = torch.cat([features[:, 0], features[:, 1:].mean(1)], dim=1)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (N, 4) from normalized images (N, 3, S, S)."""
        return self.forward_head(self.forward_features(inputs))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names, layer by layer, as timm's models give them.

        `timm.models.group_parameters` numbers by them: the embedding, each block, then the head;
        99999 joins the last norm to the block before it.
        """
        blocks = [
            (r"^backbone\.encoder\.layer\.(\d+)", None),
            (r"^backbone\.layernorm", (99999,)),
        ]
        return {"stem": r"^backbone\.embeddings", "blocks": blocks}


def fastest_attention(
    module: nn.Module, query: Tensor, *rest: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Fused attention, but plain matrix products in bfloat16 on a CPU, where they are faster.

    It takes and returns what an attention function of transformers does. The slower part of the
    fused one is its backward pass.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.dinov2.modeling_dinov2 import eager_attention_forward

    plain = query.device.type == "cpu" and query.dtype == torch.bfloat16
    attention = eager_attention_forward if plain else sdpa_attention_forward
    return attention(module, query, *rest, **options)
