"""What notebooks show of records: narrow tables, folds in one view, detail folded away."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest

from utils import report
from utils.evaluation.records import Records, read_records, without_rehearsals
from utils.evaluation.schema import Record, Run
from utils.report.scans_and_ensembles import choice_of_slices
from utils.utils_funcs import MODELS, ROOT


@pytest.fixture(scope="module")
def committed() -> Records:
    return without_rehearsals(read_records(ROOT))


def of(committed: Records, model: str) -> list[Record]:
    return [committed[model, protocol] for protocol in ("patient", "slice")]


def visible(text: str) -> str:
    return re.sub(r"(?s)<details>.*?</details>", "", text)


def table_of(text: str) -> list[list[str]]:
    lines = [line for line in visible(text).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("model", MODELS)
def test_what_is_not_folded_away_is_small(committed, model):
    records = of(committed, model)
    for text in (
        report.model_scores_markdown(records),
        report.model_findings_markdown(model, records),
        report.checks_markdown(records),
        *(report.sweep_markdown(record) for record in records),
    ):
        shown = visible(text)
        assert len(shown.splitlines()) <= 30
        assert all(len(row) <= 7 for row in table_of(text))


@pytest.mark.parametrize("model", ["Resnet_atk", "Dinov2"])
def test_the_sweep_is_that_of_the_record(committed, model):
    record = committed[model, "patient"]
    rows = {row[0]: row for row in table_of(report.sweep_markdown(record))[1:]}
    assert list(rows) == list(record.worst_case)
    for eps, worst in record.worst_case.items():
        score = worst.scores["balanced_accuracy_3"]
        low, high = score.ci
        assert rows[eps][-1] == f"{100 * score.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    names = {name for attacks in record.attacks.values() for name in attacks}
    detail = report.sweep_markdown(record).split("<details>")[1]
    assert all(f"`{name}`" in detail for name in names)


def test_checks_are_one_line_and_failed_ones_are_named(committed):
    records = of(committed, "Efficientnet")
    text = report.checks_markdown(records)
    failed = [check for record in records for check in record.sanity if not check.passed]
    count = sum(len(record.sanity) for record in records)
    assert f"{count - len(failed)} of {count} checks passed** in 6 runs" in text
    for check in failed:
        assert f"fold {check.fold}, seed {check.seed}: {check.note}" in visible(text)
    passed = visible(report.checks_markdown(of(committed, "Resnet")))
    assert "Not passed" not in passed


def test_findings_are_of_the_models_own_record(committed):
    for model in ("Efficientnet", "Efficientnet_atk"):
        text = report.model_findings_markdown(model, of(committed, model))
        score = committed[model, "patient"].clean.slice["balanced_accuracy_3"]
        assert f"{100 * score.value:.1f} [" in text
        assert ("clean counterpart keeps" in text) == model.endswith("_atk")
    assert "rehearsal" not in text
    alone = report.model_findings_markdown("Resnet", [committed["Resnet", "patient"]])
    assert "published split" not in alone, "a demo runs some models under one protocol"
    assert "No record" in report.model_findings_markdown("Resnet", [committed["Resnet", "slice"]])
    assert "No record" in report.model_findings_markdown("Resnet", [])
    assert "No records" in report.model_scores_markdown([])


def test_maps_of_all_runs_are_counted(committed):
    runs = committed["Resnet_atk", "patient"].runs
    found = {f"fold {run.fold}": run.source["explanation"] for run in runs}
    rows = {row[0]: row[2:] for row in table_of(report.maps_markdown(found))[1:]}
    road = [one["gradcam"]["faithfulness"]["road"]["beyond_random"]["ci"] for one in found.values()]
    above = sum(low > 0 for low, _ in road)
    assert rows["better than a random map by ROAD"][0] == str(above)
    assert all(sum(map(int, counts)) == len(runs) for counts in rows.values())
    assert "No maps" in report.maps_markdown({"fold 0": {}})


@pytest.mark.parametrize(
    "shift, sooner, later", [(-1, True, False), (0, False, False), (1, False, True)]
)
def test_a_choice_of_slices_that_flips_sooner_or_later_is_told(committed, shift, sooner, later):
    """The committed record with the gradient's numbers of slices made those of chance, shifted."""
    record = committed["Sequence", "patient"]
    runs = copy.deepcopy([run.source for run in record.runs])
    for run in runs:
        for variant in run["variants"].values():
            if budget := variant.get("slice_budget"):
                count = len(budget["labels"])
                budget["least"]["random"] = [8] * count
                budget["least"]["gradient"] = [{-1: 1, 0: 8, 1: 32}[shift]] * count
    changed = dataclasses.replace(record, runs=[Run.from_json(run, "run") for run in runs])
    found = choice_of_slices(changed)
    assert (found.sooner > 0, found.later > 0) == (sooner, later)
    assert found.n_patients == choice_of_slices(record).n_patients == 30
    assert choice_of_slices(committed["Resnet", "patient"]) is None


def test_aligned_text_becomes_a_table_and_other_lines_stay():
    text = (
        "Two models, and what they cost\n"
        "name        seconds   right\n"
        "a model     1,000     0.5 [0.4, 0.6]\n"
        "another               0.7\n"
        "Only the second is free.\n"
        "\n"
        "A sentence of its own."
    )
    assert report.text_as_markdown(text) == (
        "Two models, and what they cost\n\n"
        "| name | seconds | right |\n|---|---|---|\n"
        "| a model | 1,000 | 0.5 [0.4, 0.6] |\n| another |  | 0.7 |\n\n"
        "Only the second is free.\n\nA sentence of its own."
    )


def test_text_without_columns_stays_as_it_is():
    assert report.text_as_markdown("one line\nanother\n\nthird") == "one line\n\nanother\n\nthird"
