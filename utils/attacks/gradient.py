"""Attacks that follow the gradient of a loss: FGSM, PGD and their relatives."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from utils.attacks.ascent import with_restarts
from utils.attacks.base import ATTACKS, Loss, count_classes, image_axes, register, succeeded
from utils.attacks.steps import (
    attack_objective,
    nearest_classes,
    pixel_gradient,
    project,
    start_at_random,
)


@register("noise", kind="control", targeted=False)
def noise(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
) -> Tensor:
    """Uniform noise in the eps ball: the control that any attack must be stronger than."""
    return start_at_random(images, eps, "linf", seed)


@register("fgsm")
def fgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
) -> Tensor:
    """One step of length eps along the sign of the cross-entropy's gradient (Goodfellow et al.
    2015, arXiv:1412.6572); towards `targets` where they are given.

    An image whose gradient is zero everywhere gets random signs: it is attacked all the same, and
    the evaluation reports the missing gradient.
    """
    objective = functools.partial(attack_objective, labels=labels, targets=targets, loss="ce")
    gradient, _ = pixel_gradient(model, images, objective)
    no_gradient = (gradient == 0).flatten(1).all(1)
    at_random = start_at_random(images, eps, "linf", seed) - images
    direction = torch.where(image_axes(no_gradient), at_random, gradient).sign()
    return project(images + eps * direction, images, eps, "linf")


@register("fgsm_targeted")
def fgsm_targeted(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
) -> Tensor:
    """FGSM towards `targets`; without them towards each other class, keeping the step that went
    furthest."""
    attack = functools.partial(fgsm.unguarded, seed=seed)
    return _towards_each_class(attack, model, images, labels, eps, targets)


def _towards_each_class(
    attack: Callable[..., Tensor],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    targets: Tensor | None,
) -> Tensor:
    """A targeted attack towards `targets`, or on the images that are still robust towards every
    other class in turn, the nearest first."""
    if targets is not None:
        return attack(model, images, labels, eps, targets=targets)
    adversarial, distance = images.clone(), torch.full_like(labels, torch.inf, dtype=torch.float32)
    done = succeeded(model, images, labels)[1]
    for aim in nearest_classes(model, images, labels)[0].unbind(1):
        rows = (~done).nonzero().squeeze(1)
        if not len(rows):
            break
        found = attack(model, images[rows], labels[rows], eps, targets=aim[rows])
        remaining, success = succeeded(model, found, labels[rows])
        better = success | (remaining < distance[rows])
        adversarial[rows[better]], distance[rows[better]] = found[better], remaining[better]
        done[rows[success]] = True
    return adversarial


@register("ifgsm")
def ifgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 10,
    step_size: float | None = None,
    loss: Loss = "ce",
) -> Tensor:
    """Iterative FGSM, also called BIM (Kurakin et al. 2017, arXiv:1607.02533): PGD from the image
    itself, without a random start. Towards `targets` where they are given."""
    return with_restarts(
        model,
        images,
        labels,
        eps,
        steps=steps,
        seed=seed,
        targets=targets,
        step_size=step_size,
        loss=loss,
        random_start=False,
    )


ATTACKS["bim"] = ifgsm


@register("ifgsm_targeted")
def ifgsm_targeted(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 10,
    step_size: float | None = None,
) -> Tensor:
    """Iterative FGSM towards `targets`; without them towards each other class in turn."""
    attack = functools.partial(ifgsm.unguarded, seed=seed, steps=steps, step_size=step_size)
    return _towards_each_class(attack, model, images, labels, eps, targets)


@register("mifgsm")
def mifgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 10,
    step_size: float | None = None,
    momentum: float = 1.0,
    loss: Loss = "ce",
) -> Tensor:
    """Momentum iterative FGSM (Dong et al. 2018, arXiv:1710.06081), whose images transfer better
    between models."""
    return with_restarts(
        model,
        images,
        labels,
        eps,
        steps=steps,
        seed=seed,
        targets=targets,
        step_size=step_size,
        loss=loss,
        random_start=False,
        momentum=momentum,
    )


@register("pgd")
def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 20,
    restarts: int = 1,
    step_size: float | None = None,
    loss: Loss = "ce",
    random_start: bool = True,
    push: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Projected gradient descent (Madry et al. 2018, arXiv:1706.06083), keeping the best iterate:
    any successful one counts, and ends the search for its image. Towards `targets` where they are
    given.

    Args:
        step_size: None takes 2.5·eps/steps, so that the ball's edge is in reach from any start.
        loss: `ce`, or `margin`, which ascends towards the nearest other class (at each restart the
            next nearest).
        push: go on after success to the lowest margin, as an attack on a rank statistic such as
            AUROC has to.
        mask: 1 where a pixel may change.
    """
    return with_restarts(
        model,
        images,
        labels,
        eps,
        steps=steps,
        seed=seed,
        targets=targets,
        attempts=restarts,
        step_size=step_size,
        loss=loss,
        random_start=random_start,
        push=push,
        mask=mask,
    )


@register("pgd_targeted")
def pgd_targeted(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 20,
    restarts: int = 1,
    step_size: float | None = None,
) -> Tensor:
    """PGD towards `targets`, where success means hitting them; without them towards each other
    class in turn, the nearest first, where any wrong answer is a success (multi-targeted, Gowal et
    al. 2019, arXiv:1910.09338)."""
    attempts = restarts if targets is not None else restarts * (count_classes(model, images) - 1)
    return with_restarts(
        model,
        images,
        labels,
        eps,
        steps=steps,
        seed=seed,
        targets=targets,
        attempts=attempts,
        step_size=step_size,
        loss="margin",
    )


@register("pgd_clinical", targeted=False)
def pgd_clinical(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 20,
    restarts: int = 1,
) -> Tensor:
    """PGD towards the clinically worst answer: Mild and Moderate made Non, Non and Very mild made
    Moderate."""
    return pgd_targeted.unguarded(
        model,
        images,
        labels,
        eps,
        seed=seed,
        steps=steps,
        restarts=restarts,
        targets=clinical_targets(labels, count_classes(model, images)),
    )


def clinical_targets(labels: Tensor, classes: int = 4) -> Tensor:
    """The clinically worst answers (N,): class 0 (Non) for the sicker half of the classes, the
    highest class for the healthier half."""
    return torch.where(2 * labels >= classes, 0, classes - 1)


@register("pgd_l2", norm="l2")
def pgd_l2(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 20,
    restarts: int = 1,
    step_size: float | None = None,
    loss: Loss = "margin",
) -> Tensor:
    """PGD in the Euclidean norm (Madry et al. 2018): steps along the gradient itself instead of its
    sign."""
    return with_restarts(
        model,
        images,
        labels,
        eps,
        steps=steps,
        seed=seed,
        targets=targets,
        attempts=restarts,
        step_size=step_size,
        norm="l2",
        loss=loss,
    )
