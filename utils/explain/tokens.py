"""DINOv2's tokens: as a feature map, and as attention rollout."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from utils.backbones import DinoClassifier, PixelClassifier
from utils.utils_funcs import UserError

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedModel

#: Feature maps (N, C, h, w).
Features = TypeVar("Features", np.ndarray, Tensor)


def map_from_tokens(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """`feature_map_of_tokens` for a model that holds a DINOv2; None for a convolutional one, whose
    layers give feature maps."""
    holds_dino = any(isinstance(module, DinoClassifier) for module in model.modules())
    return feature_map_of_tokens if holds_dino else None


def feature_map_of_tokens(tokens: Tensor) -> Tensor:
    """DINOv2's tokens (N, 1 + h·h, C) as a feature map (N, C, h, h), without the CLS token."""
    patches = tokens[:, 1:]
    side = round(patches.shape[1] ** 0.5)  # `PixelClassifier` feeds squares
    return patches.reshape(len(tokens), side, side, -1).permute(0, 3, 1, 2)


def above_mean(features: Features) -> Features:
    """Feature maps (N, C, h, w) minus each channel's mean over the places of one image.

    A class activation map adds up weighted activations as if each said how much of a feature is
    there. After a ReLU it does. A token's channels have either sign and share a large part with
    every other token's, which says nothing about any place.
    """
    if isinstance(features, Tensor):
        return features - features.mean(dim=(2, 3), keepdim=True)
    return features - features.mean(axis=(2, 3), keepdims=True)


def attention_rollout(model: nn.Module, images: Tensor) -> Tensor:
    """Coarse maps (N, h, w) of images (N, 1, H, W), on the CPU, each with its minimum at 0.

    The product of the layers' attention matrices, half of each the skip connection (Abnar and
    Zuidema 2020, arXiv:2005.00928), read where the head reads: half at the CLS token, half at the
    mean of the patch tokens.
    """
    wrapper, dino = find_dino(model)
    with torch.no_grad(), _attention_matrices(dino) as layers:
        dino.backbone(pixel_values=wrapper.pixels_to_input(images))
        read = torch.zeros(len(images), 1, layers[0].shape[-1], device=images.device)
        read[:, :, 0] = 0.5
        read[:, :, 1:] = 0.5 / (layers[0].shape[-1] - 1)
        # One row from the last layer down is cheaper than the product of the matrices.
        for attention in reversed(layers):
            read = 0.5 * read @ attention.mean(1) + 0.5 * read
    coarse = feature_map_of_tokens(read.transpose(1, 2))[:, 0]
    # The minimum goes, as in grad-cam's maps: every place has a large share that says nothing.
    return (coarse - coarse.amin(dim=(-2, -1), keepdim=True)).cpu()


def find_dino(model: nn.Module) -> tuple[PixelClassifier, DinoClassifier]:
    """The pixel classifier inside `model` whose body is a DINOv2, and that body.

    Raises:
        UserError: there is none.
    """
    for module in model.modules():
        if isinstance(module, PixelClassifier) and isinstance(module.body, DinoClassifier):
            return module, module.body
    raise UserError(
        "Attention rollout needs attention matrices: of these backbones only DINOv2 has them."
    )


@contextlib.contextmanager
def eager_attention(dino: DinoClassifier) -> Iterator[None]:
    """The plain implementation of attention inside the block: only this one returns its matrices
    and can be differentiated twice."""
    backbone = cast("PreTrainedModel", dino.backbone)
    before = backbone.config._attn_implementation
    backbone.set_attn_implementation("eager")
    try:
        yield
    finally:
        backbone.set_attn_implementation(before)


@contextlib.contextmanager
def _attention_matrices(dino: DinoClassifier) -> Iterator[list[Tensor]]:
    """A list to which every forward pass inside the block adds each layer's attention,
    (N, heads, tokens, tokens).

    `output_attentions=True` gives the same, but its first call leaves hooks in the network.
    """
    from transformers.models.dinov2.modeling_dinov2 import Dinov2Attention

    matrices: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: matrices.append(output[1]))
        for module in dino.modules()
        if isinstance(module, Dinov2Attention)
    ]
    try:
        with eager_attention(dino):
            yield matrices
    finally:
        for hook in hooks:
            hook.remove()
