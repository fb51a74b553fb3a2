"""PGD without checks and bookkeeping, for the inner maximization of adversarial training."""

from __future__ import annotations

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.attacks.base import unsaturated_cross_entropy
from utils.attacks.steps import pixel_gradient, project
from utils.model_state import frozen


def perturb_for_training(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    steps: int,
    loss: Literal["ce", "kl"] = "ce",
    step_size: float | None = None,
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """PGD for the inner maximization of adversarial training: the last iterate, without any checks.

    The caller sets the model's mode and autocast; in training mode BatchNorm statistics see every
    iterate. Give the plain module, not a distributed wrapper around it.

    Args:
        steps: 1 with `step_size = 1.25 * eps` is the fast single-step method (Wong et al. 2020,
            arXiv:2001.03994).
        loss: `ce` for PGD adversarial training (Madry et al. 2018, arXiv:1706.06083); `kl` for
            TRADES (Zhang et al. 2019, arXiv:1901.08573), the divergence from the clean answer,
            where the label is not used.
        step_size: None takes eps for one step, else 2.5·eps/steps.
        generator: of the random start, on the images' device (None: the global one).
    """
    if eps == 0 or steps == 0:
        return images.detach()
    images = images.detach()
    step_size = step_size or (eps if steps == 1 else 2.5 * eps / steps)
    with frozen(model, eval_mode=False):
        if loss == "kl":
            with torch.no_grad():
                clean = model(images).float().softmax(1)

            def objective(logits: Tensor) -> Tensor:
                return F.kl_div(logits.log_softmax(1), clean, reduction="sum")
        else:
            objective = functools.partial(unsaturated_cross_entropy, labels=labels)
        current = images
        if random_start:
            start = torch.empty_like(images).uniform_(-eps, eps, generator=generator)
            current = (images + start).clamp(0.0, 1.0)
        for _ in range(steps):
            gradient, _ = pixel_gradient(model, current, objective)
            current = project(current + step_size * gradient.sign(), images, eps, "linf")
    return current
