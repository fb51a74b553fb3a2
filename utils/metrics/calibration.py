"""Temperature scaling and calibration curves."""

from __future__ import annotations

import numpy as np

from utils.metrics.pairs import share
from utils.metrics.scores import confidence_bin, probabilities, scored


def fit_temperature(
    logits: np.ndarray, labels: np.ndarray, bounds: tuple[float, float] = (0.05, 20.0)
) -> float:
    """The temperature that minimizes cross-entropy of logits / temperature (Guo et al. 2017,
    arXiv:1706.04599).

    Cross-entropy is convex in 1/temperature, so its slope is bisected; on a separable set the
    search ends where the slope vanishes in floating point.

    Args:
        logits: (N, 4) on *validation* images: a temperature chosen on test images would be fitted
            to them.
    """
    rows = scored(logits)
    logits, labels = (
        np.asarray(logits, dtype=np.float64)[rows],
        np.asarray(labels, dtype=np.int64)[rows],
    )
    truth = logits[np.arange(len(labels)), labels]

    def slope(inverse: float) -> float:
        return float(((probabilities(logits * inverse) * logits).sum(axis=1) - truth).mean())

    low, high = 1 / bounds[1], 1 / bounds[0]
    for _ in range(60):  # on a logarithmic scale, beyond the precision of a float
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / (low * high) ** 0.5


def calibration_curve(
    logits: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    bins: int = 10,
    n_boot: int = 2000,
    seed: int = 0,
) -> list[dict]:
    """The filled confidence bins from low to high, each {"confidence", "accuracy", "ci",
    "n_slices"}.

    `confidence` is the bin's mean top probability; the interval of `accuracy` resamples the
    patients with slices in it.
    """
    rows = scored(logits)
    logits, labels = np.asarray(logits)[rows], np.asarray(labels, dtype=np.int64)[rows]
    patients = np.asarray(patients)[rows]
    confidence = probabilities(logits).max(axis=1, initial=0)
    of_bin, curve = confidence_bin(confidence, bins), []
    for index in np.unique(of_bin):
        inside = of_bin == index
        right = logits[inside].argmax(axis=1) == labels[inside]
        found = share(right, labels[inside], patients[inside], n_boot=n_boot, seed=seed)
        curve.append(
            {
                "confidence": float(confidence[inside].mean()),
                "accuracy": found["value"],
                "ci": found["ci"],
                "n_slices": int(inside.sum()),
            }
        )
    return curve
