"""AutoAttack and its parts, by their authors' code (package `pyautoattack`)."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from utils.attacks.base import count_classes, register
from utils.attacks.steps import noise_where_unchanged


class _AtLeastFour(nn.Module):
    """A model's logits with further classes below them until there are four, since the targeted
    difference-of-logits-ratio loss reads the four highest. They are too low ever to be a target."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        missing = 4 - logits.shape[1]
        if missing <= 0:
            return logits
        below = torch.arange(1, missing + 1, device=logits.device, dtype=logits.dtype)
        return torch.cat([logits, logits.amin(1, keepdim=True) - below], dim=1)


@register("apgd_ce", package="pyautoattack", targeted=False)
def apgd_ce(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 100,
    restarts: int = 1,
) -> Tensor:
    """Auto-PGD on the cross-entropy (Croce and Hein 2020, arXiv:2003.01690), official code."""
    from pyautoattack.autopgd_base import APGDAttack

    attack = APGDAttack(
        model,
        n_iter=steps,
        n_restarts=restarts,
        eps=eps,
        loss="ce",
        seed=seed,
        device=images.device,
    )
    found = attack.perturb(images, labels)
    return noise_where_unchanged(found, model, images, labels, eps, seed)


@register("apgd_t", package="pyautoattack", targeted=False)
def apgd_t(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 100,
    restarts: int = 1,
) -> Tensor:
    """Auto-PGD on the targeted difference-of-logits ratio, towards each other class (Croce and Hein
    2020, arXiv:2003.01690), official code with as many targets as there are other classes."""
    from pyautoattack.autopgd_base import APGDAttack_targeted

    attack = APGDAttack_targeted(
        _AtLeastFour(model),
        n_iter=steps,
        n_restarts=restarts,
        eps=eps,
        seed=seed,
        n_target_classes=count_classes(model, images) - 1,
        device=images.device,
    )
    found = attack.perturb(images, labels)
    return noise_where_unchanged(found, model, images, labels, eps, seed)


@register("square", kind="black-box", package="pyautoattack", targeted=False)
def square(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    queries: int = 5000,
) -> Tensor:
    """Square Attack, a random search that needs only the logits (Andriushchenko et al. 2020,
    arXiv:1912.00049), official code with AutoAttack's settings."""
    from pyautoattack.square import SquareAttack

    attack = SquareAttack(
        model,
        p_init=0.8,
        n_queries=queries,
        eps=eps,
        seed=seed,
        resc_schedule=False,
        device=images.device,
    )
    found = attack.perturb(images, labels)
    return noise_where_unchanged(found, model, images, labels, eps, seed)


@register("autoattack", package="pyautoattack", targeted=False)
def autoattack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    batch: int = 64,
) -> Tensor:
    """Official AutoAttack `standard` in L-infinity: APGD-CE, APGD-T, FAB-T and Square, 100 steps
    and 5,000 queries (Croce and Hein 2020, arXiv:2003.01690), set to the model's number of classes
    (its default of ten fails with four)."""
    from pyautoattack import AutoAttack

    tracer = sys.gettrace()
    try:
        attack = AutoAttack(
            _AtLeastFour(model),
            norm="Linf",
            eps=eps,
            version="standard",
            seed=seed,
            device=images.device,
        )
        other_classes = count_classes(model, images) - 1
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = other_classes
        adversarial = attack.run_standard_evaluation(images, labels, batch_size=batch)[0]
    finally:
        # Its check for adaptive models switches off the tracer of coverage or of a debugger.
        sys.settrace(tracer)
    return noise_where_unchanged(adversarial, model, images, labels, eps, seed)
