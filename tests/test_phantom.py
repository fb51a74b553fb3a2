"""phantom: the cohort drawn is the cohort asked for, is the same for the same seed, and shows class
and person."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.phantom import draw_cohort, draw_patient, write_phantom


@pytest.fixture(scope="module")
def drawn():
    return draw_cohort(
        patients=(3, 2, 2, 1), size=64, synthetic=10, duplicates=4, cross_duplicates=2, seed=5
    )


def real(cohort) -> np.ndarray:
    return np.array(cohort.kind) == "real"


def test_the_cohort_is_the_one_asked_for(drawn):
    assert Counter(drawn.kind) == {"real": 8 * 32, "synthetic": 10, "duplicate": 6}
    assert sorted(Counter(drawn.patient[real(drawn)].tolist()).values()) == [32] * 8
    assert all(image.dtype == np.uint8 and image.shape == (64, 64) for image in drawn.images)
    labels = {int(who): set(drawn.label[drawn.patient == who].tolist()) for who in range(8)}
    assert [labels[who] for who in range(8)] == [{0}] * 3 + [{1}] * 2 + [{2}] * 2 + [{3}]


def test_equal_seeds_give_equal_pixels_and_others_do_not(drawn):
    again = draw_cohort(
        patients=(3, 2, 2, 1), size=64, synthetic=10, duplicates=4, cross_duplicates=2, seed=5
    )
    other = draw_cohort(
        patients=(3, 2, 2, 1), size=64, synthetic=10, duplicates=4, cross_duplicates=2, seed=6
    )
    assert all(np.array_equal(a, b) for a, b in zip(drawn.images, again.images, strict=True))
    assert not np.array_equal(drawn.images[0], other.images[0])


def test_real_images_stand_on_black_and_synthetic_ones_do_not(drawn):
    corners = np.array([max(image[:4, :4].max(), image[-4:, -4:].max()) for image in drawn.images])
    kind = np.array(drawn.kind)
    assert corners[kind == "real"].max() == 0
    assert corners[kind == "synthetic"].min() > 0


def test_duplicates_repeat_real_training_images(drawn):
    for i in np.flatnonzero(np.array(drawn.kind) == "duplicate"):
        original = drawn.duplicate_of[i]
        assert np.array_equal(drawn.images[i], drawn.images[original])
        assert drawn.kind[original] == "real" and drawn.split[original] == "train"
        assert drawn.patient[i] == drawn.patient[original]
    copies = [
        split for split, kind in zip(drawn.split, drawn.kind, strict=True) if kind == "duplicate"
    ]
    assert Counter(copies) == {"train": 4, "test": 2}


def test_everybody_is_in_both_splits(drawn):
    for who in range(8):
        assert {drawn.split[i] for i in np.flatnonzero(drawn.patient == who)} == {"train", "test"}


def test_ventricles_grow_with_the_class():
    dark = [
        np.mean(
            [
                (image[24:40, 24:40] < 60).mean()
                for seed in range(4)
                for image in draw_patient(np.random.default_rng(seed), group, 32, (64,))
            ]
        )
        for group in range(4)
    ]
    assert dark == sorted(dark) and dark[3] > 2 * dark[0]


def test_neighbouring_slices_are_more_alike_than_slices_of_others():
    one, other = (
        np.stack(draw_patient(np.random.default_rng(seed), 1, 32, (64,))).reshape(32, -1)
        for seed in (1, 2)
    )
    neighbours = [np.corrcoef(one[i], one[i + 1])[0, 1] for i in range(31)]
    strangers = [np.corrcoef(one[i], other[i])[0, 1] for i in range(32)]
    assert min(neighbours) > max(strangers)


def test_a_conflict_files_one_patient_under_two_classes():
    cohort = draw_cohort(
        patients=(2, 1, 1, 1), size=48, conflicts=1, synthetic=0, duplicates=0, seed=0
    )
    assert Counter(cohort.label[cohort.patient == 0].tolist()) == {0: 16, 1: 16}
    assert set(cohort.label[cohort.patient == 1].tolist()) == {0}


def test_sizes_and_slice_counts_follow_their_ranges():
    cohort = draw_cohort(
        patients=(6, 1, 1, 1), slices=(8, 40), size=(48, 64), synthetic=0, duplicates=0, seed=1
    )
    counts = Counter(cohort.patient.tolist()).values()
    assert min(counts) >= 8 and max(counts) <= 40 and len(set(counts)) > 1
    assert {image.shape for image in cohort.images} == {(48, 48), (64, 64)}


def test_the_written_folder_holds_the_raw_layout_and_the_truth(tmp_path: Path):
    folder = write_phantom(
        tmp_path / "raw",
        patients=(2, 1, 1, 1),
        size=48,
        slices=6,
        synthetic=4,
        duplicates=2,
        seed=2,
    )
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*.jpg")}
    truth = list(csv.DictReader((folder / "people.csv").open()))
    assert {row["path"] for row in truth} == files and len(files) == 5 * 6 + 4 + 2
    assert {Path(name).parts[0] for name in files} == {"train", "test"}
    assert {Path(name).parts[1] for name in files} == {
        "Non_Demented",
        "Very_Mild_Demented",
        "Mild_Demented",
        "Moderate_Demented",
    }
    assert Image.open(folder / truth[0]["path"]).mode == "L"
