"""Controls: settings never see a test image, and the robust linear model's worst case is exact."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from utils import controls, data, metrics
from utils.attacks.base import ATTACKS
from utils.class_groups import THREE
from utils.cohort.raw import RawImages, read_raw
from utils.cohort.table import Cohort, build_cohort, cohort_for
from utils.config import RunConfig, make_config, parse_eps
from utils.controls import answers as answers_of_controls
from utils.controls import record
from utils.data import Folds, assign_folds, patients_of
from utils.evaluation.predictions import worst_case
from utils.evaluation.suite import SuiteResult, evaluate_suite
from utils.phantom import write_phantom

REAL = os.environ.get("ALZHEIMER_RAW")
SWEEP = ("1/255", "4/255")

Workspace = tuple[RawImages, Cohort, Folds]
AnswersByProtocol = dict[str, dict[str, controls.Answers]]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """(raw images, cohort, folds) of a small phantom."""
    folder = write_phantom(
        tmp_path_factory.mktemp("controls") / "raw",
        patients=(6, 6, 5, 5),
        slices=8,
        size=64,
        synthetic=8,
        duplicates=3,
        cross_duplicates=2,
        seed=9,
    )
    raw = read_raw(folder)
    cohort = build_cohort(raw)[0]
    return raw, cohort, assign_folds(*patients_of(cohort))


def parts_of(workspace: Workspace, protocol: str) -> dict[str, controls.Slices]:
    """Training, validation and test slices of fold 0."""
    raw, cohort, folds = workspace
    rows = (
        data.split_slices(cohort) if protocol == "slice" else data.split_patients(cohort, folds, 0)
    )
    images = data.stack_images(raw)[:, 0].numpy()
    every = controls.Slices(images, cohort.label, cohort.patient_id, cohort.slice_index)
    return {name: every.pick(chosen) for name, chosen in rows.items()}


@pytest.fixture(scope="module", autouse=True)
def short_training() -> Iterator[None]:
    """Fits the robust linear model in a tenth of its steps wherever all controls answer: choosing
    its settings takes most of the time, and no claim about these answers is of how good they are.
    """
    short = partial(controls.fit_robust_linear, steps=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers_of_controls, "fit_robust_linear", short)
        yield


@pytest.fixture(scope="module")
def patient_runs(workspace: Workspace) -> tuple[list[dict], list[tuple[dict, dict]]]:
    """(answers before they are rounded, `control_runs`) of two folds of the patient protocol."""
    answers: list[dict] = []

    def keep(**arguments: Any) -> Iterator[tuple[str, controls.Answers]]:
        answers.append({})
        for name, answer in controls.control_answers(**arguments):
            answers[-1][name] = answer
            yield name, answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "control_answers", keep)
        runs = controls.control_runs(*workspace, "patient", test_folds=(0, 1))
    return answers, runs


@pytest.fixture(scope="module")
def answers(workspace: Workspace, patient_runs: tuple) -> AnswersByProtocol:
    slice_answers = controls.control_answers(
        **parts_of(workspace, "slice"), sweep=SWEEP, headline="4/255"
    )
    return {"slice": dict(slice_answers), "patient": patient_runs[0][0]}


def test_every_control_answers_every_test_slice(workspace: Workspace, answers: AnswersByProtocol):
    for protocol, found in answers.items():
        wanted = [name for name in controls.CONTROLS if name != "constant"]
        if protocol == "slice":
            wanted = [name for name in wanted if name not in controls.OF_SCANS]
        assert list(found) == wanted
        for answer in found.values():
            assert answer.logits.shape == (len(parts_of(workspace, protocol)["test"]), 4)
            assert np.isfinite(answer.logits).all()


def test_no_answer_depends_on_a_test_label(workspace: Workspace, answers: AnswersByProtocol):
    parts = parts_of(workspace, "patient")
    test = parts["test"]
    shuffled = controls.Slices(test.images, (test.labels + 1) % 4, test.patients, test.positions)
    again = dict(
        controls.control_answers(
            parts["train"], parts["validation"], shuffled, sweep=(), headline="4/255"
        )
    )
    for name, answer in answers["patient"].items():
        # The labels of this one are permuted among the test patients too.
        if name != "nearest_neighbour_permuted":
            np.testing.assert_array_equal(again[name].logits, answer.logits, name)


def test_settings_are_judged_by_patients_that_were_not_fitted(workspace: Workspace):
    parts = parts_of(workspace, "patient")
    splits = controls.validation_splits(parts["train"], parts["validation"])
    patients = np.concatenate([parts["train"].patients, parts["validation"].patients])
    judged = np.concatenate([rows for _, rows in splits])
    assert sorted(judged.tolist()) == list(range(len(patients))), "every patient judges once"
    for fitted, rows in splits:
        assert not set(patients[fitted]) & set(patients[rows])


def test_the_whole_scan_gives_one_answer_a_patient(
    workspace: Workspace, answers: AnswersByProtocol
):
    test = parts_of(workspace, "patient")["test"]
    logits = answers["patient"]["atrophy_scan"].logits
    for patient in np.unique(test.patients):
        assert len(np.unique(logits[test.patients == patient], axis=0)) == 1


def test_labels_are_permuted_among_patients_and_never_across_the_split():
    patients = np.repeat([0, 1, 2, 3, -1], 2)
    donor = controls.permuted_patients(patients, np.array([0, 1, 2]), seed=1)
    assert set(donor) == {0, 1, 2, 3} == set(donor.values())
    assert {donor[0], donor[1]} == {0, 1} and {donor[2], donor[3]} == {2, 3}


def test_a_patient_is_only_answered_in_the_fold_that_tests_it(
    workspace: Workspace, patient_runs: tuple
):
    folds, runs = workspace[2], patient_runs[1]
    fold_of = dict(zip(folds.patient_id.tolist(), folds.fold.tolist(), strict=True))
    for rows, variants in runs:
        assert (rows["fold"] == [fold_of[patient] for patient in rows["patient_id"].tolist()]).all()
        assert {f"{name}/clean" for name in variants} < set(rows)
        assert "robust_linear_32/4/255:exact" in rows
        assert variants["robust_linear_32"]["settings"]["eps"] > 0
    assert rows["file_sha256"].shape == (len(rows["labels"]), 32)


# -- exact robust accuracy -------------------------------------------------------------------------


def linear_model(seed: int = 0, size: int = 8) -> nn.Module:
    """An affine model in which no two of the four classes share weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(size * size, 4)).eval()


