"""Scores and patient-clustered confidence intervals, from arrays alone.

Neighbouring slices of one person are nearly the same image, so every interval resamples *people*, never slices, and
within each class, so that no resample loses a class. Intervals are percentiles (BCa degenerates near 100 %). All
scores are sums over people, so a resample is a row of whole-number weights and 2,000 of them are one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

METRICS = ("balanced_accuracy_3", "balanced_accuracy", "accuracy", "auroc", "macro_f1", "qwk", "ece")
#: Mild and Moderate merged (a clinical rating of 1 or more): the headline decision, since Moderate is two people.
THREE = np.array([0, 1, 2, 2])
ECE_BINS = 15

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
    return np.column_stack([probability[:, 0], probability[:, 1], probability[:, 2] + probability[:, 3]])


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
    shifted = np.clip(logits[rows] - logits[rows].max(axis=1, keepdims=True), -6e4, -2.0**-24)
    shifted[np.arange(len(shifted)), logits[rows].argmax(axis=1)] = 0
    half[rows] = shifted
    return half


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Counts, shape (4, 4): rows are true classes, columns the four-class decisions. NaN rows are left out."""
    rows = scored(logits)
    matrix = np.zeros((4, 4), dtype=np.int64)
    np.add.at(matrix, (np.asarray(labels, dtype=np.int64)[rows], np.asarray(logits)[rows].argmax(axis=1)), 1)
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
    def person_class(self) -> np.ndarray:
        return self.four.sum(axis=2).argmax(axis=1)

    @property
    def slices(self) -> int:
        return int(self.four.sum())


def tally(logits: np.ndarray, labels: np.ndarray, people: np.ndarray) -> Tally:
    """Sums by person of (N, 4) logits; NaN rows are left out."""
    rows = scored(logits)
    logits, labels = np.asarray(logits)[rows], np.asarray(labels, dtype=np.int64)[rows]
    identity, person = np.unique(np.asarray(people)[rows], return_inverse=True)
    probability = probabilities(logits)
    decision = logits.argmax(axis=1) if len(logits) else np.zeros(0, dtype=np.int64)
    four, three = np.zeros((len(identity), 4, 4)), np.zeros((len(identity), 3, 3))
    np.add.at(four, (person, labels, decision), 1)
    merged = merge_classes(probability)
    np.add.at(three, (person, THREE[labels], merged.argmax(axis=1) if len(merged) else decision), 1)
    confidence = probability.max(axis=1, initial=0)
    bins = np.zeros((len(identity), ECE_BINS))
    np.add.at(bins, (person, _bin(confidence, ECE_BINS)), (decision == labels) - confidence)
    return Tally(four, three, _wins(disease_margin(logits), labels > 0, person, len(identity)), bins)


def _bin(confidence: np.ndarray, bins: int) -> np.ndarray:
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def _wins(margin: np.ndarray, diseased: np.ndarray, person: np.ndarray, n_people: int) -> np.ndarray:
    wins = np.zeros((n_people, n_people))
    if diseased.all():
        return wins
    columns, high = person[diseased], margin[diseased]
    order = np.argsort(person[~diseased], kind="stable")
    owners, starts = np.unique(person[~diseased][order], return_index=True)
    for owner, scores in zip(owners, np.split(margin[~diseased][order], starts[1:]), strict=True):
        scores = np.sort(scores)
        beaten = (np.searchsorted(scores, high, "left") + np.searchsorted(scores, high, "right")) / 2
        wins[owner] = np.bincount(columns, beaten, n_people)
    return wins


# ------------------------------------------------------------------------------------- scores of weighted sums

def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Element-wise quotient, NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(np.broadcast(numerator, denominator).shape, np.nan),
                     where=denominator > 0)


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


def _statistic(sums: Tally) -> Statistic:
    """The function from resampling weights (B, P) to the B values of every score."""
    diseased, healthy = sums.four[:, 1:].sum(axis=(1, 2)), sums.four[:, 0].sum(axis=1)
    of_people = sums.four.sum(axis=(1, 2))

    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        four = np.tensordot(weights, sums.four, axes=1)
        pairs = (weights @ healthy) * (weights @ diseased)
        total = weights @ of_people
        return {
            "balanced_accuracy_3": _mean_present(_recall(np.tensordot(weights, sums.three, axes=1))),
            "balanced_accuracy": _mean_present(_recall(four)),
            "accuracy": _ratio(np.trace(four, axis1=-2, axis2=-1), total),
            "auroc": _ratio(((weights @ sums.wins) * weights).sum(axis=1), pairs),
            "macro_f1": _macro_f1(four),
            "qwk": _qwk(four),
            "ece": _ratio(np.abs(weights @ sums.bins).sum(axis=1), total),
        }
    return scores


