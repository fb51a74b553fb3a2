"""Attacks that use a model's answers, or the gradient of another model, instead of its gradient."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from utils.attacks.ascent import ascend
from utils.attacks.base import (
    count_classes,
    distance_to_success,
    register,
    select_rows,
    untouched_model,
)
from utils.attacks.steps import noise_where_unchanged, project, start_at_random


@register("few_pixel", norm="l0", kind="black-box", gray=True)
def few_pixel(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    pixels: int = 5,
    generations: int = 30,
    population: int = 40,
) -> Tensor:
    """Changes a few pixels by at most eps each (1: any value), found by differential evolution on
    the logits alone (Su, Vargas and Sakurai 2019, arXiv:1710.08864), for all images at once."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(images.device)

    genes = draw(len(images), population, pixels, 3)  # row, column, new value, each in [0, 1)
    fitness = _pixel_fitness(model, images, labels, targets, eps, genes)
    for _ in range(generations):
        rows = (fitness.amin(1) >= 0).nonzero().squeeze(1)
        if not len(rows):
            break
        partners = draw(len(rows), population, population).argsort(2)[:, :, :3]
        first, second, third = (genes[rows[:, None], partners[:, :, k]] for k in range(3))
        children = (first + 0.5 * (second - third)) % 1.0
        score = _pixel_fitness(
            model, images[rows], labels[rows], select_rows(targets, rows), eps, children
        )
        better = score < fitness[rows]
        genes[rows] = torch.where(better[:, :, None, None], children, genes[rows])
        fitness[rows] = torch.where(better, score, fitness[rows])
    best = genes[torch.arange(len(images), device=images.device), fitness.argmin(1)]
    return _with_pixels(images, best[:, None], eps)[:, 0]


@register("one_pixel", norm="l0", kind="black-box", gray=True)
def one_pixel(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    generations: int = 30,
    population: int = 40,
) -> Tensor:
    """One pixel changed by at most eps (1: any value), by differential evolution (Su et al. 2019,
    arXiv:1710.08864)."""
    return few_pixel.unguarded(
        model,
        images,
        labels,
        eps,
        seed=seed,
        targets=targets,
        pixels=1,
        generations=generations,
        population=population,
    )


def _with_pixels(images: Tensor, genes: Tensor, eps: float) -> Tensor:
    """Images (N, P, 1, H, W) with the pixels of each candidate changed; genes (N, P, pixels, 3) in
    [0, 1) are row, column and new value."""
    (count, candidates), (height, width) = genes.shape[:2], images.shape[-2:]
    changed = images[:, None].expand(-1, candidates, -1, -1, -1).clone()
    flat = changed.view(count, candidates, -1)
    place = (genes[..., 0] * height).long() * width + (genes[..., 1] * width).long()
    old = images.flatten(1)[:, None].expand(-1, candidates, -1).gather(2, place)
    new = torch.minimum(torch.maximum(genes[..., 2], old - eps), old + eps).clamp(0.0, 1.0)
    flat.scatter_(2, place, new)
    return changed


def _pixel_fitness(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    eps: float,
    genes: Tensor,
) -> Tensor:
    """Distance to success of each candidate (N, P): negative if it succeeds, else at least 0."""
    candidates = genes.shape[1]
    changed = _with_pixels(images, genes, eps).flatten(0, 1)
    repeated = None if targets is None else targets.repeat_interleave(candidates)
    with torch.no_grad():
        logits = torch.cat([model(part) for part in changed.split(256)]).float()
    distance, success = distance_to_success(logits, labels.repeat_interleave(candidates), repeated)
    return torch.where(success, distance.clamp_max(-1e-6), distance.clamp_min(0.0)).view(
        -1, candidates
    )


@register("hopskipjump", kind="black-box", package="adversarial-robustness-toolbox")
def hopskipjump(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 10,
    evaluations: int = 1000,
) -> Tensor:
    """HopSkipJump, which sees the model's decision alone (Chen, Jordan and Wainwright 2020,
    arXiv:1904.02144), by the Adversarial Robustness Toolbox. What it finds beyond eps is projected
    onto the ball."""
    from art.attacks.evasion import HopSkipJump
    from art.estimators.classification import BlackBoxClassifierNeuralNetwork

    def answers(batch: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.as_tensor(batch).to(images)).float().cpu().numpy()

    # The toolbox draws from the global random state, which the guard restores.
    np.random.seed(seed % 2**32)
    classes, aims = count_classes(model, images), labels if targets is None else targets
    starts, rows = _adversarial_starts(model, images, labels, targets, seed)
    found = start_at_random(images, eps, "linf", seed)
    if len(rows):
        oracle = BlackBoxClassifierNeuralNetwork(
            answers, images.shape[1:], classes, channels_first=True, clip_values=(0.0, 1.0)
        )
        attack = HopSkipJump(
            oracle,
            targeted=targets is not None,
            norm=np.inf,
            max_iter=steps,
            max_eval=evaluations,
            init_eval=min(100, evaluations),
            init_size=1,
            verbose=False,
        )
        made = attack.generate(
            images[rows].cpu().numpy(),
            y=np.eye(classes, dtype=np.float32)[aims[rows].cpu().numpy()],
            x_adv_init=starts.cpu().numpy(),
        )
        found[rows] = project(torch.as_tensor(made).to(images), images[rows], eps, "linf")
    return noise_where_unchanged(found, model, images, labels, eps, seed)


def _adversarial_starts(
    model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None, seed: int
) -> tuple[Tensor, Tensor]:
    """Where a decision-based attack starts, because the toolbox draws its starts without a seed.

    Returns:
        The nearest image of the batch, or of 64 images of noise, that the model already answers as
        the attacker wants (R, 1, H, W), and the rows that have one, int64 (R,).
    """
    generator = torch.Generator().manual_seed(seed)
    pool = torch.cat([images, torch.rand(64, *images.shape[1:], generator=generator).to(images)])
    with torch.no_grad():
        given = torch.cat([model(part).float().argmax(1) for part in pool.split(256)])
    useful = given != labels[:, None] if targets is None else given == targets[:, None]
    distance = torch.cdist(images.flatten(1), pool.flatten(1)).masked_fill(~useful, torch.inf)
    rows = useful.any(1).nonzero().squeeze(1)
    return pool[distance[rows].argmin(1)], rows


@register("transfer", kind="transfer")
def transfer(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    source: nn.Module,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 20,
) -> Tensor:
    """Images made against `source`, another model, by momentum PGD that goes on after success (Dong
    et al. 2018, arXiv:1710.06081), without the gradient of `model`."""
    with untouched_model(source):
        return ascend(
            source,
            images,
            labels,
            eps,
            images,
            steps=steps,
            step_size=2.5 * eps / steps,
            targets=targets,
            momentum=1.0,
            push=True,
        )[0]
