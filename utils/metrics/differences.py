"""Paired differences between two sets of predictions, and correction for multiplicity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from utils.metrics.clustered import (
    auroc_widths,
    classes_of_patients,
    flag_views,
    patient_pairs,
    score_views,
    statistic_of,
    view_statistic,
    with_ece,
)
from utils.metrics.intervals import Problem, Statistic, intervals
from utils.metrics.scores import METRICS, Scores, scored, tally
from utils.metrics.widths import Widths, difference_widths

#: (four, three, labels, patients), each (N,): whether the decision over four and over three classes
#: is robust, class number, and patient of every slice.
FlagsOfSlices = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> Scores:
    """First model minus second on the same images, every score with an interval over the *same*
    resampled patients.

    Args:
        first, second: (N, 4) logits of the two models, row by row of the same images; a row that is
            NaN in either is left out of both.

    Returns:
        as `score`, in [-1, 1] (qwk in [-2, 2]), with "p": the two-sided bootstrap p-value of no
        difference; at least 2 / (n_boot + 1), so verdicts over many comparisons (`holm`) need more
        resamples than intervals.
    """
    rows = scored(first) & scored(second)
    a, b = (
        tally(np.asarray(x)[rows], np.asarray(labels)[rows], np.asarray(patients)[rows])
        for x in (first, second)
    )

    def widths(weights: np.ndarray) -> Widths:
        three, four = (
            difference_widths(of_a, of_b, weights)
            for of_a, of_b in zip(score_views(a), score_views(b), strict=True)
        )
        return with_ece(three | four) | {"auroc": auroc_widths(a) + auroc_widths(b)[::-1]}

    ranges = dict.fromkeys(METRICS, (-1.0, 1.0)) | {"qwk": (-2.0, 2.0)}
    problem = Problem(
        _difference_of(statistic_of(a), statistic_of(b)),
        widths,
        a.class_of_patient,
        a.n_slices,
        ranges,
        n_patients={"auroc": patient_pairs(a)},
    )
    return intervals(problem, n_boot, seed, test=True)


def paired_robust_difference(
    first: tuple[np.ndarray, np.ndarray],
    second: tuple[np.ndarray, np.ndarray],
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> Scores:
    """`paired_difference` of robust scores; each model gives its (four, three) flags as in
    `score_robust`."""
    return robust_difference(
        (*first, labels, patients), (*second, labels, patients), n_boot=n_boot, seed=seed
    )


def robust_difference(
    first: FlagsOfSlices,
    second: FlagsOfSlices,
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> Scores:
    """First minus second of the scores of `score_robust`, on images of the *same patients*, who are
    resampled in both at once; with "p" as in `paired_difference`.

    Args:
        first, second: of N and of M images, which may be others.

    Raises:
        ValueError: the patients of the two differ.
    """
    if not np.array_equal(np.unique(first[3]), np.unique(second[3])):
        raise ValueError(
            "Differences are resampled over patients, so both sides need the same ones."
        )
    views_of_first, views_of_second = (
        flag_views(np.asarray(four, dtype=bool), np.asarray(three, dtype=bool), labels, patients)
        for four, three, labels, patients in (first, second)
    )

    def widths(weights: np.ndarray) -> Widths:
        three, four = (
            difference_widths(of_first, of_second, weights)
            for of_first, of_second in zip(views_of_first, views_of_second, strict=True)
        )
        return three | four

    statistic = _difference_of(view_statistic(*views_of_first), view_statistic(*views_of_second))
    ranges = dict.fromkeys(("balanced_accuracy_3", "balanced_accuracy", "accuracy"), (-1.0, 1.0))
    classes = classes_of_patients(views_of_first[1])
    problem = Problem(statistic, widths, classes, len(first[2]), ranges)
    return intervals(problem, n_boot, seed, test=True)


def _difference_of(first: Statistic, second: Statistic) -> Statistic:
    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        a, b = first(weights), second(weights)
        return {name: a[name] - b[name] for name in a}

    return scores


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values adjusted for being several, in the given order (Holm 1979, Scandinavian Journal of
    Statistics 6, 65-70).

    Deciding by the adjusted values keeps the chance of any false verdict among all of them below
    the level, whatever their dependence.

    Args:
        p_values: (M,), each in [0, 1].

    Raises:
        ValueError: a value is outside [0, 1] or not a number.
    """
    raw = np.asarray(p_values, dtype=np.float64)
    if not ((raw >= 0) & (raw <= 1)).all():
        raise ValueError(f"p-values lie between 0 and 1, but these do not: {raw.tolist()}.")
    order = np.argsort(raw, kind="stable")
    scaled = raw[order] * np.arange(len(raw), 0, -1)
    adjusted = np.empty_like(raw)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted
