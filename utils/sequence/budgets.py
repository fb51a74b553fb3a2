"""How many slices of a scan an attacker has to change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from utils.attacks.base import margin
from utils.model_state import frozen
from utils.sequence.attacks import ScanAttack, attack_scan
from utils.sequence.decisions import grouped_logits, scan_decisions, scan_labels
from utils.sequence.model import ScanModel
from utils.utils_funcs import UserError


def slice_gains(
    model: ScanModel, pixels: Tensor, mask: Tensor, labels: Tensor, *, view: str = "three"
) -> Tensor:
    """What each slice offers an attacker of a view, to first order, (B, S).

    The L1 norm of the gradient of that view's margin, 0 where there is no slice, in evaluation
    mode.

    Args:
        pixels: (B, S, 1, H, W) in [0, 1]; mask: (B, S); labels: (B,) in 0..3.
    """
    truth, gains = scan_labels(labels, view), []
    with torch.enable_grad(), frozen(model):
        for row in range(len(labels)):
            at = slice(row, row + 1)
            scan = pixels[at].detach().requires_grad_(True)
            gap = margin(grouped_logits(model(scan, mask[at]), view), truth[at])
            gradient = torch.autograd.grad(-gap.sum(), scan)[0].nan_to_num(0.0, 0.0, 0.0)
            gains.append(gradient.abs().flatten(2).sum(2) * mask[at])
    return torch.cat(gains)


def slice_budgets(
    model: ScanModel,
    pixels: Tensor,
    mask: Tensor,
    labels: Tensor,
    eps: float,
    budgets: Sequence[int],
    *,
    steps: int = 20,
    choice: str = "gradient",
    view: str = "three",
    seed: int = 0,
    full: Tensor | None = None,
) -> Tensor:
    """The smallest number of slices with which an attack flips each patient's diagnosis in a view.

    The attack on all slices comes first, and only the patients whom it flips are attacked with
    fewer: so the curve over budgets starts at the clean answers, never rises, and ends where the
    full attack does.

    Args:
        pixels: (B, S, 1, H, W) in [0, 1]; mask: (B, S); labels: (B,) in 0..3.
        budgets: numbers of slices; one as large as the scan is the full attack itself.
        choice: which slices: `gradient`, those with the largest `slice_gains`; `random`, the
            control.
        view: the decision, one of `evaluation.plan.VIEWS`.
        seed: of the random choice.
        full: logits (B, 4) under the attack on every slice at the same eps in this view, where
            they are known already.

    Returns:
        int64 (B,): one of `budgets`, or the number of slices of the longest scan; 0 where the
        clean answer is wrong; −1 where even the attack on every slice fails.
    """
    if choice not in ("gradient", "random"):
        raise UserError(f"Unknown choice of slices {choice!r}: expected gradient or random.")
    attack, truth = ScanAttack(view, steps), scan_labels(labels, view)
    least, most = torch.full_like(labels, -1), int(mask.sum(1).max())
    if full is None:
        full = attack_scan(model, pixels, mask, labels, eps, attack)[1]
    clean = attack_scan(model, pixels, mask, labels, 0.0, attack)[1]
    wrong = scan_decisions(clean, view) != truth
    rows = ((scan_decisions(full, view) != truth) & ~wrong).nonzero().squeeze(1)
    least[rows], least[wrong] = most, 0
    if not len(rows):
        return least
    if choice == "gradient":
        gains = slice_gains(model, pixels[rows], mask[rows], labels[rows], view=view)
    else:  # drawn for all patients, so that a patient's slices do not depend on the others
        drawn = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed))
        gains = drawn.to(pixels)[rows]
    rank = gains.masked_fill(~mask[rows], -1).argsort(1, descending=True).argsort(1)
    robust = torch.ones_like(rows, dtype=torch.bool)
    for budget in sorted(budget for budget in budgets if 0 < budget < most):
        places = robust.nonzero().squeeze(1)
        if not len(places):
            break
        now = rows[places]
        allowed = rank[places] < budget
        logits = attack_scan(
            model, pixels[now], mask[now], labels[now], eps, attack, allowed=allowed
        )[1]
        flipped = scan_decisions(logits, view) != truth[now]
        least[now[flipped]] = budget
        robust[places[flipped]] = False
    return least


def robust_curve(least: np.ndarray, budgets: Sequence[int]) -> list[np.ndarray]:
    """For each budget, which patients are robust to an attack on so many slices, bool (P,).

    Args:
        least: (P,), from `slice_budgets`.
    """
    least = np.asarray(least)
    return [(least < 0) | (least > budget) for budget in budgets]
