"""Scores from logits and labels alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from utils import class_groups

METRICS = (
    "balanced_accuracy_3",
    "balanced_accuracy",
    "accuracy",
    "auroc",
    "macro_f1",
    "qwk",
    "ece",
)

#: Mild and Moderate merged (a clinical rating of 1 or more): the headline decision, since Moderate
#: is two patients.
THREE = class_groups.group_of_class(class_groups.THREE)

#: Bins of the expected calibration error, of equal width (Guo et al. 2017, arXiv:1706.04599).
ECE_BINS = 15

#: Name of a score → {"value", "ci", …}, ready for JSON.
Scores = dict[str, dict]


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax in float64, shape (N, 4); rows of NaN stay NaN."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = np.exp(shifted - shifted.max(axis=1, keepdims=True, initial=-np.inf))
    return shifted / shifted.sum(axis=1, keepdims=True)


def merge_classes(probability: np.ndarray) -> np.ndarray:
    """(N, 4) → (N, 3): the probabilities of Mild and Moderate summed."""
    return np.column_stack(
        [probability[:, 0], probability[:, 1], probability[:, 2] + probability[:, 3]]
    )


def scored(logits: np.ndarray) -> np.ndarray:
    """Which rows belong to the declared evaluation set: bool (N,), False where a logit is NaN."""
    return ~np.isnan(np.asarray(logits)).any(axis=1)


def correct(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether the four-class and the three-class decision are right: two bool (N,) arrays, False on
    NaN rows."""
    labels = np.asarray(labels, dtype=np.int64)
    four, three = np.zeros((2, len(labels)), dtype=bool)
    rows = scored(logits)
    probability = probabilities(np.asarray(logits)[rows])
    four[rows] = np.argmax(np.asarray(logits)[rows], axis=1) == labels[rows]
    three[rows] = np.argmax(merge_classes(probability), axis=1) == THREE[labels[rows]]
    return four, three


def disease_margin(logits: np.ndarray) -> np.ndarray:
    """Log odds of "not Non", shape (N,): the score behind AUROC, finer than a saturated
    probability."""
    logits = np.asarray(logits, dtype=np.float64)
    top = logits[:, 1:].max(axis=1)
    return top + np.log(np.exp(logits[:, 1:] - top[:, None]).sum(axis=1)) - logits[:, 0]


