"""Explanations of a classifier and how far to trust them: maps, faithfulness, anatomy, and both under attack."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor, nn

from utils.backbones import DinoClassifier, PixelClassifier, build_model
from utils.metrics import score_robust, share_by_class
from utils.utils_funcs import CLASSES, ROOT, UserError, atomic_path, read_json

#: Class-activation maps of the `grad-cam` package, by our names: Grad-CAM (Selvaraju et al. 2017), Grad-CAM++
#: (Chattopadhay et al. 2018), Layer-CAM (Jiang et al. 2021), Score-CAM (Wang et al. 2020: one forward pass a channel,
#: hundreds an image, so for a figure's few slices only).
CAMS = ("gradcam", "gradcam++", "layercam", "scorecam")
#: Attention rollout (Abnar and Zuidema 2020) reads attention matrices, so it exists for DINOv2 alone.
METHODS = (*CAMS, "rollout")
#: Share of a map's pixels that count as its top, in the comparison of two maps and in the attack on one.
TOP = 0.2
#: A gradient map must fall below this rank correlation once the last layer is random (Adebayo et al. 2018).
SANITY_LIMIT = 0.5
#: Two maps are alike from this top-20% IoU on (0.11 is chance): below it, most of what a reader would point at has moved.
ALIKE = 0.5
#: From fewer people than this an interval is itself uncertain, and a verdict is called a hint.
FEW_PATIENTS = 20
#: An interval of a share of the map that is wider than this says little about where the map lies.
WIDE = 0.2
#: A share that differs from the region's area by less than this is no preference, however sure the difference is.
NOTABLE = 0.01


# --- Maps -------------------------------------------------------------------------------------------------------------


def explain(
    model: nn.Module,
    images: Tensor,
    targets: Tensor | None = None,
    *,
    method: str = "gradcam",
    batch_size: int = 64,
    layer: nn.Module | None = None,
) -> Tensor:
    """One map an image: where the evidence for the target class lies.

    Each map is scaled by itself to [0, 1]; a map without positive evidence is all zero. The model is used in eval mode
    and float32, and its modes, gradients and hooks are afterwards what they were, also when this raises.

    Args:
        model: a `PixelClassifier`, or a wrapper around one that still returns one logit a class.
        images: float32 (N, 1, H, W) in [0, 1].
        targets: int64 (N,), the class to explain; None takes the predicted one. Rollout knows no class and ignores it.
        method: one of `METHODS`.
        batch_size: bounds the peak memory; no map depends on it.
        layer: a module with feature maps (N, C, h, w) or, for DINOv2, tokens; None takes `target_layer(model)`.

    Returns:
        float32 (N, H, W) in [0, 1], at the images' resolution and on their device.

    Raises:
        StudyError: unknown method, a method that this backbone does not have, or targets that do not fit.
    """
    if method not in METHODS:
        raise UserError(f"Unknown explanation {method!r}: expected one of {', '.join(METHODS)}.")
    if images.ndim != 4 or images.shape[1] != 1:
        raise UserError(
            f"Images to explain have the shape (N, 1, H, W), not {tuple(images.shape)}."
        )
    if targets is not None and tuple(targets.shape) != (len(images),):
        raise UserError(
            f"{len(images)} images need as many target classes, not the shape {tuple(targets.shape)}."
        )
    if not len(images):
        return images.new_zeros((0, *images.shape[-2:]))
    one_batch = _rollout_batch if method == "rollout" else _cam_batch
    if method == "rollout":
        _dino(model)
    layer = layer or target_layer(model)
    with (
        _untouched(model),
        torch.inference_mode(False),
        torch.autocast(images.device.type, enabled=False),
    ):
        maps = torch.empty(len(images), *images.shape[-2:], device=images.device)
        upsample = _upsampler(model, layer, images[:1].detach().float().clone())
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            batch = (
                images[rows].detach().float().clone()
            )  # a clone may leave inference mode, its original may not
            chosen = None if targets is None else targets[rows].tolist()
            # Enlarged here and not at the end: of all images at once, the steps of it would hold several full sets of maps.
            maps[rows] = _unit_range(
                upsample(one_batch(model, batch, chosen, method, layer).to(images.device))
            )
    return maps


def target_layer(model: nn.Module) -> nn.Module:
    """The layer whose maps are explained: the last feature map before pooling of a convolutional backbone; for DINOv2
    the last block's `norm1`, the last place where every patch token still has a path to the CLS token."""
    body = next(
        (module.body for module in model.modules() if isinstance(module, PixelClassifier)), model
    )
    if isinstance(body, DinoClassifier):
        return body.backbone.encoder.layer[-1].norm1
    if hasattr(body, "layer4"):
        return body.layer4[-1]
    if hasattr(body, "conv_head"):
        return (
            body.bn2
        )  # timm keeps the head convolution's normalisation and activation in this one module
    convolutions = [module for module in body.modules() if isinstance(module, nn.Conv2d)]
    if not convolutions:
        raise UserError(f"{type(body).__name__} has no feature map to explain: name the layer.")
    return convolutions[-1]


def _cam_batch(
    model: nn.Module, images: Tensor, targets: list[int] | None, method: str, layer: nn.Module
) -> Tensor:
    """Coarse maps (N, h, w), each scaled to [0, 1]."""
    from pytorch_grad_cam import GradCAM, GradCAMPlusPlus, LayerCAM, ScoreCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    cam_type = {
        "gradcam": GradCAM,
        "gradcam++": GradCAMPlusPlus,
        "layercam": LayerCAM,
        "scorecam": ScoreCAM,
    }[method]
    classes = None if targets is None else [ClassifierOutputTarget(target) for target in targets]
    gradients = method != "scorecam"
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad() if gradients else torch.no_grad())
        if gradients:
            # Gradients are wanted from the logits down to this layer and no further: cutting the graph here saves the
            # backward pass through the rest of the network, and its memory. Registered first, so grad-cam sees the cut.
            stack.callback(
                layer.register_forward_hook(
                    lambda _m, _i, output: output.detach().requires_grad_()
                ).remove
            )
        else:
            stack.enter_context(
                contextlib.redirect_stderr(io.StringIO())
            )  # it opens a progress bar an image
        if tokens_to_map := _tokens_to_map(model):
            cam_type = type(cam_type.__name__, (_AboveMean, cam_type), {})
        with cam_type(model, [layer], reshape_transform=tokens_to_map) as cam:
            cam.get_target_width_height = lambda _inputs: (
                None
            )  # leaves the map coarse: see `_upsampler`
            cam.batch_size = len(
                images
            )  # Score-CAM's masked copies go through in batches of this size
            try:
                return torch.from_numpy(cam(images, classes))
            except IndexError as error:  # grad-cam's __exit__ would print this one and swallow it
                raise UserError(
                    f"grad-cam failed ({error}): are all target classes among the logits?"
                ) from error


class _AboveMean:
    """A map of `grad-cam` that counts each channel from its mean over the patch tokens.

    A CAM adds up weighted activations as if each said how much of a feature is there. After a ReLU it does; a token's
    channels have either sign and a large part in common with every other token's, which says nothing about any place.
    Score-CAM's weights stay as they are; from Grad-CAM++'s the term with a channel's sum, now zero, drops out.
    """

    def get_cam_image(
        self,
        input_tensor: Tensor,
        target_layer: nn.Module,
        targets: list,
        activations: np.ndarray,
        grads: np.ndarray,
        eigen_smooth: bool = False,
    ) -> np.ndarray:
        return super().get_cam_image(
            input_tensor, target_layer, targets, _above_mean(activations), grads, eigen_smooth
        )


