"""Raw pixels → logits: a network with its preprocessing inside."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.pixel_range import pixel_fault
from utils.utils_funcs import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Body(Protocol):
    """What a network offers besides `forward`, under the names that timm's models give it."""

    def forward_features(self, inputs: Tensor) -> Tensor:
        """Feature maps or tokens, before pooling, from normalized images (N, 3, S, S)."""
        ...

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (N, 4) of such features, or (`pre_logits`) what the linear layer sees (N, D)."""
        ...

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names, layer by layer, for `timm.models.group_parameters`."""
        ...


class PixelClassifier(nn.Module):
    """A network with its preprocessing inside: raw pixels → logits.

    It resizes, repeats the channel three times and normalizes differentiably, so that an attack
    perturbs what the data set delivers (one channel, native resolution).

    Input float32 (N, 1, H, W) in [0, 1]; output (N, 4) logits.

    Args:
        body: a network that follows `Body`.
        name: one of `MODELS`.
        init: which weights it started from: `imagenet1k`, `lvd142m` or `random`.
        input_size: side in pixels that the body sees (None: the images' size).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Module, *, name: str, init: str, input_size: int | None) -> None:
        super().__init__()
        self.body, self.name, self.init, self.input_size = body, name, init, input_size
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def pixels_to_input(self, images: Tensor) -> Tensor:
        """What the body sees: normalized images (N, 3, S, S), S the input size."""
        if images.ndim != 4 or images.shape[1] != 1:
            raise UserError(
                "The model takes images of shape (N, 1, H, W) in [0, 1], not "
                f"{tuple(images.shape)}."
            )
        if not self.training and (fault := pixel_fault(images)):  # training makes its own pixels
            raise UserError(f"The model's {fault}.")
        side = self.input_size
        if side and images.shape[-2:] != (side, side):
            images = F.interpolate(
                images,
                size=(side, side),
                mode="bilinear",
                align_corners=False,
                antialias=images.shape[-1] > side,
            )
        return (images.expand(-1, 3, -1, -1) - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 4)."""
        return self.body(self.pixels_to_input(images))

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features (N, D): what the linear head sees."""
        body = cast(Body, self.body)
        features = body.forward_features(self.pixels_to_input(images))
        return body.forward_head(features, pre_logits=True)
