"""How fast which parameter learns: frozen layers, learning rates, weight decay, eps over time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch

from utils.backbones import PixelClassifier
from utils.config import RunConfig


def layer_numbers(model: PixelClassifier) -> dict[str, int]:
    """Parameter name → its layer, 0 at the input and highest at the head, by timm's grouping.

    A layer is a transformer block (DINOv2) or a stage of a convolutional network; what normalizes
    after the last block belongs to it.
    """
    from timm.models import group_parameters  # takes seconds to import

    matcher = cast(Callable[..., dict], model.body.group_matcher)
    numbers = group_parameters(model.body, matcher(coarse=True), reverse=True)
    return {f"body.{name}": number for name, number in numbers.items()}


def freeze_lower_layers(model: PixelClassifier, fine_tune: str) -> None:
    """Freezes what `RunConfig.fine_tune` leaves out, and unfreezes the rest.

    Args:
        fine_tune: `full` trains everything, `last_block` the last layer before the head and the
            head, `head` the head alone.
    """
    numbers = layer_numbers(model)
    top = max(numbers.values())
    lowest = {"full": 0, "last_block": top - 1, "head": top}[fine_tune]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(numbers[name] >= lowest)


def parameter_groups(model: PixelClassifier, config: RunConfig) -> list[dict]:
    """The parameters that learn, grouped by learning rate and weight decay.

    Biases and the parameters of norms (all with one dimension) do not decay. `layer_decay`
    multiplies the learning rate of DINOv2 once a block downwards (Clark et al. 2020,
    arXiv:2003.10555).

    Returns:
        For the optimizer: {"params", "weight_decay", "scale": factor on the learning rate}.
    """
    numbers = layer_numbers(model)
    top = max(numbers.values())
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        weight_decay = 0.0 if parameter.ndim < 2 else config.weight_decay
        scale = 1.0
        if config.backbone == "Dinov2":
            # The embedding counts as two layers. timm's `param_groups_layer_decay` counts it as
            # one, so its groups would train other weights.
            below_head = top - numbers[name] + (numbers[name] == 0)
            scale = config.layer_decay**below_head
        group = groups.setdefault(
            (scale, weight_decay), {"params": [], "weight_decay": weight_decay, "scale": scale}
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(
    groups: list[dict], config: RunConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum, over the groups of `parameter_groups`."""
    fused = device.type in ("cpu", "cuda")
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, config.lr, fused=fused)
    return torch.optim.SGD(groups, config.lr, momentum=0.9, nesterov=True, fused=fused)


def learning_rate(config: RunConfig, epochs_done: float) -> float:
    """Factor on `lr` after so many epochs: linear warm-up, then a cosine to 0, or constant."""
    if epochs_done < config.warmup_epochs:
        return max(epochs_done / config.warmup_epochs, 1e-3)
    if config.schedule == "constant":
        return 1.0
    after_warmup = max(config.epochs - config.warmup_epochs, 1e-9)
    done = (epochs_done - config.warmup_epochs) / after_warmup
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def curriculum(config: RunConfig, epochs_done: float) -> float:
    """eps after so many epochs.

    It grows from 0 to `train_eps` over the first `eps_ramp` of the epochs and then stays.
    """
    ramp = config.eps_ramp * config.epochs
    return config.train_eps * (min(1.0, epochs_done / ramp) if ramp > 0 else 1.0)
