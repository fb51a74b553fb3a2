"""Attacks that search for the smallest perturbation: DeepFool, FAB."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from utils.attacks.base import (
    Norm,
    count_classes,
    distance_to_success,
    image_axes,
    perturbation_size,
    register,
    select_rows,
    succeeded,
    untouched_model,
)
from utils.attacks.steps import class_gaps, noise_where_unchanged, project


@register("deepfool", norm="l2")
def deepfool(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 50,
    overshoot: float = 0.02,
) -> Tensor:
    """Minimal Euclidean perturbation by repeated linearization (Moosavi-Dezfooli et al. 2016,
    arXiv:1511.04599), shortened to the boundary by bisection. Where the nearest adversarial image
    found is beyond eps, its projection onto the ball is returned. Towards `targets` where they are
    given."""
    nearest = _deepfool(model, images, labels, targets, steps, overshoot)
    return project(nearest, images, eps, "l2")


def _deepfool(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    steps: int,
    overshoot: float,
) -> Tensor:
    """Nearest adversarial images that DeepFool finds, at any distance."""
    current = images.clone()
    done = torch.zeros_like(labels).bool()
    for _ in range(steps):
        rows = (~done).nonzero().squeeze(1)
        if not len(rows):
            break
        classes, gaps, slopes, logits = class_gaps(model, current[rows], labels[rows])
        success = distance_to_success(logits, labels[rows], select_rows(targets, rows))[1]
        done[rows[success]] = True
        left = ~success
        rows, classes, gaps, slopes = rows[left], classes[left], gaps[left].abs(), slopes[left]
        length = slopes.flatten(2).norm(dim=2).clamp_min(1e-12)
        if targets is None:
            chosen = (gaps / length).argmin(1)
        else:
            chosen = (classes == targets[rows, None]).int().argmax(1)
        at = torch.arange(len(rows), device=rows.device), chosen
        step = -slopes[at] * image_axes((gaps[at] + 1e-6) / length[at] ** 2)
        current[rows] = (current[rows] + (1 + overshoot) * step).clamp(0.0, 1.0)
    return _bisect(model, images, current, labels, targets)


def _bisect(
    model: nn.Module,
    images: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    halvings: int = 10,
) -> Tensor:
    """The point nearest to `images` on the line to `adversarial` that is still adversarial, by
    bisection."""
    low = torch.zeros(len(images), device=images.device)
    high = torch.ones(len(images), device=images.device)
    for _ in range(halvings):
        middle = (low + high) / 2
        between = images + image_axes(middle) * (adversarial - images)
        success = succeeded(model, between, labels, targets)[1]
        low, high = torch.where(success, low, middle), torch.where(success, middle, high)
    return (images + image_axes(high) * (adversarial - images)).clamp(0.0, 1.0)


@register("fab_t", package="pyautoattack", targeted=False)
def fab_t(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 100,
) -> Tensor:
    """FAB-T, minimal perturbation towards each other class (Croce and Hein 2020, arXiv:1907.02044),
    official code. Where the nearest adversarial image found is beyond eps, its projection onto the
    ball is returned."""
    nearest = nearest_adversarial(
        model, images, labels, norm="linf", steps=steps, seed=seed, eps=eps
    )
    found = project(nearest, images, eps, "linf")
    return noise_where_unchanged(found, model, images, labels, eps, seed)


def nearest_adversarial(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    norm: Norm = "linf",
    steps: int = 100,
    seed: int = 0,
    eps: float | None = None,
) -> Tensor:
    """Nearest adversarial images that official FAB-T finds at any distance (N, 1, H, W); unchanged
    where it finds none, and for clean errors.

    The loop over target classes is this repository's own, because the official one discards what it
    found beyond eps.

    Args:
        eps: an image is done once it is misclassified within eps, as in AutoAttack (None: once it
            is misclassified at all, every other class having been tried).
    """
    from pyautoattack.fab_pt import FABAttack_PT

    norms = {"linf": "Linf", "l2": "L2"}
    with untouched_model(model):
        fab = FABAttack_PT(
            model,
            norm=norms[norm],
            n_iter=steps,
            eps=eps or 1.0,
            seed=seed,
            targeted=True,
            device=images.device,
        )
        adversarial = images.clone()
        distance = torch.full_like(labels, torch.inf, dtype=torch.float32)
        distance[succeeded(model, images, labels)[1]] = 0.0
        torch.manual_seed(seed)
        for rank in range(2, count_classes(model, images) + 1):
            rows = (distance > (eps or 0.0)).nonzero().squeeze(1)
            if not len(rows):
                break
            fab.target_class = rank
            found = fab.attack_single_run(
                images[rows], labels[rows], use_rand_start=False, is_targeted=True
            )
            size = perturbation_size(images[rows], found, norm)
            better = succeeded(model, found, labels[rows])[1] & (size < distance[rows])
            adversarial[rows[better]], distance[rows[better]] = found[better], size[better]
    return adversarial.detach()
