"""Paired comparisons between records: networks against controls, and against their clean
counterparts.

Differences are first minus second, on the same images, with intervals over the same resampled
patients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from utils import metrics
from utils.evaluation.records import Records, robust_decisions
from utils.evaluation.rows import CONSTANT, TableRow
from utils.evaluation.schema import Record, Rows, Score, Scores, attacks_of, clean_of
from utils.utils_funcs import BACKBONES, MODELS

#: Controls that networks are compared with, and the one whose robust accuracy is exact.
RIVALS = ("linear_32", "robust_linear_32", "atrophy_scan", "kernel_ridge_16")
EXACT_CONTROL = "robust_linear_32"

#: Corrected p-values need more resamples than an interval.
N_BOOT = 10_000

#: A corrected p-value below this decides.
LEVEL = 0.05

#: The eps at which networks are compared with the control whose robust accuracy is exact.
SWEEP = ("1/255", "2/255", "4/255", "8/255")

#: The eps at which the probe compared what an attack leaves of the patient and of the diagnosis.
PROBE_EPS = "1/255"

#: What a corrected comparison says of the first of its two.
Verdict = Literal["better", "undecided", "worse"]


@dataclass(frozen=True)
class Comparison:
    """One difference of a table.

    eps: None of a difference on clean images.
    score: the difference with its paired interval and the bootstrap's two-sided p-value.
    p_holm: that p-value after Holm's correction for all comparisons of the table.
    """

    first: TableRow
    second: TableRow
    protocol: str
    eps: str | None
    score: Score
    n_slices: int
    n_patients: int
    p_holm: float = 1.0

    @property
    def verdict(self) -> Verdict:
        """Whether the first is better, at the level of 5 % after the correction."""
        if self.p_holm >= LEVEL or not self.score.value:
            return "undecided"
        return "better" if self.score.value > 0 else "worse"


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons of one table with Holm's correction for their number; an undefined difference
    has the p-value 1."""
    p_values = [comparison.score.p for comparison in comparisons]
    adjusted = metrics.holm([1.0 if p is None else p for p in p_values])
    return [
        replace(comparison, p_holm=float(p))
        for comparison, p in zip(comparisons, adjusted, strict=True)
    ]


# -- the same images in two records ----------------------------------------------------------------


def _keys(record: Record) -> list[tuple]:
    """What each row is: file, fold, seed, and which one of byte-identical copies, since a hash
    alone is no key."""
    rows, keys = record.predictions, []
    seen: Counter[tuple[bytes, int, int]] = Counter()
    for digest, fold, seed in zip(rows["file_sha256"], rows["fold"], rows["seed"], strict=True):
        key = (digest.tobytes(), int(fold), int(seed))
        keys.append((*key, seen[key]))
        seen[key] += 1
    return keys


