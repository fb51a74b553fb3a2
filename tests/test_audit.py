"""audit: the evidence is what the cohort was made to hold, the controls see patients and not
disease, and the command judges any folder."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components

from utils import controls, metrics, report
from utils.audit import figures, measure, page
from utils.cohort import Cohort, build_cohort, cohort_for, read_cohort, read_raw
from utils.cohort.similarity import features
from utils.data import COMMITTED_FOLDS, assign_folds, patients_of, read_folds
from utils.evaluation import records, schema
from utils.phantom import write_phantom
from utils.utils_funcs import ROOT, UserError

REAL = os.environ.get("ALZHEIMER_RAW")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_phantom(
        tmp_path_factory.mktemp("audit") / "raw",
        patients=(10, 8, 6, 5),
        slices=12,
        size=64,
        synthetic=20,
        duplicates=5,
        cross_duplicates=3,
        seed=9,
    )


@pytest.fixture(scope="module")
def workspace(folder):
    raw = read_raw(folder)
    cohort = build_cohort(raw)[0]
    return raw, cohort, assign_folds(*patients_of(cohort))


@pytest.fixture(scope="module")
def audited(workspace, tmp_path_factory):
    """The audit's folder and records. Choosing the robust linear model's settings takes most of the
    time, and no claim here is about that model: it is fitted in a tenth of its steps."""
    out = tmp_path_factory.mktemp("assets") / "assets" / "Baselines"
    short = partial(controls.fit_robust_linear, steps=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.controls.answers.fit_robust_linear", short)
        found = measure.run_audit(out, *workspace, data="phantom", profile="cpu", cohort_sha256="x")
    return out, found


def score(record: records.Record, name: str, metric: str = "accuracy") -> float:
    return record.variants[name].clean.slice[metric].value


# -- patients from pixels --------------------------------------------------------------------------


def test_no_correlation_lies_in_the_gap_between_own_and_other_patients(workspace):
    raw, cohort, _ = workspace
    real = np.flatnonzero(cohort.kind == "real")
    patient = cohort.patient_id[real]
    vectors = features([raw.images[i] for i in real])
    found = measure.link_evidence(vectors, patient)
    low, high = found["gap"]
    assert low < high
    assert found["own"].sum() == found["other"].sum() == len(real)
    inside = (low < measure.EDGES[:-1]) & (high > measure.EDGES[1:])
    assert inside.any() and found["own"][inside].sum() == found["other"][inside].sum() == 0
    flat = (low < measure.THRESHOLDS) & (high > measure.THRESHOLDS)
    assert (found["groups"][flat] == patient.max() + 1).all()
    for threshold, groups in zip(measure.THRESHOLDS[::8], found["groups"][::8], strict=True):
        assert connected_components(vectors @ vectors.T >= threshold)[0] == groups


def test_the_patients_stay_the_same_under_other_choices(workspace):
    raw, cohort, _ = workspace
    real = np.flatnonzero(cohort.kind == "real")
    found = measure.stability([raw.images[i] for i in real], cohort.patient_id[real])
    assert all(
        found[name].same
        for name in found
        if name.startswith(("as published", "JPEG", "features", "noise of 2"))
    )
    unrelated = measure.regroup(
        np.linalg.qr(np.random.default_rng(0).standard_normal((64, 64)))[0].astype(np.float32),
        np.arange(64) // 8,
    )
    assert unrelated.patients == 0 and not unrelated.same


# -- the split -------------------------------------------------------------------------------------


def tiny_cohort(split: list[str], patient: list[int], index: list[int]) -> Cohort:
    n = len(split)
    return Cohort(
        np.array([f"{i:064x}" for i in range(n)]),
        np.array([f"{i:064x}" for i in range(n)]),
        np.array(split),
        np.zeros(n, int),
        np.where(np.array(patient) >= 0, "real", "synthetic"),
        np.array([""] * n),
        np.array(patient),
        np.array(index),
    )


def test_shared_patients_and_distances_are_counted_by_hand():
    cohort = tiny_cohort(
        ["train", "test", "train", "test", "test", "train"],
        [0, 0, 0, 1, 2, -1],
        [0, 1, 5, 0, 0, -1],
    )
    assert measure.patients_on_both_sides(cohort) == {
        "train": 1,
        "test": 3,
        "both": 1,
        "test_images": 3,
        "test_images_of_training_people": 1,
    }
    assert measure.distance_to_training(cohort).tolist() == [1, -1, -1]


# -- controls --------------------------------------------------------------------------------------


def test_nearest_rows_are_the_nearest():
    rng = np.random.default_rng(0)
    queries, gallery = (
        rng.standard_normal((700, 5)).astype(np.float32),
        rng.standard_normal((40, 5)).astype(np.float32),
    )
    expected = ((queries[:, None] - gallery) ** 2).sum(2).argmin(1)
    assert (controls.nearest_rows(queries, gallery) == expected).all()


def test_recognizing_patients_wins_the_published_split_even_with_permuted_labels(audited):
    _, found = audited
    assert score(found["slice"], "nearest_neighbour") > 0.97
    assert score(found["slice"], "nearest_neighbour_permuted") > 0.97


def test_with_patients_apart_the_permuted_neighbor_is_at_chance(audited):
    _, found = audited
    permuted = found["patient"].variants["nearest_neighbour_permuted"].clean
    low, high = permuted.slice["balanced_accuracy"].ci
    assert low - 0.1 < 0.25 < high + 0.1
    assert (
        score(found["patient"], "nearest_neighbour", "balanced_accuracy")
        < score(found["slice"], "nearest_neighbour", "balanced_accuracy") - 0.3
    )


# -- records and figures ---------------------------------------------------------------------------


def test_the_audit_leaves_valid_records_and_small_arrays(audited):
    out, found = audited
    for protocol in ("slice", "patient"):
        record = records.read_record(out / f"{protocol}.json")
        assert (
            record == found[protocol] and record.model == "Baselines" and record.data == "phantom"
        )
        rescored = metrics.score(
            *(
                schema.read_predictions(out / f"{protocol}.json")[name].astype(kind)
                for name, kind in (
                    ("linear_32/clean", np.float32),
                    ("labels", np.int64),
                    ("patient_id", np.int64),
                )
            )
        )
        assert rescored["auroc"]["value"] == pytest.approx(
            score(record, "linear_32", "auroc"), abs=1e-6
        )
    assert (out / figures.ARRAYS).stat().st_size < 1_000_000


def test_a_finished_audit_is_shown_and_not_measured_again(workspace, audited, monkeypatch):
    out, found = audited
    monkeypatch.setattr(measure, "baseline_record", lambda *_, **__: pytest.fail("measured again"))
    assert (
        measure.run_audit(out, *workspace, data="phantom", profile="cpu", cohort_sha256="x")
        == found
    )


def test_every_figure_is_redrawn_from_the_files_alone(audited):
    out, _ = audited
    drawn = report.draw_audit_figures(out.parents[1])
    assert set(drawn) == {"people", "stability", "split", "synthetic", "controls"}
    for name in drawn:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        texts = [
            text.get_text()
            for axes in drawn[name].axes
            for text in (axes.title, axes.xaxis.label, axes.yaxis.label, axes._left_title)
        ]
        assert any(texts), f"{name} has unlabelled axes"


def test_the_committed_data_card_follows_from_the_committed_cohort():
    cohort, folds = read_cohort(ROOT / "dataset" / "cohort.csv"), read_folds(COMMITTED_FOLDS)
    card = (ROOT / "assets" / "Baselines" / "data_card.md").read_text(encoding="utf-8")
    assert measure.data_card(cohort, folds) in card and "data: real" in card


def test_synthetic_images_are_counted_and_distinguished(workspace):
    raw, cohort, _ = workspace
    found = measure.synthetic_evidence(raw, cohort)
    assert (
        found["kinds"][:, 1].sum()
        == (cohort.kind == "synthetic").sum()
        == found["from_test"][:, 0].sum()
        == found["likeness"].sum()
    )
    real, made = found["background"]
    assert real[1] == 0 < made[0]
    assert found["shortcut"][0] >= found["shortcut"][1]


def test_the_data_card_counts_patients_and_images(workspace):
    _, cohort, folds = workspace
    card = measure.data_card(cohort, folds)
    assert "| all, real | 10 / 120 | 8 / 96 | 6 / 72 | 5 / 60 | 29 / 348 |" in card
    assert "Moderate is 5 patients" in card and "`patient`, test fold 4" in card


@pytest.mark.skipif(not REAL, reason="ALZHEIMER_RAW is not set")
def test_the_published_split_of_the_real_set_shares_all_patients_and_a_neighbor_wins_it():
    raw = read_raw(REAL)
    cohort = cohort_for(raw)
    shared = measure.patients_on_both_sides(cohort)
    assert (
        shared["both"] == shared["test"] == 200
        and shared["test_images_of_training_people"] == shared["test_images"] == 1279
    )
    distance = measure.distance_to_training(cohort)
    assert (distance == 1).mean() > 0.9 and distance.max() <= 4
    rates = page.split_control(raw, cohort)
    assert rates["published split"][0] > 0.99 and rates["patients kept apart"][0] < 0.55


# -- the command -----------------------------------------------------------------------------------


def run_command(raw: Path, out: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "utils.audit", str(raw), "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_the_command_writes_one_self_contained_page(folder, tmp_path):
    renamed = tmp_path / "any"
    for part in ("train", "test"):
        for place, kind in enumerate(sorted((folder / part).iterdir())):
            for file in kind.iterdir():
                target = renamed / part / f"kind{place}" / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
    done = run_command(renamed, tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "100.0% of the test images" in text and "29, of 12 to 12 images" in text
    assert "8, of which 3 repeat an image of an earlier part" in text
    assert text.count("data:image/png;base64,") == 2 and "http" not in text


def test_the_command_says_so_where_there_are_no_patients(tmp_path):
    folder = write_phantom(
        tmp_path / "raw", patients=(30, 20, 15, 10), slices=1, size=48, synthetic=0, duplicates=0
    )
    done = run_command(folder, tmp_path / "report.html")
    assert done.returncode == page.NO_PATIENTS == 3 and len(done.stderr.strip().splitlines()) == 1
    assert "No gap separates patients" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_command_names_what_it_cannot_read(tmp_path):
    done = run_command(tmp_path / "nothing", tmp_path / "report.html")
    assert (
        done.returncode == 2
        and "nothing at" in done.stderr
        and not (tmp_path / "report.html").exists()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--out"),
        ({"scores": Path("age.json"), "out": Path("page.html")}, "--scores need another set"),
        ({"age_from": 60.0, "id_pattern": "P"}, "--id-pattern and --age-from need another set"),
        ({"against": Path("other"), "age_to": 60.0}, "--ages"),
    ],
)
def test_options_that_need_another_are_refused(folder, options, message):
    with pytest.raises(UserError, match=message):
        page.main(folder, **options)
