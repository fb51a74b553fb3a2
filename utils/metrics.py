"""Scores and patient-clustered confidence intervals, from arrays alone.

Neighboring slices of one patient are nearly the same image, so every interval resamples *patients*, never
slices, and within each class, so that no resample loses a class. Of the n patients of a class n - 1 are drawn
and weighted by n / (n - 1), because n draws make an interval too narrow by the factor sqrt((n - 1) / n) (Rao
and Wu 1988, Journal of the American Statistical Association 83). Intervals are percentiles (BCa degenerates
near 100 %). All scores are sums over patients, so a resample is a row of weights and 2,000 of them are one
matrix product.

Resampling sees no variance where all or none of a class's patients are right, and too little where nearly all
are. So each class's share also has an exact interval (`exact_interval`), and what that adds to the resampled
one is carried through the score, one class at a time, and combined in quadrature (MOVER: Zou and Donner 2008,
Statistics in Medicine 27). The intervals hold the variance between patients; they do not hold that between
trainings (seeds).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

METRICS = (
    "balanced_accuracy_3",
    "balanced_accuracy",
    "accuracy",
    "auroc",
    "macro_f1",
    "qwk",
    "ece",
)
#: Mild and Moderate merged (a clinical rating of 1 or more): the headline decision, since Moderate is two people.
THREE = np.array([0, 1, 2, 2])
ECE_BINS = 15
#: Each side of a 95 % interval may miss this often.
TAIL = 0.025

Scores = dict[str, dict]
Statistic = Callable[[np.ndarray], dict[str, np.ndarray]]


# ------------------------------------------------------------------------------------------------- decisions


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
    """Whether the four-class and the three-class decision are right: two bool (N,) arrays, False on NaN rows."""
    labels = np.asarray(labels, dtype=np.int64)
    four, three = np.zeros((2, len(labels)), dtype=bool)
    rows = scored(logits)
    probability = probabilities(np.asarray(logits)[rows])
    four[rows] = np.argmax(np.asarray(logits)[rows], axis=1) == labels[rows]
    three[rows] = np.argmax(merge_classes(probability), axis=1) == THREE[labels[rows]]
    return four, three


def disease_margin(logits: np.ndarray) -> np.ndarray:
    """Log odds of "not Non", shape (N,): the score behind AUROC, finer than a saturated probability."""
    logits = np.asarray(logits, dtype=np.float64)
    top = logits[:, 1:].max(axis=1)
    return top + np.log(np.exp(logits[:, 1:] - top[:, None]).sum(axis=1)) - logits[:, 0]


def to_half(logits: np.ndarray) -> np.ndarray:
    """Logits minus their row maximum as float16, for the predictions file.

    The top entry is exactly 0 and every other one below it, so that the decision survives rounding also where two
    logits differ by less than float16 can tell. NaN rows (outside the declared set) stay NaN.
    """
    logits = np.asarray(logits, dtype=np.float64)
    rows = scored(logits)
    half = np.full(logits.shape, np.nan, dtype=np.float16)
    shifted = np.clip(logits[rows] - logits[rows].max(axis=1, keepdims=True), -6e4, -(2.0**-24))
    shifted[np.arange(len(shifted)), logits[rows].argmax(axis=1)] = 0
    half[rows] = shifted
    return half


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Counts, shape (4, 4): rows are true classes, columns the four-class decisions. NaN rows are left out."""
    rows = scored(logits)
    matrix = np.zeros((4, 4), dtype=np.int64)
    np.add.at(
        matrix,
        (np.asarray(labels, dtype=np.int64)[rows], np.asarray(logits)[rows].argmax(axis=1)),
        1,
    )
    return matrix


# --------------------------------------------------------------------------------------------- sums by person


@dataclass(frozen=True)
class Tally:
    """Everything the scores need, added up by person (P people, in sorted order of their ids).

    four (P, 4, 4) and three (P, 3, 3): confusion counts, true × decided. wins (P, P): over slice pairs (a Non slice of
    the row's person, a diseased slice of the column's), how often the diseased one scores higher, a tie counting half.
    bins (P, ECE_BINS): sum of (right − confidence) of the slices whose confidence falls in the bin.
    """

    four: np.ndarray
    three: np.ndarray
    wins: np.ndarray
    bins: np.ndarray

    @property
    def class_of_patient(self) -> np.ndarray:
        return self.four.sum(axis=2).argmax(axis=1)

    @property
    def slices(self) -> int:
        return int(self.four.sum())


