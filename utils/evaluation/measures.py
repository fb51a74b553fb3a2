"""What single attacks measure: accuracy by eps, transfer, smallest perturbations, directions,
convergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.attacks.base import ATTACKS, Norm, perturbation_size
from utils.attacks.minimal import nearest_adversarial
from utils.config import RunConfig, parse_eps
from utils.evaluation.batches import BATCH_SEED
from utils.evaluation.plan import headline_of
from utils.evaluation.predictions import (
    as_pixels,
    misclassified,
    stratified_sample,
    worst_case,
)
from utils.evaluation.suite import SuiteResult
from utils.prediction import device_of, predict
from utils.utils_funcs import CLASSES, progress


def accuracy_curves(
    result: SuiteResult, labels: np.ndarray, view: str = "four", norm: Norm = "linf"
) -> dict[str, np.ndarray]:
    """Which images are robust at each eps, eps ascending, of the attacks run at every eps.

    Returns:
        Attack → bool (eps, N), and `worst_case` over all attacks. An image that is misclassified at
        a smaller eps, whose ball is inside the larger ones, counts as misclassified at the larger:
        no curve rises.
    """
    keys = [key for key in result.logits if result.meta[key]["norm"] == norm]
    sweep = sorted({eps_text for eps_text, _ in keys}, key=parse_eps)
    robust = {
        name: [~misclassified(result.logits[eps, name], labels, view) for eps in sweep]
        for name in dict.fromkeys(name for _, name in keys)
        if all((eps, name) in result.logits for eps in sweep)
    }
    chosen = {key: result.logits[key] for key in keys}
    right = ~misclassified(result.clean_logits, labels, view)
    robust["worst_case"] = [right & worst_case(chosen, labels, eps, view) for eps in sweep]
    return {
        name: np.logical_and.accumulate(np.stack(flags), axis=0) for name, flags in robust.items()
    }


def transfer_matrix(
    models: Mapping[str, nn.Module],
    images_uint8: np.ndarray | Tensor,
    labels: np.ndarray,
    eps: float,
    *,
    steps: int = 20,
    batch: int = 64,
    seed: int = 0,
) -> np.ndarray:
    """Which images each target model is robust against that were made on each source model, bool
    (source, target, N), in the order of `models`. The diagonal is momentum PGD on the model
    itself."""
    pixels, truth, members = as_pixels(images_uint8), np.asarray(labels), list(models.values())
    robust = np.zeros((len(members), len(members), len(pixels)), bool)
    for row, source in enumerate(progress(members, "transfer")):
        made = attack_images(
            source,
            pixels,
            truth,
            "transfer",
            eps,
            batch=batch,
            seed=seed,
            source=source,
            steps=steps,
        )
        for column, target in enumerate(members):
            logits = predict(target, made, batch_size=batch).numpy()
            robust[row, column] = ~misclassified(logits, truth)
    return robust


def attack_images(
    model: nn.Module,
    pixels: Tensor,
    labels: np.ndarray,
    attack: str,
    eps: float,
    /,
    *,
    batch: int = 64,
    seed: int = 0,
    targets: np.ndarray | None = None,
    **budget: Any,
) -> Tensor:
    """Adversarial images float32 (N, 1, H, W) of a registered attack, on the CPU, made batch by
    batch, each with a seed of its own.

    Args:
        pixels: float32 in [0, 1].
        labels, targets: int64 (N,).
        attack: name in `utils.attacks.ATTACKS`.
    """
    device, made = device_of(model), []
    for start in range(0, len(pixels), batch):
        part = slice(start, start + batch)
        made.append(
            ATTACKS[attack](
                model,
                pixels[part].to(device),
                torch.as_tensor(labels[part]).to(device),
                eps,
                seed=seed + BATCH_SEED * start,
                targets=None if targets is None else torch.as_tensor(targets[part]).to(device),
                **budget,
            ).cpu()
        )
    return torch.cat(made)


def minimal_perturbations(
    model: nn.Module,
    images_uint8: np.ndarray | Tensor,
    labels: np.ndarray,
    *,
    norm: Norm = "linf",
    steps: int = 50,
    batch: int = 64,
    seed: int = 0,
) -> np.ndarray:
    """Size of the smallest adversarial perturbation that FAB-T finds for each image, float32 (N,),
    where the range of pixels is 1: an upper bound on the true one. 0 for clean errors, infinite
    where none is found."""
    pixels, device, sizes = as_pixels(images_uint8), device_of(model), []
    truths = torch.as_tensor(np.asarray(labels))
    for images, truth in zip(pixels.split(batch), truths.split(batch), strict=True):
        found = nearest_adversarial(
            model, images.to(device), truth.to(device), norm=norm, steps=steps, seed=seed
        ).cpu()
        success = predict(model, found, batch_size=batch).argmax(1) != truth
        sizes.append(torch.where(success, perturbation_size(images, found, norm), torch.inf))
    return torch.cat(sizes).numpy()


def direction_success(
    model: nn.Module,
    images_uint8: np.ndarray | Tensor,
    labels: np.ndarray,
    eps: float,
    *,
    steps: int = 20,
    batch: int = 64,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Whether PGD can move the answer below the truth (`healthier`) and above it (`sicker`): 1 or 0
    for each image, NaN where there is no such class (Non cannot be made healthier), float (N,)."""
    pixels, truth = as_pixels(images_uint8), np.asarray(labels).astype(np.int64)
    success = {}
    for direction, step in (("healthier", -1), ("sicker", 1)):
        moved = np.where((truth + step >= 0) & (truth + step < len(CLASSES)), 0.0, np.nan)
        for distance in range(1, len(CLASSES)):
            target = truth + step * distance
            rows = np.flatnonzero((moved == 0) & (target >= 0) & (target < len(CLASSES)))
            if not len(rows):
                break
            made = attack_images(
                model,
                pixels[rows],
                truth[rows],
                "pgd_targeted",
                eps,
                batch=batch,
                seed=seed,
                targets=target[rows],
                steps=steps,
            )
            answers = predict(model, made, batch_size=batch).argmax(1).numpy()
            moved[rows[(answers - truth[rows]) * step > 0]] = 1.0
        success[direction] = moved
    return success


