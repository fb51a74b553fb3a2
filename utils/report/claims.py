"""What the records show, as values: each claim with its row, protocol, score and verdict.

The sentences are in `templates/findings.md.j2`. Nothing here is worded, so a test can check a claim
without reading one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from utils.evaluation.comparisons import Comparison, Comparisons, Verdict
from utils.evaluation.rows import TableRow
from utils.evaluation.schema import Score
from utils.report.tables import (
    AGE_AUROC,
    BALANCED,
    PATIENT_AUROC,
    WORST,
    age_part,
    age_score,
    score_of,
)
from utils.utils_funcs import BACKBONES, MODELS


@dataclass(frozen=True)
class Claim:
    """What one row scores under one protocol.

    column: which score, a key of `tables.COLUMNS`.
    value, score: the score, and the same with its interval.
    n_slices, n_patients: what it was counted on; no slices for the age-matched part, which is
        counted by patient alone.
    comparison: of the row with another one, on the images that both answered.
    """

    row: TableRow
    protocol: str
    column: str
    value: float
    score: Score
    n_slices: int | None
    n_patients: int
    comparison: Comparison | None = None

    @property
    def verdict(self) -> Verdict | None:
        """Whether the row is better than the one it is compared with; None if with none."""
        return self.comparison.verdict if self.comparison else None


def claim(
    row: TableRow, protocol: str, column: str, comparison: Comparison | None = None
) -> Claim | None:
    """The claim that a row has this score; None where the score is missing or undefined."""
    score = score_of(row, protocol, column)
    if score is None or score.value is None:
        return None
    evaluation = row.evaluations[protocol]
    counted = (column == WORST and row.worst_case(protocol)) or evaluation.clean
    size = counted.n_slices, counted.n_patients
    return Claim(row, protocol, column, score.value, score, *size, comparison)


def claims_of(rows: Iterable[TableRow], protocol: str, column: str) -> list[Claim]:
    """The claims of all rows that have this score."""
    return [one for row in rows if (one := claim(row, protocol, column))]


def highest(claims: Sequence[Claim]) -> Claim:
    """The claim of the highest score, the first of several."""
    return max(claims, key=lambda one: one.value)


# -- the questions, and the claims that answer each ------------------------------------------------


@dataclass(frozen=True)
class SplitClaims:
    """A nearest neighbor with nothing learned: under the published split, there with the patients'
    labels permuted, and with patients kept apart."""

    published: Claim
    permuted: Claim
    apart: Claim


@dataclass(frozen=True)
class CleanClaims:
    """The network that scores highest under the published split, there and with patients kept
    apart; and the constant answer with patients kept apart."""

    published: Claim
    apart: Claim
    constant: Claim


@dataclass(frozen=True)
class ControlClaims:
    """How networks rank unseen patients, against controls that have no hidden layer.

    pairs: every network, compared with every control.
    network, control: the best of each; the network is compared with this control.
    """

    pairs: tuple[Claim, ...]
    network: Claim
    control: Claim

    @property
    def verdicts(self) -> Counter[Verdict | None]:
        """How many comparisons find the network better, worse, or are undecided."""
        return Counter(pair.verdict for pair in self.pairs)


@dataclass(frozen=True)
class RobustnessClaims:
    """Robust accuracy of networks with patients kept apart.

    best: the network of the highest, compared with the linear model, if there is one.
    linear: the linear model whose robust accuracy is exact.
    networks: every network, compared with the constant answer.
    """

    best: Claim
    linear: Claim | None
    networks: tuple[Claim, ...]

    def by_verdict(self) -> dict[Verdict, list[Claim]]:
        """Verdict against the constant answer → the networks that have it, the better first."""
        order: tuple[Verdict, ...] = ("better", "undecided", "worse")
        groups = {
            verdict: [one for one in self.networks if one.verdict == verdict] for verdict in order
        }
        return {verdict: group for verdict, group in groups.items() if group}


@dataclass(frozen=True)
class TrainingClaims:
    """An adversarially trained network, under attack and on clean images, each compared with its
    clean counterpart."""

    attacked: Claim
    clean: Claim


@dataclass(frozen=True)
class AgeClaims:
    """AUROC by patient on all patients, and on those of about one age.

    cohort: in which these patients were found by their pixels; n_part of n_patients were.
    not_found: class → how many were not (a number, or `fewer than 5`).
    everybody, part: a claim a row.
    """

    cohort: str
    n_part: int
    n_patients: int
    not_found: dict[str, int | str]
    everybody: tuple[Claim, ...]
    part: tuple[Claim, ...]


@dataclass(frozen=True)
class Findings:
    """All claims, by question; None or empty where no record answers one.

    only_rehearsed: there are results of the controls but of no network; then only the split is
        answered.
    """

    only_rehearsed: bool = False
    split: SplitClaims | None = None
    clean: CleanClaims | None = None
    controls: ControlClaims | None = None
    robustness: RobustnessClaims | None = None
    training: tuple[TrainingClaims, ...] = ()
    age: AgeClaims | None = None

    @property
    def claims(self) -> list[Claim]:
        """Every claim, in the order of the questions."""
        return list(_claims_in(self))


def _claims_in(value: Any) -> Iterator[Claim]:
    if isinstance(value, Claim):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _claims_in(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _claims_in(getattr(value, field.name))


# -- rows and comparisons → claims -----------------------------------------------------------------


def findings(rows: Sequence[TableRow], eps: str, comparisons: Comparisons) -> Findings:
    """What the rows and their comparisons allow to claim.

    Args:
        rows: of the whole table, the constant answer first.
        eps: of robust accuracy.
    """
    controls = {row.variant: row for row in rows if row.model == "Baselines"}
    networks = [row for row in rows if row.model in MODELS and "patient" in row.records]
    split = split_claims(controls)
    results = [row for row in networks if _is_result(row)]
    trained = any(row.trained for row in rows)
    if trained and not results and any(_is_result(row) for row in controls.values()):
        return Findings(only_rehearsed=True, split=split)
    networks = results or networks
    return Findings(
        split=split,
        clean=clean_claims(rows[0], networks),
        controls=control_claims(comparisons.auroc),
        robustness=robustness_claims(networks, comparisons),
        training=training_claims(comparisons.counterparts, eps),
        age=age_claims([*networks, *controls.values()]),
    )


def _is_result(row: TableRow) -> bool:
    """Whether a row has more than a rehearsal with patients kept apart."""
    return "patient" in row.records and row.records["patient"].profile != "demo"


def split_claims(controls: dict[str | None, TableRow]) -> SplitClaims | None:
    """What the published split rewards. `controls`: name → row."""
    plain = controls.get("nearest_neighbour")
    permuted = controls.get("nearest_neighbour_permuted")
    if plain is None or permuted is None:
        return None
    published, apart = claim(plain, "slice", BALANCED), claim(plain, "patient", BALANCED)
    recognized = claim(permuted, "slice", BALANCED)
    if published is None or recognized is None or apart is None:
        return None
    return SplitClaims(published, recognized, apart)


def clean_claims(constant: TableRow, networks: Sequence[TableRow]) -> CleanClaims | None:
    """What of the best network's score is left where patients are kept apart."""
    apart = {one.row.number: one for one in claims_of(networks, "patient", BALANCED)}
    published = [one for one in claims_of(networks, "slice", BALANCED) if one.row.number in apart]
    of_constant = claim(constant, "patient", BALANCED)
    if not published or of_constant is None:
        return None
    best = highest(published)
    return CleanClaims(best, apart[best.row.number], of_constant)


