"""The attack stage of sequence models: every view of a scan's decision attacked to the end,
slice-budget curves, checks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from utils import data, sequence
from utils.config import RunConfig, parse_eps
from utils.evaluation.plan import VIEWS
from utils.evaluation.predictions import model_digest
from utils.pipeline.store import read_arrays, write_arrays
from utils.utils_funcs import CLASSES, atomic_path, choose_device, progress

#: The decision that the slice-budget curves count: the headline's.
CURVE_VIEW = "three"
#: Raised when the same settings would give other numbers: results of older code are then not taken.
SCAN_STATE = 2
#: Raised when slice-budget curves after the same attacks would come out otherwise: they alone are
#: measured again.
CURVE_STATE = 1
#: Number of classes of each view.
VIEW_CLASSES = {
    view: len(groups) if groups else len(CLASSES) for view, (groups, _) in VIEWS.items()
}
#: Settings of a budget that do not change what the attacks find.
_OTHER_SETTINGS = ("train", "validation", "test")


def attacked_scans(
    model: sequence.ScanModel,
    scans: sequence.Scans,
    chosen: np.ndarray,
    curve: np.ndarray,
    config: RunConfig,
    budget: dict,
    path: Path,
    variant: str,
) -> dict[str, np.ndarray]:
    """Attacks the scans of the `chosen` patients; the result is kept on disk with everything that
    it depends on.

    Args:
        scans: of every test patient.
        chosen, curve: rows of `scans` that are attacked, and of those the ones whose slice-budget
            curves are measured.
        budget: an entry of `utils.pipeline.scans.SCAN_BUDGETS`.
        path: of the `.npz` file that keeps the result; the aggregator's weights are written next to
            it.

    Returns:
        "<eps>:<attack>" → logits (len(chosen), 4); "<eps>:rounds_<view>" → (rounds, 3) of steps,
        patients robust before and robust after; "least_<choice>" → the least number of slices that
        flips each patient of `curve`.
    """
    identity = _identity(model, scans, chosen, curve, config, budget)
    found = read_arrays(path)
    if not ("identity" in found and np.array_equal(found["identity"], identity)):
        found = {}
    if found.get("curve_state", 0) == CURVE_STATE:
        return found
    part, device = scans.pick(chosen), choose_device()
    given = model, data.pixels(part.values, device), part.mask.to(device), part.labels.to(device)
    if not found:
        found = {"identity": identity}
        seeds = part.patients.numpy() + config.seed
        strongest: dict[str, Tensor] = {}
        for eps in progress(budget["eps"], f"attack on scans, {variant}"):
            for view in VIEWS:
                found |= attacked_in_view(given, eps, view, budget, seeds, strongest)
    rows = np.searchsorted(chosen, curve)
    worst = _worst_in_view(found, budget["eps"][-1], CURVE_VIEW, part.labels)[rows]
    picked = torch.from_numpy(rows).to(device)
    few = model, given[1][picked], given[2][picked], given[3][picked]
    found |= _slice_budgets(few, torch.from_numpy(worst).to(device), config, budget)
    _save_reader(model, path.with_suffix(".safetensors"))
    write_arrays(path, found)
    return found


def _identity(
    model: sequence.ScanModel,
    scans: sequence.Scans,
    chosen: np.ndarray,
    curve: np.ndarray,
    config: RunConfig,
    budget: dict,
) -> np.ndarray:
    """SHA-256 of everything that the attacks' results depend on, uint8 (32,)."""
    settings = [
        model_digest(model),
        scans.patients[chosen].tolist(),
        scans.patients[curve].tolist(),
        config.seed,
        SCAN_STATE,
        {key: value for key, value in budget.items() if key not in _OTHER_SETTINGS},
    ]
    return np.frombuffer(hashlib.sha256(json.dumps(settings).encode()).digest(), np.uint8)


