"""Scores with intervals over patients: by slice, by patient, robust, class by class."""

from __future__ import annotations

import numpy as np

from utils.metrics.exact import no_event_bound
from utils.metrics.intervals import Problem, Statistic, intervals
from utils.metrics.scores import (
    METRICS,
    THREE,
    Scores,
    Tally,
    confusion_scores,
    mean_present,
    merged_scores,
    probabilities,
    ratio,
    scored,
    tally,
)
from utils.metrics.widths import View, Widths, view_widths

# -- from logits -----------------------------------------------------------------------------------


def score(
    logits: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> Scores:
    """Every score in `METRICS` with its interval.

    Args:
        logits: (N, 4); rows of NaN are outside the declared set and left out.
        labels: (N,) in 0..3. A class that is absent is left out of balanced accuracy and macro-F1.
        patients: (N,) ids; what is resampled.
        n_boot: resamples; 0 for an answer whose scores are known without sampling, such as the
            constant one.

    Returns:
        as `intervals`; all values in [0, 1] but qwk in [-1, 1]. AUROC is undefined with one side
        empty.
    """
    sums = tally(logits, labels, patients)

    def widths(weights: np.ndarray) -> Widths:
        three, four = (view_widths(view, weights) for view in score_views(sums))
        return with_ece(three | four) | {"auroc": auroc_widths(sums)}

    problem = Problem(
        statistic_of(sums),
        widths,
        sums.class_of_patient,
        sums.n_slices,
        ranges={"qwk": (-1.0, 1.0)},
        n_patients={"auroc": patient_pairs(sums)},
    )
    return intervals(problem, n_boot, seed)


def by_patient(
    logits: np.ndarray, labels: np.ndarray, patients: np.ndarray, seeds: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One row per patient and training seed: (log of the mean slice probability (M, 4), label (M,),
    patient (M,)).

    Seeds are kept apart because their mean would be an ensemble that nobody evaluated.
    """
    rows = scored(logits)
    seeds = np.zeros(len(rows), dtype=np.int64) if seeds is None else np.asarray(seeds, np.int64)
    keys, group = np.unique(
        np.column_stack([np.asarray(patients, dtype=np.int64)[rows], seeds[rows]]),
        axis=0,
        return_inverse=True,
    )
    group = group.reshape(-1)
    mean, of_class = np.zeros((len(keys), 4)), np.zeros((len(keys), 4))
    np.add.at(mean, group, probabilities(np.asarray(logits)[rows]))
    np.add.at(of_class, (group, np.asarray(labels, dtype=np.int64)[rows]), 1)
    mean /= of_class.sum(axis=1, keepdims=True)
    return np.log(np.maximum(mean, 1e-300)), of_class.argmax(axis=1), keys[:, 0]


def score_patients(
    logits: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    seeds: np.ndarray | None = None,
    n_boot: int = 2000,
    seed: int = 0,
) -> Scores:
    """`score` with one decision a patient: the mean of the patient's slice probabilities."""
    return score(*by_patient(logits, labels, patients, seeds), n_boot=n_boot, seed=seed)


def recalls(
    logits: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    groups: np.ndarray = THREE,
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> list[dict]:
    """The recall of each class: the share of its slices that are decided right.

    By patient instead of by slice: `recalls(*by_patient(logits, labels, patients))`.

    Args:
        logits: (N, 4); rows of NaN are left out.
        groups: (4,) the group, from 0, that each of the four classes belongs to; the probabilities
            of a group are summed before the decision. The default is Non, Very mild, Mild or
            Moderate.

    Returns:
        for each group {"value", "ci", "n_slices", "n_people"}; value and ci are None for a group
        without slices.
    """
    rows = scored(logits)
    labels, patients = np.asarray(labels, dtype=np.int64)[rows], np.asarray(patients)[rows]
    groups = np.asarray(groups)
    member = np.eye(groups.max() + 1)[groups]
    truth = groups[labels]
    right = (probabilities(np.asarray(logits)[rows]) @ member).argmax(axis=1) == truth
    return _share_by_group(right, truth, len(member.T), labels, patients, n_boot, seed)


# -- from flags ------------------------------------------------------------------------------------


def score_robust(
    four: np.ndarray,
    three: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> Scores:
    """Robust scores from flags: whether each image's four-class and three-class decision withstood
    every attack.

    Args:
        four, three: bool (N,); a clean error is not robust. Numbers instead of flags give their
            means, with intervals inside the range of the numbers and without exact bounds, which
            are those of shares.

    Returns:
        as `intervals`: balanced_accuracy_3 (mean over three classes of the robust share),
            balanced_accuracy, accuracy.
    """
    four, three = np.asarray(four), np.asarray(three)
    merged, plain = flag_views(four, three, labels, patients)

    def widths(weights: np.ndarray) -> Widths:
        return view_widths(merged, weights) | view_widths(plain, weights)

    statistic, classes = view_statistic(merged, plain), classes_of_patients(plain)
    if four.dtype == three.dtype == bool:
        return intervals(Problem(statistic, widths, classes, len(four)), n_boot, seed)
    numbers = np.concatenate([four, three]).astype(np.float64)
    limits = (float(numbers.min()), float(numbers.max())) if len(numbers) else (0.0, 0.0)
    ranges = dict.fromkeys(("balanced_accuracy_3", "balanced_accuracy", "accuracy"), limits)
    problem = Problem(statistic, lambda weights: {}, classes, len(four), ranges)
    return intervals(problem, n_boot, seed)


def score_flags(
    flags: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    n_classes: int,
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> Scores:
    """Scores of any classes from flags, bool (N,): whether each decision is right, or robust.

    Returns:
        as `intervals`: balanced_accuracy (the mean over classes of the share of true flags),
            accuracy.
    """
    flags, labels = np.asarray(flags, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    identity, patient = np.unique(np.asarray(patients), return_inverse=True)
    counts = flag_counts(flags, labels, patient, (len(identity), n_classes))
    view = View(counts, np.zeros(n_classes, dtype=np.int64), _share_scores)
    problem = Problem(
        view_statistic(view),
        lambda weights: view_widths(view, weights),
        classes_of_patients(view),
        len(flags),
    )
    return intervals(problem, n_boot, seed)


def share_by_class(
    flags: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> list[dict]:
    """The share of true flags (N,) in each of the four classes: {"value", "ci", "n_slices",
    "n_people"}."""
    return _share_by_group(flags, np.asarray(labels), 4, labels, patients, n_boot, seed)


def _share_by_group(
    flags: np.ndarray,
    group: np.ndarray,
    n_groups: int,
    labels: np.ndarray,
    patients: np.ndarray,
    n_boot: int,
    seed: int,
) -> list[dict]:
    flags, labels, patients = np.asarray(flags), np.asarray(labels), np.asarray(patients)
    shares = []
    for number in range(n_groups):
        rows = group == number
        found = score_robust(
            flags[rows], flags[rows], labels[rows], patients[rows], n_boot=n_boot, seed=seed
        )["accuracy"]
        size = {"n_slices": int(rows.sum()), "n_people": len(np.unique(patients[rows]))}
        shares.append({**found, **size})
    return shares


# -- what intervals need ---------------------------------------------------------------------------


def statistic_of(sums: Tally) -> Statistic:
    """The function from resampling weights (B, P) to the B values of every score."""
    diseased, healthy = sums.four[:, 1:].sum(axis=(1, 2)), sums.four[:, 0].sum(axis=1)
    of_patients = sums.four.sum(axis=(1, 2))

    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        pairs = (weights @ healthy) * (weights @ diseased)
        found = {
            **merged_scores(np.tensordot(weights, sums.three, axes=1)),
            **confusion_scores(np.tensordot(weights, sums.four, axes=1)),
            "auroc": ratio(((weights @ sums.wins) * weights).sum(axis=1), pairs),
            "ece": ratio(np.abs(weights @ sums.bins).sum(axis=1), weights @ of_patients),
        }
        return {name: found[name] for name in METRICS}

    return scores


def score_views(sums: Tally) -> tuple[View, View]:
    """The three-class and the four-class decisions as views."""
    three = View(sums.three, np.arange(3), merged_scores)
    return three, View(sums.four, np.arange(4), confusion_scores)


def view_statistic(*views: View) -> Statistic:
    """The function from resampling weights (B, P) to the B values of all scores of several
    views."""

    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for view in views:
            found |= view.scores(np.tensordot(weights, view.counts, axes=1))
        return found

    return scores


def classes_of_patients(view: View) -> np.ndarray:
    """The class of each patient (P,): that of most of the slices."""
    return view.counts.sum(axis=2).argmax(axis=1)


def flag_counts(
    flags: np.ndarray, labels: np.ndarray, patient: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """(P, K, 2): the sum of flags in [0, 1], and of what they lack to 1, by patient and class.

    Args:
        patient: (N,) numbers from 0. size: (P, K).
    """
    counts = np.zeros((*size, 2))
    np.add.at(counts, (patient, labels), np.column_stack([flags, 1.0 - flags]))
    return counts


def flag_views(
    four: np.ndarray, three: np.ndarray, labels: np.ndarray, patients: np.ndarray
) -> tuple[View, View]:
    """The views of three and of four classes of flags in [0, 1], each (N,); a true flag is the
    right decision (0)."""
    labels = np.asarray(labels, dtype=np.int64)
    identity, patient = np.unique(np.asarray(patients), return_inverse=True)
    four, three = np.asarray(four, dtype=np.float64), np.asarray(three, dtype=np.float64)
    merged = flag_counts(three, THREE[labels], patient, (len(identity), 3))
    counts = flag_counts(four, labels, patient, (len(identity), 4))
    return (
        View(merged, np.zeros(3, dtype=np.int64), merged_share_scores),
        View(counts, np.zeros(4, dtype=np.int64), _share_scores),
    )


def _share_scores(by_class: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of (slices with the flag, slices without) by class: sums (B, K, 2) to two scores, each
    (B,)."""
    return {
        "balanced_accuracy": mean_present(ratio(by_class[..., 0], by_class.sum(axis=-1))),
        "accuracy": ratio(by_class[..., 0].sum(axis=-1), by_class.sum(axis=(-2, -1))),
    }


def merged_share_scores(three: np.ndarray) -> dict[str, np.ndarray]:
    """The same of three classes: sums (B, 3, 2) to the score that is made of them."""
    return {"balanced_accuracy_3": mean_present(ratio(three[..., 0], three.sum(axis=-1)))}


def patient_pairs(sums: Tally) -> int:
    """The largest number of pairs of a Non and a diseased patient with every patient in one pair at
    most."""
    return min(int(side.any(axis=(1, 2)).sum()) for side in (sums.four[:, :1], sums.four[:, 1:]))


def auroc_widths(sums: Tally) -> np.ndarray:
    """Extra squared half-widths (2,) of an AUROC of exactly 0 or 1: the exact bound of patient
    pairs."""
    pairs = patient_pairs(sums)
    if not pairs:
        return np.zeros(2)
    healthy, diseased = sums.four[:, 0].sum(), sums.four[:, 1:].sum()
    auroc = sums.wins.sum() / (healthy * diseased)
    return np.array([auroc == 1, auroc == 0]) * no_event_bound(pairs) ** 2


def with_ece(widths: Widths) -> Widths:
    """ECE differs by at most the share of slices whose decision differs, in either direction."""
    if "accuracy" not in widths:
        return widths
    return widths | {"ece": np.full(2, widths["accuracy"].max())}