def to_half(logits: np.ndarray) -> np.ndarray:
    """Logits minus their row maximum as float16, for the predictions file.

    The top entry is exactly 0 and every other one below it, so that the decision survives rounding
    also where two logits differ by less than float16 resolves. NaN rows (outside the declared set)
    stay NaN.
    """
    logits = np.asarray(logits, dtype=np.float64)
    rows = scored(logits)
    half = np.full(logits.shape, np.nan, dtype=np.float16)
    shifted = np.clip(logits[rows] - logits[rows].max(axis=1, keepdims=True), -6e4, -(2.0**-24))
    shifted[np.arange(len(shifted)), logits[rows].argmax(axis=1)] = 0
    half[rows] = shifted
    return half


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Counts, shape (4, 4): rows are true classes, columns the four-class decisions. NaN rows are
    left out."""
    rows = scored(logits)
    matrix = np.zeros((4, 4), dtype=np.int64)
    np.add.at(
        matrix,
        (np.asarray(labels, dtype=np.int64)[rows], np.asarray(logits)[rows].argmax(axis=1)),
        1,
    )
    return matrix


@dataclass(frozen=True)
class Tally:
    """Everything the scores need, added up by patient (P patients, in sorted order of their ids).

    four (P, 4, 4), three (P, 3, 3): confusion counts, true × decided.
    wins (P, P): over slice pairs (a Non slice of the row's patient, a diseased slice of the
        column's), how often the diseased one scores higher, a tie counting half.
    bins (P, ECE_BINS): sum of (right − confidence) of the slices whose confidence falls in the bin.
    """

    four: np.ndarray
    three: np.ndarray
    wins: np.ndarray
    bins: np.ndarray

    @property
    def class_of_patient(self) -> np.ndarray:
        """The class of each patient (P,): that of most of the slices."""
        return self.four.sum(axis=2).argmax(axis=1)

    @property
    def n_slices(self) -> int:
        """The number of slices of all patients."""
        return int(self.four.sum())


def tally(logits: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> Tally:
    """Sums by patient of logits (N, 4); NaN rows are left out."""
    rows = scored(logits)
    logits, labels = np.asarray(logits)[rows], np.asarray(labels, dtype=np.int64)[rows]
    identity, patient = np.unique(np.asarray(patients)[rows], return_inverse=True)
    probability = probabilities(logits)
    decision = logits.argmax(axis=1) if len(logits) else np.zeros(0, dtype=np.int64)
    four, three = np.zeros((len(identity), 4, 4)), np.zeros((len(identity), 3, 3))
    np.add.at(four, (patient, labels, decision), 1)
    merged = merge_classes(probability)
    np.add.at(
        three, (patient, THREE[labels], merged.argmax(axis=1) if len(merged) else decision), 1
    )
    confidence = probability.max(axis=1, initial=0)
    bins = np.zeros((len(identity), ECE_BINS))
    np.add.at(
        bins, (patient, confidence_bin(confidence, ECE_BINS)), (decision == labels) - confidence
    )
    return Tally(
        four, three, _wins(disease_margin(logits), labels > 0, patient, len(identity)), bins
    )


def confidence_bin(confidence: np.ndarray, bins: int) -> np.ndarray:
    """The number (N,) of the bin, from 0, of confidences in [0, 1]; a bin holds its upper edge."""
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def _wins(
    margin: np.ndarray, diseased: np.ndarray, patient: np.ndarray, n_patients: int
) -> np.ndarray:
    """`Tally.wins`: by sorting each Non patient's slices and looking up the place of every diseased
    slice among them."""
    wins = np.zeros((n_patients, n_patients))
    if diseased.all():
        return wins
    columns, high = patient[diseased], margin[diseased]
    order = np.argsort(patient[~diseased], kind="stable")
    owners, starts = np.unique(patient[~diseased][order], return_index=True)
    for owner, scores in zip(owners, np.split(margin[~diseased][order], starts[1:]), strict=True):
        scores = np.sort(scores)
        beaten = (
            np.searchsorted(scores, high, "left") + np.searchsorted(scores, high, "right")
        ) / 2
        wins[owner] = np.bincount(columns, beaten, n_patients)
    return wins


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Element-wise quotient, NaN where the denominator is 0."""
    return np.divide(
        numerator,
        denominator,
        out=np.full(np.broadcast(numerator, denominator).shape, np.nan),
        where=denominator > 0,
    )


def mean_present(values: np.ndarray) -> np.ndarray:
    """Row means over the entries that are defined; NaN for a row with none."""
    present = ~np.isnan(values)
    return ratio(np.where(present, values, 0).sum(axis=-1), present.sum(axis=-1))


def _recall(confusion: np.ndarray) -> np.ndarray:
    return ratio(np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(axis=-1))


def _macro_f1(confusion: np.ndarray) -> np.ndarray:
    true, decided = confusion.sum(axis=-1), confusion.sum(axis=-2)
    f1 = ratio(2 * np.diagonal(confusion, axis1=-2, axis2=-1), true + decided)
    return mean_present(np.where(true > 0, f1, np.nan))


def _qwk(confusion: np.ndarray) -> np.ndarray:
    penalty = (np.arange(4)[:, None] - np.arange(4)) ** 2
    chance = confusion.sum(axis=-1)[..., :, None] * confusion.sum(axis=-2)[..., None, :]
    observed = (penalty * confusion).sum(axis=(-2, -1)) * confusion.sum(axis=(-2, -1))
    return 1 - ratio(observed, (penalty * chance).sum(axis=(-2, -1)))


def confusion_scores(four: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of four-class confusion counts (B, 4, 4), each (B,)."""
    return {
        "balanced_accuracy": mean_present(_recall(four)),
        "accuracy": ratio(np.trace(four, axis1=-2, axis2=-1), four.sum(axis=(-2, -1))),
        "macro_f1": _macro_f1(four),
        "qwk": _qwk(four),
    }


def merged_scores(three: np.ndarray) -> dict[str, np.ndarray]:
    """The score of three-class confusion counts (B, 3, 3)."""
    return {"balanced_accuracy_3": mean_present(_recall(three))}
