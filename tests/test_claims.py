"""The claims that README makes, as values computed from the committed records: each with its row,
its score and its verdict, and no sentence."""

from __future__ import annotations

import re

import pytest

from utils import drawing, report
from utils.evaluation.comparisons import LEVEL, Comparison, Comparisons
from utils.evaluation.records import read_records, without_rehearsals
from utils.evaluation.rows import CONSTANT, TableRow, table_rows
from utils.report.claims import Claim, Findings, findings
from utils.report.notes import planted_evidence, withdrawn_claim
from utils.report.tables import AGE_AUROC, BALANCED, PATIENT_AUROC, WORST
from utils.utils_funcs import ROOT

STUDIED = ("Dinov2", "Efficientnet", "Resnet")

EPS = "4/255"
RESULTS = (ROOT / report.RESULTS_PAGE).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows() -> list[TableRow]:
    return table_rows(without_rehearsals(read_records(ROOT)))


@pytest.fixture(scope="module")
def comparisons(rows: list[TableRow]) -> Comparisons:
    return Comparisons.of(rows, EPS)


@pytest.fixture(scope="module")
def found(rows: list[TableRow], comparisons: Comparisons) -> Findings:
    return findings(rows, EPS, comparisons)


def names(claims: list[Claim]) -> list[str]:
    return [one.row.name for one in claims]


def test_every_claim_is_the_score_of_its_record(found: Findings) -> None:
    assert found.claims
    for one in found.claims:
        record = one.row.records[one.protocol]
        evaluation = record.evaluations[one.row.variant] if one.row.model != CONSTANT else None
        if evaluation is None:
            expected, counted = record.constant_answer.slice["balanced_accuracy_3"], None
        elif one.column == WORST:
            counted = evaluation.worst_case[EPS]
            expected = counted.scores["balanced_accuracy_3"]
        elif one.column == BALANCED:
            counted = evaluation.clean
            expected = counted.slice["balanced_accuracy_3"]
        elif one.column == PATIENT_AUROC:
            counted = evaluation.clean
            expected = counted.patient["auroc"]
        else:
            assert one.column == AGE_AUROC and one.n_slices is None
            continue
        assert one.value == pytest.approx(expected.value, abs=5e-4), one.row.name
        assert one.value == one.score.value
        if counted:
            assert (one.n_slices, one.n_patients) == (counted.n_slices, counted.n_patients)


def test_every_claim_is_on_the_page_with_its_row_and_interval(found: Findings) -> None:
    for one in found.claims:
        style = "decimal" if "AUROC" in one.column else "percent"
        assert drawing.show(one.score, style) in RESULTS, one.row.name
        assert re.search(rf"\(row {one.row.number}[,)]", RESULTS), one.row.name
        if one.comparison and one.column == WORST:
            assert drawing.show(one.comparison.score, style, signed=True) in RESULTS or (
                one.comparison.second.model == CONSTANT
            )


@pytest.mark.parametrize("name", ["auroc", "exact", "exact_sweep", "constant", "counterparts"])
def test_a_verdict_is_that_of_the_corrected_p_value(comparisons: Comparisons, name: str) -> None:
    of_table: list[Comparison] = getattr(comparisons, name)
    assert of_table
    ranked = sorted(of_table, key=lambda one: one.score.p)
    steps = [(len(ranked) - place) * one.score.p for place, one in enumerate(ranked)]
    for place, one in enumerate(ranked):
        decided = max(steps[: place + 1]) < LEVEL
        expected = "undecided" if not decided else "better" if one.score.value > 0 else "worse"
        assert one.verdict == expected, (one.first.name, one.second.name)


def test_the_published_split_rewards_recognizing_patients(found: Findings) -> None:
    split = found.split
    assert {split.published.row.variant, split.apart.row.variant} == {"nearest_neighbour"}
    assert split.permuted.row.variant == "nearest_neighbour_permuted"
    assert min(split.published.score.ci[0], split.permuted.score.ci[0]) > split.apart.score.ci[1]


def test_what_a_network_scores_under_the_published_split_is_not_left_apart(found: Findings) -> None:
    clean = found.clean
    assert clean.published.row is clean.apart.row
    assert (clean.published.protocol, clean.apart.protocol) == ("slice", "patient")
    assert clean.apart.score.ci[1] < clean.published.score.ci[0]
    assert clean.constant.value == pytest.approx(1 / 3) and clean.constant.score.ci is None
    assert clean.constant.value < clean.apart.score.ci[0]


def test_no_network_is_shown_to_rank_patients_better_than_a_control(found: Findings) -> None:
    controls = found.controls
    assert controls.verdicts == {"undecided": len(controls.pairs)} and len(controls.pairs) == 24
    assert controls.network.value == max(pair.value for pair in controls.pairs)
    assert controls.network.comparison.second is controls.control.row
    assert controls.network.comparison.score.value == pytest.approx(
        controls.network.value - controls.control.value, abs=1e-6
    )


def test_which_networks_are_above_the_constant_answer_under_attack(found: Findings) -> None:
    robustness = found.robustness
    assert {verdict: names(group) for verdict, group in robustness.by_verdict().items()} == {
        "better": ["Resnet_atk"],
        "undecided": ["Dinov2", "Dinov2_atk", "Efficientnet_atk"],
        "worse": ["Efficientnet", "Resnet"],
    }
    assert robustness.best.row.model == "Resnet_atk"
    assert robustness.linear.row.variant == "robust_linear_32"
    assert robustness.best.verdict == "undecided", "against the exact linear model"


def test_what_adversarial_training_gains_and_costs(found: Findings) -> None:
    gains = {pair.clean.row.model: pair.attacked.verdict for pair in found.training}
    assert gains == {
        "Dinov2_atk": "undecided",
        "Efficientnet_atk": "better",
        "Resnet_atk": "better",
    }
    for pair in found.training:
        assert pair.clean.verdict == "undecided", "a cost that is not seen, not one that is absent"
        assert pair.clean.comparison.second.model == pair.clean.row.model.removesuffix("_atk")
        assert pair.attacked.comparison.second is pair.clean.comparison.second


def test_every_score_is_lower_on_patients_of_about_one_age(found: Findings) -> None:
    age = found.age
    assert {one.row.model for one in age.part} == {*STUDIED, "Baselines"}
    for everybody, part in zip(age.everybody, age.part, strict=True):
        assert everybody.row is part.row and part.value < everybody.value
        assert part.n_patients == age.n_part < age.n_patients == everybody.n_patients


def test_the_withdrawn_claim_depends_on_a_choice_of_the_probe(rows: list[TableRow]) -> None:
    withdrawn = withdrawn_claim(rows)
    assert withdrawn.distant_slices != withdrawn.all_slices
    for counts in (withdrawn.distant_slices, withdrawn.all_slices):
        assert 0 <= counts.patients_first + counts.diagnoses_first < counts.n_records


def test_planted_evidence_is_given_for_every_backbone() -> None:
    planted = planted_evidence(ROOT)
    assert {one.backbone for one in planted.maps} == set(STUDIED)
    assert all(one.share.ci[0] <= one.share.value <= one.share.ci[1] for one in planted.maps)