# ---------------------------------------------------------------------------------------------------- intervals

@lru_cache(maxsize=16)
def _weights(classes: bytes, n_boot: int, seed: int) -> np.ndarray:
    """(n_boot, P) whole numbers: how often each person is drawn, with replacement, from the people of their class."""
    person_class = np.frombuffer(classes, dtype=np.int64)
    generator = np.random.default_rng(seed)
    weights = np.zeros((n_boot, len(person_class)))
    for label in np.unique(person_class):
        members = np.flatnonzero(person_class == label)
        weights[:, members] = generator.multinomial(len(members), np.full(len(members), 1 / len(members)), n_boot)
    weights.setflags(write=False)
    return weights


def _intervals(statistic: Statistic, person_class: np.ndarray, n: int, n_boot: int, seed: int) -> Scores:
    """Value on everybody and 95 % percentile interval over resamples; null, with n, where a score is undefined.

    An interval is widened to contain its value: resampling biases ECE upwards, which could leave the value outside.
    """
    point = statistic(np.ones((1, len(person_class))))
    drawn = statistic(_weights(person_class.astype(np.int64).tobytes(), n_boot, seed))
    result = {}
    for name, values in point.items():
        value, draws = float(values[0]), drawn[name][~np.isnan(drawn[name])]
        if np.isnan(value) or not len(draws):
            result[name] = {"value": None, "ci": None, "n": n}
            continue
        low, high = map(float, np.percentile(draws, [2.5, 97.5]))
        result[name] = {"value": round(value, 6), "ci": [round(min(low, value), 6), round(max(high, value), 6)]}
    return result


def score(logits: np.ndarray, labels: np.ndarray, people: np.ndarray, *, n_boot: int = 2000, seed: int = 0) -> Scores:
    """Every score in `METRICS` with its interval.

    Args:
        logits: (N, 4); rows of NaN are outside the declared set and left out.
        labels: (N,) in 0..3. A class that is absent is left out of balanced accuracy and macro-F1.
        people: (N,) ids; the unit of resampling.

    Returns:
        name → {"value", "ci": [low, high]}, all in [0, 1] but qwk in [-1, 1]; {"value": None, "ci": None, "n": N}
        where the score is undefined, such as AUROC with one side empty.
    """
    sums = tally(logits, labels, people)
    return _intervals(_statistic(sums), sums.person_class, sums.slices, n_boot, seed)