def control_claims(comparisons: Sequence[Comparison]) -> ControlClaims | None:
    """How networks rank patients, from the comparisons of AUROC by patient."""
    pairs = {
        (one.first.number, one.second.number): pair
        for one in comparisons
        if (pair := claim(one.first, "patient", PATIENT_AUROC, one))
    }
    controls = claims_of((one.second for one in comparisons), "patient", PATIENT_AUROC)
    if not pairs or not controls:
        return None
    best, control = highest([*pairs.values()]), highest(controls)
    network = pairs[best.row.number, control.row.number]
    return ControlClaims(tuple(pairs.values()), network, control)


def robustness_claims(
    networks: Sequence[TableRow], comparisons: Comparisons
) -> RobustnessClaims | None:
    """What networks keep under all attacks."""
    attacked = claims_of(networks, "patient", WORST)
    if not attacked:
        return None
    best = highest(attacked)
    number = best.row.number
    exact = next((one for one in comparisons.exact if one.first.number == number), None)
    linear = claim(exact.second, "patient", WORST) if exact else None
    compared = [claim(one.first, "patient", WORST, one) for one in comparisons.constant]
    return RobustnessClaims(replace(best, comparison=exact), linear, tuple(filter(None, compared)))


def training_claims(comparisons: Sequence[Comparison], eps: str) -> tuple[TrainingClaims, ...]:
    """What adversarial training gains and costs with patients kept apart, by row."""
    apart = {(one.first.number, one.eps): one for one in comparisons if one.protocol == "patient"}
    found = []
    for number in sorted({number for number, _ in apart}):
        on_clean, under_attack = apart.get((number, None)), apart.get((number, eps))
        if on_clean and under_attack:
            attacked = claim(under_attack.first, "patient", WORST, under_attack)
            clean = claim(on_clean.first, "patient", BALANCED, on_clean)
            if attacked and clean:
                found.append(TrainingClaims(attacked, clean))
    return tuple(found)


def age_claims(rows: Sequence[TableRow]) -> AgeClaims | None:
    """Of cleanly trained networks, and of the control that measures atrophy in whole scans."""
    matched = age_part(row.records["patient"] for row in rows if "patient" in row.records)
    shown = [row for row in rows if row.model in BACKBONES or row.variant == "atrophy_scan"]
    everybody, part = [], []
    for of_part in claims_of(shown, "patient", AGE_AUROC):
        of_all = claim(of_part.row, "patient", PATIENT_AUROC)
        found = age_score(of_part.row, "patient", "person_auroc")
        if of_all and found and found.everybody.value is not None:
            # Both scores are those of the page of the part, which has its own intervals.
            everybody.append(replace(of_all, value=found.everybody.value, score=found.everybody))
            part.append(replace(of_part, n_slices=None, n_patients=matched["n_part"]))
    if not part:
        return None
    not_found = {name: count for name, count in matched["not_found_by_class"].items() if count}
    sizes = matched["n_part"], matched["n_patients"]
    return AgeClaims(matched["other"], *sizes, not_found, tuple(everybody), tuple(part))
