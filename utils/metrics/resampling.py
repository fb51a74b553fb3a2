"""Resampling patients: weights, percentile intervals, and p-values of differences."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from utils.metrics.exact import TAIL


def resampling_weights(class_of_patient: np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    """Weights (n_boot, P) of the patients in each resample, read-only.

    Patients are drawn within their class. Of the n patients of a class n - 1 are drawn with
    replacement and weighted so that the class keeps its size n: without this rescaling the variance
    of a mean would come out too small by (n - 1) / n (Rao and Wu 1988, JASA 83, 231-241). A patient
    alone in a class is always drawn.

    Args:
        class_of_patient: whole numbers (P,).
    """
    classes = np.ascontiguousarray(class_of_patient, dtype=np.int64)
    return _weights(classes.tobytes(), n_boot, seed)


@lru_cache(maxsize=8)
def _weights(classes: bytes, n_boot: int, seed: int) -> np.ndarray:
    """Kept for the next score of the same patients: a record asks for the same weights some hundred
    times."""
    class_of_patient = np.frombuffer(classes, dtype=np.int64)
    generator = np.random.default_rng(seed)
    weights = np.zeros((n_boot, len(class_of_patient)))
    for label in np.unique(class_of_patient):
        members = np.flatnonzero(class_of_patient == label)
        drawn = max(len(members) - 1, 1)
        times = generator.multinomial(drawn, np.full(len(members), 1 / len(members)), n_boot)
        weights[:, members] = times * (len(members) / drawn)
    weights.setflags(write=False)
    return weights


def percentile_interval(draws: np.ndarray, value: float) -> tuple[float, float]:
    """The 95 % percentile interval of draws (B,), widened to contain the value; the value twice
    where no draw is defined.

    Without that it could miss the value: resampling biases the calibration error upwards.
    """
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return value, value
    low, high = np.percentile(draws, [100 * TAIL, 100 * (1 - TAIL)])
    return min(float(low), value), max(float(high), value)


def p_value(draws: np.ndarray, value: float, low: float, high: float) -> float:
    """Two-sided p-value of a difference of 0, in (0, 1], which agrees with the interval (low, high)
    of the value.

    Twice the share of draws (B,) on the rarer side of 0 (Davison and Hinkley 1997, Bootstrap
    Methods and their Application, section 4.4). Draws do not know of the exact bounds in the
    interval, so it is at least the p-value of a normal distribution with the interval's half-width
    towards 0: not below 0.05 where the interval contains 0.
    """
    draws = np.round(draws, 12)  # sums in another order must not turn a zero into a sign
    rarer = min((draws <= 0).sum(), (draws >= 0).sum())
    drawn = min(1.0, 2 * (rarer + 1) / (len(draws) + 1))
    towards_zero = value - low if value > 0 else high - value
    if towards_zero <= 0:
        return float(drawn)
    from scipy.stats import norm  # here, since reading records needs no scipy

    return float(max(drawn, 2 * norm.sf(norm.isf(TAIL) * abs(value) / towards_zero)))
