"""Paired comparisons between records: networks against controls, and networks against their clean counterparts.

Every difference is taken on the same images and its interval resamples the same patients on both sides. It holds the
patients' variance alone: another training seed would move a network too, which no interval of one seed can show. A
table of many differences gives some that look clear by chance, so a verdict is given after Holm's correction only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from utils import metrics
from utils.records import (
    CONSTANT,
    Entry,
    TableRow,
    attacks_of,
    clean_of,
    headline_eps,
    robust_decisions,
)
from utils.utils_funcs import BACKBONES, MODELS

#: Controls that a network has to beat, and the one whose robust accuracy is exact.
RIVALS = ("linear_32", "robust_linear_32", "atrophy_scan", "kernel_ridge_16")
EXACT_CONTROL = "robust_linear_32"
#: Corrected p-values need more draws than an interval.
N_BOOT = 10_000
LEVEL = 0.05

Entries = dict[tuple[str, str], Entry]


@dataclass(frozen=True)
class Comparison:
    """First minus second: a score with its paired interval, the bootstrap's two-sided p, and the same after Holm's
    correction over the table that the comparison stands in."""

    first: TableRow
    second: TableRow
    what: str
    score: dict
    n_slices: int
    n_patients: int
    p_holm: float = 1.0

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `undecided`: of the first, at 5 % after the correction."""
        if self.p_holm >= LEVEL or not self.score["value"]:
            return "undecided"
        return "better" if self.score["value"] > 0 else "worse"


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons of one table with Holm's correction for their number."""
    if not comparisons:
        return []
    adjusted = metrics.holm([comparison.score["p"] for comparison in comparisons])
    return [
        replace(comparison, p_holm=float(p))
        for comparison, p in zip(comparisons, adjusted, strict=True)
    ]


# -- the same images --------------------------------------------------------------------------------------------------


def _keys(entry: Entry) -> list[tuple]:
    """What each row is: file, fold, seed, and which one of byte-identical copies (a hash alone is no key)."""
    rows, seen, keys = entry.predictions, Counter(), []
    for digest, fold, seed in zip(rows["file_sha256"], rows["fold"], rows["seed"], strict=True):
        key = (digest.tobytes(), int(fold), int(seed))
        keys.append((*key, seen[key]))
        seen[key] += 1
    return keys