def _above_mean(features: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Feature maps (N, C, h, w) less each channel's mean over the places of one image."""
    return features - features.mean(axis=(2, 3), keepdims=True)


def _tokens_to_map(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """DINOv2's tokens (N, 1 + h·w, C) → (N, C, h, w) without the CLS token; None for a convolutional model."""
    if not any(isinstance(module, DinoClassifier) for module in model.modules()):
        return None

    def transform(tokens: Tensor) -> Tensor:
        patches = tokens[:, 1:]
        side = round(patches.shape[1] ** 0.5)  # `PixelClassifier` feeds squares
        return patches.reshape(len(tokens), side, side, -1).permute(0, 3, 1, 2)

    return transform


def _rollout_batch(
    model: nn.Module, images: Tensor, _targets: object, _method: str, _layer: nn.Module
) -> Tensor:
    """The product of the layers' attention, half of each the skip connection (Abnar and Zuidema 2020), read where the
    head reads: half at the CLS token, half at the mean of the patch tokens."""
    wrapper, dino = _dino(model)
    with torch.no_grad(), _attention_matrices(dino) as layers:
        dino.backbone(pixel_values=wrapper.pixels_to_input(images))
        read = torch.zeros(len(images), 1, layers[0].shape[-1], device=images.device)
        read[:, :, 0] = 0.5
        read[:, :, 1:] = 0.5 / (layers[0].shape[-1] - 1)
        for attention in reversed(
            layers
        ):  # a row vector from the top down: cheaper than the product of matrices
            read = 0.5 * read @ attention.mean(1) + 0.5 * read
    coarse = _tokens_to_map(model)(read.transpose(1, 2))
    return (coarse - coarse.amin(dim=(-2, -1), keepdim=True))[
        :, 0
    ].cpu()  # as grad-cam does: there is a high floor


def _upsampler(model: nn.Module, layer: nn.Module, image: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from coarse maps (N, h, w) to the image's resolution, linear between the places the cells look at.

    A strided convolution with a symmetric border centres cell i on pixel i·stride, not on the middle of a tile.
    Stretching the map over the image, as grad-cam and most figures do, moves everything by half a cell: 16 of 128 px
    in ResNet-34 and EfficientNet-B0. DINOv2's patches are tiles, and stay where they are.
    """
    first, stride, seen = _cell_geometry(model, layer, image)
    native = image.shape[-2:]

    def matrix(pixels: int, width: int, cells: int) -> Tensor:
        if (
            -(-width // round(stride)) != cells
        ):  # pooling that is no module: nothing known, so take tiles
            at = (torch.arange(pixels) + 0.5) * cells / pixels - 0.5
        else:
            at = ((torch.arange(pixels) + 0.5) * width / pixels - 0.5 - first) / stride
        return (
            (1 - (at.clamp(0, cells - 1)[:, None] - torch.arange(cells)).abs())
            .clamp_min(0)
            .to(image.device)
        )

    def upsample(maps: Tensor) -> Tensor:
        vertical, horizontal = (matrix(native[i], seen[i], maps.shape[1 + i]) for i in (0, 1))
        return vertical @ maps @ horizontal.T

    return upsample


def _cell_geometry(
    model: nn.Module, layer: nn.Module, image: Tensor
) -> tuple[float, float, tuple[int, int]]:
    """Where the cells of the layer's map look: the centre of cell 0 and the distance between cells, in pixels of the
    input that the first convolution sees, and that input's height and width."""
    first, stride, sizes = 0.0, 1.0, []

    def follow(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal first, stride
        sizes.append(inputs[0].shape[-2:]) if not sizes else None
        if (
            inputs[0].shape[-2:] != sizes[-1] or reached
        ):  # a shortcut beside the main path, already counted
            return
        kernel, step, border, gap = (
            value if isinstance(value := getattr(module, name, 1), int) else value[0]
            for name in ("kernel_size", "stride", "padding", "dilation")
        )
        first += ((kernel - 1) * gap / 2 - border) * stride
        stride *= step
        sizes.append(output.shape[-2:])

    reached: list[bool] = []
    kinds = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    hooks = [
        module.register_forward_hook(follow)
        for module in model.modules()
        if isinstance(module, kinds)
    ]
    hooks.append(layer.register_forward_hook(lambda *_: reached.append(True)))
    try:
        with torch.no_grad():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return first, stride, tuple(sizes[0]) if sizes else tuple(image.shape[-2:])


def _dino(model: nn.Module) -> tuple[PixelClassifier, DinoClassifier]:
    for module in model.modules():
        if isinstance(module, PixelClassifier) and isinstance(module.body, DinoClassifier):
            return module, module.body
    raise UserError(
        "Attention rollout needs attention matrices: of these backbones only DINOv2 has them."
    )


@contextlib.contextmanager
def _eager_attention(dino: DinoClassifier) -> Iterator[None]:
    """The only implementation of attention that returns its matrices, and that can be differentiated twice."""
    before = dino.backbone.config._attn_implementation
    dino.backbone.set_attn_implementation("eager")
    try:
        yield
    finally:
        dino.backbone.set_attn_implementation(before)


@contextlib.contextmanager
def _attention_matrices(dino: DinoClassifier) -> Iterator[list[Tensor]]:
    """A list to which every forward pass inside adds each layer's attention, (N, heads, tokens, tokens).

    `output_attentions=True` gives the same, but its first call leaves hooks of transformers in the network for good.
    """
    from transformers.models.dinov2.modeling_dinov2 import Dinov2Attention

    matrices: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: matrices.append(output[1]))
        for module in dino.modules()
        if isinstance(module, Dinov2Attention)
    ]
    try:
        with _eager_attention(dino):
            yield matrices
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode and frozen parameters inside; every mode, `requires_grad`, `.grad` and grad-cam hook as before after.

    grad-cam by itself leaves the model in eval mode and without its gradients.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [
        (parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()
    ]
    try:
        model.eval()
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)
            parameter.grad = (
                None  # grad-cam calls zero_grad, which may write zeros into the caller's tensor
            )
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, required, gradient in parameters:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _unit_range(maps: Tensor) -> Tensor:
    """Divides each map by its own maximum; a map of zeros stays one. No further offset: zero is "no evidence"."""
    peak = maps.amax(dim=(-2, -1), keepdim=True)
    return (
        torch.where(peak > 0, maps / peak.clamp_min(torch.finfo(maps.dtype).tiny), 0.0)
        .clamp(0, 1)
        .float()
    )


# --- Faithfulness -----------------------------------------------------------------------------------------------------


def random_maps(like: Tensor, cells: int, seed: int = 0) -> Tensor:
    """The control: maps (N, H, W) of uniform noise on a `cells` × `cells` grid, as coarse as the real ones, since pixel
    noise would be beaten by any smooth map."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(len(like), 1, cells, cells, generator=generator)
    fine = F.interpolate(coarse, size=like.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    return _unit_range(fine).to(like.device)


def deletion_insertion(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: Tensor,
    *,
    steps: int = 16,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Probability of the target class while pixels are blurred away, or brought back, in the map's order (Petsiuk et
    al. 2018, arXiv:1806.07421). The blur (sigma one twelfth of the width) stands for "removed" in both: black would
    draw new edges.

    Returns:
        `deletion` and `insertion`, each float32 (N, steps + 1), after shares 0, 1/steps … 1 of the pixels. A faithful
        map has a low mean deletion and a high mean insertion.
    """
    order = _order(maps, seed).view_as(maps)[:, None]
    blurred = _blur(images, images.shape[-1] / 12)
    curves: dict[str, list[np.ndarray]] = {"deletion": [], "insertion": []}
    for step in range(steps + 1):
        first = order < step * order[0].numel() / steps
        for name, (inside, outside) in {
            "deletion": (blurred, images),
            "insertion": (images, blurred),
        }.items():
            curves[name].append(
                _probability(model, torch.where(first, inside, outside), targets, batch_size)
            )
    return {name: np.stack(curve, axis=1) for name, curve in curves.items()}


def road(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: Tensor,
    *,
    percentiles: Sequence[int] = (20, 50, 80),
    seed: int = 0,
) -> np.ndarray:
    """ROAD (Rong et al. 2022, arXiv:2202.00449) through `grad-cam`: half of what the target's probability loses more
    when the most relevant pixels are imputed than when the least relevant are. Float32 (N,), higher is better.

    The maps are handed over as ranks, ties broken at random, so that a map with many zeros has as many pixels removed
    as any other.
    """
    from pytorch_grad_cam.metrics.road import ROADCombined
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    ranks = 1 - _order(maps, seed).view_as(maps).double() / maps[0].numel()
    goals = [ClassifierOutputSoftmaxTarget(target) for target in targets.tolist()]
    with (
        _untouched(model),
        torch.random.fork_rng(devices=[]),
    ):  # the imputation draws its noise from the global state
        torch.manual_seed(seed)
        return np.asarray(
            ROADCombined(list(percentiles))(images, ranks.cpu().numpy(), goals, model),
            dtype=np.float32,
        )


def _order(maps: Tensor, seed: int) -> Tensor:
    """Place of each pixel when a map is sorted from high to low, int64 (N, H·W); equal values in random order."""
    shuffle = torch.randperm(maps[0].numel(), generator=torch.Generator().manual_seed(seed)).to(
        maps.device
    )
    order = shuffle[maps.flatten(1)[:, shuffle].argsort(dim=1, descending=True, stable=True)]
    return order.argsort(dim=1)


def _blur(images: Tensor, sigma: float) -> Tensor:
    from torchvision.transforms.functional import gaussian_blur

    return gaussian_blur(images, kernel_size=2 * round(3 * sigma) + 1, sigma=sigma)


def _probability(model: nn.Module, images: Tensor, targets: Tensor, batch_size: int) -> np.ndarray:
    with _untouched(model), torch.no_grad():
        parts = [model(batch).softmax(1) for batch in images.split(batch_size)]
    return torch.cat(parts).gather(1, targets[:, None].to(images.device))[:, 0].cpu().numpy()


def _predict(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Logits (N, classes) in eval mode."""
    with _untouched(model), torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(batch_size)])


# --- Sanity -----------------------------------------------------------------------------------------------------------


def randomisation_check(
    model: nn.Module,
    images: Tensor,
    *,
    method: str = "gradcam",
    draws: int = 3,
    depth: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    fresh: Callable[[], nn.Module] | None = None,
) -> dict[str, np.ndarray]:
    """Cascading parameter randomisation (Adebayo et al. 2018, arXiv:1810.03292): from the head down, one stage after
    the other is replaced by one at its random start, and the map is compared with the trained model's, for one class.

    Attention rollout never reads the head, so it cannot change with the first stage: it fails by construction.
    Grad-CAM++ and Layer-CAM keep positive gradients only, so over a ResNet's non-negative features they can stay nearly
    what they were (0.97 with random features): believe the number of the model at hand, not the method's name.

    Args:
        draws: random networks to average over. One alone tells little of the head: all images share its four random
            rows, and on a coarse grid these can agree with the trained ones by luck.
        depth: how many stages, from the head down; None takes all.
        fresh: builds an untrained twin of `model`; None builds one by the model's name.

    Returns:
        name of the last stage replaced → Spearman correlation with the trained map, float64 (N,), mean of the draws.
    """
    targets = _predict(model, images, batch_size).argmax(1)
    trained = explain(model, images, targets, method=method, batch_size=batch_size)
    result: dict[str, np.ndarray] = {}
    for draw in range(draws):
        with torch.random.fork_rng(devices=[]):
            # Far from the seeds of training: with the same one, the twin would be this very model's own starting point.
            torch.manual_seed(2**31 + draws * seed + draw)
            counterpart = (
                fresh()
                if fresh
                else build_model(model.name, pretrained=False, input_size=model.input_size)
            )
        altered = copy.deepcopy(model)
        for (name, stage), (_, source) in list(
            zip(_stages(altered), _stages(counterpart), strict=True)
        )[:depth]:
            stage.load_state_dict(source.state_dict())
            maps = explain(altered, images, targets, method=method, batch_size=batch_size)
            result[name] = result.get(name, 0) + rank_correlation(trained, maps) / draws
    return result


def _stages(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The body's parts that hold parameters, from the head down to the pixels."""
    body = next(
        (module.body for module in model.modules() if isinstance(module, PixelClassifier)), model
    )
    if isinstance(body, DinoClassifier):
        layers = [(f"layer{i}", layer) for i, layer in enumerate(body.backbone.encoder.layer)]
        parts = [
            ("embeddings", body.backbone.embeddings),
            *layers,
            ("layernorm", body.backbone.layernorm),
            ("head", body.head),
        ]
    else:
        parts = []
        for name, child in body.named_children():
            parts += (
                [(f"{name}{i}", block) for i, block in enumerate(child)]
                if name == "blocks"
                else [(name, child)]
            )
    return [(name, part) for name, part in reversed(parts) if any(True for _ in part.parameters())]


# --- Anatomy ----------------------------------------------------------------------------------------------------------


def anatomy_masks(images: Tensor) -> dict[str, Tensor]:
    """Regions of brain-extracted axial slices from the pixels alone, each bool (N, H, W):

    `brain` (all inside the outline), `csf` (fluid in its central part: the ventricles and the cisterns beside them),
    `rim` (a band about the outline, 3% of the width inside and 2% outside) and `background` (outside brain and rim).
    Thresholds are Otsu's, per image. An image without a brain has empty masks and is all background.
    """
    masks = [_masks_of(image) for image in images[:, 0].detach().cpu().numpy()]
    return {
        name: torch.from_numpy(np.stack([mask[name] for mask in masks])).to(images.device)
        for name in masks[0]
    }


def _masks_of(image: np.ndarray) -> dict[str, np.ndarray]:
    from scipy import ndimage

    empty = np.zeros(image.shape, dtype=bool)
    if image.max() <= image.min():
        return {"brain": empty, "csf": empty, "rim": empty, "background": ~empty}
    parts, _ = ndimage.label(image > 0.5 * _otsu(image, 1)[0])
    largest = parts == 1 + np.bincount(parts.ravel())[1:].argmax()
    closed = ndimage.binary_closing(np.pad(largest, 8), iterations=4)[
        8:-8, 8:-8
    ]  # padded: closing eats at the border
    brain = ndimage.binary_fill_holes(closed)
    inside, outside = ndimage.distance_transform_edt(brain), ndimage.distance_transform_edt(~brain)
    width = image.shape[1]
    rim = (inside <= 0.03 * width) & (outside <= 0.02 * width)
    tissue = image[inside > 0.03 * width]
    csf = (
        _central(brain, (image < _otsu(tissue, 2)[0]) & brain)
        if len(tissue) and np.ptp(tissue) > 1e-6
        else empty
    )
    return {"brain": brain, "csf": csf, "rim": rim, "background": ~(brain | rim)}


def _central(brain: np.ndarray, fluid: np.ndarray) -> np.ndarray:
    """The fluid within an ellipse about the brain's centre, without specks: sulci at the surface stay out."""
    from scipy import ndimage

    rows, columns = np.nonzero(brain)
    y, x = np.mgrid[: brain.shape[0], : brain.shape[1]]
    half_height, half_width = np.ptp(rows) / 2 + 1, np.ptp(columns) / 2 + 1
    up, across = (y - rows.min()) / half_height - 1, (x - columns.min()) / half_width - 1
    core = (up / 0.68) ** 2 + (across / 0.55) ** 2 <= 1
    parts, count = ndimage.label(ndimage.binary_opening(fluid) & core)
    size = np.bincount(parts.ravel(), minlength=count + 1)
    return (parts > 0) & (size[parts] >= 0.0007 * brain.size)


def _otsu(values: np.ndarray, thresholds: int) -> list[float]:
    """The one or two thresholds that maximise the variance between classes (Otsu 1979), on 64 bins."""
    counts, edges = np.histogram(values.astype(np.float64), bins=64)
    weight = np.concatenate([[0], np.cumsum(counts)])
    total = np.concatenate([[0], np.cumsum(counts * (edges[:-1] + edges[1:]) / 2)])

    def between(low: np.ndarray | int, high: np.ndarray | int) -> np.ndarray:
        return (total[high] - total[low]) ** 2 / np.maximum(weight[high] - weight[low], 1)

    first, second = np.triu_indices(65) if thresholds == 2 else (np.arange(65), np.full(65, 64))
    best = (between(0, first) + between(first, second) + between(second, 64)).argmax()
    return [float(edges[first[best]]), float(edges[second[best]])][:thresholds]


def anatomy_shares(maps: Tensor, masks: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Per region the share of each map's mass in it, and as `<region>_area` the region's share of the pixels, which is
    what a map that looks everywhere alike would have. Float64 (N,); NaN for a map of zeros."""
    mass = maps.double().sum(dim=(1, 2))
    shares = {}
    for name, mask in masks.items():
        shares[name] = ((maps.double() * mask).sum(dim=(1, 2)) / mass).cpu().numpy()
        shares[f"{name}_area"] = mask.double().mean(dim=(1, 2)).cpu().numpy()
    return shares


# --- Under attack -----------------------------------------------------------------------------------------------------


def map_similarity(first: Tensor, second: Tensor) -> dict[str, np.ndarray]:
    """How alike two sets of maps (N, H, W) in [0, 1] are, each float64 (N,): `ssim` (Wang et al. 2004),
    `rank_correlation` (Spearman) and `iou_top20` (of the top 20% of pixels; by chance 0.11)."""
    count = round(TOP * first[0].numel())
    # Two seeds: where a map has fewer positive pixels than that, equal zeros must not count as agreement.
    a, b = _order(first, 0) < count, _order(second, 1) < count
    iou = ((a & b).sum(dim=1) / (a | b).sum(dim=1)).cpu().numpy().astype(np.float64)
    return {
        "ssim": _ssim(first, second),
        "rank_correlation": rank_correlation(first, second),
        "iou_top20": iou,
    }


def rank_correlation(first: Tensor, second: Tensor) -> np.ndarray:
    """Spearman's correlation of each pair of maps, float64 (N,); 0 where a map is constant and so ranks nothing."""
    from scipy.stats import rankdata

    a, b = (rankdata(maps.detach().flatten(1).cpu().numpy(), axis=1) for maps in (first, second))
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    scale = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.divide((a * b).sum(axis=1), scale, out=np.zeros(len(a)), where=scale > 0)


def _ssim(first: Tensor, second: Tensor) -> np.ndarray:
    a, b = first[:, None].double(), second[:, None].double()
    mean_a, mean_b = _blur(a, 1.5), _blur(b, 1.5)
    variance_a, variance_b = _blur(a * a, 1.5) - mean_a**2, _blur(b * b, 1.5) - mean_b**2
    covariance = _blur(a * b, 1.5) - mean_a * mean_b
    index = (
        (2 * mean_a * mean_b + 0.01**2)
        * (2 * covariance + 0.03**2)
        / ((mean_a**2 + mean_b**2 + 0.01**2) * (variance_a + variance_b + 0.03**2))
    )
    return index.mean(dim=(1, 2, 3)).cpu().numpy()


def explanation_attack(
    model: nn.Module,
    images: Tensor,
    eps: float,
    *,
    steps: int = 40,
    shift: float = 0.1,
    batch_size: int = 64,
    seed: int = 0,
) -> Tensor:
    """Imperceptible changes that keep the prediction and move the Grad-CAM map away from where it lay: the top-k attack
    of Ghorbani et al. (2019, arXiv:1710.10547) with the output held as in Dombrowski et al. (2019, arXiv:1906.07983).

    Signed-gradient descent in the L-infinity ball on the share of the map in its former top 20%, plus the divergence of
    the prediction. Of all iterates that keep the class, and its probability within `shift`, the one with the smallest
    share is returned; the clean image is the first of them. The softplus of Dombrowski et al. is not needed: no ReLU
    lies between `target_layer` and the logits, so the map's gradient does not vanish.

    Returns:
        float32 (N, 1, H, W) in [0, 1], within `eps` of `images`.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = (2 * torch.rand(images.shape, generator=generator) - 1).to(images.device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_untouched(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for module in model.modules():
            if isinstance(module, DinoClassifier):
                stack.enter_context(_eager_attention(module))
        upsample = _upsampler(model, target_layer(model), images[:1].detach().clone())
        parts = [
            _move_maps(model, batch.detach().clone(), start, eps, steps, shift, upsample)
            for batch, start in zip(images.split(batch_size), noise.split(batch_size))
        ]
    return torch.cat(parts)


def _move_maps(
    model: nn.Module,
    images: Tensor,
    noise: Tensor,
    eps: float,
    steps: int,
    shift: float,
    upsample: Callable[[Tensor], Tensor],
) -> Tensor:
    logits, cam = _cam_graph(model, images, None, upsample)
    targets, clean = logits.argmax(1), logits.softmax(1).detach()
    top = (_order(cam.detach(), 0) < round(TOP * cam[0].numel())).view_as(cam)
    best, least = images.clone(), _share(cam.detach(), top)
    moved = (images + 0.1 * eps * noise).clamp(0, 1)
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        logits, cam = _cam_graph(model, moved, targets, upsample)
        share, probability = _share(cam, top), logits.softmax(1)
        with torch.no_grad():
            change = (probability - clean).gather(1, targets[:, None])[:, 0].abs()
            better = (logits.argmax(1) == targets) & (change <= shift) & (share < least)
            best[better], least[better] = moved[better], share[better]
        divergence = F.kl_div(logits.log_softmax(1), clean, reduction="none").sum(1)
        (gradient,) = torch.autograd.grad((share + divergence).sum(), moved)
        step = moved.detach() - 2.5 * eps / steps * gradient.sign()
        moved = (images + (step - images).clamp(-eps, eps)).clamp(0, 1)
    return best.detach()


def _cam_graph(
    model: nn.Module, images: Tensor, targets: Tensor | None, upsample: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Logits and Grad-CAM (N, H, W) at the images' size, before scaling, both differentiable."""
    kept: list[Tensor] = []
    if not images.requires_grad:
        images = images.detach().requires_grad_()
    hook = target_layer(model).register_forward_hook(
        lambda _module, _inputs, output: kept.append(output)
    )
    try:
        logits = model(images)
    finally:
        hook.remove()
    targets = logits.argmax(1) if targets is None else targets
    score = logits.gather(1, targets[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, kept[0], create_graph=True)
    features = kept[0]
    if reshape := _tokens_to_map(model):
        features, gradient = _above_mean(reshape(features)), reshape(gradient)
    return logits, upsample(F.relu((gradient.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1)))


def _share(cam: Tensor, region: Tensor) -> Tensor:
    """Share of each map's mass in its region, (N,); 0 for a map of zeros."""
    return (cam * region).sum(dim=(1, 2)) / cam.sum(dim=(1, 2)).clamp_min(
        torch.finfo(cam.dtype).tiny
    )


# --- The record's part ------------------------------------------------------------------------------------------------

CONTROL = " of random maps"


def explanation_measures(
    model: nn.Module,
    images: Tensor,
    *,
    methods: Sequence[str] = ("gradcam", "layercam"),
    adversarial: Mapping[str, Tensor] | None = None,
    sample: Sequence[int] | None = None,
    attack_eps: float = 4 / 255,
    batch_size: int = 64,
    seed: int = 0,
    fresh: Callable[[], nn.Module] | None = None,
) -> dict[str, np.ndarray]:
    """Every number about these explanations, slice by slice, so that folds can be pooled before intervals are made.

    Args:
        adversarial: eps as text → attacked `images`. Both maps explain the same class, the clean prediction.
        sample: rows for the dear measures (faithfulness, randomisation, the explanation attack); None takes all.

    Returns:
        `<method>:<topic>:<name>` → float64 (N,), NaN outside the sample and for a share of an empty map.
    """
    rows = (
        torch.arange(len(images)) if sample is None else torch.as_tensor(sample, dtype=torch.int64)
    )
    logits = _predict(model, images, batch_size)
    targets, masks = logits.argmax(1), anatomy_masks(images)
    measures: dict[str, np.ndarray] = {}

    def on_sample(key: str, values: np.ndarray) -> None:
        measures[key] = np.full(len(images), np.nan)
        measures[key][rows.numpy()] = values

    for eps, attacked in (adversarial or {}).items():
        kept = _predict(model, attacked, batch_size).argmax(1) == targets
        measures[f"prediction:kept:{eps}"] = kept.cpu().numpy().astype(np.float64)
    moved = explanation_attack(model, images[rows], attack_eps, batch_size=batch_size, seed=seed)
    cells = _cells(model, images[:1])
    for method in methods:
        maps = explain(model, images, targets, method=method, batch_size=batch_size)
        for name, values in anatomy_shares(maps, masks).items():
            measures[f"{method}:anatomy:{name}"] = values
        for eps, attacked in (adversarial or {}).items():
            there = explain(model, attacked, targets, method=method, batch_size=batch_size)
            for name, values in map_similarity(maps, there).items():
                measures[f"{method}:attack {eps}:{name}"] = values
        there = explain(model, moved, targets[rows], method=method, batch_size=batch_size)
        for name, values in map_similarity(maps[rows], there).items():
            on_sample(f"{method}:explanation attack:{name}", values)
        on_sample(
            f"{method}:explanation attack:eps", np.full(len(rows), attack_eps)
        )  # no similarity means anything without it
        faithful = _faithfulness(
            model, images[rows], maps[rows], targets[rows], cells, batch_size, seed
        )
        for name, values in faithful.items():
            on_sample(f"{method}:faithfulness:{name}", values)
        changed = randomisation_check(
            model, images[rows], method=method, batch_size=batch_size, seed=seed, fresh=fresh
        )
        for place, (name, values) in enumerate(changed.items()):
            on_sample(f"{method}:randomisation:{place:02d} {name}", values)
    return measures


def _faithfulness(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: Tensor,
    cells: int,
    batch_size: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Means of the deletion and insertion curves and ROAD, for the maps and for `random_maps` as coarse."""
    result = {}
    for suffix, judged in (("", maps), (CONTROL, random_maps(maps, cells, seed))):
        curves = deletion_insertion(
            model, images, judged, targets, batch_size=batch_size, seed=seed
        )
        result |= {f"{name}{suffix}": curve.mean(axis=1) for name, curve in curves.items()}
        parts = zip(*(tensor.split(batch_size) for tensor in (images, judged, targets)))
        result[f"road{suffix}"] = np.concatenate([road(model, *part, seed=seed) for part in parts])
    return result


def _cells(model: nn.Module, image: Tensor) -> int:
    """Side of the coarse grid that a map is made on."""
    with _untouched(model), torch.enable_grad():
        shape: list[int] = []
        reshape = _tokens_to_map(model) or (lambda features: features)
        hook = target_layer(model).register_forward_hook(
            lambda _m, _i, output: shape.append(reshape(output).shape[-1])
        )
        try:
            model(image)
        finally:
            hook.remove()
    return shape[0]


def explanation_record(
    measures: Mapping[str, np.ndarray], labels: np.ndarray, patients: np.ndarray
) -> dict:
    """The record's `explanation` part: `explanation_measures` (folds concatenated) as means with 95% intervals.

    Returns:
        method → topic → name → {"value", "ci", "n_slices", "n_people"}; anatomy also has `by_class`, four such entries, and
        `beyond_area`, share minus area; faithfulness has `beyond_random`, how much better the map is than the random one of
        the same slice (so above 0 is good for deletion too); `randomisation` has `passed`, whether the first stage takes the
        mean correlation under `SANITY_LIMIT`. All JSON-serialisable; a mean of nothing is null.
    """
    record: dict[str, dict] = {}
    for key, values in measures.items():
        method, topic, name = key.split(":")
        entry = _mean(values, labels, patients)
        if topic == "anatomy" and not name.endswith("_area"):
            known = ~np.isnan(values)
            entry["by_class"] = share_by_class(values[known], labels[known], patients[known])
        # Differences are made slice by slice: two intervals side by side would hide a small but constant one.
        if topic == "anatomy" and (area := measures.get(f"{key}_area")) is not None:
            entry["beyond_area"] = _mean(values - area, labels, patients)
        if topic == "faithfulness" and (control := measures.get(f"{key}{CONTROL}")) is not None:
            entry["beyond_random"] = _mean(
                control - values if name == "deletion" else values - control, labels, patients
            )
        record.setdefault(method, {}).setdefault(topic, {})[name] = entry
    for topics in record.values():
        if stages := topics.get("randomisation"):
            first = stages[min(stages)]["value"]
            topics["randomisation"] = {
                "stages": stages,
                "passed": first is not None and first < SANITY_LIMIT,
            }
    return record


def _mean(values: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> dict:
    """Mean of the finite values with its patient-clustered interval. The share of standing images is the mean of a
    flag, and `score_standing` adds up numbers as it adds up flags."""
    known = ~np.isnan(values)
    sizes = {"n_slices": int(known.sum()), "n_people": len(np.unique(patients[known]))}
    if not known.any():
        return {"value": None, "ci": None, **sizes}
    entry = score_robust(values[known], values[known], labels[known], patients[known])["accuracy"]
    return {"value": entry["value"], "ci": entry["ci"], **sizes}


# --- In words ---------------------------------------------------------------------------------------------------------

REGIONS = {
    "brain": "brain",
    "csf": "ventricles (CSF)",
    "background": "background",
    "rim": "rim of the brain's outline",
}
FAITHFUL = {"insertion": "insertion (high)", "deletion": "deletion (low)", "road": "ROAD (high)"}
SIMILARITY = {"ssim": "SSIM", "rank_correlation": "rank correlation", "iou_top20": "top-20% IoU"}
NOTHING = (
    "No explanation was measured for this unit: its weights are on another machine, or its record was made without the "
    "explanation part."
)


def explanation_text(numbers: Mapping[str, dict]) -> str:
    """`explanation_record`'s numbers as plain tables for a notebook: where the maps lie, faithfulness, both attacks and the
    randomisation check, with 95% intervals over people and n. What was not measured is named."""
    methods = _methods(numbers)
    if not methods:
        return NOTHING
    blocks = []
    for method, topics in methods.items():
        blocks += [
            _anatomy_text(method, topics.get("anatomy")),
            _faithfulness_text(method, topics.get("faithfulness")),
            _similarity_text(method, topics, numbers.get("prediction", {}).get("kept", {})),
        ]
    return "\n\n".join([*blocks, _randomisation_text(methods)])


def _methods(numbers: Mapping[str, dict]) -> dict[str, dict]:
    """The record without `prediction`, which is about the answers under attack and not about a map."""
    return {method: topics for method, topics in (numbers or {}).items() if method != "prediction"}


def _anatomy_text(method: str, anatomy: dict | None) -> str:
    title = f"{method}: where the map lies (share of its mass; a map that looks everywhere alike has the region's area)"
    if not anatomy:
        return f"{title}\nnot measured"
    rows = [["region", "all", "area", "share minus area", *CLASSES]]
    for region, words in REGIONS.items():
        entry = anatomy.get(region, {})
        by_class = entry.get("by_class", [{}] * len(CLASSES))
        rows.append(
            [
                words,
                *(
                    _shown(part)
                    for part in (
                        entry,
                        anatomy.get(f"{region}_area"),
                        entry.get("beyond_area"),
                        *by_class,
                    )
                ),
            ]
        )
    sized = next((anatomy[region] for region in REGIONS if region in anatomy), {})
    rows.append(
        [
            "n slices / n people",
            _sizes(sized),
            "",
            "",
            *(_sizes(part) for part in sized.get("by_class", [{}] * len(CLASSES))),
        ]
    )
    return f"{title}\n{_aligned(rows)}"


def _faithfulness_text(method: str, faithful: dict | None) -> str:
    title = f"{method}: faithfulness, beside random maps as coarse (the last column is paired, above 0 is better than random)"
    if not faithful:
        return f"{title}\nnot measured"
    rows = [["measure", "map", "random map", "better than random by", "n slices / n people"]]
    for name, words in FAITHFUL.items():
        entry = faithful.get(name)
        parts = (entry, faithful.get(f"{name}{CONTROL}"), (entry or {}).get("beyond_random"))
        rows.append([words, *(_shown(part, 3) for part in parts), _sizes(entry)])
    return f"{title}\n{_aligned(rows)}"


def _similarity_text(method: str, topics: dict, kept: dict) -> str:
    title = f"{method}: likeness of the clean and the attacked map of one class (1 the same; IoU by chance 0.11)"
    rows = [["attack", *SIMILARITY.values(), "prediction kept", "n slices / n people"]]
    attacks = {
        topic.removeprefix("attack "): entries
        for topic, entries in topics.items()
        if topic.startswith("attack ")
    }
    for eps, entries in attacks.items():
        rows.append(
            [
                f"on the prediction, eps {eps}",
                *(_shown(entries.get(name)) for name in SIMILARITY),
                _shown(kept.get(eps)),
                _sizes(entries.get("iou_top20")),
            ]
        )
    if not attacks:
        rows.append(["on the prediction", "not measured"])
    moved = topics.get("explanation attack")
    rows.append(
        [
            f"on the map, {_eps_of(moved)}",
            *(_shown(moved.get(name)) for name in SIMILARITY),
            "by construction",
            _sizes(moved.get("iou_top20")),
        ]
        if moved
        else ["on the map", "not measured"]
    )
    return f"{title}\n{_aligned(rows)}"


def _randomisation_text(methods: Mapping[str, dict]) -> str:
    title = f"Randomisation check: rank correlation with the map of a partly random network (must fall below {SANITY_LIMIT})"
    rows = [["method", "last layer random", "everything random", "n slices / n people", ""]]
    for method, topics in methods.items():
        stages = topics.get("randomisation", {}).get("stages")
        if not stages:
            rows.append(
                [method, "not measured", "", "", "UNKNOWN: not checked against a random layer"]
            )
            continue
        first, last = stages[min(stages)], stages[max(stages)]
        rows.append(
            [
                method,
                _shown(first),
                _shown(last) if len(stages) > 1 else "not measured",
                _sizes(first),
                _mark(method, first),
            ]
        )
    return f"{title}\n{_aligned(rows)}"


def _mark(method: str, first: dict) -> str:
    if first["value"] is None:
        return "UNKNOWN: no map to compare"
    if first["value"] < SANITY_LIMIT:
        return (
            "ok"
            if first["ci"][1] < SANITY_LIMIT
            else "ok on average, but the interval reaches the limit"
        )
    reason = " (rollout never reads that layer)" if method == "rollout" else ""
    return f"FAILS: this map hardly changes when the last layer is random{reason}: do not read it as evidence"


def planted_text(model: str, path: Path | str = ROOT / "assets" / "planted_evidence.json") -> str:
    """How well this backbone's maps find evidence whose place is known, as a table and one sentence for a notebook.

    The record is of phantom images and random weights (`tests/benchmarks/planted_evidence.py`): what it says is about the
    method on this architecture, not about a model of the study.
    """
    record = read_json(path) if Path(path).is_file() else {"backbones": {}}
    rows = record["backbones"].get(model.removesuffix("_atk"), [])
    if not rows:
        return "Planted evidence: not measured for this backbone (`python tests/benchmarks/planted_evidence.py`)."
    limit, methods = record["limit"], list(rows[0]["inside"])
    table = [
        ["trained", "on images", "side", "cells a side", "around the patch", "accuracy", *methods]
    ]
    for row in rows:
        seen = (
            f"{row['tokens_trained_on']:,} + {row['trained_on']:,}"
            if row["tokens_trained_on"]
            else f"{row['trained_on']:,}"
        )
        table.append(
            [
                row["training"],
                seen,
                f"{row['side']} px",
                str(row["cells"]),
                "noise" if row["noise"] else "grey",
                f"{row['accuracy']:.2f}",
                *(
                    _shown(row["inside"][method])
                    + (f", {empty} empty" if (empty := row["inside"][method]["empty"]) else "")
                    for method in methods
                ),
            ]
        )
    trainings = dict.fromkeys(row["training"] for row in rows)
    verdict = " ".join(
        _planted_verdict([row for row in rows if row["training"] == training], methods, limit)
        for training in trainings
    )
    return (
        f"Planted evidence (phantom, random init): share of a map inside the patch that alone decides the class, limit {limit:.2f}, "
        f"{rows[0]['area']:.2f} for an even map, 0 for an empty one; n = {rows[0]['inside'][methods[0]]['n']} images a "
        f"row\n{_aligned(table)}\n{verdict}"
    )


def _planted_verdict(rows: Sequence[dict], methods: Sequence[str], limit: float) -> str:
    """What the rows of one way of training say about where such a network's map is bright."""
    kept = [
        row["cells"]
        for row in rows
        if row["accuracy"] > 0.9
        and min(row["inside"][method]["value"] for method in methods) >= limit
    ]
    if rows[0]["training"] != "whole":
        return "Where the patch tokens first learned what lies under them, " + (
            "the limit is kept: this kind of map finds evidence that stays in its token. A network that learns everything from the "
            "class, as "
            "the models of this study that start from random weights do, may move it to other tokens."
            if len(kept) == len(rows)
            else "the limit is not kept either."
        )
    if not kept:
        return "No row trained whole keeps the limit: the bright part of such a network's map need not be where its evidence is."
    if len(kept) == len(rows):
        return "Every row keeps the limit: a map of this network is bright where its evidence is."
    return (
        f"The limit is kept from {min(kept)} cells a side on: the map is bright where the evidence is, but no finer than a cell and "
        f"its neighbours. A slice of 128 px has {rows[0]['cells']} cells a side."
    )


def explanation_conclusion(numbers: Mapping[str, dict]) -> str:
    """What may and what may not be concluded from the maps, in plain words for the closing cell.

    Every line follows from one number and its 95% interval, and cites both. A line whose interval holds both answers, or
    whose number is missing, stands under "undecided"; one that rests on fewer than `FEW_PEOPLE` people is called a hint.
    """
    methods = _methods(numbers)
    if not methods:
        return NOTHING
    lines: dict[str, list[str]] = {"may": [], "may not": [], "undecided": []}
    for method, topics in methods.items():
        trust = [
            _about_faithfulness(topics.get("faithfulness", {})),
            _about_randomisation(topics.get("randomisation", {})),
        ]
        places = _about_anatomy(
            topics.get("anatomy", {}), trusted=all(heading == "may" for heading, _ in trust)
        )
        verdicts = [
            *trust,
            *places,
            *_about_attacks(topics),
            _about_the_map_attack(topics),
            _about_patients(topics),
        ]
        for heading, words in verdicts:
            lines[heading].append(f"- {method}: {words}")
    titles = {
        "may": "What may be concluded",
        "may not": "What may not be concluded",
        "undecided": "Undecided by these numbers",
    }
    empty = {
        "may": "- nothing",
        "may not": "- no limit was found by these measures",
        "undecided": "- nothing",
    }
    return "\n\n".join(
        "\n".join([titles[heading], *(found or [empty[heading]])])
        for heading, found in lines.items()
    )


Verdict = tuple[str, str]


def _about_faithfulness(faithful: dict) -> Verdict:
    gains = {name: faithful.get(name, {}).get("beyond_random") for name in FAITHFUL}
    if any(gain is None or gain["value"] is None for gain in gains.values()):
        return (
            "undecided",
            "whether it shows what the model uses: faithfulness was not measured slice by slice against random maps.",
        )
    cited = {
        name: f"{name.upper() if name == 'road' else name} {_signed(gain)}"
        for name, gain in gains.items()
    }
    above = [cited[name] for name, gain in gains.items() if gain["ci"][0] > 0]
    rest = [cited[name] for name, gain in gains.items() if gain["ci"][0] <= 0]
    hint = _hint(gains["insertion"])
    if not rest:
        return (
            "may",
            f"the pixels it marks matter to the answer more than those of a random map: better by {', '.join(above)}{hint}.",
        )
    but = f" (though it is by {', '.join(above)})" if above else ""
    return (
        "may not",
        f"it does not show what the model uses: not better than a random map by {', '.join(rest)}{but}{hint}.",
    )


def _about_randomisation(check: dict) -> Verdict:
    stages = check.get("stages")
    first = stages[min(stages)] if stages else {"value": None}
    if first["value"] is None:
        return (
            "undecided",
            "whether it depends on what was learned: not checked against a random last layer.",
        )
    cited = f"rank correlation {_shown(first)}, limit {SANITY_LIMIT}{_hint(first)}"
    if first["value"] >= SANITY_LIMIT:
        return (
            "may not",
            f"it hardly changes when the last layer is random ({cited}): it is no evidence of what the model learned.",
        )
    if first["ci"][1] >= SANITY_LIMIT:
        return (
            "undecided",
            f"it changes on average when the last layer is random, but the interval reaches the limit ({cited}).",
        )
    return (
        "may",
        f"it depends on what the last layer learned: with a random one it is another map ({cited}).",
    )


def _about_anatomy(anatomy: dict, *, trusted: bool) -> list[Verdict]:
    """Where the map lies is a fact about a picture; only a map that passed both other checks makes it one about the model."""
    verdicts = []
    only = (
        ""
        if trusted
        else ": so lies the picture; what the model uses does not follow, for the map did not pass both checks above"
    )
    for region, words in REGIONS.items():
        entry = anatomy.get(region, {})
        beyond, area = entry.get("beyond_area"), anatomy.get(f"{region}_area", {})
        if beyond is None or beyond["value"] is None:
            verdicts.append(
                (
                    "undecided",
                    f"how much of it lies in the {words}: not measured against the region's area.",
                )
            )
            continue
        cited = f"share {_shown(entry)}, area {area['value']:.2f}, difference {_signed(beyond, 2)}{_hint(beyond)}"
        inside = region in ("brain", "csf")
        if abs(beyond["value"]) < NOTABLE and not beyond["ci"][0] <= 0 <= beyond["ci"][1]:
            verdicts.append(
                (
                    "may not",
                    f"it has no preference for or against the {words} worth naming: under {NOTABLE} ({cited}).",
                )
            )
        elif beyond["ci"][0] > 0:
            verdicts.append(
                ("may" if trusted else "may not", f"it favours the {words} ({cited}){only}.")
                if inside
                else (
                    "may not",
                    f"it must not be read as anatomy alone: it favours the {words} ({cited}).",
                )
            )
        elif beyond["ci"][1] < 0:
            verdicts.append(
                (
                    "may not",
                    f"it does not point at the {words}: it has less there than an even map ({cited}).",
                )
                if inside
                else ("may" if trusted else "may not", f"it avoids the {words} ({cited}){only}.")
            )
        else:
            verdicts.append(("undecided", f"whether it favours or avoids the {words} ({cited})."))
    return verdicts


def _about_attacks(topics: dict) -> list[Verdict]:
    verdicts = []
    for topic, entries in topics.items():
        if topic.startswith("attack "):
            verdicts.append(
                _about_likeness(
                    entries.get("iou_top20"),
                    f"an attack on the prediction at eps {topic.removeprefix('attack ')}",
                )
            )
    return verdicts or [
        ("undecided", "whether it is stable under attacks on the prediction: not measured.")
    ]


def _about_the_map_attack(topics: dict) -> Verdict:
    moved = topics.get("explanation attack", {})
    return _about_likeness(
        moved.get("iou_top20"),
        f"an attack on the map itself that keeps the answer ({_eps_of(moved)})",
    )


def _about_likeness(entry: dict | None, attack: str) -> Verdict:
    if entry is None or entry["value"] is None:
        return "undecided", f"whether it survives {attack}: not measured."
    cited = f"top-20% IoU {_shown(entry)}, alike from {ALIKE}{_hint(entry)}"
    if entry["ci"][1] < ALIKE:
        return "may not", f"it is unstable: {attack} moves most of its top ({cited})."
    if entry["ci"][0] >= ALIKE:
        return "may", f"it stays where it was under {attack} ({cited})."
    return "undecided", f"whether it survives {attack} ({cited})."


def _about_patients(topics: dict) -> Verdict:
    entries = {
        region: entry
        for region in REGIONS
        if (entry := topics.get("anatomy", {}).get(region)) and entry["value"] is not None
    }
    if not entries:
        return "undecided", "where it lies: no share of a region was measured."
    region = max(entries, key=lambda name: entries[name]["ci"][1] - entries[name]["ci"][0])
    entry = entries[region]
    width = entry["ci"][1] - entry["ci"][0]
    cited = f"{entry['n_people']} people, widest interval {width:.2f} ({REGIONS[region]}, {_shown(entry)})"
    if entry["n_people"] < FEW_PATIENTS or width > WIDE:
        return (
            "may not",
            f"nothing about patients in general: too few people or too wide ({cited}).",
        )
    return (
        "may",
        f"its place is known to within {width:.2f} of its mass for people like these ({cited}).",
    )


def _hint(entry: dict) -> str:
    return (
        f"; a hint only, n = {entry['n_people']} people" if entry["n_people"] < FEW_PATIENTS else ""
    )


def _eps_of(moved: dict | None) -> str:
    value = (moved or {}).get("eps", {}).get("value")
    return "eps not in the record" if value is None else f"eps {round(255 * value, 2):g}/255"


def _shown(entry: dict | None, digits: int = 2) -> str:
    if not entry or entry.get("value") is None:
        return "none" if entry and entry.get("n_slices") == 0 else "not measured"
    low, high = entry["ci"]
    return f"{entry['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _signed(entry: dict, digits: int = 3) -> str:
    low, high = entry["ci"]
    return f"{entry['value']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _sizes(entry: dict | None) -> str:
    return f"{entry['n_slices']} / {entry['n_people']}" if entry else "not measured"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    columns = max(map(len, rows))
    filled = [[*row, *[""] * (columns - len(row))] for row in rows]
    widths = [max(len(row[place]) for row in filled) for place in range(columns)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in filled
    )


# --- Figures ----------------------------------------------------------------------------------------------------------


def overlay_figure(
    images: Tensor,
    maps: Tensor,
    predictions: Tensor | np.ndarray,
    labels: Sequence[int] | Tensor,
    *,
    title: str = "",
    map_name: str = "Grad-CAM",
) -> Figure:
    """One column a slice; rows: image, map, overlay. Above each the true and the predicted class with its probability.

    Args:
        predictions: class probabilities (N, 4).
    """
    count = len(images)
    figure = Figure(figsize=(1.75 * count + 0.9, 6.2 if title else 5.9), layout="constrained")
    axes = figure.subplots(3, count, squeeze=False)
    for column, (image, heat) in enumerate(zip(_numpy(images[:, 0]), _numpy(maps))):
        for row, shown in enumerate((image, heat, _blend(image, heat))):
            _draw(axes[row, column], shown, "magma" if row == 1 else "gray")
        axes[0, column].set_title(_caption(labels[column], predictions[column]), fontsize=9)
    for row, name in enumerate(("image", map_name, "overlay")):
        axes[row, 0].set_ylabel(name, fontsize=10)
    _colour_bar(figure, axes)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def comparison_figure(
    rows: Mapping[str, tuple[Tensor, Tensor, Tensor | np.ndarray]],
    labels: Sequence[int] | Tensor,
    *,
    title: str = "",
) -> Figure:
    """The same slices for all models: one row a model, and for each slice the image, its map and the overlay.

    Args:
        rows: row name, such as "Resnet_atk", → images (N, 1, H, W), maps (N, H, W), class probabilities (N, 4).
    """
    count = len(labels)
    figure = Figure(figsize=(1.15 * 3 * count + 1.6, 1.45 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), 3 * count, squeeze=False)
    for line, (name, (images, maps, predictions)) in zip(axes, rows.items()):
        for slice_, (image, heat) in enumerate(zip(_numpy(images[:, 0]), _numpy(maps))):
            for place, shown in enumerate((image, heat, _blend(image, heat))):
                _draw(line[3 * slice_ + place], shown, "magma" if place == 1 else "gray")
            line[3 * slice_ + 1].set_title(
                _caption(labels[slice_], predictions[slice_], one_line=True), fontsize=8
            )
        line[0].set_ylabel(name, fontsize=9)
    _colour_bar(figure, axes)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def patient_strip(
    images: Tensor,
    maps: Tensor,
    predictions: Tensor | np.ndarray,
    label: int,
    *,
    columns: int = 8,
    title: str = "",
) -> Figure:
    """Overlays of one person's slices in body order, 0 the most superior, above each class's probability by slice."""
    count, height = len(images), -(-len(images) // columns)
    figure = Figure(figsize=(1.2 * columns + 1, 1.2 * height + 2.3), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.2 * height + 0.3, 2])
    axes = above.subplots(height, columns, squeeze=False)
    for place, axis in enumerate(axes.flat):
        axis.axis("off")
        if place < count:
            axis.imshow(_blend(_numpy(images[place, 0]), _numpy(maps[place])), vmin=0, vmax=1)
            axis.text(
                0.04,
                0.96,
                str(place),
                color="white",
                fontsize=8,
                va="top",
                transform=axis.transAxes,
            )
    _colour_bar(above, axes)
    curves = below.subplots()
    for class_, (name, colour) in enumerate(
        zip(CLASSES, ("#0072B2", "#E69F00", "#009E73", "#CC79A7"))
    ):
        curves.plot(
            _numpy(predictions)[:, class_],
            color=colour,
            marker=".",
            linewidth=2.2 if class_ == label else 1.0,
            label=f"{name} (true)" if class_ == label else name,
        )
    curves.set(xlabel="slice, from superior to inferior", ylabel="probability")
    curves.set(xlim=(-0.5, count - 0.5), ylim=(-0.02, 1.02))
    curves.spines[["top", "right"]].set_visible(False)
    curves.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def patient_gif(
    images: Tensor,
    maps: Tensor,
    path: Path | str,
    *,
    side: int = 160,
    colours: int = 64,
    seconds: float = 0.18,
) -> Path:
    """Writes a looping GIF of one person's slices in body order, image beside overlay."""
    from PIL import Image

    pairs = [
        np.hstack([np.repeat(image[..., None], 3, axis=2), _blend(image, heat)])
        for image, heat in zip(_numpy(images[:, 0]), _numpy(maps))
    ]
    frames = [
        Image.fromarray((pair * 255).round().astype(np.uint8)).resize(
            (2 * side, side), Image.Resampling.BICUBIC
        )
        for pair in pairs
    ]
    # One palette, taken from all frames: a palette for each would flicker and cost more bytes.
    together = Image.new("RGB", (2 * side, side * len(frames)))
    for place, frame in enumerate(frames):
        together.paste(frame, (0, side * place))
    palette = together.quantize(colours, dither=Image.Dither.NONE)
    indexed = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    with atomic_path(path) as temporary:
        indexed[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=indexed[1:],
            duration=round(1000 * seconds),
            loop=0,
            optimize=True,
        )
    return Path(path)


def _blend(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """The map over the image, RGB in [0, 1]: opaque where the map is high, so that anatomy stays visible elsewhere."""
    opacity = 0.65 * heat[..., None]
    return ((1 - opacity) * image[..., None] + opacity * colormaps["magma"](heat)[..., :3]).clip(
        0, 1
    )


def _draw(axis, shown: np.ndarray, colours: str) -> None:
    axis.imshow(shown, cmap=colours, vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _caption(
    label: int | Tensor, probabilities: Tensor | np.ndarray, *, one_line: bool = False
) -> str:
    chosen = int(_numpy(probabilities).argmax())
    mark = "✓" if chosen == int(label) else "✗"
    gap = ", " if one_line else "\n"
    return f"true {CLASSES[int(label)]}{gap}{mark} {CLASSES[chosen]} {float(probabilities[chosen]):.2f}"


def _colour_bar(figure, axes: np.ndarray) -> None:
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(cmap="magma"), ax=axes, fraction=0.02, pad=0.01, aspect=35)
    bar.set_label("evidence for the explained class\n(share of the map's maximum)", fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _numpy(values: Tensor | np.ndarray) -> np.ndarray:
    return (
        values.detach().float().cpu().numpy()
        if isinstance(values, Tensor)
        else np.asarray(values, dtype=np.float32)
    )