def by_person(logits: np.ndarray, labels: np.ndarray, people: np.ndarray,
              seeds: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One row per person and training seed: (log of the mean slice probability (M, 4), label (M,), person (M,)).

    Seeds are kept apart because their mean would be an ensemble that nobody evaluated.
    """
    rows = scored(logits)
    seeds = np.zeros(len(rows), dtype=np.int64) if seeds is None else np.asarray(seeds, dtype=np.int64)
    keys, group = np.unique(np.column_stack([np.asarray(people, dtype=np.int64)[rows], seeds[rows]]), axis=0,
                            return_inverse=True)
    group = group.reshape(-1)
    mean, of_class = np.zeros((len(keys), 4)), np.zeros((len(keys), 4))
    np.add.at(mean, group, probabilities(np.asarray(logits)[rows]))
    np.add.at(of_class, (group, np.asarray(labels, dtype=np.int64)[rows]), 1)
    mean /= of_class.sum(axis=1, keepdims=True)
    return np.log(np.maximum(mean, 1e-300)), of_class.argmax(axis=1), keys[:, 0]


def score_people(logits: np.ndarray, labels: np.ndarray, people: np.ndarray, *, seeds: np.ndarray | None = None,
                 n_boot: int = 2000, seed: int = 0) -> Scores:
    """`score` with one decision a person: the mean of the person's slice probabilities."""
    return score(*by_person(logits, labels, people, seeds), n_boot=n_boot, seed=seed)


def _standing_statistic(four: np.ndarray, three: np.ndarray, labels: np.ndarray,
                        people: np.ndarray) -> tuple[Statistic, np.ndarray]:
    labels = np.asarray(labels, dtype=np.int64)
    identity, person = np.unique(np.asarray(people), return_inverse=True)
    n, up, up_three = np.zeros((len(identity), 4)), np.zeros((len(identity), 4)), np.zeros((len(identity), 3))
    np.add.at(n, (person, labels), 1)
    np.add.at(up, (person, labels), np.asarray(four, dtype=np.float64))
    np.add.at(up_three, (person, THREE[labels]), np.asarray(three, dtype=np.float64))
    n_three = np.column_stack([n[:, 0], n[:, 1], n[:, 2] + n[:, 3]])

    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {"balanced_accuracy_3": _mean_present(_ratio(weights @ up_three, weights @ n_three)),
                "balanced_accuracy": _mean_present(_ratio(weights @ up, weights @ n)),
                "accuracy": _ratio((weights @ up).sum(axis=1), (weights @ n).sum(axis=1))}
    return scores, n.argmax(axis=1)


def score_standing(four: np.ndarray, three: np.ndarray, labels: np.ndarray, people: np.ndarray, *,
                   n_boot: int = 2000, seed: int = 0) -> Scores:
    """Worst-case scores from flags: whether each image's four-class and three-class decision withstood every attack.

    Args:
        four, three: bool (N,); a clean error counts as not standing.

    Returns:
        balanced_accuracy_3 (mean over three classes of the share standing), balanced_accuracy, accuracy.
    """
    statistic, person_class = _standing_statistic(four, three, labels, people)
    return _intervals(statistic, person_class, len(labels), n_boot, seed)


def share_by_class(flags: np.ndarray, labels: np.ndarray, people: np.ndarray, *, n_boot: int = 2000,
                   seed: int = 0) -> list[dict]:
    """The share of true flags in each of the four classes with its interval, `n_slices` and `n_people`."""
    labels, people, shares = np.asarray(labels), np.asarray(people), []
    for label in range(4):
        rows = labels == label
        entry = score_standing(flags[rows], flags[rows], labels[rows], people[rows], n_boot=n_boot,
                               seed=seed)["accuracy"]
        shares.append({**entry, "n_slices": int(rows.sum()), "n_people": len(np.unique(people[rows]))})
    return shares


def _difference(first: Statistic, second: Statistic) -> Statistic:
    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        a, b = first(weights), second(weights)
        return {name: a[name] - b[name] for name in a}
    return scores


def paired_difference(first: np.ndarray, second: np.ndarray, labels: np.ndarray, people: np.ndarray, *,
                      n_boot: int = 2000, seed: int = 0) -> Scores:
    """First model minus second on the same images, every score with an interval over the *same* resampled people.

    Args:
        first, second: (N, 4) logits of the two models, row by row of the same images; a row that is NaN in either is
            left out of both.
    """
    rows = scored(first) & scored(second)
    a, b = (tally(np.asarray(x)[rows], np.asarray(labels)[rows], np.asarray(people)[rows]) for x in (first, second))
    return _intervals(_difference(_statistic(a), _statistic(b)), a.person_class, a.slices, n_boot, seed)


def paired_standing_difference(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray],
                               labels: np.ndarray, people: np.ndarray, *, n_boot: int = 2000, seed: int = 0) -> Scores:
    """`paired_difference` of worst-case scores; each model gives its (four, three) flags as in `score_standing`."""
    return standing_difference((*first, labels, people), (*second, labels, people), n_boot=n_boot, seed=seed)


def standing_difference(first: tuple[np.ndarray, ...], second: tuple[np.ndarray, ...], *, n_boot: int = 2000, seed: int = 0) -> Scores:
    """First minus second of the scores of `score_standing`, on images of the *same people*, who are resampled in both at once.

    Args:
        first, second: (four, three, labels, people), each (N,) and (M,); the images may be others.

    Raises:
        ValueError: the people of the two differ.
    """
    if not np.array_equal(np.unique(first[3]), np.unique(second[3])):
        raise ValueError("Differences are resampled over people, so both sides need the same ones.")
    (a, person_class), (b, _) = _standing_statistic(*first), _standing_statistic(*second)
    return _intervals(_difference(a, b), person_class, len(first[2]), n_boot, seed)


# --------------------------------------------------------------------------------------------------- calibration