def attacked_in_view(
    given: tuple, eps: str, view: str, budget: dict, seeds: np.ndarray, strongest: dict[str, Tensor]
) -> dict[str, np.ndarray]:
    """PGD and momentum PGD in one view at one eps: with restarts, and PGD again with twice the
    steps until that misclassifies no further patient.

    Args:
        given: model, pixels (P, S, 1, H, W), mask (P, S) and four-class labels (P,).
        seeds: of each patient's starting points (P,).
        strongest: view → the strongest scans found so far; added to. Points of a smaller ball, and
            what the attack in another view found, are tried before any step is spent.
    """
    model, pixels, mask, labels = given
    truth, suffix = sequence.scan_labels(labels, view), VIEWS[view][1]
    push = (
        view == "binary"
    )  # towards the wrong side, for AUROC: a single run with half of the steps
    steps = max(budget["steps"] // 2, min(budget["steps"], 5)) if push else budget["steps"]
    attempts = 1 if push else VIEW_CLASSES[view] - 1
    scans = pixels.clone()
    logits = torch.zeros(len(labels), len(CLASSES), device=pixels.device)

    def attack(rows: Tensor, steps: int, momentum: float | None, number: int) -> None:
        candidates = [found[rows] for found in strongest.values()] + [scans[rows]] * (number > 0)
        scans[rows], logits[rows] = sequence.attack_scan(
            model,
            pixels[rows],
            mask[rows],
            labels[rows],
            parse_eps(eps),
            sequence.ScanAttack(view, steps, attempts, momentum, push),
            candidates=candidates,
            seeds=seeds[rows.cpu().numpy()] + 104729 * number,
        )

    def robust_rows() -> Tensor:
        return (sequence.scan_decisions(logits, view) == truth).nonzero().squeeze(1)

    attack(torch.arange(len(labels), device=pixels.device), steps, None, 0)
    robust = robust_rows()
    rounds = [(steps, len(labels), len(robust))]
    for number in range(1, 0 if push else budget["doublings"] + 1):
        if not len(robust):
            break
        before = len(robust)
        attack(robust, steps * 2**number, None, number)
        robust = robust_rows()
        rounds.append((steps * 2**number, before, len(robust)))
        if len(robust) == before:
            break
    found = {
        f"{eps}:scan_pgd{steps}{suffix}": logits.cpu().numpy().copy(),
        f"{eps}:rounds_{view}": np.array(rounds),
    }
    if not push:
        if len(robust):
            attack(robust, steps, sequence.MOMENTUM, 100)
        found[f"{eps}:scan_mpgd{steps}{suffix}"] = logits.cpu().numpy()
    strongest[view] = scans
    return found


def _slice_budgets(
    given: tuple[sequence.ScanModel, Tensor, Tensor, Tensor],
    worst: Tensor,
    config: RunConfig,
    budget: dict,
) -> dict[str, np.ndarray]:
    """The least number of slices that flips each patient at the largest eps, chosen by gradient and
    at random.

    Args:
        worst: logits (P, 4) under the attack on every slice.
    """
    found = {
        f"least_{choice}": sequence.slice_budgets(
            *given,
            parse_eps(budget["eps"][-1]),
            budget["budgets"],
            steps=budget["steps"],
            choice=choice,
            view=CURVE_VIEW,
            seed=config.seed,
            full=worst,
        )
        .cpu()
        .numpy()
        for choice in ("gradient", "random")
    }
    return found | {"curve_state": np.array(CURVE_STATE)}


def _save_reader(model: sequence.ScanModel, path: Path) -> None:
    """Keeps the aggregator's weights with the standardization of its features; the backbone has its
    own checkpoint."""
    tensors = {
        key: value.detach().cpu().contiguous()
        for key, value in model.state_dict().items()
        if not key.startswith("backbone.")
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def _worst_in_view(found: dict[str, np.ndarray], eps: str, view: str, labels: Tensor) -> np.ndarray:
    """Logits (P, 4) of each patient that are wrong in a view under any attack at that eps, or,
    where none are, those of the last attack."""
    every = [
        torch.from_numpy(values) for key, values in found.items() if key.startswith(f"{eps}:scan_")
    ]
    worst, truth = every[-1].clone(), sequence.scan_labels(labels.cpu(), view)
    for logits in every:
        wrong = sequence.scan_decisions(logits, view) != truth
        worst[wrong] = logits[wrong]
    return worst.numpy()


def attack_metadata(found: dict[str, np.ndarray], count: int) -> dict[tuple[str, str], dict]:
    """(eps, attack) → what the record says of it; `count` patients were attacked."""
    metadata = {}
    for key in found:
        eps, _, name = key.partition(":")
        if not name.startswith("scan_"):
            continue
        view = next(view for view, (_, suffix) in reversed(VIEWS.items()) if name.endswith(suffix))
        rounds, momentum = found[f"{eps}:rounds_{view}"], name.startswith("scan_mpgd")
        metadata[eps, name] = {
            "norm": "linf",
            "kind": "white-box",
            "view": view,
            "n_set": count,
            "n_attacked": int(rounds[-1, 2]) if momentum else count,
            "steps": int(rounds[0, 0]) if momentum else rounds[:, 0].tolist(),
            "attempts": 1 if view == "binary" else VIEW_CLASSES[view] - 1,
        }
    return metadata


# --- Checks -------------------------------------------------------------------------------------


def scan_checks(
    variant: str,
    scans: sequence.Scans,
    chosen: np.ndarray,
    curve: np.ndarray,
    clean: np.ndarray,
    found: dict[str, np.ndarray],
    budget: dict,
) -> list[dict]:
    """What an evaluation of whole scans must satisfy, each check with its figure.

    Args:
        clean: clean logits of every test patient (P, 4).
        found: of `attacked_scans`.
    """
    checks = []
    for view in ("four", "three"):
        checks += _checks_in_view(scans.labels[chosen], view, clean[chosen], found, budget)
    rows = np.searchsorted(chosen, curve)
    worst = _worst_in_view(found, budget["eps"][-1], CURVE_VIEW, scans.labels[chosen])[rows]
    right, robust = (
        _is_right(logits, scans.labels[curve], CURVE_VIEW) for logits in (clean[curve], worst)
    )
    budgets = [0, *budget["budgets"], scans.mask.shape[1]]
    curves = {
        choice: [
            int(flags.sum()) for flags in sequence.robust_curve(found[f"least_{choice}"], budgets)
        ]
        for choice in ("gradient", "random")
    }
    checks += [
        (
            "no_slice_is_clean",
            all(counts[0] == right.sum() for counts in curves.values()),
            int(right.sum()),
            "a budget of no slice changes no diagnosis",
        ),
        (
            "all_slices_are_the_full_attack",
            all(counts[-1] == robust.sum() for counts in curves.values()),
            int(robust.sum()),
            "a budget of every slice is the full attack",
        ),
        (
            "curve_does_not_rise",
            all(counts == sorted(counts, reverse=True) for counts in curves.values()),
            curves["gradient"],
            "more slices never leave more patients robust",
        ),
    ]
    return [
        {
            "check": check,
            "passed": bool(passed),
            "figure": [int(value) for value in np.atleast_1d(figure)],
            "note": note,
            "variant": variant,
        }
        for check, passed, figure, note in checks
    ]


def _checks_in_view(
    labels: Tensor, view: str, clean: np.ndarray, found: dict[str, np.ndarray], budget: dict
) -> list[tuple]:
    """Checks of the attacks in one view: (name, passed, figure, note)."""
    sweep = budget["eps"]
    right = _is_right(clean, labels, view)
    robust = [_is_right(_worst_in_view(found, eps, view, labels), labels, view) for eps in sweep]
    counts = [int(flags.sum()) for flags in robust]
    last = [found[f"{eps}:rounds_{view}"][-1] for eps in sweep]
    converged = all(before == after or after == 0 for _, before, after in last)
    return [
        (
            f"scan_attack_le_clean_{view}",
            all((flags <= right).all() for flags in robust),
            counts,
            "no patient is robust who was not diagnosed right",
        ),
        (
            f"falls_with_eps_{view}",
            counts == sorted(counts, reverse=True),
            counts,
            "no more patients are robust at a larger eps",
        ),
        (
            f"converged_in_steps_{view}",
            converged,
            np.array(last).ravel(),
            "twice the steps misclassify no further patient"
            if converged
            else "more steps still misclassify patients: raise the cap",
        ),
    ]


def _is_right(logits: np.ndarray, labels: Tensor, view: str) -> np.ndarray:
    """Which patients are diagnosed correctly in a view: bool (P,)."""
    truth = sequence.scan_labels(labels, view)
    return (sequence.scan_decisions(torch.from_numpy(logits), view) == truth).numpy()