def same_rows(first: Record, second: Record) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers, one array a record, of the images that both evaluated under the same fold and
    seed, in one order."""
    place = {key: row for row, key in enumerate(_keys(second))}
    pairs = [(row, place[key]) for row, key in enumerate(_keys(first)) if key in place]
    in_first, in_second = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return in_first, in_second


@dataclass(frozen=True)
class _Robust:
    """Of some rows of a record at one eps: whether the decisions over four and over three classes
    are robust, and whether the row was attacked there; bool (N,) each."""

    four: np.ndarray
    three: np.ndarray
    covered: np.ndarray

    @classmethod
    def of(cls, record: Record, variant: str | None, eps: str, rows: np.ndarray) -> _Robust:
        names = record.evaluations[variant].attacks.get(eps, {})
        logits = attacks_of(record.predictions, variant).get(eps, {})
        clean = clean_of(record.predictions, variant)[rows]
        attacked = [logits[name][rows] for name in names]
        return cls(*robust_decisions(clean, attacked, record.rows.labels[rows]))


def _robust_difference(first: _Robust, second: _Robust, rows: Rows) -> tuple[Scores, Rows]:
    """Robust scores of the first minus those of the second on the rows that both were attacked on,
    and these rows; no scores where there are none."""
    covered = first.covered & second.covered
    part = rows.take(covered)
    if not covered.any():
        return {}, part
    found = metrics.paired_robust_difference(
        (first.four[covered], first.three[covered]),
        (second.four[covered], second.three[covered]),
        part.labels,
        part.patients,
        n_boot=N_BOOT,
    )
    return _typed(found), part


def _typed(scores: metrics.Scores) -> Scores:
    return {name: Score.from_json(score, name) for name, score in scores.items()}


# -- networks against controls ---------------------------------------------------------------------


def _networks(rows: Iterable[TableRow]) -> list[TableRow]:
    return [row for row in rows if row.model in MODELS and "patient" in row.records]


def _networks_and_controls(
    rows: Sequence[TableRow], controls: Sequence[str]
) -> list[tuple[TableRow, TableRow]]:
    """Every network that is more than a rehearsal with every one of these controls, patients kept
    apart."""
    networks = [row for row in _networks(rows) if row.records["patient"].profile != "demo"]
    rivals = [
        row
        for row in rows
        if row.model == "Baselines" and row.variant in controls and "patient" in row.records
    ]
    return [(network, control) for network in networks for control in rivals]


def patient_auroc_against_controls(rows: Sequence[TableRow]) -> list[Comparison]:
    """AUROC by patient (Non against the rest) of every network minus that of every control,
    patients kept apart."""
    found = []
    for network, control in _networks_and_controls(rows, RIVALS):
        pair = network.records["patient"], control.records["patient"]
        in_first, in_second = same_rows(*pair)
        if not len(in_first):
            continue
        part = pair[0].rows.take(in_first)
        answers = [
            metrics.by_patient(
                clean_of(record.predictions, row.variant)[chosen],
                part.labels,
                part.patients,
                part.seeds,
            )
            for record, row, chosen in zip(
                pair, (network, control), (in_first, in_second), strict=True
            )
        ]
        (first, labels, patients), (second, _, _) = answers
        difference = metrics.paired_difference(first, second, labels, patients, n_boot=N_BOOT)
        score = Score.from_json(difference["auroc"], "auroc")
        size = part.n_slices, part.n_patients
        found.append(Comparison(network, control, "patient", None, score, *size))
    return corrected(found)


def robust_accuracy_against_exact(
    rows: Sequence[TableRow], sweep: Sequence[str]
) -> list[Comparison]:
    """Robust accuracy over three classes of every network minus the exact one of the robust linear
    model, at each eps, on the slices that the network was attacked on."""
    found = []
    for network, control in _networks_and_controls(rows, (EXACT_CONTROL,)):
        first, second = network.records["patient"], control.records["patient"]
        in_first, in_second = same_rows(first, second)
        for eps in sweep:
            scores, part = _robust_difference(
                _Robust.of(first, network.variant, eps, in_first),
                _Robust.of(second, control.variant, eps, in_second),
                first.rows.take(in_first),
            )
            if scores:
                score, size = scores["balanced_accuracy_3"], (part.n_slices, part.n_patients)
                found.append(Comparison(network, control, "patient", eps, score, *size))
    return corrected(found)


def robust_accuracy_against_constant(rows: Sequence[TableRow], eps: str) -> list[Comparison]:
    """Robust accuracy over three classes of every network at eps minus that of always answering Non
    on the same slices, which no attack changes."""
    found = []
    constant = next((row for row in rows if row.model == CONSTANT), None)
    if constant is None:
        return []
    for network in _networks(rows):
        record = network.records["patient"]
        labels = record.rows.labels
        always_non = _Robust(labels == 0, labels == 0, np.ones(len(labels), dtype=bool))
        robust = _Robust.of(record, network.variant, eps, np.arange(len(labels)))
        scores, part = _robust_difference(robust, always_non, record.rows)
        if scores:
            score, size = scores["balanced_accuracy_3"], (part.n_slices, part.n_patients)
            found.append(Comparison(network, constant, "patient", eps, score, *size))
    return corrected(found)


# -- networks against their clean counterparts -----------------------------------------------------


@dataclass(frozen=True)
class CounterpartDifference:
    """Adversarially trained minus clean network on the same images.

    clean, robust: on clean images, and under the attacks of the headline eps where both ran some
        (else empty).
    n_attacked: slices that `robust` is of.
    """

    eps: str
    clean: Scores
    robust: Scores
    n_slices: int
    n_patients: int
    n_attacked: int


def counterpart_difference(
    records: Records, backbone: str, protocol: str
) -> CounterpartDifference | None:
    """What adversarial training changes in a backbone; None where one of the two has no record or
    was trained with other means (data, profile, initial weights)."""
    trained, clean = records.get((f"{backbone}_atk", protocol)), records.get((backbone, protocol))
    if trained is None or clean is None:
        return None
    pair = (trained, clean)
    if len({(record.data, record.profile, record.init) for record in pair}) > 1:
        return None
    in_trained, in_clean = same_rows(*pair)
    if not len(in_trained):
        return None
    part, eps = trained.rows.take(in_trained), trained.headline_eps
    difference = metrics.paired_difference(
        clean_of(trained.predictions)[in_trained],
        clean_of(clean.predictions)[in_clean],
        part.labels,
        part.patients,
        n_boot=N_BOOT,
    )
    robust, attacked = _robust_difference(
        _Robust.of(trained, None, eps, in_trained), _Robust.of(clean, None, eps, in_clean), part
    )
    return CounterpartDifference(
        eps, _typed(difference), robust, part.n_slices, part.n_patients, attacked.n_slices
    )


def counterpart_comparisons(rows: Sequence[TableRow], protocols: Sequence[str]) -> list[Comparison]:
    """Every difference of the table of adversarial training in balanced accuracy over three
    classes: for each protocol on clean images and under attack."""
    by_model = {row.model: row for row in rows if row.model in MODELS}
    records = {
        (model, protocol): record
        for model, row in by_model.items()
        for protocol, record in row.records.items()
    }
    found = []
    for backbone in BACKBONES:
        for protocol in protocols:
            difference = counterpart_difference(records, backbone, protocol)
            if difference is None:
                continue
            pair = by_model[f"{backbone}_atk"], by_model[backbone]
            for eps, scores, n_slices in (
                (None, difference.clean, difference.n_slices),
                (difference.eps, difference.robust, difference.n_attacked),
            ):
                if score := scores.get("balanced_accuracy_3"):
                    size = n_slices, difference.n_patients
                    found.append(Comparison(*pair, protocol, eps, score, *size))
    return corrected(found)


# -- all of them -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparisons:
    """All comparisons that some rows allow, each list corrected for its own length.

    auroc: AUROC by patient of networks and controls.
    exact, exact_sweep: robust accuracy of networks and of the control that has it exactly, at one
        eps and at those of `SWEEP`.
    constant: robust accuracy of networks and of always answering Non, at one eps.
    counterparts: adversarially trained networks and their clean counterparts.
    """

    auroc: list[Comparison]
    exact: list[Comparison]
    exact_sweep: list[Comparison]
    constant: list[Comparison]
    counterparts: list[Comparison]

    @classmethod
    def of(cls, rows: Sequence[TableRow], eps: str) -> Comparisons:
        """Compares the rows of a table, the constant answer first, with robust accuracy at
        `eps`."""
        return cls(
            patient_auroc_against_controls(rows),
            robust_accuracy_against_exact(rows, [eps]),
            robust_accuracy_against_exact(rows, SWEEP),
            robust_accuracy_against_constant(rows, eps),
            counterpart_comparisons(rows, list(rows[0].evaluations)),
        )


# -- the probe by features -------------------------------------------------------------------------


@dataclass(frozen=True)
class PooledProbe:
    """What the nearest neighbors in a network's features still give away under attack, for all
    sampled images (N,) of a record.

    right, recognized, neighbor: name of the images (`clean`, an eps, …) → bool (N,): the diagnosis
        is right; the patient is recognized, where slices nearer than the probe's gap do not count;
        where all slices count (None if some run does not say).
    """

    labels: np.ndarray
    patients: np.ndarray
    right: dict[str, np.ndarray]
    recognized: dict[str, np.ndarray]
    neighbor: dict[str, np.ndarray] | None


def pooled_probe(record: Record) -> PooledProbe | None:
    """The probes of all runs of a record in one; None where no run has one."""
    probes = [(run, run.leak_probe) for run in record.runs if run.leak_probe]
    if not probes:
        return None
    rows = record.predictions
    sampled = [
        np.flatnonzero((rows["fold"] == run.fold) & (rows["seed"] == run.seed))[probe["rows"]]
        for run, probe in probes
    ]
    part = record.rows.take(np.concatenate(sampled))

    def pooled(key: str) -> dict[str, np.ndarray]:
        return {
            name: np.concatenate([probe[key][name] for _, probe in probes])
            for name in probes[0][1][key]
        }

    every_run_has = all("neighbour" in probe for _, probe in probes)
    return PooledProbe(
        part.labels,
        part.patients,
        pooled("right"),
        pooled("recognised"),
        pooled("neighbour") if every_run_has else None,
    )


def probe_differences(
    records: Iterable[Record], recognition: Literal["recognized", "neighbor"]
) -> list[Score]:
    """Share of patients still recognized minus share of diagnoses still right under PGD at
    `PROBE_EPS`, one score a record, undefined ones left out.

    Args:
        recognition: which of the two attributes of `PooledProbe`.
    """
    found = []
    for record in records:
        probe = pooled_probe(record)
        if probe is None:
            continue
        flags = probe.recognized if recognition == "recognized" else probe.neighbor
        if not flags or PROBE_EPS not in flags or PROBE_EPS not in probe.right:
            continue
        score = metrics.kept_shares(
            (flags["clean"], flags[PROBE_EPS]),
            (probe.right["clean"], probe.right[PROBE_EPS]),
            probe.labels,
            probe.patients,
        )["difference"]
        if score["value"] is not None:
            found.append(Score.from_json(score, recognition))
    return found


def away_from_zero(scores: Sequence[Score]) -> tuple[int, int]:
    """How many intervals, uncorrected, lie below 0 and how many above."""
    intervals = [score.ci for score in scores if score.ci]
    return sum(high < 0 for _, high in intervals), sum(low > 0 for low, _ in intervals)
