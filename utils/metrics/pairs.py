"""Pairs of flags: how the errors of two models agree, and which of two abilities an attack
leaves."""

from __future__ import annotations

import numpy as np

from utils.metrics.clustered import classes_of_patients, flag_counts, score_robust, view_statistic
from utils.metrics.intervals import Problem, intervals
from utils.metrics.scores import Scores, ratio
from utils.metrics.widths import View, Widths, difference_widths, view_widths

#: Columns of two flags' joint outcomes: neither is true, only the second, only the first, both.
NEITHER, SECOND, FIRST, BOTH = range(4)


def _error_correlation(outcomes: np.ndarray) -> dict[str, np.ndarray]:
    """Pearson's correlation of two flags from sums (B, classes, 4) of their joint outcomes."""
    counts = outcomes.sum(axis=1)
    n, both = counts.sum(axis=1), counts[:, BOTH]
    first, second = counts[:, FIRST] + both, counts[:, SECOND] + both
    spread = np.sqrt(np.maximum(first * (n - first) * second * (n - second), 0))
    return {"error_correlation": ratio(n * both - first * second, spread)}


def pair_scores(
    differ: np.ndarray,
    first_wrong: np.ndarray,
    second_wrong: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> Scores:
    """Disagreement of two models and the correlation of their errors (Pearson's of two flags), with
    intervals over patients.

    Args:
        differ, first_wrong, second_wrong: bool (N,) a row: other answers; the first, the second
            model is wrong.
    """
    labels = np.asarray(labels, dtype=np.int64)
    identity, patient = np.unique(np.asarray(patients), return_inverse=True)
    outcome = 2 * np.asarray(first_wrong, dtype=np.int64) + np.asarray(second_wrong, dtype=np.int64)
    counts = np.zeros((len(identity), 4, 4))
    np.add.at(counts, (patient, labels, outcome), 1)
    view = View(counts, np.full(4, NEITHER), _error_correlation)
    problem = Problem(
        view_statistic(view),
        lambda weights: view_widths(view, weights),
        classes_of_patients(view),
        len(labels),
        ranges={"error_correlation": (-1.0, 1.0)},
    )
    return {
        "disagreement": share(differ, labels, patients, n_boot=n_boot, seed=seed),
        **intervals(problem, n_boot, seed),
    }


def share(
    flags: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> dict:
    """The share of true flags among all rows with its interval over patients."""
    flags = np.asarray(flags, dtype=bool)
    return score_robust(flags, flags, labels, patients, n_boot=n_boot, seed=seed)["accuracy"]


def kept_shares(
    first: tuple[np.ndarray, np.ndarray],
    second: tuple[np.ndarray, np.ndarray],
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    n_boot: int = 2000,
    seed: int = 0,
    test: bool = False,
) -> Scores:
    """How much of what each of two abilities had on clean images it keeps under an attack, and the
    first's share minus the second's.

    Args:
        first, second: (before, after), bool (N,) each, row by row of the same images.
        test: whether to add "p", the p-value of a value of 0, which says something of `difference`.

    Returns:
        as `intervals`: `first`, `second`: the share of the rows with `before` that have `after`
        too; `difference`. Undefined where nothing was there before.
    """
    labels = np.asarray(labels, dtype=np.int64)
    identity, patient = np.unique(np.asarray(patients), return_inverse=True)
    size, views = (len(identity), 4), []
    for before, after in (first, second):
        rows = np.asarray(before, dtype=bool)
        kept = np.asarray(after, dtype=bool)[rows].astype(np.float64)
        counts = flag_counts(kept, labels[rows], patient[rows], size)
        views.append(View(counts, np.zeros(4, dtype=np.int64), _kept_scores))
    patient_class = np.zeros(len(identity), dtype=np.int64)
    patient_class[patient] = labels
    first_view, second_view = views

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        shares = [view_statistic(view)(weights)["kept"] for view in views]
        return {"first": shares[0], "second": shares[1], "difference": shares[0] - shares[1]}

    def widths(weights: np.ndarray) -> Widths:
        none = np.zeros(2)
        return {
            "first": view_widths(first_view, weights).get("kept", none),
            "second": view_widths(second_view, weights).get("kept", none),
            "difference": difference_widths(first_view, second_view, weights).get("kept", none),
        }

    problem = Problem(statistic, widths, patient_class, len(labels), {"difference": (-1.0, 1.0)})
    return intervals(problem, n_boot, seed, test=test)


def _kept_scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """The share of all slices, of all classes, with the flag: sums (B, classes, 2) to (B,)."""
    return {"kept": ratio(counts[..., 0].sum(axis=-1), counts.sum(axis=(-2, -1)))}