def tally(logits: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> Tally:
    """Sums by person of (N, 4) logits; NaN rows are left out."""
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
    np.add.at(bins, (patient, _bin(confidence, ECE_BINS)), (decision == labels) - confidence)
    return Tally(
        four, three, _wins(disease_margin(logits), labels > 0, patient, len(identity)), bins
    )


def _bin(confidence: np.ndarray, bins: int) -> np.ndarray:
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def _wins(
    margin: np.ndarray, diseased: np.ndarray, patient: np.ndarray, n_patients: int
) -> np.ndarray:
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


# ------------------------------------------------------------------------------------- scores of weighted sums


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Element-wise quotient, NaN where the denominator is 0."""
    return np.divide(
        numerator,
        denominator,
        out=np.full(np.broadcast(numerator, denominator).shape, np.nan),
        where=denominator > 0,
    )


def _mean_present(values: np.ndarray) -> np.ndarray:
    """Row means over the entries that are defined; NaN for a row with none."""
    present = ~np.isnan(values)
    return _ratio(np.where(present, values, 0).sum(axis=-1), present.sum(axis=-1))


def _recall(confusion: np.ndarray) -> np.ndarray:
    return _ratio(np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(axis=-1))


def _macro_f1(confusion: np.ndarray) -> np.ndarray:
    true, decided = confusion.sum(axis=-1), confusion.sum(axis=-2)
    f1 = _ratio(2 * np.diagonal(confusion, axis1=-2, axis2=-1), true + decided)
    return _mean_present(np.where(true > 0, f1, np.nan))


def _qwk(confusion: np.ndarray) -> np.ndarray:
    penalty = (np.arange(4)[:, None] - np.arange(4)) ** 2
    chance = confusion.sum(axis=-1)[..., :, None] * confusion.sum(axis=-2)[..., None, :]
    observed = (penalty * confusion).sum(axis=(-2, -1)) * confusion.sum(axis=(-2, -1))
    return 1 - _ratio(observed, (penalty * chance).sum(axis=(-2, -1)))


def _confusion_scores(four: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of four-class confusion counts (B, 4, 4), each (B,)."""
    return {
        "balanced_accuracy": _mean_present(_recall(four)),
        "accuracy": _ratio(np.trace(four, axis1=-2, axis2=-1), four.sum(axis=(-2, -1))),
        "macro_f1": _macro_f1(four),
        "qwk": _qwk(four),
    }


def _merged_scores(three: np.ndarray) -> dict[str, np.ndarray]:
    """The score of three-class confusion counts (B, 3, 3)."""
    return {"balanced_accuracy_3": _mean_present(_recall(three))}


def _statistic(sums: Tally) -> Statistic:
    """The function from resampling weights (B, P) to the B values of every score."""
    diseased, healthy = sums.four[:, 1:].sum(axis=(1, 2)), sums.four[:, 0].sum(axis=1)
    of_patients = sums.four.sum(axis=(1, 2))

    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        pairs = (weights @ healthy) * (weights @ diseased)
        found = {
            **_merged_scores(np.tensordot(weights, sums.three, axes=1)),
            **_confusion_scores(np.tensordot(weights, sums.four, axes=1)),
            "auroc": _ratio(((weights @ sums.wins) * weights).sum(axis=1), pairs),
            "ece": _ratio(np.abs(weights @ sums.bins).sum(axis=1), weights @ of_patients),
        }
        return {name: found[name] for name in METRICS}

    return scores


# ----------------------------------------------------------------------------------------------- exact bounds


def exact_interval(hits: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Exact 95 % interval (low, high), in [0, 1], of a share of slices that come in patients.

    It is Clopper and Pearson's binomial interval with an effective number of independent slices, which is
    chosen so that the binomial variance is the one seen between patients (Korn and Graubard 1998, Survey
    Methodology 24). That number is the number of patients where all patients have the same share, such as 0
    or 1, since nothing is known there about how much patients differ. With one slice a patient it is Clopper
    and Pearson's interval itself.

    Args:
        hits, counts: (P,) by patient: slices for which something is true, and all slices; not all counts 0.
    """
    present = counts > 0
    hits, counts = hits[present], counts[present]
    share = hits.sum() / counts.sum()
    number = _effective_number(hits, counts)
    from scipy.stats import beta  # here, since reading records needs no scipy

    low = beta.ppf(TAIL, share * number, (1 - share) * number + 1) if hits.any() else 0.0
    high = (
        beta.ppf(1 - TAIL, share * number + 1, (1 - share) * number)
        if (hits < counts).any()
        else 1.0
    )
    return float(low), float(high)


def _effective_number(hits: np.ndarray, counts: np.ndarray) -> float:
    """How many independent slices tell as much about a share as these of (P,) patients do."""
    patients, total = len(counts), counts.sum()
    share = hits.sum() / total
    if np.ptp(hits / counts) < 1e-12:
        return float(patients)
    variance = ((hits - share * counts) ** 2).sum() / total**2 * patients / (patients - 1)
    # The slices of a patient are at best independent and at worst all alike.
    all_alike = total**2 / (counts**2).sum()
    return float(np.clip(share * (1 - share) / variance, all_alike, total))


def _no_event_bound(patients: int) -> float:
    """The upper exact bound of a share that was true of none of so many patients."""
    return float(1 - TAIL ** (1 / patients))


def _resampled_interval(draws: np.ndarray, value: float) -> tuple[float, float]:
    """The 95 % percentile interval of draws (B,), widened to contain the value (alone if there are none).

    Resampling biases ECE upwards, which could leave the value outside.
    """
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return value, value
    low, high = np.percentile(draws, [100 * TAIL, 100 * (1 - TAIL)])
    return min(float(low), value), max(float(high), value)


def _excess(wide: float, narrow: float) -> float:
    """What has to be added to one half-width, in quadrature, to make it at least as wide as another."""
    return math.sqrt(max(wide**2 - narrow**2, 0.0))


@dataclass(frozen=True)
class _View:
    """Slices counted by patient, true class and decision, and the scores that are made of their sums.

    counts: (P, K, C), P patients, K classes, C decisions.
    right: (K,) the decision that is right for each class.
    scores: from sums (B, K, C) to name → (B,).
    """

    counts: np.ndarray
    right: np.ndarray
    scores: Callable[[np.ndarray], dict[str, np.ndarray]]

    def of_class(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Right decisions and slices of a class by patient, each (P,)."""
        return self.counts[:, row, self.right[row]], self.counts[:, row].sum(axis=1)

    def wrong(self, row: int) -> list[int]:
        """The decisions that are wrong for a class."""
        return [cell for cell in range(self.counts.shape[2]) if cell != self.right[row]]

    def moved(self, row: int, share: float, cell: int) -> np.ndarray:
        """Sums (K, C) with that share of a class's slices, of whatever decision, moved to one decision."""
        sums = self.counts.sum(axis=0)
        sums[row] *= 1 - share
        sums[row, cell] += share * self.counts[:, row].sum()
        return sums


#: Extra squared half-widths of a score, downwards and upwards, shape (2,).
Widths = dict[str, np.ndarray]


def _class_widths(point: dict[str, np.ndarray], moved: list[dict[str, np.ndarray]]) -> Widths:
    """How far scores go down and up, squared, when slices of one class are moved in each of several ways."""
    widths = {}
    for name, value in point.items():
        changes = np.array([0.0, *(found[name][0] - value[0] for found in moved)])
        widths[name] = np.array([np.nanmin(changes), np.nanmax(changes)]) ** 2
    return widths


def _add(total: Widths, more: Widths) -> None:
    for name, widths in more.items():
        total[name] = total.get(name, 0) + widths


def _share_excess(hits: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """What the exact interval of a share adds to its resampled one, downwards and upwards."""
    value = float(hits.sum() / counts.sum())
    low, high = _resampled_interval(_ratio(weights @ hits, weights @ counts), value)
    exact_low, exact_high = exact_interval(hits, counts)
    return _excess(value - exact_low, value - low), _excess(exact_high - value, high - value)


def _view_widths(view: _View, weights: np.ndarray) -> Widths:
    """The extra squared half-widths of a view's scores, summed over classes.

    The share of a class's slices that its exact bound adds is moved to the right decision, or to the wrong
    one that changes a score most.
    """
    total: Widths = {}
    point = view.scores(view.counts.sum(axis=0)[None])
    for row in range(view.counts.shape[1]):
        hits, counts = view.of_class(row)
        if not counts.any():
            continue
        down, up = _share_excess(hits, counts, weights)
        share = hits.sum() / counts.sum()
        to_right = up / (1 - share) if share < 1 else 0.0
        # Where no decision is right, other wrong decisions may be unseen just as right ones are.
        to_wrong = down / share if share > 0 else up
        moves = [(to_right, view.right[row]), *((to_wrong, cell) for cell in view.wrong(row))]
        _add(
            total,
            _class_widths(
                point,
                [
                    view.scores(view.moved(row, min(moved, 1.0), cell)[None])
                    for moved, cell in moves
                    if moved > 0
                ],
            ),
        )
    return total


def _difference_excess(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], weights: np.ndarray
) -> tuple[float, float, float]:
    """A difference of two shares of the same patients, and what exact bounds add to it: (value, down, up).

    The difference is the mean of its positive parts minus that of its negative parts; each has an exact
    interval, which are combined by MOVER. Where no patient differs this is the bound of no discordant patient
    among n.
    """
    both = (first[1] > 0) & (second[1] > 0)
    if not both.any():
        return 0.0, 0.0, 0.0
    counts = np.where(both, (first[1] + second[1]) / 2, 0)
    own = _ratio(first[0], first[1]) - _ratio(second[0], second[1])
    gain, loss = (counts * np.nan_to_num(np.maximum(sign * own, 0)) for sign in (1, -1))
    mean_gain, mean_loss = gain.sum() / counts.sum(), loss.sum() / counts.sum()
    gains, losses = exact_interval(gain, counts), exact_interval(loss, counts)
    value = float(mean_gain - mean_loss)
    low, high = _resampled_interval(_ratio(weights @ (gain - loss), weights @ counts), value)
    down = math.hypot(mean_gain - gains[0], losses[1] - mean_loss)
    up = math.hypot(gains[1] - mean_gain, mean_loss - losses[0])
    return value, _excess(down, value - low), _excess(up, high - value)


def _difference_widths(first: _View, second: _View, weights: np.ndarray) -> Widths:
    """`_view_widths` of first minus second: pairs of decisions on the same patients are moved."""
    total: Widths = {}
    scores = _difference(
        lambda view: first.scores(view[None]), lambda view: second.scores(view[None])
    )
    point = scores(first.counts.sum(axis=0), second.counts.sum(axis=0))
    for row in range(first.counts.shape[1]):
        value, down, up = _difference_excess(first.of_class(row), second.of_class(row), weights)
        higher = min(up / (1 - value), 1.0) if value < 1 else 0.0
        lower = min(down / (1 + value), 1.0) if value > -1 else 0.0
        moved = [
            scores(first.moved(row, higher, first.right[row]), second.moved(row, higher, cell))
            for cell in second.wrong(row)
        ]
        moved += [
            scores(first.moved(row, lower, cell), second.moved(row, lower, second.right[row]))
            for cell in first.wrong(row)
        ]
        _add(total, _class_widths(point, moved))
    return total


# ---------------------------------------------------------------------------------------------------- intervals


@lru_cache(maxsize=8)
def _weights(classes: bytes, n_boot: int, seed: int) -> np.ndarray:
    """(n_boot, P) resampling weights: n - 1 of the n patients of each class are drawn with replacement, and
    weighted so that every class keeps its size n; one patient alone is always drawn."""
    patient_class = np.frombuffer(classes, dtype=np.int64)
    generator = np.random.default_rng(seed)
    weights = np.zeros((n_boot, len(patient_class)))
    for label in np.unique(patient_class):
        members = np.flatnonzero(patient_class == label)
        drawn = max(len(members) - 1, 1)
        times = generator.multinomial(drawn, np.full(len(members), 1 / len(members)), n_boot)
        weights[:, members] = times * (len(members) / drawn)
    weights.setflags(write=False)
    return weights


@dataclass(frozen=True)
class _Problem:
    """Scores and what their intervals need.

    statistic: from weights (B, P) to name → (B,).
    widths: from weights (B, P) to the extra squared half-widths.
    patient_class: (P,) the class within which each patient is resampled.
    n: slices, told where a score is undefined.
    ranges: name → (lowest, highest) possible value, where it is not [0, 1].
    units: name → patients whose exact bound gives a width where nothing else does, where they are not those
        of the smallest class.
    """

    statistic: Statistic
    widths: Callable[[np.ndarray], Widths]
    patient_class: np.ndarray
    n: int
    ranges: dict[str, tuple[float, float]]
    runs: dict[str, int] = field(default_factory=dict)


def _intervals(problem: _Problem, n_boot: int, seed: int, *, test: bool = False) -> Scores:
    """Value on everybody and 95 % interval; null, with n, where a score is undefined.

    Args:
        n_boot: resamples; 0 where the scores are known without sampling (see `score`).
        test: whether to add "p", the two-sided p-value of the value 0.
    """
    patients = len(problem.patient_class)
    point = {
        name: float(values[0]) for name, values in problem.statistic(np.ones((1, patients))).items()
    }
    undefined = {"value": None, "ci": None, "n": problem.n}
    if n_boot == 0:
        return {
            name: undefined
            if np.isnan(value)
            else {"value": round(value, 6), "ci": None, "exact": True}
            for name, value in point.items()
        }
    weights = _weights(problem.patient_class.astype(np.int64).tobytes(), n_boot, seed)
    drawn = problem.statistic(weights)
    widths = problem.widths(weights) if patients else {}
    smallest = np.unique(problem.patient_class, return_counts=True)[1].min(initial=patients)
    result = {}
    for name, value in point.items():
        draws = drawn[name][~np.isnan(drawn[name])]
        if np.isnan(value) or not len(draws):
            result[name] = dict(undefined)
            continue
        low, high = _widened(
            _resampled_interval(draws, value),
            value,
            widths.get(name, np.zeros(2)),
            problem.ranges.get(name, (0.0, 1.0)),
            problem.runs.get(name, smallest),
        )
        result[name] = {"value": round(value, 6), "ci": [round(low, 6), round(high, 6)]}
        if test:
            result[name]["p"] = round(_p_value(draws, value, low, high), 6)
    return result


def _widened(
    interval: tuple[float, float],
    value: float,
    widths: np.ndarray,
    limits: tuple[float, float],
    patients: int,
) -> tuple[float, float]:
    """A resampled interval with its extra half-widths, inside the score's range.

    An interval that still has no width gets the share of the way to both ends of the range that the exact
    bound of so many patients allows.
    """
    lowest, highest = limits
    low = max(value - math.sqrt((value - interval[0]) ** 2 + widths[0]), lowest)
    high = min(value + math.sqrt((interval[1] - value) ** 2 + widths[1]), highest)
    if round(high, 6) == round(low, 6):
        share = _no_event_bound(patients)
        low, high = value - share * (value - lowest), value + share * (highest - value)
    return low, high


def _p_value(draws: np.ndarray, value: float, low: float, high: float) -> float:
    """Two-sided p-value of a difference of 0: twice the share of draws on the rarer side of 0 (Davison and
    Hinkley 1997, Bootstrap Methods and their Application, section 4.4), in (0, 1].

    Draws do not know of the exact bounds, so it is at least the one of a normal distribution with the
    interval's half-width towards 0: it is not below 0.05 where the interval contains 0.
    """
    draws = np.round(draws, 12)  # sums in another order must not turn a zero into a sign
    rarer = min((draws <= 0).sum(), (draws >= 0).sum())
    drawn = min(1.0, 2 * (rarer + 1) / (len(draws) + 1))
    towards_zero = value - low if value > 0 else high - value
    if towards_zero <= 0:
        return float(drawn)
    from scipy.stats import norm

    return float(max(drawn, 2 * norm.sf(norm.isf(TAIL) * abs(value) / towards_zero)))


def _views(sums: Tally) -> tuple[_View, _View]:
    """The three-class and the four-class decisions as views."""
    return _View(sums.three, np.arange(3), _merged_scores), _View(
        sums.four, np.arange(4), _confusion_scores
    )


def _patient_pairs(sums: Tally) -> int:
    """The largest number of pairs of a Non and a diseased patient with every patient in one pair at most."""
    return min(int(side.any(axis=(1, 2)).sum()) for side in (sums.four[:, :1], sums.four[:, 1:]))


def _auroc_widths(sums: Tally) -> np.ndarray:
    """Extra squared half-widths of an AUROC of exactly 0 or 1: the exact bound of patient pairs."""
    pairs = _patient_pairs(sums)
    if not pairs:
        return np.zeros(2)
    healthy, diseased = sums.four[:, 0].sum(), sums.four[:, 1:].sum()
    auroc = sums.wins.sum() / (healthy * diseased)
    return np.array([auroc == 1, auroc == 0]) * _no_event_bound(pairs) ** 2


def _with_ece(widths: Widths) -> Widths:
    """ECE differs by at most the share of slices whose decision differs, in either direction."""
    return (
        widths | {"ece": np.full(2, widths["accuracy"].max())} if "accuracy" in widths else widths
    )


def _score_problem(sums: Tally) -> _Problem:
    def widths(weights: np.ndarray) -> Widths:
        three, four = (_view_widths(view, weights) for view in _views(sums))
        return _with_ece(three | four) | {"auroc": _auroc_widths(sums)}

    return _Problem(
        _statistic(sums),
        widths,
        sums.class_of_patient,
        sums.slices,
        {"qwk": (-1.0, 1.0)},
        {"auroc": _patient_pairs(sums)},
    )


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
        people: (N,) ids; the unit of resampling.
        n_boot: resamples; 0 for an answer whose scores are known without sampling, such as the constant one.

    Returns:
        name → {"value", "ci": [low, high]}, all in [0, 1] but qwk in [-1, 1]; {"value": None, "ci": None, "n": N}
        where the score is undefined, such as AUROC with one side empty. With `n_boot` 0 a defined score is
        {"value", "ci": None, "exact": True}.
    """
    return _intervals(_score_problem(tally(logits, labels, patients)), n_boot, seed)


def by_patient(
    logits: np.ndarray, labels: np.ndarray, patients: np.ndarray, seeds: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One row per person and training seed: (log of the mean slice probability (M, 4), label (M,), person (M,)).

    Seeds are kept apart because their mean would be an ensemble that nobody evaluated.
    """
    rows = scored(logits)
    seeds = (
        np.zeros(len(rows), dtype=np.int64) if seeds is None else np.asarray(seeds, dtype=np.int64)
    )
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
    """`score` with one decision a person: the mean of the person's slice probabilities."""
    return score(*by_patient(logits, labels, patients, seeds), n_boot=n_boot, seed=seed)


def _share_scores(four: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of (slices with the flag, slices without) by class: sums (B, 4, 2) to two scores, each (B,)."""
    return {
        "balanced_accuracy": _mean_present(_ratio(four[..., 0], four.sum(axis=-1))),
        "accuracy": _ratio(four[..., 0].sum(axis=-1), four.sum(axis=(-2, -1))),
    }


def _merged_share_scores(three: np.ndarray) -> dict[str, np.ndarray]:
    """`_share_scores` of three classes: sums (B, 3, 2) to the score that is made of them."""
    return {"balanced_accuracy_3": _mean_present(_ratio(three[..., 0], three.sum(axis=-1)))}


def _flag_counts(
    flags: np.ndarray, labels: np.ndarray, patient: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """(P, K, 2): the sum of flags in [0, 1], and of what they lack to 1, by patient and class."""
    counts = np.zeros((*size, 2))
    np.add.at(counts, (patient, labels), np.column_stack([flags, 1.0 - flags]))
    return counts


def _flag_views(
    four: np.ndarray, three: np.ndarray, labels: np.ndarray, patients: np.ndarray
) -> tuple[_View, _View]:
    """The views of three and four classes of flags in [0, 1], each (N,); a flag is the right decision (0)."""
    labels = np.asarray(labels, dtype=np.int64)
    identity, patient = np.unique(np.asarray(patients), return_inverse=True)
    merged = _flag_counts(
        np.asarray(three, dtype=np.float64), THREE[labels], patient, (len(identity), 3)
    )
    counts = _flag_counts(np.asarray(four, dtype=np.float64), labels, patient, (len(identity), 4))
    return (
        _View(merged, np.zeros(3, dtype=np.int64), _merged_share_scores),
        _View(counts, np.zeros(4, dtype=np.int64), _share_scores),
    )


def _view_statistic(*views: _View) -> Statistic:
    """All scores of several views from resampling weights."""

    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        found = {}
        for view in views:
            found |= view.scores(np.tensordot(weights, view.counts, axes=1))
        return found

    return scores


def _patient_class(view: _View) -> np.ndarray:
    """The class of each patient (P,): that of most of the slices."""
    return view.counts.sum(axis=2).argmax(axis=1)


def score_robust(
    four: np.ndarray,
    three: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> Scores:
    """Worst-case scores from flags: whether each image's four-class and three-class decision withstood every attack.

    Args:
        four, three: bool (N,); a clean error counts as not standing. Numbers instead of flags give their
            means, with intervals inside the range of the numbers and without exact bounds, which are those of
            shares.

    Returns:
        balanced_accuracy_3 (mean over three classes of the share standing), balanced_accuracy, accuracy.
    """
    four, three = np.asarray(four), np.asarray(three)
    if four.dtype == three.dtype == bool:
        views = _flag_views(four, three, labels, patients)
        return _intervals(_flag_problem(views, len(four)), n_boot, seed)
    return _mean_scores(four, three, labels, patients, n_boot, seed)


def _flag_problem(views: tuple[_View, _View], n: int) -> _Problem:
    def widths(weights: np.ndarray) -> Widths:
        return _view_widths(views[0], weights) | _view_widths(views[1], weights)

    return _Problem(_view_statistic(*views), widths, _patient_class(views[1]), n, {})


def _mean_scores(
    four: np.ndarray,
    three: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    n_boot: int,
    seed: int,
) -> Scores:
    """`score_standing` of numbers: a mean is a sum as a share is, but its range is that of the numbers."""
    views = _flag_views(four, three, labels, patients)
    numbers = np.concatenate([four, three]).astype(np.float64)
    limits = (float(numbers.min()), float(numbers.max())) if len(numbers) else (0.0, 0.0)
    ranges = dict.fromkeys(("balanced_accuracy_3", "balanced_accuracy", "accuracy"), limits)
    problem = _Problem(
        _view_statistic(*views), lambda weights: {}, _patient_class(views[1]), len(four), ranges
    )
    return _intervals(problem, n_boot, seed)


def share_by_class(
    flags: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> list[dict]:
    """The share of true flags in each of the four classes with its interval, `n_slices` and `n_people`."""
    return _share_by_group(flags, np.asarray(labels), 4, labels, patients, n_boot, seed)


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

    By patient instead of by slice: `recalls(*by_person(logits, labels, people))`.

    Args:
        logits: (N, 4); rows of NaN are left out.
        groups: (4,) the group, from 0, that each of the four classes belongs to; the probabilities of a group
            are summed before the decision. The default is Non, Very mild, Mild or Moderate.

    Returns:
        for each group {"value", "ci", "n_slices", "n_people"}; value and ci are null for a group without
        slices.
    """
    rows = scored(logits)
    labels, patients = np.asarray(labels, dtype=np.int64)[rows], np.asarray(patients)[rows]
    groups = np.asarray(groups)
    member = np.eye(groups.max() + 1)[groups]
    truth = groups[labels]
    right = (probabilities(np.asarray(logits)[rows]) @ member).argmax(axis=1) == truth
    return _share_by_group(right, truth, len(member.T), labels, patients, n_boot, seed)


def _share_by_group(
    flags: np.ndarray,
    group: np.ndarray,
    n_groups: int,
    labels: np.ndarray,
    patients: np.ndarray,
    n_boot: int,
    seed: int,
) -> list[dict]:
    """`score_standing`'s accuracy within each group of rows, with `n_slices` and `n_people`."""
    flags, labels, patients, shares = (
        np.asarray(flags),
        np.asarray(labels),
        np.asarray(patients),
        [],
    )
    for index in range(n_groups):
        rows = group == index
        entry = score_robust(
            flags[rows], flags[rows], labels[rows], patients[rows], n_boot=n_boot, seed=seed
        )["accuracy"]
        shares.append(
            {**entry, "n_slices": int(rows.sum()), "n_people": len(np.unique(patients[rows]))}
        )
    return shares


# ------------------------------------------------------------------------------------------------ differences


def _difference(
    first: Callable[..., dict[str, np.ndarray]], second: Callable[..., dict[str, np.ndarray]]
) -> Callable[..., dict[str, np.ndarray]]:
    """First minus second, each of its own argument, or both of the same where one is given."""

    def scores(*arguments: np.ndarray) -> dict[str, np.ndarray]:
        a, b = first(arguments[0]), second(arguments[-1])
        return {name: a[name] - b[name] for name in a}

    return scores


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> Scores:
    """First model minus second on the same images, every score with an interval over the *same* resampled
    patients.

    Args:
        first, second: (N, 4) logits of the two models, row by row of the same images; a row that is NaN in either is
            left out of both.

    Returns:
        as `score`, in [-1, 1] (qwk in [-2, 2]), with "p": the two-sided bootstrap p-value of no difference;
        at least 2 / (n_boot + 1), so verdicts over many comparisons (`holm`) need more resamples than
        intervals.
    """
    rows = scored(first) & scored(second)
    a, b = (
        tally(np.asarray(x)[rows], np.asarray(labels)[rows], np.asarray(patients)[rows])
        for x in (first, second)
    )

    def widths(weights: np.ndarray) -> Widths:
        three, four = (
            _difference_widths(*pair, weights) for pair in zip(_views(a), _views(b), strict=True)
        )
        return _with_ece(three | four) | {"auroc": _auroc_widths(a) + _auroc_widths(b)[::-1]}

    ranges = dict.fromkeys(METRICS, (-1.0, 1.0)) | {"qwk": (-2.0, 2.0)}
    problem = _Problem(
        _difference(_statistic(a), _statistic(b)),
        widths,
        a.class_of_patient,
        a.slices,
        ranges,
        {"auroc": _patient_pairs(a)},
    )
    return _intervals(problem, n_boot, seed, test=True)


def paired_robust_difference(
    first: tuple[np.ndarray, np.ndarray],
    second: tuple[np.ndarray, np.ndarray],
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> Scores:
    """`paired_difference` of worst-case scores; each model gives its (four, three) flags as in `score_standing`."""
    return robust_difference(
        (*first, labels, patients), (*second, labels, patients), n_boot=n_boot, seed=seed
    )


def robust_difference(
    first: tuple[np.ndarray, ...],
    second: tuple[np.ndarray, ...],
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> Scores:
    """First minus second of the scores of `score_standing`, on images of the *same patients*, who are
    resampled in both at once; with "p" as in `paired_difference`.

    Args:
        first, second: (four, three, labels, people), each (N,) and (M,), flags; the images may be others.

    Raises:
        ValueError: the patients of the two differ.
    """
    if not np.array_equal(np.unique(first[3]), np.unique(second[3])):
        raise ValueError("Differences are resampled over people, so both sides need the same ones.")
    sides = [
        _flag_views(np.asarray(four, dtype=bool), np.asarray(three, dtype=bool), labels, patients)
        for four, three, labels, patients in (first, second)
    ]

    def widths(weights: np.ndarray) -> Widths:
        three, four = (_difference_widths(*pair, weights) for pair in zip(*sides, strict=True))
        return three | four

    statistic = _difference(*(_view_statistic(*views) for views in sides))
    ranges = dict.fromkeys(("balanced_accuracy_3", "balanced_accuracy", "accuracy"), (-1.0, 1.0))
    problem = _Problem(statistic, widths, _patient_class(sides[0][1]), len(first[2]), ranges)
    return _intervals(problem, n_boot, seed, test=True)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values adjusted for being several, in the given order (Holm 1979, Scandinavian Journal of Statistics
    6).

    Deciding by the adjusted values keeps the chance of any false verdict among all of them below the level,
    whatever their dependence.

    Args:
        p_values: (M,), each in [0, 1].

    Raises:
        ValueError: a value is outside [0, 1] or not a number.
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    if not ((p_values >= 0) & (p_values <= 1)).all():
        raise ValueError(f"p-values lie between 0 and 1, but these do not: {p_values.tolist()}.")
    order = np.argsort(p_values, kind="stable")
    scaled = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted


# --------------------------------------------------------------------------------------------------- calibration


def fit_temperature(
    logits: np.ndarray, labels: np.ndarray, bounds: tuple[float, float] = (0.05, 20.0)
) -> float:
    """The temperature that minimises cross-entropy of logits / temperature (Guo et al. 2017, arXiv:1706.04599).

    Cross-entropy is convex in 1/temperature, so its slope is bisected; on a separable set the search ends where the
    slope vanishes in floating point.

    Args:
        logits: (N, 4) on *validation* images: a temperature chosen on test images would be fitted to them.
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
    for _ in range(60):
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
    """The filled confidence bins from low to high, each {"confidence", "accuracy", "ci", "n_slices"}.

    `confidence` is the bin's mean top probability; the interval of `accuracy` resamples the patients with
    slices in it.
    """
    rows = scored(logits)
    logits, labels = np.asarray(logits)[rows], np.asarray(labels, dtype=np.int64)[rows]
    patients = np.asarray(patients)[rows]
    confidence = probabilities(logits).max(axis=1, initial=0)
    of_bin, curve = _bin(confidence, bins), []
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


# ------------------------------------------------------------------------------------------------ two decisions

#: Columns of two flags' joint outcomes: neither is true, only the second, only the first, both.
NEITHER, SECOND, FIRST, BOTH = range(4)


def _error_correlation(outcomes: np.ndarray) -> dict[str, np.ndarray]:
    """Pearson's correlation of two flags from sums (B, classes, 4) of their joint outcomes."""
    counts = outcomes.sum(axis=1)
    n, both = counts.sum(axis=1), counts[:, BOTH]
    first, second = counts[:, FIRST] + both, counts[:, SECOND] + both
    spread = np.sqrt(np.maximum(first * (n - first) * second * (n - second), 0))
    return {"error_correlation": _ratio(n * both - first * second, spread)}


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
    """Disagreement of two models and the correlation of their errors (Pearson's of two flags), with intervals
    over patients.

    Args:
        differ, first_wrong, second_wrong: bool (N,) a row: other answers; the first, the second model is wrong.
    """
    labels = np.asarray(labels, dtype=np.int64)
    identity, patient = np.unique(np.asarray(patients), return_inverse=True)
    outcome = 2 * np.asarray(first_wrong, dtype=np.int64) + np.asarray(second_wrong, dtype=np.int64)
    counts = np.zeros((len(identity), 4, 4))
    np.add.at(counts, (patient, labels, outcome), 1)
    view = _View(counts, np.full(4, NEITHER), _error_correlation)
    problem = _Problem(
        _view_statistic(view),
        lambda weights: _view_widths(view, weights),
        _patient_class(view),
        len(labels),
        {"error_correlation": (-1.0, 1.0)},
    )
    return {
        "disagreement": share(differ, labels, patients, n_boot=n_boot, seed=seed),
        **_intervals(problem, n_boot, seed),
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
) -> Scores:
    """How much of what each of two abilities had on clean images it keeps under an attack, and the first's
    share minus the second's.

    Args:
        first, second: (before, after), bool (N,) each, row by row of the same images.

    Returns:
        first, second: share of the rows with `before` that have `after` too; difference. Undefined where
            nothing was
        there before.
    """
    labels = np.asarray(labels, dtype=np.int64)
    identity, patient = np.unique(np.asarray(patients), return_inverse=True)
    size, views = (len(identity), 4), []
    for before, after in (first, second):
        rows = np.asarray(before, dtype=bool)
        kept = np.asarray(after, dtype=bool)[rows].astype(np.float64)
        counts = _flag_counts(kept, labels[rows], patient[rows], size)
        views.append(_View(counts, np.zeros(4, dtype=np.int64), _kept_scores))
    patient_class = np.zeros(len(identity), dtype=np.int64)
    patient_class[patient] = labels
    return _intervals(_kept_problem(*views, patient_class, len(labels)), n_boot, seed)


def _kept_scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """The share of all slices, of all classes, with the flag: sums (B, classes, 2) to (B,)."""
    return {"kept": _ratio(counts[..., 0].sum(axis=-1), counts.sum(axis=(-2, -1)))}


def _kept_problem(first: _View, second: _View, patient_class: np.ndarray, n: int) -> _Problem:
    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        shares = [_view_statistic(view)(weights)["kept"] for view in (first, second)]
        return {"first": shares[0], "second": shares[1], "difference": shares[0] - shares[1]}

    def widths(weights: np.ndarray) -> Widths:
        none = np.zeros(2)
        return {
            "first": _view_widths(first, weights).get("kept", none),
            "second": _view_widths(second, weights).get("kept", none),
            "difference": _difference_widths(first, second, weights).get("kept", none),
        }

    return _Problem(statistic, widths, patient_class, n, {"difference": (-1.0, 1.0)})


# ------------------------------------------------------------------------------------- abstention and conformal sets


def risk_coverage(
    logits: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    coverages: np.ndarray | None = None,
    n_boot: int = 2000,
    seed: int = 0,
) -> list[dict]:
    """Error among the most confident share of rows, for each share: {"coverage", "risk", "ci", "threshold", "n"}.

    The decision is the three-class one (`THREE`), the confidence its probability (El-Yaniv and Wiener 2010, JMLR 11). The
    interval resamples people with the threshold of the whole set held fixed.

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
    """Error among rows at least as confident as `threshold`: {"risk", "ci", "threshold", "n", "answered"}; under attack give
    the wrong answers and confidences of the attacked images and the threshold of the clean ones."""
    kept = np.asarray(confidence) >= threshold
    entry = {"threshold": float(threshold), "n": int(kept.sum()), "answered": float(kept.mean())}
    if not kept.any():
        return {"risk": None, "ci": None, **entry}
    found = share(
        np.asarray(wrong)[kept],
        np.asarray(labels)[kept],
        np.asarray(patients)[kept],
        n_boot=n_boot,
        seed=seed,
    )
    return {"risk": found["value"], "ci": found["ci"], **entry}


def conformal_threshold(logits: np.ndarray, labels: np.ndarray, alpha: float) -> float:
    """The score up to which a class enters a conformal set: the ⌈(n + 1)(1 − alpha)⌉-th smallest of 1 − p(true class) on
    calibration rows, over three classes (split conformal; Vovk et al. 2005). 1 (every class) where n is too small.

    Args:
        logits, labels: of people that took part in no other choice; their labels must be exchangeable with those tested.
    """
    probability = merge_classes(probabilities(logits))
    nonconformity = np.sort(
        1 - probability[np.arange(len(labels)), THREE[np.asarray(labels, dtype=np.int64)]]
    )
    place = math.ceil((len(labels) + 1) * (1 - alpha))
    return float(nonconformity[place - 1]) if place <= len(labels) else 1.0


def conformal_sets(logits: np.ndarray, threshold: float | np.ndarray) -> np.ndarray:
    """Which of the three classes each row's set holds, bool (N, 3), for one threshold or one a row."""
    return 1 - merge_classes(probabilities(logits)) <= np.asarray(threshold).reshape(-1, 1) + 1e-12


def cross_conformal(
    logits: np.ndarray, labels: np.ndarray, fold: np.ndarray, alpha: float, seed: int = 0
) -> np.ndarray:
    """A conformal threshold for each row (N,), calibrated on the *other half* of its own fold's test people.

    These people took part in no training, search or choice of epoch, and nobody is in the half that judges them. Halves are
    drawn at random within each fold and class.

    Args:
        logits: (N, 4), one row a person; labels, fold: (N,).
    """
    generator, half = np.random.default_rng(seed), np.zeros(len(labels), dtype=np.int64)
    for own in np.unique(fold):
        for label in np.unique(THREE[np.asarray(labels)]):
            rows = generator.permutation(
                np.flatnonzero((fold == own) & (THREE[np.asarray(labels)] == label))
            )
            half[rows] = (np.arange(len(rows)) + generator.integers(2)) % 2
    thresholds = np.ones(len(labels))
    for own in np.unique(fold):
        for side in (0, 1):
            judges, judged = (fold == own) & (half != side), (fold == own) & (half == side)
            if judges.any():
                thresholds[judged] = conformal_threshold(logits[judges], labels[judges], alpha)
    return thresholds
