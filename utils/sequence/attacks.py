"""Attacks that perturb all slices of a scan towards another diagnosis of the patient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.attacks.base import margin
from utils.model_state import frozen
from utils.sequence.decisions import grouped_logits, scan_labels
from utils.sequence.model import ScanModel

#: Decay of the accumulated gradient in the second attack (momentum iterative FGSM, Dong et al.
#: 2018, arXiv:1710.06081).
MOMENTUM = 1.0


@dataclass(frozen=True)
class ScanAttack:
    """What one attack on scans does."""

    view: str = "four"
    """The decision that is attacked, one of `evaluation.plan.VIEWS`. The attack goes on until
    *this* decision is wrong."""
    steps: int = 20
    """Of each ascent."""
    attempts: int = 1
    """Ascents. The first starts at the scan itself and climbs towards the nearest other class; the
    k-th starts at random and climbs towards the k-th nearest."""
    momentum: float | None = None
    """None for plain PGD."""
    push: bool = False
    """Go on after success to the lowest margin: a rank statistic like AUROC asks for it."""


class AttackedScan:
    """One patient's scan under attack: what is asked of the model, and the best iterate so far.

    All tensors have a first dimension of 1. The best iterate is the wrong answer with the lowest
    margin in the attacked view, or the lowest margin where no answer was wrong.

    Args:
        pixels: (1, S, 1, H, W) in [0, 1]; mask: (1, S); label: (1,) in 0..3.
        changed: bool (1, S), the slices that the attack may change.
        view: the decision that is attacked.
    """

    def __init__(
        self,
        model: ScanModel,
        pixels: Tensor,
        mask: Tensor,
        changed: Tensor,
        label: Tensor,
        view: str,
    ) -> None:
        self.model, self.pixels, self.mask, self.changed = model, pixels, mask, changed
        self.label, self.view = scan_labels(label, view), view
        with torch.no_grad():
            self.features = model.features(pixels, mask)
            self.best, self.logits = pixels, model.aggregator(self.features, mask)
        self.margin, self.wrong = self._judge(self.logits)

    def ask(self, scan: Tensor) -> Tensor:
        """Logits (1, 4) of an iterate; only the slices that may change are read again."""
        return self.model.reread(scan, self.mask, self.changed, self.features)

    def offer(self, scan: Tensor, logits: Tensor) -> None:
        """Keeps this iterate, with its logits (1, 4), where it is better for the attacker."""
        lowest, wrong = self._judge(logits)
        if (wrong, -lowest) > (self.wrong, -self.margin):
            self.best, self.logits, self.margin, self.wrong = scan, logits, lowest, wrong

    def nearest(self) -> Tensor:
        """The other groups of the view, that with the highest logit first, int64 (groups − 1,)."""
        grouped = grouped_logits(self.logits, self.view)
        others = grouped.scatter(1, self.label[:, None], -torch.inf)
        return others.argsort(1, descending=True)[0, :-1]

    def gap(self, logits: Tensor, target: int | None) -> Tensor:
        """The label's group ahead of `target`, or of the highest other group (None), (1,)."""
        grouped = grouped_logits(logits, self.view)
        if target is None:
            return margin(grouped, self.label)
        return grouped[:, int(self.label)] - grouped[:, target]

    def _judge(self, logits: Tensor) -> tuple[float, bool]:
        """Margin in the view, and whether the answer is wrong, by `argmax` as in every score."""
        grouped = grouped_logits(logits, self.view)
        return float(margin(grouped, self.label)), int(grouped.argmax(1)) != int(self.label)


def attack_scan(
    model: ScanModel,
    pixels: Tensor,
    mask: Tensor,
    labels: Tensor,
    eps: float,
    attack: ScanAttack = ScanAttack(),  # noqa: B008  frozen
    *,
    allowed: Tensor | None = None,
    candidates: Sequence[Tensor] = (),
    seeds: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Perturbs all slices of each scan towards another diagnosis, and keeps the best iterate.

    One patient at a time: 32 images are enough work for a processor, and no patient's result
    depends on the others.

    Args:
        pixels: (B, S, 1, H, W) in [0, 1]; mask: (B, S); labels: (B,) in 0..3.
        eps: L-infinity budget of a pixel.
        allowed: (B, S), the slices that may be changed (None: every slice that exists).
        candidates: scans (B, S, 1, H, W) in the same eps ball, found by other attacks, that are
            tried first.
        seeds: (B,), of each patient's random starts (None: 0 for all).

    Returns:
        Adversarial scans (B, S, 1, H, W) within eps and [0, 1], and their logits (B, 4). A patient
        whose decision in this view is wrong already (unless `push`), or with no slice that may be
        changed, comes back unchanged.
    """
    changed = mask if allowed is None else mask & allowed
    scans, logits = [], []
    with frozen(model):
        for row in range(len(labels)):
            at = slice(row, row + 1)
            scan = AttackedScan(model, pixels[at], mask[at], changed[at], labels[at], attack.view)
            _attack_one(
                scan,
                eps,
                attack,
                [candidate[at] for candidate in candidates],
                0 if seeds is None else int(seeds[row]),
            )
            scans.append(scan.best)
            logits.append(scan.logits)
    return torch.cat(scans), torch.cat(logits)


def _attack_one(
    scan: AttackedScan, eps: float, attack: ScanAttack, candidates: Sequence[Tensor], seed: int
) -> None:
    """All attempts of `attack_scan` on one patient; what they find is in `scan.best`."""
    if eps == 0 or not bool(scan.changed.any()) or (scan.wrong and not attack.push):
        return
    with torch.no_grad():
        for candidate in candidates:
            scan.offer(candidate, scan.ask(candidate))
    nearest = scan.nearest()
    generator = torch.Generator().manual_seed(seed)
    for attempt in range(attack.attempts):
        if scan.wrong and not attack.push:
            return
        if attempt == 0:
            start, target = scan.best, None
        else:
            start = random_scan(scan.pixels, scan.changed, eps, generator)
            target = int(nearest[attempt % len(nearest)])
        _ascend(scan, eps, attack, start, target)


def random_scan(pixels: Tensor, changed: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """A scan drawn uniformly from the eps ball, within [0, 1]; only `changed` slices differ."""
    noise = torch.empty(pixels.shape).uniform_(-eps, eps, generator=generator).to(pixels)
    return (pixels + noise * changed[..., None, None, None]).clamp(0, 1)


def _ascend(
    scan: AttackedScan, eps: float, attack: ScanAttack, current: Tensor, target: int | None
) -> None:
    """One ascent from `current` towards the group `target`, or the nearest wrong one (None).

    Every iterate is offered to `scan`. Slices that may not change have no gradient.
    """
    lower, upper = (scan.pixels - eps).clamp_min(0), (scan.pixels + eps).clamp_max(1)
    velocity = torch.zeros_like(current)
    for step in range(attack.steps + 1):
        last = step == attack.steps
        current = current.detach().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            logits = scan.ask(current)
            gap = scan.gap(logits, target)
        scan.offer(current.detach(), logits.detach())
        if last or (scan.wrong and not attack.push):
            return
        gradient = torch.autograd.grad(-gap.sum(), current)[0].nan_to_num(0.0, 0.0, 0.0)
        if attack.momentum is not None:
            size = gradient.abs().mean().clamp_min(1e-20)
            gradient = velocity = attack.momentum * velocity + gradient / size
        step_size = 2.5 * eps / attack.steps
        current = torch.clamp(current.detach() + step_size * gradient.sign(), lower, upper)