def pgd_convergence(
    model: nn.Module,
    images_uint8: np.ndarray | Tensor,
    labels: np.ndarray,
    eps: float,
    *,
    steps: Sequence[int] = (1, 2, 5, 10, 20, 50),
    restarts: Sequence[int] = (1, 2, 5),
    restart_steps: int = 20,
    batch: int = 64,
    seed: int = 0,
) -> dict[tuple[str, int], np.ndarray]:
    """Which images are robust against PGD with each number of steps, and with each number of
    restarts of `restart_steps` steps: bool (N,) under `("steps", k)` and `("restarts", k)`."""
    pixels, truth = as_pixels(images_uint8), np.asarray(labels)
    budgets: dict[tuple[str, int], dict[str, Any]] = {
        ("steps", count): {"steps": count} for count in steps
    }
    budgets |= {
        ("restarts", count): {"steps": restart_steps, "restarts": count} for count in restarts
    }
    robust = {}
    for key, budget in budgets.items():
        made = attack_images(
            model, pixels, truth, "pgd", eps, batch=batch, seed=seed, loss="margin", **budget
        )
        robust[key] = ~misclassified(predict(model, made, batch_size=batch).numpy(), truth)
    return robust


def sample_measures(
    model: nn.Module,
    images_uint8: np.ndarray | Tensor,
    labels: np.ndarray,
    patients: np.ndarray,
    config: RunConfig,
) -> dict:
    """What robust accuracy does not say, on the fixed stratified sample, at the headline eps and
    with four classes, as JSON.

    Returns:
        `rows`, the sample's numbers among the images given; `minimal_linf`, the smallest
        perturbation found for each (None: none was found); `healthier` and `sicker`, whether PGD
        can move the answer there (None: no such class); `convergence`, whether each image is robust
        (`standing`) against PGD of growing budgets; and `eps` and `pgd_steps`.
    """
    rows, eps_text = stratified_sample(labels, patients, config.sample), headline_of(config)
    eps = parse_eps(eps_text)
    given = (model, torch.as_tensor(images_uint8)[torch.as_tensor(rows)], np.asarray(labels)[rows])
    options: dict[str, Any] = {"batch": config.attack_batch, "seed": config.seed}
    sizes = minimal_perturbations(*given, steps=20, **options)
    directions = direction_success(*given, eps, steps=config.pgd_steps, **options)
    converged = pgd_convergence(*given, eps, restart_steps=config.pgd_steps, **options)
    return {
        "eps": eps_text,
        "pgd_steps": config.pgd_steps,
        "rows": rows.tolist(),
        "minimal_linf": _finite_or_none(sizes),
        **{name: _finite_or_none(success) for name, success in directions.items()},
        "convergence": [
            {"kind": kind, "count": count, "standing": robust.tolist()}
            for (kind, count), robust in converged.items()
        ],
    }


def _finite_or_none(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
