"""95 % confidence intervals over patients that never have width zero.

1. Patients are resampled within their class, all their slices at once: slices of a patient are
   alike, so that resampling slices would promise far too much (`resampling`). The percentiles of
   the resampled scores are the interval.
2. Where resampling sees no variance, since all or none of a class is right, exact bounds widen it
   (`widths`, `exact`).
3. An interval that still has no width gets the exact bound of the patients it rests on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from utils.metrics.exact import no_event_bound
from utils.metrics.resampling import p_value, percentile_interval, resampling_weights
from utils.metrics.scores import Scores
from utils.metrics.widths import Widths

#: From resampling weights (B, P) to name of a score → (B,) values.
Statistic = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Problem:
    """Scores and what their intervals need.

    statistic: from weights (B, P) to name → (B,).
    widths: from weights (B, P) to the extra squared half-widths of each score.
    class_of_patient: (P,) the class within which each patient is resampled.
    n_slices: given where a score is undefined.
    ranges: name → (lowest, highest) possible value, where it is not [0, 1].
    n_patients: name → how many patients' exact bound gives a width where nothing else does, where
        they are not those of the smallest class.
    """

    statistic: Statistic
    widths: Callable[[np.ndarray], Widths]
    class_of_patient: np.ndarray
    n_slices: int
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    n_patients: dict[str, int] = field(default_factory=dict)


def intervals(problem: Problem, n_boot: int, seed: int, *, test: bool = False) -> Scores:
    """Value on all patients and 95 % interval of every score.

    Args:
        n_boot: resamples; 0 where the scores are known without sampling.
        test: whether to add "p", the two-sided p-value of the value 0.

    Returns:
        name → {"value", "ci": [low, high]}, {"value": None, "ci": None, "n": slices} where a score
        is undefined, and {"value", "ci": None, "exact": True} without resamples.
    """
    patients = len(problem.class_of_patient)
    undefined: dict[str, Any] = {"value": None, "ci": None, "n": problem.n_slices}
    point = {
        name: float(values[0]) for name, values in problem.statistic(np.ones((1, patients))).items()
    }
    if n_boot == 0:
        return {
            name: dict(undefined)
            if np.isnan(value)
            else {"value": round(value, 6), "ci": None, "exact": True}
            for name, value in point.items()
        }
    weights = resampling_weights(problem.class_of_patient, n_boot, seed)
    drawn = problem.statistic(weights)
    widths = problem.widths(weights) if patients else {}
    smallest = np.unique(problem.class_of_patient, return_counts=True)[1].min(initial=patients)
    result: Scores = {}
    for name, value in point.items():
        draws = drawn[name][~np.isnan(drawn[name])]
        if np.isnan(value) or not len(draws):
            result[name] = dict(undefined)
            continue
        low, high = _widened(
            percentile_interval(draws, value),
            value,
            widths.get(name, np.zeros(2)),
            problem.ranges.get(name, (0.0, 1.0)),
            problem.n_patients.get(name, smallest),
        )
        result[name] = {"value": round(value, 6), "ci": [round(low, 6), round(high, 6)]}
        if test:
            result[name]["p"] = round(p_value(draws, value, low, high), 6)
    return result


def _widened(
    interval: tuple[float, float],
    value: float,
    widths: np.ndarray,
    limits: tuple[float, float],
    patients: int,
) -> tuple[float, float]:
    """A resampled interval with its extra half-widths (2,), inside the score's limits.

    An interval that still has no width gets the share of the way to both limits that the exact
    bound of so many patients allows.
    """
    lowest, highest = limits
    low = max(value - math.sqrt((value - interval[0]) ** 2 + widths[0]), lowest)
    high = min(value + math.sqrt((interval[1] - value) ** 2 + widths[1]), highest)
    if round(high, 6) == round(low, 6):
        share = no_event_bound(patients)
        low, high = value - share * (value - lowest), value + share * (highest - value)
    return low, high
