"""Where the cells of a coarse map lie in the image."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from utils.backbones import DinoClassifier, PixelClassifier
from utils.explain.tokens import map_from_tokens
from utils.model_state import frozen
from utils.utils_funcs import UserError


def target_layer(model: nn.Module) -> nn.Module:
    """The layer whose maps are explained: the last feature map before pooling of a convolutional
    backbone; for DINOv2 the last block's `norm1`, the last place where every patch token still has
    a path to the CLS token.

    Raises:
        UserError: the model has no convolution.
    """
    body = body_of(model)
    if isinstance(body, DinoClassifier):
        *_, last_block = body.get_submodule("backbone.encoder.layer").children()
        return last_block.get_submodule("norm1")
    if hasattr(body, "layer4"):
        *_, last_block = body.get_submodule("layer4").children()
        return last_block
    if hasattr(body, "conv_head"):
        if hasattr(body, "bn2"):
            # timm keeps the normalization and activation after `conv_head` in here
            return body.get_submodule("bn2")
        # MobileNetV3 pools before `conv_head`.
        *_, last_block = body.get_submodule("blocks").children()
        return last_block
    convolutions = [module for module in body.modules() if isinstance(module, nn.Conv2d)]
    if not convolutions:
        raise UserError(f"{type(body).__name__} has no feature map to explain: name the layer.")
    return convolutions[-1]


def body_of(model: nn.Module) -> nn.Module:
    """The network inside the first `PixelClassifier` of `model`; the model where it holds none."""
    classifier = pixel_classifier_of(model)
    return model if classifier is None else classifier.body


def pixel_classifier_of(model: nn.Module) -> PixelClassifier | None:
    """The first `PixelClassifier` in `model`, which may be the model itself."""
    return next((part for part in model.modules() if isinstance(part, PixelClassifier)), None)


def grid_side(model: nn.Module, image: Tensor) -> int:
    """Cells on one side of the coarse grid that a map of this image (1, 1, H, W) is made on."""
    reshape = map_from_tokens(model) or (lambda features: features)
    sides: list[int] = []

    def keep_side(_module: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> None:
        sides.append(reshape(output).shape[-1])

    with frozen(model), torch.no_grad(), _hooks([target_layer(model)], keep_side):
        model(image)
    return sides[0]


def upsampler(model: nn.Module, layer: nn.Module, image: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from coarse maps (N, h, w) of `layer` to the resolution of `image` (1, 1, H, W):
    linear between the places where the cells look.

    A strided convolution with a symmetric border centers cell i on pixel i·stride, not on the
    middle of a tile. Stretching the map over the image, as grad-cam and most figures do, moves
    everything by half a cell: 16 of 128 px in ResNet-34 and EfficientNet-B0. DINOv2's patches are
    tiles, which stretching leaves in place.
    """
    first, stride, seen = _cell_geometry(model, layer, image)
    native = image.shape[-2:]

    def matrix(pixels: int, width: int, cells: int) -> Tensor:
        """Weights (pixels, cells) of linear interpolation along one side."""
        if -(-width // round(stride)) == cells:
            at = ((torch.arange(pixels) + 0.5) * width / pixels - 0.5 - first) / stride
        else:  # something that is no convolution or pooling module shrank the map: assume tiles
            at = (torch.arange(pixels) + 0.5) * cells / pixels - 0.5
        distance = (at.clamp(0, cells - 1)[:, None] - torch.arange(cells)).abs()
        return (1 - distance).clamp_min(0).to(image.device)

    def upsample(maps: Tensor) -> Tensor:
        vertical, horizontal = (matrix(native[i], seen[i], maps.shape[1 + i]) for i in (0, 1))
        return vertical @ maps @ horizontal.T

    return upsample


def _cell_geometry(
    model: nn.Module, layer: nn.Module, image: Tensor
) -> tuple[float, float, torch.Size]:
    """Where the cells of the layer's map look, followed through one forward pass.

    Returns:
        (center of cell 0, distance between cells, (height, width) of the input that the first
        convolution sees), all in pixels of that input.
    """
    first, stride = 0.0, 1.0
    sizes: list[torch.Size] = []  # of the maps on the main path, from the input on
    reached = False

    def follow(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal first, stride
        if not sizes:
            sizes.append(inputs[0].shape[-2:])
        shortcut = inputs[0].shape[-2:] != sizes[-1]  # parallel to the main path: counted
        if shortcut or reached:
            return
        kernel, step, border, gap = (
            value if isinstance(value := getattr(module, name, 1), int) else value[0]
            for name in ("kernel_size", "stride", "padding", "dilation")
        )
        first += ((kernel - 1) * gap / 2 - border) * stride
        stride *= step
        sizes.append(output.shape[-2:])

    def stop(_module: nn.Module, _inputs: tuple[Tensor], _output: Tensor) -> None:
        nonlocal reached
        reached = True

    kinds = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    followed = [module for module in model.modules() if isinstance(module, kinds)]
    with torch.no_grad(), _hooks(followed, follow), _hooks([layer], stop):
        model(image)
    return first, stride, sizes[0] if sizes else image.shape[-2:]


@contextlib.contextmanager
def _hooks(modules: Iterable[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    """The forward hook on every module inside the block."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
