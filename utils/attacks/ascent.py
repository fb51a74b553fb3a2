"""Projected gradient ascent over many steps, and several of them from different starts."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from utils.attacks.base import (
    Loss,
    Norm,
    distance_to_success,
    image_axes,
    mask_of_rows,
    select_rows,
)
from utils.attacks.steps import (
    attack_objective,
    nearest_classes,
    pixel_gradient,
    project,
    start_at_random,
    steepest_ascent,
)


def ascend(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    start: Tensor,
    *,
    steps: int,
    step_size: float,
    targets: Tensor | None = None,
    norm: Norm = "linf",
    loss: Loss = "ce",
    momentum: float | None = None,
    mask: Tensor | None = None,
    push: bool = False,
    aim: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Projected gradient ascent from `start`, keeping each image's best iterate.

    An image leaves the batch at its first success, so that later steps cost only the images that
    are still robust; with `push` all images stay and go on to the lowest margin.

    Args:
        targets: int64 (N,); success means hitting them (None: any wrong answer).
        aim: int64 (N,), classes to ascend towards while any wrong answer is a success.
        momentum: decay of the accumulated gradient (None: no accumulation).
        mask: 1 where a pixel may change, broadcastable to `images`.

    Returns:
        Best iterate (N, C, H, W), its distance to success (N,), and whether it succeeded (N,).
    """
    goals = targets if aim is None else aim
    best, distance = start.clone(), torch.full_like(labels, torch.inf, dtype=torch.float32)
    done = torch.zeros_like(labels).bool()
    # `rows`: the images still in the batch; `current` and `velocity` hold these alone.
    rows, current = torch.arange(len(images), device=images.device), start
    velocity = None if momentum is None else torch.zeros_like(images)
    for step in range(steps + 1):
        truth, wanted = labels[rows], select_rows(targets, rows)
        if step < steps:
            objective = functools.partial(
                attack_objective, labels=truth, targets=select_rows(goals, rows), loss=loss
            )
            gradient, logits = pixel_gradient(model, current, objective)
        else:
            with torch.no_grad():
                logits = model(current).float()
        remaining, success = distance_to_success(logits, truth, wanted)
        better = (success & ~done[rows]) | (remaining < distance[rows])
        if step == 0 and start is images:
            # The image itself is no iterate: where no step helps, the best step is returned all the
            # same. A wrong answer to it ends the search, but not with `push`, where the model that
            # is evaluated may be another one than `model`.
            better = success & (not push)
        best[rows[better]], distance[rows[better]] = current[better], remaining[better]
        done[rows[success]] = True
        if step == steps:
            break
        if not push and bool(success.any()):
            stay = ~success
            rows, current, gradient = rows[stay], current[stay], gradient[stay]
            velocity = select_rows(velocity, stay)
            if not len(rows):
                break
        if momentum is not None and velocity is not None:
            scale = gradient.flatten(1).abs().mean(1).clamp_min(1e-20)
            gradient = velocity = momentum * velocity + gradient / image_axes(scale)
        if mask is not None:
            gradient = gradient * mask_of_rows(mask, rows)
        moved = current + step_size * steepest_ascent(gradient, norm)
        current = project(moved, images[rows], eps, norm)
    return best, distance, done


def with_restarts(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    steps: int,
    seed: int,
    targets: Tensor | None = None,
    attempts: int = 1,
    step_size: float | None = None,
    norm: Norm = "linf",
    loss: Loss = "ce",
    random_start: bool = True,
    momentum: float | None = None,
    mask: Tensor | None = None,
    push: bool = False,
) -> Tensor:
    """`attempts` ascents, each on the images that are robust to all those before it.

    With a margin loss and no targets, the k-th ascends towards the k-th nearest class. The other
    arguments are those of `ascend`.

    Args:
        seed: of the random starts, each ascent with another one.
        step_size: None takes 2.5·eps/steps, so that the ball's edge is in reach from any start.
        random_start: False starts at the image itself.

    Returns:
        Each image's best iterate over all ascents (N, C, H, W).
    """
    aims = None
    if loss == "margin" and targets is None:
        aims, logits = nearest_classes(model, images, labels, norm)
    else:
        with torch.no_grad():
            logits = model(images).float()
    adversarial = images.clone()
    distance, done = distance_to_success(logits, labels, targets)
    if not push:
        # A correctly classified image never comes back unchanged: its best *iterate* does.
        distance = torch.full_like(distance, torch.inf)
    for attempt in range(attempts):
        if push:
            rows = torch.arange(len(images), device=images.device)
        else:
            rows = (~done).nonzero().squeeze(1)
        if not len(rows):
            break
        part, part_mask = images[rows], None if mask is None else mask_of_rows(mask, rows)
        start = start_at_random(part, eps, norm, seed + 1009 * attempt) if random_start else part
        if part_mask is not None:
            start = torch.where(part_mask > 0, start, part)
        found, remaining, success = ascend(
            model,
            part,
            labels[rows],
            eps,
            start,
            steps=steps,
            step_size=step_size or 2.5 * eps / steps,
            targets=select_rows(targets, rows),
            norm=norm,
            loss=loss,
            momentum=momentum,
            mask=part_mask,
            push=push,
            aim=None if aims is None else aims[rows, attempt % aims.shape[1]],
        )
        better = (success & ~done[rows]) | (remaining < distance[rows])
        adversarial[rows[better]], distance[rows[better]] = found[better], remaining[better]
        done[rows[success]] = True
    return adversarial