def same_rows(first: Entry, second: Entry) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the images that both evaluated under the same fold and seed, in one order."""
    place = {key: row for row, key in enumerate(_keys(second))}
    pairs = [(row, place[key]) for row, key in enumerate(_keys(first)) if key in place]
    return tuple(np.array(pairs, dtype=np.int64).reshape(-1, 2).T)


def _robust_flags(
    entry: Entry, variant: str | None, eps: str, rows: np.ndarray
) -> tuple[np.ndarray, ...]:
    """(four, three, covered): which of these rows are robust at eps, and which were attacked there."""
    blocks = entry.record["variants"][variant] if variant else entry.record
    within = attacks_of(entry.predictions, variant).get(eps, {})
    attacked = [within[name][rows] for name in blocks["attacks"].get(eps, {})]
    clean = clean_of(entry.predictions, variant)[rows]
    return robust_decisions(clean, attacked, entry.rows.labels[rows])


# -- networks against controls ----------------------------------------------------------------------------------------


def _networks_and_controls(
    rows: Sequence[TableRow], controls: Sequence[str]
) -> list[tuple[TableRow, TableRow]]:
    networks = [row for row in rows if row.model in MODELS and "patient" in row.entries]
    networks = [row for row in networks if row.entries["patient"].record["profile"] != "demo"]
    rivals = [
        row
        for row in rows
        if row.model == "Baselines" and row.variant in controls and "patient" in row.entries
    ]
    return [(network, control) for network in networks for control in rivals]


def patient_auroc_against_controls(rows: Sequence[TableRow]) -> list[Comparison]:
    """AUROC by patient (Non against the rest) of every network minus that of every control, patients kept apart."""
    found = []
    for network, control in _networks_and_controls(rows, RIVALS):
        first, second = network.entries["patient"], control.entries["patient"]
        own, other = same_rows(first, second)
        if not len(own):
            continue
        who = first.rows.take(own)
        sides = [
            metrics.by_patient(
                clean_of(entry.predictions, row.variant)[chosen],
                who.labels,
                who.patients,
                who.seeds,
            )
            for entry, row, chosen in ((first, network, own), (second, control, other))
        ]
        difference = metrics.paired_difference(
            sides[0][0], sides[1][0], sides[0][1], sides[0][2], n_boot=N_BOOT
        )
        size = who.size()
        found.append(
            Comparison(
                network,
                control,
                "AUROC by patient",
                difference["auroc"],
                size["n_slices"],
                size["n_people"],
            )
        )
    return corrected(found)


def robust_accuracy_against_exact(
    rows: Sequence[TableRow], sweep: Sequence[str]
) -> list[Comparison]:
    """Robust accuracy over three classes of every network minus the exact one of the robust linear model, at each eps,
    on the slices that the network was attacked on."""
    found = []
    for network, control in _networks_and_controls(rows, (EXACT_CONTROL,)):
        first, second = network.entries["patient"], control.entries["patient"]
        own, other = same_rows(first, second)
        for eps in sweep:
            flags = (
                _robust_flags(first, network.variant, eps, own),
                _robust_flags(second, control.variant, eps, other),
            )
            covered = flags[0][2] & flags[1][2]
            if not covered.any():
                continue
            who = first.rows.take(own[covered])
            sides = [(four[covered], three[covered]) for four, three, _ in flags]
            score = metrics.paired_robust_difference(
                *sides, who.labels, who.patients, n_boot=N_BOOT
            )
            size = who.size()
            found.append(
                Comparison(
                    network,
                    control,
                    eps,
                    score["balanced_accuracy_3"],
                    size["n_slices"],
                    size["n_people"],
                )
            )
    return corrected(found)


def robust_accuracy_against_constant(rows: Sequence[TableRow], eps: str) -> list[Comparison]:
    """Robust accuracy over three classes of every network at eps minus that of always answering Non on the same
    slices, which no attack moves."""
    found = []
    constant = next((row for row in rows if row.model == CONSTANT), None)
    for network in rows:
        if network.model not in MODELS or "patient" not in network.entries:
            continue
        entry = network.entries["patient"]
        every = np.arange(len(entry.rows.labels))
        four, three, covered = _robust_flags(entry, network.variant, eps, every)
        if constant is None or not covered.any():
            continue
        who = entry.rows.take(covered)
        always_non = who.labels == 0
        sides = (four[covered], three[covered]), (always_non, always_non)
        score = metrics.paired_robust_difference(*sides, who.labels, who.patients, n_boot=N_BOOT)
        size = who.size()
        found.append(
            Comparison(
                network,
                constant,
                eps,
                score["balanced_accuracy_3"],
                size["n_slices"],
                size["n_people"],
            )
        )
    return corrected(found)


# -- adversarially trained networks against their clean counterparts --------------------------------------------------


def counterpart_difference(
    entries: Entries, backbone: str, protocol: str, n_boot: int = 2000
) -> dict | None:
    """Adversarially trained minus clean network on the same images.

    Returns:
        {"clean": scores, "worst_case": scores, "n_slices", "n_people", "n_attacked"}, or None where one of the two has
        no record or was trained with other means. The worst case is given where both ran attacks of the headline eps.
    """
    pair = [entries.get((f"{backbone}_atk", protocol)), entries.get((backbone, protocol))]
    if None in pair or any(
        pair[0].record[key] != pair[1].record[key] for key in ("data", "profile", "init")
    ):
        return None
    rows = same_rows(*pair)
    if not len(rows[0]):
        return None
    who = pair[0].rows.take(rows[0])
    clean = [entry.predictions["clean"][own] for entry, own in zip(pair, rows, strict=True)]
    difference = metrics.paired_difference(*clean, who.labels, who.patients, n_boot=n_boot)
    result = {"clean": difference, "worst_case": {}, **who.size()}
    eps = headline_eps(pair[0].record)
    flags = [_robust_flags(entry, None, eps, own) for entry, own in zip(pair, rows, strict=True)]
    covered = flags[0][2] & flags[1][2]
    result["n_attacked"] = int(covered.sum())
    if covered.any():
        part = who.take(covered)
        sides = [(four[covered], three[covered]) for four, three, _ in flags]
        result["worst_case"] = metrics.paired_robust_difference(
            *sides, part.labels, part.patients, n_boot=n_boot
        )
    return result


def counterpart_comparisons(rows: Sequence[TableRow], protocols: Sequence[str]) -> list[Comparison]:
    """Every difference of the table of adversarial training, clean and under attack, with Holm's correction."""
    entries = {
        (row.model, protocol): entry
        for row in rows
        if row.model in MODELS
        for protocol, entry in row.entries.items()
    }
    by_model = {row.model: row for row in rows}
    found = []
    for backbone in BACKBONES:
        for protocol in protocols:
            difference = counterpart_difference(entries, backbone, protocol, N_BOOT)
            for what in ("clean", "worst_case") if difference else ():
                if score := difference[what].get("balanced_accuracy_3"):
                    attacked = (
                        difference["n_attacked"] if what == "worst_case" else difference["n_slices"]
                    )
                    pair = by_model[f"{backbone}_atk"], by_model[backbone]
                    found.append(
                        Comparison(
                            *pair, f"{protocol} {what}", score, attacked, difference["n_people"]
                        )
                    )
    return corrected(found)


