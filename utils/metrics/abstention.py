"""Answering only when sure: risk against coverage, conformal sets."""

from __future__ import annotations

import math

import numpy as np

from utils.metrics.pairs import share
from utils.metrics.scores import THREE, merge_classes, probabilities


def risk_coverage(
    logits: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    coverages: np.ndarray | None = None,
    n_boot: int = 2000,
    seed: int = 0,
) -> list[dict]:
    """Error among the most confident share of rows, for each share: {"coverage", "risk", "ci",
    "threshold", "n"}.

    The decision is the three-class one (`THREE`), the confidence its probability (El-Yaniv and
    Wiener 2010, JMLR 11). The interval resamples patients with the threshold of the whole set held
    fixed.

    Args:
        coverages: shares in (0, 1] (None: 0.1, 0.2, …, 1).
    """
    probability = merge_classes(probabilities(logits))
    wrong = probability.argmax(axis=1) != THREE[np.asarray(labels, dtype=np.int64)]
    confidence, curve = probability.max(axis=1), []
    for coverage in np.linspace(0.1, 1, 10) if coverages is None else coverages:
        count = max(1, round(float(coverage) * len(confidence)))
        threshold = np.sort(confidence)[::-1][count - 1]
        curve.append(
            {
                "coverage": float(coverage),
                **selective_risk(
                    wrong, confidence, threshold, labels, patients, n_boot=n_boot, seed=seed
                ),
            }
        )
    return curve


def selective_risk(
    wrong: np.ndarray,
    confidence: np.ndarray,
    threshold: float,
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> dict:
    """Error among rows at least as confident as `threshold`: {"risk", "ci", "threshold", "n",
    "answered"}.

    Under attack give the wrong answers and confidences of the attacked images and the threshold of
    the clean ones.

    Args:
        wrong, confidence: (N,) flags, and top probabilities.
    """
    kept = np.asarray(confidence) >= threshold
    size = {"threshold": float(threshold), "n": int(kept.sum()), "answered": float(kept.mean())}
    if not kept.any():
        return {"risk": None, "ci": None, **size}
    found = share(
        np.asarray(wrong)[kept],
        np.asarray(labels)[kept],
        np.asarray(patients)[kept],
        n_boot=n_boot,
        seed=seed,
    )
    return {"risk": found["value"], "ci": found["ci"], **size}


def conformal_threshold(logits: np.ndarray, labels: np.ndarray, alpha: float) -> float:
    """The score up to which a class enters a conformal set: the ⌈(n + 1)(1 − alpha)⌉-th smallest of
    1 − p(true class) on calibration rows, over three classes (split conformal; Vovk et al. 2005). 1
    (every class) where n is too small.

    Args:
        logits, labels: (N, 4), (N,) of patients that took part in no other choice; they must be
            exchangeable with those tested.
    """
    probability = merge_classes(probabilities(logits))
    nonconformity = np.sort(
        1 - probability[np.arange(len(labels)), THREE[np.asarray(labels, dtype=np.int64)]]
    )
    place = math.ceil((len(labels) + 1) * (1 - alpha))
    return float(nonconformity[place - 1]) if place <= len(labels) else 1.0


def conformal_sets(logits: np.ndarray, threshold: float | np.ndarray) -> np.ndarray:
    """Which of the three classes each row's set holds, bool (N, 3), for one threshold or one a
    row."""
    return 1 - merge_classes(probabilities(logits)) <= np.asarray(threshold).reshape(-1, 1) + 1e-12


def cross_conformal(
    logits: np.ndarray, labels: np.ndarray, fold: np.ndarray, alpha: float, seed: int = 0
) -> np.ndarray:
    """A conformal threshold for each row (N,), calibrated on the *other half* of the same fold's
    test patients.

    These patients took part in no training, search or choice of epoch, and none is in the half that
    calibrates the threshold for them. Halves are drawn at random within each fold and class.

    Args:
        logits: (N, 4), one row a patient; labels, fold: (N,).
    """
    generator, half = np.random.default_rng(seed), np.zeros(len(labels), dtype=np.int64)
    merged = THREE[np.asarray(labels)]
    for one_fold in np.unique(fold):
        for label in np.unique(merged):
            rows = generator.permutation(np.flatnonzero((fold == one_fold) & (merged == label)))
            half[rows] = (np.arange(len(rows)) + generator.integers(2)) % 2
    thresholds = np.ones(len(labels))
    for one_fold in np.unique(fold):
        for side in (0, 1):
            tested = (fold == one_fold) & (half == side)
            calibration = (fold == one_fold) & (half != side)
            if calibration.any():
                thresholds[tested] = conformal_threshold(
                    logits[calibration], labels[calibration], alpha
                )
    return thresholds