def fit_temperature(logits: np.ndarray, labels: np.ndarray, bounds: tuple[float, float] = (0.05, 20.0)) -> float:
    """The temperature that minimises cross-entropy of logits / temperature (Guo et al. 2017, arXiv:1706.04599).

    Cross-entropy is convex in 1/temperature, so its slope is bisected; on a separable set the search ends where the
    slope vanishes in floating point.

    Args:
        logits: (N, 4) on *validation* images: a temperature chosen on test images would be fitted to them.
    """
    rows = scored(logits)
    logits, labels = np.asarray(logits, dtype=np.float64)[rows], np.asarray(labels, dtype=np.int64)[rows]
    truth = logits[np.arange(len(labels)), labels]

    def slope(inverse: float) -> float:
        return float(((probabilities(logits * inverse) * logits).sum(axis=1) - truth).mean())

    low, high = 1 / bounds[1], 1 / bounds[0]
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / (low * high) ** 0.5


def calibration_curve(logits: np.ndarray, labels: np.ndarray, people: np.ndarray, *, bins: int = 10,
                      n_boot: int = 2000, seed: int = 0) -> list[dict]:
    """The filled confidence bins from low to high, each {"confidence", "accuracy", "ci", "n_slices"}.

    `confidence` is the bin's mean top probability; the interval of `accuracy` resamples people.
    """
    rows = scored(logits)
    logits, labels = np.asarray(logits)[rows], np.asarray(labels, dtype=np.int64)[rows]
    identity, person = np.unique(np.asarray(people)[rows], return_inverse=True)
    confidence = probabilities(logits).max(axis=1, initial=0)
    right = logits.argmax(axis=1) == labels if len(logits) else np.zeros(0)
    of_bin = _bin(confidence, bins)
    n, hits = np.zeros((len(identity), bins)), np.zeros((len(identity), bins))
    np.add.at(n, (person, of_bin), 1)
    np.add.at(hits, (person, of_bin), right)
    person_class = np.zeros(len(identity), dtype=np.int64)
    person_class[person] = labels
    drawn = _weights(person_class.tobytes(), n_boot, seed)
    shares = _ratio(drawn @ hits, drawn @ n)
    curve = []
    for index in np.flatnonzero(n.sum(axis=0)):
        accuracy = hits[:, index].sum() / n[:, index].sum()
        low, high = np.nanpercentile(shares[:, index], [2.5, 97.5])
        curve.append({"confidence": float(confidence[of_bin == index].mean()), "accuracy": float(accuracy),
                      "ci": [float(min(low, accuracy)), float(max(high, accuracy))],
                      "n_slices": int(n[:, index].sum())})
    return curve


# ------------------------------------------------------------------------------------------------ two decisions

def pair_scores(differ: np.ndarray, first_wrong: np.ndarray, second_wrong: np.ndarray, labels: np.ndarray, people: np.ndarray, *,
                n_boot: int = 2000, seed: int = 0) -> Scores:
    """Disagreement of two models and the correlation of their errors (Pearson's of two flags), with intervals over people.

    Args:
        differ, first_wrong, second_wrong: bool (N,) a row: other answers; the first, the second model is wrong.
    """
    a, b = np.asarray(first_wrong, dtype=float), np.asarray(second_wrong, dtype=float)
    columns = np.column_stack([np.ones(len(a)), np.asarray(differ, dtype=float), a, b, a * b])
    sums, person_class = _sums_by_person(columns, labels, people)

    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        n, unlike, wrong_a, wrong_b, both = (weights @ sums).T
        spread = np.sqrt(np.maximum(wrong_a * (n - wrong_a) * wrong_b * (n - wrong_b), 0))
        return {"disagreement": _ratio(unlike, n), "error_correlation": _ratio(n * both - wrong_a * wrong_b, spread)}
    return _intervals(scores, person_class, len(a), n_boot, seed)


def share(flags: np.ndarray, labels: np.ndarray, people: np.ndarray, *, n_boot: int = 2000, seed: int = 0) -> dict:
    """The share of true flags among all rows with its interval over people."""
    flags = np.asarray(flags, dtype=float)
    sums, person_class = _sums_by_person(np.column_stack([np.ones(len(flags)), flags]), labels, people)

    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        n, up = (weights @ sums).T
        return {"share": _ratio(up, n)}
    return _intervals(scores, person_class, len(flags), n_boot, seed)["share"]


def kept_shares(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], labels: np.ndarray, people: np.ndarray, *,
                n_boot: int = 2000, seed: int = 0) -> Scores:
    """How much of what each of two abilities had on clean images it keeps under an attack, and the first's share minus the second's.

    Args:
        first, second: (before, after), bool (N,) each, row by row of the same images.

    Returns:
        first, second: share of the rows with `before` that have `after` too; difference. Undefined where nothing was there before.
    """
    flags = [flag for before, after in (first, second)
             for flag in (np.asarray(before, bool), np.asarray(before, bool) & np.asarray(after, bool))]
    sums, person_class = _sums_by_person(np.column_stack(flags).astype(float), labels, people)

    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        had, keeps, had_too, keeps_too = (weights @ sums).T
        shares = _ratio(keeps, had), _ratio(keeps_too, had_too)
        return {"first": shares[0], "second": shares[1], "difference": shares[0] - shares[1]}
    return _intervals(scores, person_class, len(labels), n_boot, seed)


