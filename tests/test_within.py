"""Protocol `within`: the same slices, once of patients in the training and once of others."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from utils import data, within
from utils.config import RunConfig, make_config
from utils.evaluation import records
from utils.evaluation.within import gaps, same_slices
from utils.pipeline.driver import Run
from utils.pipeline.workspace import Workspace, load_sets
from utils.report import read_within, within_markdown
from utils.training.validation import epoch_to_keep
from utils.utils_funcs import UserError


def stacks(patients: int, slices: int) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat(np.arange(patients), slices), np.tile(np.arange(slices), patients)


@pytest.mark.parametrize("slices", [16, 20, 32, 61])
def test_slices_of_a_role_are_as_far_from_the_training_as_it_says(slices):
    patient, place = stacks(48, slices)
    roles = within.roles_of(patient, place)
    for one in range(48):
        mine = patient == one
        trained = place[mine & (roles == "train")]
        for role, allowed in (("far", lambda d: d >= within.FAR), ("near", lambda d: d == 1)):
            tested = place[mine & (roles == role)]
            assert 1 <= len(tested) <= within.TESTED[role]
            assert all(allowed(np.abs(trained - one_place).min()) for one_place in tested)


def test_roles_prefer_no_height_of_the_head():
    patient, place = stacks(160, 32)
    roles = within.roles_of(patient, place)
    share = np.bincount(place[roles == "train"], minlength=32) / 160
    assert share.min() == share.max() == within.TRAINED / within.PERIOD


def test_roles_do_not_depend_on_the_order_of_the_images():
    patient, place = stacks(10, 32)
    order = np.random.default_rng(0).permutation(len(patient))
    assert (
        within.roles_of(patient, place)[order] == within.roles_of(patient[order], place[order])
    ).all()


def test_permuted_labels_are_those_of_other_patients_and_as_many_of_each():
    patient, _ = stacks(40, 3)
    labels = patient % 3
    found = within.permuted_labels(patient, labels)
    assert sorted(found.values()) == sorted(labels[::3].tolist())
    assert any(found[one] != one % 3 for one in range(40))
    assert found == within.permuted_labels(patient, labels)


def test_the_last_epoch_is_kept_where_that_is_asked():
    history = [
        {"epoch": number, "validation_classes": 2, "score": score}
        for number, score in ((1, 0.5), (2, 0.9))
    ]
    assert epoch_to_keep(history, RunConfig()) == (1, False)
    assert epoch_to_keep(history, RunConfig(kept_epoch="last")) == (2, False)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, phantom_sets: Path) -> Workspace:
    """A workspace of the prepared phantom."""
    root = tmp_path_factory.mktemp("within")
    (root / "dataset").mkdir()
    (root / "dataset" / "dataset_variables").symlink_to(phantom_sets)
    identity = data.load_set(phantom_sets, "patient", 0, "test").cohort_sha256
    return Workspace(root, "phantom", "demo", root, identity)


def config_of(fold: int, protocol: str = "within", **changes: object) -> RunConfig:
    return make_config("demo", "Resnet", protocol=protocol, fold=fold, trials=0, **changes)


def test_the_parts_hold_the_same_images_of_the_same_patients(workspace):
    sets = [
        load_sets(workspace, config_of(fold, max_train=None, max_test=None))
        for fold in range(data.N_FOLDS)
    ]
    pixels: dict[str, set[str]] = {part: set() for part in within.PARTS}
    for one in sets:
        test, trained = one["test"], set(one["train"].patients.tolist())
        for part, pixel, patient in zip(test.parts, test.pixels, test.patients, strict=True):
            assert (int(patient) in trained) == part.startswith("same")
            pixels[part].add(pixel)
        assert not set(test.pixels) & set(one["train"].pixels)
        assert not set(one["validation"].patients.tolist()) & (
            trained | set(test.patients.tolist())
        )
    assert pixels["same_far"] == pixels["other_far"]
    assert pixels["same_near"] == pixels["other_near"]


def test_permuted_patients_keep_one_label_in_all_sets_and_folds(workspace):
    label_of: dict[int, int] = {}
    changed = False
    for fold in (0, 1):
        plain, permuted = (
            load_sets(workspace, config_of(fold, protocol, max_train=None, max_test=None))
            for protocol in ("within", "within_permuted")
        )
        for name, part in permuted.items():
            changed |= not torch.equal(part.labels, plain[name].labels)
            for patient, label in zip(part.patients.tolist(), part.labels.tolist(), strict=True):
                assert label_of.setdefault(patient, label) == label
    assert changed


def test_patients_of_few_slices_are_refused(workspace, monkeypatch):
    monkeypatch.setattr(within, "FAR", 99)
    monkeypatch.setattr(
        within, "roles_of", lambda patients, slices: np.full(len(patients), "train")
    )
    with pytest.raises(UserError, match="too few slices"):
        load_sets(workspace, config_of(0))


@pytest.mark.parametrize(
    "protocol", ["within", pytest.param("within_permuted", marks=pytest.mark.slow)]
)
def test_a_run_leaves_a_record_whose_variants_are_the_parts(workspace, protocol, monkeypatch):
    monkeypatch.setattr(records, "summarize", functools.partial(records.summarize, n_boot=20))
    # Patients of fold 0 are in the training of fold 3, and tested there as known ones.
    for fold in (0, 3):
        Run(workspace, config_of(fold, protocol)).save()
    record = records.read_record(workspace.record("Resnet", protocol))
    assert tuple(record.variants) == within.PARTS
    # PGD attacks robust images alone there, so nothing can rise, and no check may say so.
    assert "falls_with_eps" not in {check.name for check in record.sanity}
    assert record.clean is None
    assert record.runs[0].best_epoch == record.runs[0].config["epochs"]
    in_same, in_other = same_slices(record, "far")
    rows = record.predictions
    assert len(in_same)
    assert (rows["file_sha256"][in_same] == rows["file_sha256"][in_other]).all()
    assert set(rows["fold"][in_same]) == {3}
    assert set(rows["fold"][in_other]) == {0}
    found = gaps(record, n_boot=50)
    assert [gap.eps for gap in found] == [None, "4/255"]
    for gap in found:
        assert gap.difference.value == pytest.approx(gap.same.value - gap.other.value, abs=2e-6)
    text = within_markdown([record])
    assert f"`Resnet`, `{protocol}`" in text
    assert "| 4/255 |" in text
    robust = [gap.same.value for gap in found]
    assert robust == sorted(robust, reverse=True)
    assert (workspace.root / "assets" / "Resnet" / f"{protocol}.json").is_file()
    assert records.read_records(workspace.root) == {}  # no row of the result tables
    assert protocol in [one.protocol for one in read_within(workspace.root)]


# -- gaps of predictions whose answers are known ---------------------------------------------------


def logits_of(right: np.ndarray, labels: np.ndarray) -> np.ndarray:
    answer = np.where(right, labels, (labels + 2) % 4)
    return np.eye(4, dtype=np.float16)[answer] * 8


def record_of(same: list[np.ndarray], other: list[np.ndarray], patients: int) -> records.Record:
    """A record of two slices a patient: patients test in fold 0 and are known in fold 3.

    Args:
        same, other: right or not on clean images, then at each eps, bool (2 × patients,) each.
    """
    count = 2 * patients
    labels = np.repeat(np.arange(patients) % 3, 2)
    nothing = np.full((count, 4), np.nan, np.float16)
    rows = {
        "labels": np.tile(labels, 2).astype(np.int8),
        "fold": np.repeat([0, 3], count).astype(np.int8),
        "seed": np.zeros(2 * count, np.int8),
        "patient_id": np.tile(np.repeat(np.arange(patients), 2), 2).astype(np.int32),
        "slice_index": np.tile([8, 16], 2 * patients).astype(np.int16),
        "file_sha256": np.tile(np.arange(count, dtype=np.uint8)[:, None], (2, 32)),
    }
    names = ["clean", "1/255:pgd20", "4/255:pgd20"]
    for name, here, there in zip(names, other, same, strict=True):
        rows[f"other_far/{name}"] = np.concatenate([logits_of(here, labels), nothing])
        rows[f"same_far/{name}"] = np.concatenate([nothing, logits_of(there, labels)])
    run = {
        "model": "Resnet",
        "regime": "clean",
        "protocol": "within",
        "data": "simulated",
        "profile": "demo",
        "init": "random",
    }
    metas = [run | {"fold": fold, "seed": 0} for fold in (0, 3)]
    record = records.summarize(rows, metas, n_boot=10)
    object.__setattr__(record, "predictions", rows)
    return record


def test_a_known_gap_is_found_and_decided():
    patients, count = 60, 120
    first = np.arange(count) % 2 == 0  # one of two slices of each patient
    everything, nothing = np.ones(count, bool), np.zeros(count, bool)
    record = record_of([everything, everything, first], [first, first, nothing], patients)
    clean, small, large = gaps(record, n_boot=1000)
    assert [gap.difference.value for gap in (clean, small, large)] == [0.5, 0.5, 0.5]
    assert clean.decided
    assert large.decided
    assert not small.decided  # nothing that was right in both parts fell
    assert (small.kept_same.value, small.kept_other.value) == (1, 1)
    assert (large.kept_same.value, large.kept_other.value) == (0.5, 0)
    # Only the first slices were right in both parts: known patients keep all of them, others none.
    assert large.kept_by_both.value == 1


def test_equal_parts_show_no_gap():
    generator = np.random.default_rng(0)
    right = generator.random((3, 120)) < 0.6
    robust = [right[0], right[0] & right[1], right[0] & right[1] & right[2]]
    for gap in gaps(record_of(robust, robust, 60), n_boot=500):
        assert gap.difference.value == 0
        assert not gap.decided


def test_what_fell_at_a_smaller_eps_is_not_robust_at_a_larger_one():
    everything, nothing = np.ones(120, bool), np.zeros(120, bool)
    record = record_of([everything, nothing, everything], [everything] * 3, 60)
    assert gaps(record, n_boot=50)[2].same.value == 0


def test_a_record_without_matching_folds_has_no_gaps():
    right = np.ones(120, bool)
    record = record_of([right] * 3, [right] * 3, 60)
    rows = dict(record.predictions)
    rows["file_sha256"] = rows["file_sha256"].copy()
    rows["file_sha256"][:120] = 255
    object.__setattr__(record, "predictions", rows)
    assert gaps(record, n_boot=10) == []
    assert "fold k + 2" in within_markdown([record])