# -- the withdrawn probe ----------------------------------------------------------------------------------------------

#: The eps at which the probe compared what an attack leaves of the patient and of the diagnosis.
PROBE_EPS = "1/255"


def pooled_probe(entry: Entry) -> dict:
    """The probe by features of all runs of a record in one: `labels` and `people` of each sampled image, and name →
    flags of `right`, `recognised` and, where every run has it, `neighbour`; empty where no run was asked."""
    rows, parts = entry.predictions, []
    for run in entry.record["units"]:
        if probe := run.get("leak_probe"):
            own = np.flatnonzero((rows["fold"] == run["fold"]) & (rows["seed"] == run["seed"]))[
                probe["rows"]
            ]
            parts.append((probe, entry.rows.labels[own], entry.rows.patients[own]))
    if not parts:
        return {}
    found = {
        what: {
            name: np.concatenate([part[what][name] for part, _, _ in parts])
            for name in parts[0][0][what]
        }
        for what in ("recognised", "neighbour", "right")
        if all(what in part for part, _, _ in parts)
    }
    labels, patients = (np.concatenate([part[place] for part in parts]) for place in (1, 2))
    return {**found, "labels": labels, "people": patients}


def probe_differences(entries: Sequence[Entry], recognition: str) -> list[dict]:
    """Share of patients still recognized minus share of diagnoses still right under PGD at `PROBE_EPS`, one score a
    record, undefined ones left out.

    Args:
        recognition: `recognised`, where slices nearer than the probe's gap do not count, or `neighbour`, where all do.
    """
    found = []
    for entry in entries:
        probe = pooled_probe(entry)
        if PROBE_EPS not in probe.get("right", {}) or PROBE_EPS not in probe.get(recognition, {}):
            continue
        sides = [(probe[what]["clean"], probe[what][PROBE_EPS]) for what in (recognition, "right")]
        score = metrics.kept_shares(*sides, probe["labels"], probe["people"])["difference"]
        if score["value"] is not None:
            found.append(score)
    return found


def away_from_zero(scores: Sequence[dict]) -> tuple[int, int]:
    """How many intervals, uncorrected, lie below 0 and how many above."""
    return sum(score["ci"][1] < 0 for score in scores), sum(score["ci"][0] > 0 for score in scores)