def robust(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, eps: float) -> np.ndarray:
    """Whether the exact worst case leaves each image's answer right, bool (N,)."""
    worst = controls.exact_worst_images(model, images, labels, eps)
    with torch.no_grad():
        return (model(worst).argmax(1) == labels).numpy()


def test_the_exact_worst_case_is_that_of_every_corner_of_the_ball():
    torch.manual_seed(3)
    model = linear_model(size=2)
    images = torch.rand(60, 1, 2, 2)
    images[::3] *= 0.05  # pixels near 0 can hardly be lowered
    labels = model(images).argmax(1).detach()
    eps = 0.4
    found = robust(model, images, labels, eps)
    corners = torch.tensor(list(itertools.product((-eps, eps), repeat=4))).view(-1, 1, 1, 2, 2)
    with torch.no_grad():
        moved = (images[None] + corners).clamp(0, 1)
        stays = torch.stack([model(part).argmax(1) == labels for part in moved]).all(0).numpy()
    np.testing.assert_array_equal(found, stays)
    assert 0.2 < found.mean() < 0.95


@pytest.fixture(scope="module")
def attacked() -> tuple[nn.Module, np.ndarray, np.ndarray, RunConfig, SuiteResult]:
    """(robust linear model, images, labels, settings, what the suite found)."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 16)
    images = np.clip(
        rng.normal(110, 30, (64, 16, 16)) + 12 * labels[:, None, None] * (np.arange(16) < 8), 0, 255
    )
    images = images.astype(np.uint8)
    model = controls.fit_robust_linear(images, labels, 2 / 255, side=8, steps=150)
    config = make_config(
        "demo", eps=("1/255", "4/255"), suite="standard", sample=16, pgd_steps=20, attack_batch=64
    )
    found = evaluate_suite(model, images[:, None], labels, np.arange(64), config)
    return model, images, labels, config, found


@pytest.mark.parametrize("view", ["four", "three"])
def test_the_suite_finds_the_exact_number(view: str, attacked: tuple):
    """The suite against the truth, for four and for three classes: its robust accuracy is the exact
    one here, on every image."""
    model, images, labels, config, found = attacked
    pixels = torch.from_numpy(images)[:, None].float() / 255
    groups, row = (None, 0) if view == "four" else (THREE, 1)
    clean = metrics.correct(found.clean_logits, labels)[row]
    for eps in config.eps:
        worst = controls.exact_worst_images(
            model, pixels, torch.from_numpy(labels), parse_eps(eps), groups
        )
        with torch.no_grad():
            logits = model(worst).numpy()
        exact = clean & metrics.correct(logits, labels)[row]
        # As in every record, an image that a smaller eps made misclassified stays misclassified.
        suite = clean & worst_case(found.logits, labels, eps, view)
        assert (suite >= exact).all(), "no attack leaves the ball"
        missed = suite.sum() - exact.sum()
        assert missed <= 0, f"the suite misses {missed} images at {eps}"
    assert 0 < exact.sum() < 60, "some images must be robust and some misclassified"


def test_no_attack_beats_the_exact_worst_case_of_four_free_classes():
    torch.manual_seed(5)
    model = linear_model(seed=5)
    images = torch.rand(80, 1, 8, 8)
    labels = model(images).argmax(1).detach()
    exact = robust(model, images, labels, 4 / 255)
    made = ATTACKS["apgd_t"](model, images, labels, 4 / 255, steps=50)
    with torch.no_grad():
        attacked = (model(made).argmax(1) == labels).numpy()
    assert (attacked >= exact).all()
    assert attacked.sum() - exact.sum() <= 1


def test_merging_the_four_logits_gives_the_three_class_model():
    three = np.random.default_rng(0).normal(size=(50, 3)) * 4
    merged = metrics.merge_classes(metrics.probabilities(controls.four_logits(three, 0.07)))
    np.testing.assert_allclose(merged, metrics.probabilities(three), atol=1e-12)
    assert (
        controls.four_logits(three, controls.moderate_share(np.array([2, 3]))).argmax(1) != 3
    ).all()


def test_training_on_the_worst_case_raises_exact_robust_accuracy(workspace: Workspace):
    parts = parts_of(workspace, "patient")
    train, test = parts["train"], parts["test"]
    pixels = torch.from_numpy(np.ascontiguousarray(test.images)).float()[:, None] / 255
    labels = torch.from_numpy(test.labels)
    share = {}
    for eps in (0.0, 8 / 255):
        model = controls.fit_robust_linear(train.images, train.labels, eps)
        with torch.no_grad():
            logits = model(
                controls.exact_worst_images(model, pixels, labels, 8 / 255, THREE)
            ).numpy()
        share[eps] = metrics.correct(logits, test.labels)[1].mean()
    assert share[8 / 255] > share[0.0]


def test_the_slack_of_a_block_is_the_mean_slack_of_its_pixels():
    images = np.array([[[0, 255], [10, 100]]], np.uint8)
    lower, upper = controls.slack(images, 20 / 255, 1)
    assert lower.item() == pytest.approx((0 + 20 + 10 + 20) / 4 / 255)
    assert upper.item() == pytest.approx((20 + 0 + 20 + 20) / 4 / 255)


@pytest.mark.skipif(not REAL, reason="ALZHEIMER_RAW is not set")
def test_atrophy_is_in_five_numbers_a_slice_of_the_real_set():
    """The committed record's claim in small: statistics without any learned feature rank patients
    that were not fitted."""
    raw = read_raw(Path(REAL))
    cohort = cohort_for(raw)
    rows = data.split_patients(cohort, data.read_folds(data.COMMITTED_FOLDS), 0)
    images = data.stack_images(raw)[:, 0].numpy()
    every = controls.Slices(images, cohort.label, cohort.patient_id, cohort.slice_index)
    train, validation, test = (every.pick(rows[name]) for name in data.SETS)
    fit = controls.Slices.joined([train, validation])
    splits = controls.validation_splits(train, validation)
    logits = controls.atrophy_scan_answers(fit, test, splits).logits
    scores = metrics.score_patients(logits, test.labels, test.patients, n_boot=100)
    assert scores["auroc"]["value"] > 0.75
