"""data: no patient in two sets, refusals, batches and augmentation."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import memory
from tests.test_resume import finish
from utils import data
from utils.cohort.raw import read_raw
from utils.cohort.table import Cohort
from utils.utils_funcs import ROOT, UserError


def patients_like_the_real_ones() -> tuple[np.ndarray, np.ndarray]:
    label = np.repeat([0, 1, 2, 3], [100, 70, 28, 2])
    return np.arange(200), np.random.default_rng(1).permutation(label)


def make_set(patients, labels=None, name="set") -> data.ImageSet:
    patients = torch.as_tensor(patients)
    count = len(patients)
    labels = torch.zeros(count, dtype=torch.long) if labels is None else torch.as_tensor(labels)
    slices = torch.tensor([(patients[:row] == patients[row]).sum() for row in range(count)])
    return data.ImageSet(
        torch.arange(count).to(torch.uint8).view(-1, 1, 1, 1).expand(count, 1, 8, 8),
        torch.arange(count),
        labels,
        patients,
        slices,
        [f"{row:064x}" for row in range(count)],
        name,
        pixels=[f"{row:064x}" for row in range(count)],
        cohort_sha256="c0ffee00" * 8,
    )


def test_no_patient_on_both_sides(phantom_sets):
    for fold in range(5):
        sets = data.load_sets(phantom_sets, "patient", fold)
        data.check_patients_apart(sets)
        assert all(len(part) for part in sets.values())


def test_the_published_split_shares_patients_and_the_loader_says_so(phantom_sets):
    leaky = data.load_sets(phantom_sets, "slice", 0)
    real_only = {
        name: part.pick(torch.nonzero(part.patients >= 0)[:, 0]) for name, part in leaky.items()
    }
    with pytest.raises(data.SharedPatientsError, match=r"Patient \d+ is in both train and"):
        data.check_patients_apart(real_only)


def test_a_leaky_prepared_file_is_refused_on_load(phantom_sets, tmp_path):
    images = data.images_path(tmp_path)
    shutil.copy(data.images_path(phantom_sets), images)
    for name in data.SETS:
        data.save_set(
            data.load_set(phantom_sets, "patient", 0, "train" if name == "test" else name),
            data.file_sha256(images),
            data.set_path(tmp_path, "patient", 0, name),
        )
    with pytest.raises(data.SharedPatientsError, match="train and test"):
        data.load_sets(tmp_path, "patient", 0)


def test_an_image_of_an_unknown_patient_is_refused():
    with pytest.raises(data.SharedPatientsError, match="unknown"):
        data.check_patients_apart({"train": make_set([1, -1]), "test": make_set([2])})


def test_folds_cover_every_patient_once_and_are_stratified():
    patients, label = patients_like_the_real_ones()
    folds = data.assign_folds(patients, label)
    for fold in range(5):
        roles = np.array([folds.roles(fold)[patient] for patient in patients])
        test, validation = roles == "test", roles == "validation"
        assert test.sum() == 40
        assert [(test & (label == value)).sum() for value in (0, 1)] == [20, 14]
        assert (test & (label == 2)).sum() in (5, 6)
        assert validation.sum() == 20 and not (validation & (label == 3)).any()
    assert sorted(folds.fold[label == 3].tolist())[0] != sorted(folds.fold[label == 3].tolist())[1]
    assert max(map(len, folds.validation_of)) == 1, (
        "no patient validates twice in a cohort of this size"
    )


def test_folds_survive_their_file(tmp_path):
    folds = data.assign_folds(*patients_like_the_real_ones())
    data.write_folds(folds, tmp_path / "folds.csv")
    again = data.read_folds(tmp_path / "folds.csv")
    assert np.array_equal(again.fold, folds.fold) and again.validation_of == folds.validation_of


def test_the_committed_folds_belong_to_the_committed_cohort():
    from utils.cohort.table import read_cohort

    patients, label = data.patients_of(read_cohort(ROOT / "dataset" / "cohort.csv"))
    folds = data.read_folds(data.COMMITTED_FOLDS)
    assert np.array_equal(folds.patient_id, patients) and np.array_equal(folds.label, label)


def toy_cohort(split: str) -> Cohort:
    count = 180
    known = np.arange(count) < 120
    return Cohort(
        file_sha256=np.array([f"{(row * 7919) % 10007:064x}" for row in range(count)]),
        pixel_sha256=np.array([f"{row:064x}" for row in range(count)]),
        source_split=np.array(
            [split if row % 10 else "test" if split else "" for row in range(count)]
        ),
        label=np.arange(count) % 4,
        kind=np.where(known, "real", "synthetic"),
        duplicate_of=np.array([""] * count),
        patient_id=np.where(known, np.arange(count) // 12, -1),
        slice_index=np.where(known, np.arange(count) % 12, -1),
    )


def test_the_published_split_is_kept_and_divided_8_to_1():
    cohort = toy_cohort("train")
    parts = data.split_slices(cohort)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(180)), (
        "every image is in exactly one set"
    )
    assert set(parts["test"]) == set(np.flatnonzero(cohort.source_split == "test"))
    assert len(parts["train"]) / len(parts["validation"]) == pytest.approx(8, rel=0.15)


def test_a_copy_without_train_and_test_is_divided_and_tested_on_real_images_only():
    cohort = toy_cohort("")
    parts = data.split_slices(cohort)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(180))
    assert len(parts["test"]) > 0 and (cohort.kind[parts["test"]] == "real").all()


def test_the_honest_protocol_takes_no_synthetic_image_and_no_duplicate():
    cohort = toy_cohort("train")
    kind = cohort.kind.copy()
    kind[5] = "duplicate"
    cohort = dataclasses.replace(cohort, kind=kind)
    folds = data.assign_folds(*data.patients_of(cohort))
    rows = np.concatenate(list(data.split_patients(cohort, folds, 0).values()))
    assert set(cohort.kind[rows]) == {"real"} and 5 not in rows


def test_prepared_files_hold_native_8_bit_images_once(phantom_sets):
    images = np.load(data.images_path(phantom_sets))
    assert images.dtype == np.uint8
    assert images.shape[1:] == (1, 64, 64)
    published = [data.load_set(phantom_sets, "slice", 0, name) for name in data.SETS]
    assert sorted(torch.cat([part.rows for part in published]).tolist()) == [*range(len(images))]
    for name in data.SETS:
        path = data.set_path(phantom_sets, "patient", 2, name)
        content = torch.load(path, weights_only=True)
        assert len(content["rows"]) == len(content["files"]) == len(content["labels"])
        assert len(content["rows"]) == len(content["patients"])
        assert path.stat().st_size < 700 * len(content["rows"])  # names and numbers, no pixels


def test_a_set_reads_its_images_from_the_shared_file(phantom_raw, phantom_sets):
    raw = read_raw(phantom_raw)
    of_file = dict(zip(raw.file_sha256, raw.images, strict=True))
    part = data.load_set(phantom_sets, "patient", 1, "validation")
    for file, image in zip(part.files, part.images, strict=True):
        assert np.array_equal(image[0].numpy(), of_file[file])
    picked = part.pick(np.array([5, 2]))
    assert torch.equal(picked.images, part.images[[5, 2]])
    assert torch.equal(part.images_at(torch.tensor([5, 2])), picked.images)


def test_nothing_done_to_the_images_of_a_set_reaches_the_file(phantom_sets):
    before = data.file_sha256(data.images_path(phantom_sets))
    part = data.load_set(phantom_sets, "slice", 0, "test")
    part.stack[:5] += 1
    part.images.zero_()
    assert data.file_sha256(data.images_path(phantom_sets)) == before


@pytest.mark.parametrize(
    "text", ["", "patient_id,label\n0,1\n", "patient_id,label,fold,validation_of\nx,0,1,\n", "\0"]
)
def test_a_table_of_folds_that_is_none_is_named(tmp_path, text):
    path = tmp_path / "folds.csv"
    path.write_text(text + "patient_id,label,fold,validation_of\n1\n")
    with pytest.raises(UserError, match=r"folds\.csv is no table of folds"):
        data.read_folds(path)


def test_a_missing_file_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match="prepare_dataset.ipynb"):
        data.load_sets(tmp_path, "patient", 0)


def test_a_small_part_is_spread_over_classes_patients_and_slices(phantom_sets):
    whole = data.load_set(phantom_sets, "patient", 0, "train")
    rows = data.spread(whole, 24)
    part = whole.pick(rows)
    assert len(part) == 24 and np.array_equal(rows, data.spread(whole, 24))
    present = part.labels.bincount(minlength=4)[whole.labels.bincount(minlength=4) > 0]
    assert present.min() >= present.max() - 1
    non = part.labels == 0
    assert len(part.patients[non].unique()) >= min(6, whole.balance()["Non"][0]), (
        "one slice of many patients, not many of one"
    )
    assert len(data.spread(whole, 10**6)) == len(whole)


def test_an_epoch_with_stride_2_draws_half_of_each_patients_slices():
    part = make_set(np.repeat([3, 7, 9], 32))
    drawn = data.epoch_rows(part, 2, torch.Generator().manual_seed(0))
    for patient in (3, 7, 9):
        slices = part.slices[drawn][part.patients[drawn] == patient].sort().values
        assert len(slices) == 16 and (slices.diff() == 2).all()
    again = data.epoch_rows(part, 2, torch.Generator().manual_seed(0))
    other = data.epoch_rows(part, 2, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, again) and not torch.equal(drawn, other)


def test_an_epoch_without_stride_draws_every_image_once():
    drawn = data.epoch_rows(make_set(np.repeat([3, -1], 20)), 1, torch.Generator().manual_seed(0))
    assert sorted(drawn.tolist()) == list(range(40))


def test_a_last_batch_that_is_too_small_joins_the_one_before_it():
    def sizes(rows, least):
        return [len(chunk) for chunk in data.join_last(torch.arange(rows).split(16), least)]

    assert sizes(33, 2) == [16, 17] and sizes(34, 2) == [16, 16, 2] and sizes(1, 2) == [1]
    assert torch.equal(torch.cat(data.join_last(torch.arange(33).split(16), 2)), torch.arange(33))


def test_augmentation_keeps_range_and_shape_and_follows_its_generator():
    images = torch.rand(8, 1, 32, 32)
    drawn = data.draw_augmentation(8, 1.0, torch.Generator().manual_seed(4))
    once = data.apply_augmentation(images, drawn)
    assert once.shape == images.shape and once.min() >= 0 and once.max() <= 1
    assert torch.equal(drawn, data.draw_augmentation(8, 1.0, torch.Generator().manual_seed(4)))
    assert not torch.allclose(once, images)
    assert torch.allclose(once[2:4], data.apply_augmentation(images[2:4], drawn[2:4]), atol=1e-6), (
        "an image's changes do not depend on the others"
    )
    assert torch.equal(
        data.apply_augmentation(images, data.draw_augmentation(8, 0.0, torch.Generator())), images
    )


def test_every_nth_slice_covers_every_patient():
    part = make_set(np.repeat([3, 5, 9], [32, 7, 1]))
    rows = data.every_nth(part, 4)
    assert [int((part.patients[rows] == patient).sum()) for patient in (3, 5, 9)] == [8, 2, 1]
    assert np.array_equal(data.every_nth(part, 1), np.arange(40))


def test_images_of_odd_sizes_are_resized_to_the_most_common_one(tmp_path):
    from utils.cohort.raw import RawImages

    sizes = [(20, 20), (20, 20), (31, 17)]
    raw = RawImages(
        paths=["a", "b", "c"],
        images=[np.full(size, 9, np.uint8) for size in sizes],
        file_sha256=["", "", ""],
        source_split=["", "", ""],
        label=np.zeros(3, np.int64),
    )
    stack = data.stack_images(raw)
    assert stack.shape == (3, 1, 20, 20) and (stack == 9).all()
    data.write_images(raw, tmp_path / "images.npy")
    assert np.array_equal(np.load(tmp_path / "images.npy"), stack)


def shares(folder: Path, patients: tuple[int, int], counterpart: bool = False) -> dict[str, float]:
    """Stage → peak memory of an image, as a share of its bytes in the original project."""
    raw = [memory.write_raw(folder / f"raw{count}", count) for count in patients]
    finish(memory.measure, raw, folder, counterpart)
    found = json.loads((folder / "peaks.json").read_text())
    return {stage: memory.share_of_theirs(found, stage) for stage in ("prepare", "train")}


@pytest.mark.slow  # 40 s: cohorts of four sizes are prepared, as floats too
@pytest.mark.skipif(
    sys.platform != "linux", reason="the peak of resident memory is read from Linux's /proc"
)
def test_the_data_take_a_tenth_of_the_original_memory_at_every_moment(tmp_path):
    """Measured: the peak of resident memory while 3,200 images are prepared, and in an epoch on
    them, against 1,600 images."""
    ours = shares(tmp_path / "ours", (50, 100))
    assert ours["prepare"] < 0.01 and 0 < ours["train"] < 0.1, ours
    theirs = shares(tmp_path / "theirs", (20, 30), counterpart=True)
    assert theirs["prepare"] > 0.5 and theirs["train"] > 0.5, (
        f"the measure must see float tensors where they are: {theirs}"
    )
