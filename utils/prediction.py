"""Logits of many images, batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from utils.data import pixels
from utils.model_state import frozen


def predict(
    model: nn.Module,
    images: Tensor,
    device: torch.device | str | None = None,
    batch_size: int = 128,
) -> Tensor:
    """Float32 logits (N, C) on the CPU, of the model in evaluation mode; its modes are kept.

    Args:
        images: (N, 1, H, W), uint8, or floating in [0, 1].
        device: where the model is (None: where its first parameter or buffer is).
    """
    if device is None:
        device = device_of(model)
    with torch.no_grad(), frozen(model):
        return torch.cat(
            [model(pixels(part, device)).float().cpu() for part in images.split(batch_size)]
        )


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer is; the CPU for a model without any."""
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