def _sums_by_person(columns: np.ndarray, labels: np.ndarray, people: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(columns (N, K) summed by person (P, K), class of each person (P,))."""
    identity, person = np.unique(np.asarray(people), return_inverse=True)
    sums, of_class = np.zeros((len(identity), columns.shape[1])), np.zeros((len(identity), 4))
    np.add.at(sums, person, columns)
    np.add.at(of_class, (person, np.asarray(labels, dtype=np.int64)), 1)
    return sums, of_class.argmax(axis=1)


# ------------------------------------------------------------------------------------- abstention and conformal sets

def risk_coverage(logits: np.ndarray, labels: np.ndarray, people: np.ndarray, *, coverages: np.ndarray | None = None,
                  n_boot: int = 2000, seed: int = 0) -> list[dict]:
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
        curve.append({"coverage": float(coverage),
                      **selective_risk(wrong, confidence, threshold, labels, people, n_boot=n_boot, seed=seed)})
    return curve


def selective_risk(wrong: np.ndarray, confidence: np.ndarray, threshold: float, labels: np.ndarray, people: np.ndarray, *,
                   n_boot: int = 2000, seed: int = 0) -> dict:
    """Error among rows at least as confident as `threshold`: {"risk", "ci", "threshold", "n", "answered"}; under attack give
    the wrong answers and confidences of the attacked images and the threshold of the clean ones."""
    kept = np.asarray(confidence) >= threshold
    entry = {"threshold": float(threshold), "n": int(kept.sum()), "answered": float(kept.mean())}
    if not kept.any():
        return {"risk": None, "ci": None, **entry}
    found = share(np.asarray(wrong)[kept], np.asarray(labels)[kept], np.asarray(people)[kept], n_boot=n_boot, seed=seed)
    return {"risk": found["value"], "ci": found["ci"], **entry}


def conformal_threshold(logits: np.ndarray, labels: np.ndarray, alpha: float) -> float:
    """The score up to which a class enters a conformal set: the ⌈(n + 1)(1 − alpha)⌉-th smallest of 1 − p(true class) on
    calibration rows, over three classes (split conformal; Vovk et al. 2005). 1 (every class) where n is too small.

    Args:
        logits, labels: of people that took part in no other choice; their labels must be exchangeable with those tested.
    """
    probability = merge_classes(probabilities(logits))
    nonconformity = np.sort(1 - probability[np.arange(len(labels)), THREE[np.asarray(labels, dtype=np.int64)]])
    place = math.ceil((len(labels) + 1) * (1 - alpha))
    return float(nonconformity[place - 1]) if place <= len(labels) else 1.0


def conformal_sets(logits: np.ndarray, threshold: float | np.ndarray) -> np.ndarray:
    """Which of the three classes each row's set holds, bool (N, 3), for one threshold or one a row."""
    return 1 - merge_classes(probabilities(logits)) <= np.asarray(threshold).reshape(-1, 1) + 1e-12


def cross_conformal(logits: np.ndarray, labels: np.ndarray, fold: np.ndarray, alpha: float, seed: int = 0) -> np.ndarray:
    """A conformal threshold for each row (N,), calibrated on the *other half* of its own fold's test people.

    These people took part in no training, search or choice of epoch, and nobody is in the half that judges them. Halves are
    drawn at random within each fold and class.

    Args:
        logits: (N, 4), one row a person; labels, fold: (N,).
    """
    generator, half = np.random.default_rng(seed), np.zeros(len(labels), dtype=np.int64)
    for own in np.unique(fold):
        for label in np.unique(THREE[np.asarray(labels)]):
            rows = generator.permutation(np.flatnonzero((fold == own) & (THREE[np.asarray(labels)] == label)))
            half[rows] = (np.arange(len(rows)) + generator.integers(2)) % 2
    thresholds = np.ones(len(labels))
    for own in np.unique(fold):
        for side in (0, 1):
            judges, judged = (fold == own) & (half != side), (fold == own) & (half == side)
            if judges.any():
                thresholds[judged] = conformal_threshold(logits[judges], labels[judges], alpha)
    return thresholds
