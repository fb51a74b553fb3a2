"""What exact bounds add to a resampled interval of a score that is made of class-wise shares.

Where every slice of a class is decided right, resampling draws only right ones and sees no
variance. The exact interval of that share is wider. How much the score could change within it is
found by moving so many slices of the class to another decision and scoring again; the changes of
all classes, which are independent, are added in quadrature (as in MOVER, Zou and Donner 2008,
Statistics in Medicine 27, 1693-1702).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from utils.metrics.exact import exact_interval
from utils.metrics.resampling import percentile_interval
from utils.metrics.scores import ratio

#: Name of a score → its extra squared half-widths (2,), downwards and upwards.
Widths = dict[str, np.ndarray]

#: From sums over patients (B, K, C) to name of a score → (B,) values.
SumScores = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class View:
    """Slices counted by patient, true class and decision, and the scores that are made of their
    sums.

    counts: (P, K, C), P patients, K classes, C decisions.
    right: (K,) the decision that is right for each class.
    scores: from sums (B, K, C) to name → (B,).
    """

    counts: np.ndarray
    right: np.ndarray
    scores: SumScores

    @property
    def sums(self) -> np.ndarray:
        """Counts over all patients (K, C)."""
        return self.counts.sum(axis=0)

    def of_class(self, label: int) -> tuple[np.ndarray, np.ndarray]:
        """Right decisions and slices of a class by patient, each (P,)."""
        return self.counts[:, label, self.right[label]], self.counts[:, label].sum(axis=1)

    def wrong(self, label: int) -> list[int]:
        """The decisions that are wrong for a class."""
        return [
            decision for decision in range(self.counts.shape[2]) if decision != self.right[label]
        ]

    def moved(self, label: int, share: float, decision: int) -> np.ndarray:
        """Sums (K, C) with that share of a class's slices, of whatever decision, moved to one
        decision."""
        sums = self.sums
        sums[label] *= 1 - share
        sums[label, decision] += share * self.counts[:, label].sum()
        return sums


def view_widths(view: View, weights: np.ndarray) -> Widths:
    """The extra squared half-widths of a view's scores.

    The share of a class's slices that its exact bound adds is moved to the right decision, or to
    the wrong one that changes a score most.

    Args:
        weights: (B, P) of the resampled patients.
    """
    point = view.scores(view.sums[None])
    total: Widths = {}
    for label in range(view.counts.shape[1]):
        hits, counts = view.of_class(label)
        if not counts.any():
            continue
        down, up = _share_excess(hits, counts, weights)
        share = hits.sum() / counts.sum()
        to_right = up / (1 - share) if share < 1 else 0.0
        # Where no decision is right, other wrong decisions may be unseen just as right ones are.
        to_wrong = down / share if share > 0 else up
        moves = [(to_right, view.right[label])]
        moves += [(to_wrong, decision) for decision in view.wrong(label)]
        changed = [
            view.scores(view.moved(label, min(moved, 1.0), decision)[None])
            for moved, decision in moves
            if moved > 0
        ]
        _add(total, _squared_changes(point, changed))
    return total


def difference_widths(first: View, second: View, weights: np.ndarray) -> Widths:
    """`view_widths` of the scores of the first minus those of the second: pairs of decisions on the
    same patients are moved."""

    def scores(of_first: np.ndarray, of_second: np.ndarray) -> dict[str, np.ndarray]:
        a, b = first.scores(of_first[None]), second.scores(of_second[None])
        return {name: a[name] - b[name] for name in a}

    point = scores(first.sums, second.sums)
    total: Widths = {}
    for label in range(first.counts.shape[1]):
        value, down, up = _difference_excess(first.of_class(label), second.of_class(label), weights)
        higher = min(up / (1 - value), 1.0) if value < 1 else 0.0
        lower = min(down / (1 + value), 1.0) if value > -1 else 0.0
        right, second_right = first.right[label], second.right[label]
        changed = [
            scores(first.moved(label, higher, right), second.moved(label, higher, decision))
            for decision in second.wrong(label)
        ]
        changed += [
            scores(first.moved(label, lower, decision), second.moved(label, lower, second_right))
            for decision in first.wrong(label)
        ]
        _add(total, _squared_changes(point, changed))
    return total


def _share_excess(hits: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """What the exact interval of a share adds to its resampled one, downwards and upwards; hits,
    counts (P,)."""
    value = float(hits.sum() / counts.sum())
    low, high = percentile_interval(ratio(weights @ hits, weights @ counts), value)
    exact_low, exact_high = exact_interval(hits, counts)
    return _excess(value - exact_low, value - low), _excess(exact_high - value, high - value)


def _difference_excess(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], weights: np.ndarray
) -> tuple[float, float, float]:
    """A difference of two shares of the same patients, and what exact bounds add to it: (value,
    down, up).

    The difference is the mean of its positive parts minus that of its negative parts; each has an
    exact interval, which are combined by MOVER. Where no patient differs this is the bound of no
    discordant patient among n.

    Args:
        first, second: (hits, counts) by patient, each (P,).
    """
    both = (first[1] > 0) & (second[1] > 0)
    if not both.any():
        return 0.0, 0.0, 0.0
    counts = np.where(both, (first[1] + second[1]) / 2, 0)
    differences = ratio(first[0], first[1]) - ratio(second[0], second[1])
    gain, loss = (counts * np.nan_to_num(np.maximum(sign * differences, 0)) for sign in (1, -1))
    mean_gain, mean_loss = gain.sum() / counts.sum(), loss.sum() / counts.sum()
    gains, losses = exact_interval(gain, counts), exact_interval(loss, counts)
    value = float(mean_gain - mean_loss)
    low, high = percentile_interval(ratio(weights @ (gain - loss), weights @ counts), value)
    down = math.hypot(mean_gain - gains[0], losses[1] - mean_loss)
    up = math.hypot(gains[1] - mean_gain, mean_loss - losses[0])
    return value, _excess(down, value - low), _excess(up, high - value)


def _excess(wide: float, narrow: float) -> float:
    """What has to be added to one half-width, in quadrature, to make it at least as wide as
    another."""
    return math.sqrt(max(wide**2 - narrow**2, 0.0))


def _squared_changes(point: dict[str, np.ndarray], changed: list[dict[str, np.ndarray]]) -> Widths:
    """How far scores go down and up at most, squared, among several ways to move slices of one
    class."""
    widths = {}
    for name, value in point.items():
        changes = np.array([0.0, *(found[name][0] - value[0] for found in changed)])
        widths[name] = np.array([np.nanmin(changes), np.nanmax(changes)]) ** 2
    return widths


def _add(total: Widths, more: Widths) -> None:
    for name, widths in more.items():
        total[name] = total.get(name, 0) + widths
