"""cohort: any raw layout is read or refused in one sentence, and patients, slices, synthetic images
and duplicates come out of the pixels as they went in."""

import csv
import hashlib
import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.cohort import linking, similarity, table
from utils.cohort import raw as raw_module
from utils.cohort.linking import exact_groups, strongest_tree, tree_within
from utils.cohort.order import head_area, members_of, order_stack
from utils.cohort.patients import NoPatientsError, find_patients
from utils.cohort.raw import RawImages, find_raw, read_raw
from utils.cohort.similarity import SEARCH_SIDE, background, features, nearest
from utils.cohort.table import Cohort, Recovery, build_cohort, cohort_for, read_cohort, write_cohort
from utils.phantom import write_phantom
from utils.utils_funcs import ROOT, UserError

REAL = os.environ.get("ALZHEIMER_RAW")


def truth_of(folder: Path, raw: RawImages) -> dict[str, np.ndarray]:
    rows = {row["path"]: row for row in csv.DictReader((folder / "people.csv").open())}
    return {
        "person": np.array([int(rows[path]["person"]) for path in raw.paths]),
        "slice_index": np.array([int(rows[path]["slice_index"]) for path in raw.paths]),
        "kind": np.array([rows[path]["kind"] for path in raw.paths]),
    }


def assert_patients_are_the_true_ones(folder: Path) -> Recovery:
    raw = read_raw(folder)
    cohort, recovery = build_cohort(raw)
    truth = truth_of(folder, raw)
    known = truth["kind"] != "synthetic"
    pairs = set(
        zip(truth["person"][known].tolist(), cohort.patient_id[known].tolist(), strict=True)
    )
    assert len(pairs) == len(set(truth["person"][known])) == len(set(cohort.patient_id[known]))
    assert (cohort.kind[~known] == "synthetic").all() and (cohort.kind[known] != "synthetic").all()
    assert (cohort.kind == "duplicate").sum() == (truth["kind"] == "duplicate").sum()
    assert (cohort.slice_index == truth["slice_index"]).all()
    return recovery


def small(folder: Path, **options) -> Path:
    return write_phantom(
        folder,
        **{
            "patients": (3, 2, 2, 1),
            "size": 64,
            "slices": 12,
            "synthetic": 6,
            "duplicates": 3,
            **options,
        },
    )


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> Path:
    return small(tmp_path_factory.mktemp("phantom") / "raw_dataset", seed=11)


@pytest.fixture(scope="module")
def built(phantom) -> tuple[RawImages, Cohort]:
    raw = read_raw(phantom)
    return raw, build_cohort(raw)[0]


def zipped(folder: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


# -- the real data ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_recovery(tmp_path_factory) -> tuple[RawImages, Cohort, Recovery]:
    if not REAL:
        pytest.skip("ALZHEIMER_RAW is not set")
    raw = read_raw(REAL)
    return raw, *build_cohort(raw)


def test_the_real_set_has_200_patients_of_32_slices(real_recovery):
    raw, cohort, recovery = real_recovery
    assert len(cohort) == 11_519
    assert Counter(cohort.kind.tolist()) == {"real": 6400, "synthetic": 4937, "duplicate": 182}
    kept = cohort.kind == "real"
    assert Counter(Counter(cohort.patient_id[kept].tolist()).values()) == {32: 200}
    patients = members_of(np.where(kept, cohort.patient_id, -1))
    assert (
        all(len(set(cohort.label[members])) == 1 for members in patients) and not recovery.conflicts
    )
    assert Counter(int(cohort.label[members[0]]) for members in patients) == {
        0: 100,
        1: 70,
        2: 28,
        3: 2,
    }
    assert all(sorted(cohort.slice_index[members]) == list(range(32)) for members in patients)
    assert (
        recovery.gap == pytest.approx((0.797, 0.926), abs=0.005)
        and 0.80 < recovery.threshold < 0.92
    )


def test_the_committed_table_is_the_one_recovered(real_recovery):
    raw, cohort, _ = real_recovery
    committed = read_cohort(ROOT / "dataset" / "cohort.csv")
    for column in ("file_sha256", "source_split", "label", "kind", "patient_id", "slice_index"):
        assert (getattr(cohort, column) == getattr(committed, column)).all(), column


def test_real_stacks_run_from_the_small_end_of_the_head_down(real_recovery):
    raw, cohort, _ = real_recovery
    for members in members_of(np.where(cohort.kind == "real", cohort.patient_id, -1)):
        areas = head_area([raw.images[i] for i in members[np.argsort(cohort.slice_index[members])]])
        assert areas[:8].mean() < areas[-8:].mean()


# -- recovery on phantoms --------------------------------------------------------------------------

VARIANTS = {
    "as drawn": {},
    "few slices": {"slices": (8, 40)},
    "one class is much larger": {"patients": (16, 4, 2, 1)},
    "a patient in two classes": {"conflicts": 2},
    "small images": {"size": 96},
    "large images": {"size": 256, "patients": (4, 2, 2, 1)},
    "mixed sizes": {"size": (96, 128, 192), "patients": (4, 3, 2, 2)},
    "8-bit noise": {"noise": 3.0},
    "strong compression": {"quality": 60},
    "weak compression": {"quality": 95},
    "copies across splits": {"cross_duplicates": 12},
}


@pytest.mark.parametrize(
    "seed, variant",
    [
        (0, "few slices"),
        (1, "mixed sizes"),
        (2, "a patient in two classes"),
        (3, "8-bit noise"),
        (4, "strong compression"),
        (5, "copies across splits"),
    ],
)
def test_recovered_patients_are_the_true_ones(tmp_path, seed, variant):
    assert_patients_are_the_true_ones(
        write_phantom(
            tmp_path, **{"patients": (4, 3, 2, 2), "size": 96, **VARIANTS[variant]}, seed=seed
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [*range(2), *(pytest.param(n, marks=pytest.mark.exhaustive) for n in range(2, 20))]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_recovered_patients_are_the_true_ones_over_20_seeds(tmp_path, variant, seed):
    assert_patients_are_the_true_ones(
        write_phantom(tmp_path, **{"patients": (6, 4, 3, 2), **VARIANTS[variant]}, seed=seed)
    )


def test_a_patient_in_two_classes_is_a_reported_conflict(tmp_path):
    recovery = assert_patients_are_the_true_ones(small(tmp_path, conflicts=1, seed=4))
    assert len(recovery.conflicts) == 1
    assert sorted(next(iter(recovery.conflicts.values()))) == [0, 1]


def test_independent_images_are_refused(tmp_path):
    folder = write_phantom(
        tmp_path, patients=(40, 25, 15, 10), slices=1, synthetic=0, duplicates=0, size=64
    )
    with pytest.raises(NoPatientsError, match="No gap"):
        build_cohort(read_raw(folder))


def test_noise_images_are_refused():
    images = list(np.random.default_rng(0).integers(0, 256, (200, 32, 32), dtype=np.uint8))
    with pytest.raises(NoPatientsError):
        find_patients(features(images), background(images))


def lift(folder: Path, lifted: np.ndarray) -> tuple[Cohort, Recovery]:
    """The cohort with the background of some images raised, as a generator would leave it."""
    raw = read_raw(folder)
    images = [
        np.maximum(image, 6) if raised else image
        for image, raised in zip(raw.images, lifted, strict=True)
    ]
    return build_cohort(RawImages(raw.paths, images, raw.file_sha256, raw.source_split, raw.label))


def test_a_patient_on_an_unusual_background_is_real_among_synthetic_images(phantom):
    truth = truth_of(phantom, read_raw(phantom))
    whole = (truth["person"] == 1) & (truth["kind"] == "real")
    cohort, recovery = lift(phantom, whole)
    assert (cohort.kind[whole] == "real").all() and recovery.unusual == whole.sum()
    assert len(set(cohort.patient_id[whole])) == 1
    assert (cohort.kind[truth["kind"] == "synthetic"] == "synthetic").all()


def test_a_single_slice_on_an_unusual_background_still_joins_its_patient(tmp_path):
    folder = small(tmp_path, synthetic=0, seed=11)
    truth = truth_of(folder, read_raw(folder))
    one = (truth["slice_index"] == 5) & (truth["person"] == 3) & (truth["kind"] == "real")
    cohort, recovery = lift(folder, one)
    assert recovery.unusual == 1 and cohort.slice_index[one] == 5
    assert (
        cohort.patient_id[one]
        == cohort.patient_id[(truth["slice_index"] == 4) & (truth["person"] == 3)][0]
    )


def test_a_black_background_alone_makes_no_image_real(phantom):
    raw = read_raw(phantom)
    rng = np.random.default_rng(1)
    alone = np.kron(rng.integers(40, 200, (6, 6)), np.ones((8, 8))).astype(np.uint8)
    images = [*raw.images, np.pad(alone, 8)]
    label = np.append(raw.label, 2)
    cohort, _ = build_cohort(
        RawImages(
            [*raw.paths, "z"], images, [*raw.file_sha256, "f"], [*raw.source_split, ""], label
        )
    )
    assert cohort.kind[-1] == "synthetic" and cohort.patient_id[-1] == -1


# -- pieces ----------------------------------------------------------------------------------------


def test_neighbors_are_those_of_the_whole_matrix(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((50, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    group = rng.integers(0, 6, 50)
    monkeypatch.setattr(similarity, "BLOCK", 16)
    value, index = nearest(vectors, k=3, group=group)
    whole = np.where(group[:, None] == group, -2, vectors @ vectors.T)
    np.testing.assert_allclose(value, -np.sort(-whole, 1)[:, :3], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(whole, index, 1), value, atol=1e-6)


def test_the_tree_is_the_strongest_spanning_tree(monkeypatch):
    from scipy.sparse.csgraph import minimum_spanning_tree

    rng = np.random.default_rng(1)
    vectors = (
        (rng.standard_normal((8, 1, 30)) * 3 + rng.standard_normal((8, 10, 30)))
        .reshape(80, 30)
        .astype(np.float32)
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    monkeypatch.setattr(similarity, "BLOCK", 32)
    links = strongest_tree(vectors, rounds=10)[:, 2]
    expected = 1 - minimum_spanning_tree(1 - vectors.astype(np.float64) @ vectors.T).data
    np.testing.assert_allclose(np.sort(links), np.sort(expected), atol=1e-5)
    np.testing.assert_allclose(tree_within(vectors @ vectors.T), links, atol=1e-5)


def test_groups_are_numbered_by_first_appearance():
    links = np.array([[4, 1, 0.9], [2, 5, 0.8], [0, 3, 0.5], [5, 2, 0.4]])
    assert linking.groups_of(links, 6).tolist() == [0, 1, 2, 0, 1, 2]
    assert linking.groups_above(links, 6, 0.8).tolist() == [0, 1, 2, 3, 1, 2]
    forest = linking.strongest_forest(links[::-1], 6)
    assert forest.tolist() == links[:3].tolist()


def test_a_missed_link_is_found_by_the_check():
    """Many near copies of each slice fill the lists of neighbors; the slices must be linked all the
    same."""
    line = np.stack([np.cos(np.arange(6) * 0.3), np.sin(np.arange(6) * 0.3)], 1)
    vectors = np.repeat(line, 9, axis=0) + np.random.default_rng(0).normal(0, 1e-3, (54, 2))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    group, _ = exact_groups(vectors, np.empty((0, 3)), 0.9)
    assert len(set(group)) == 1


def test_a_wider_step_between_whole_scanners_is_not_taken_for_patients(monkeypatch):
    """Two sets of patients whose features have nothing in common: the widest step lies between the
    sets."""
    monkeypatch.setattr(linking, "LONGEST_STACK", 60)
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((2, 1, 1, 400)) * 4.5
    patients = shared + rng.standard_normal((2, 8, 1, 400))
    vectors = (
        (patients + 0.45 * rng.standard_normal((2, 8, 8, 400))).reshape(128, 400).astype(np.float32)
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (
        find_patients(vectors, np.zeros(128)).patient.tolist()
        == np.repeat(np.arange(16), 8).tolist()
    )


def test_features_ignore_brightness_and_tell_correlation():
    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(20, 100, (16, 16)), np.ones((8, 8))).astype(np.uint8)
    vectors = features(
        [
            image,
            image * 2 + 10,
            np.zeros((128, 128), np.uint8),
            rng.integers(0, 255, (90, 70), dtype=np.uint8),
        ]
    )
    assert vectors.shape == (4, SEARCH_SIDE**2)
    scores = vectors @ vectors.T
    assert (
        scores[0, 1] == pytest.approx(1, abs=1e-3)
        and abs(scores[0, 2]) < 1e-6
        and abs(scores[0, 3]) < 0.2
    )


def test_a_shuffled_stack_is_put_in_order():
    place = np.arange(20)
    matrix = np.exp(-(((place[:, None] - place) / 4.0) ** 2))
    shuffle = np.random.default_rng(0).permutation(20)
    order = shuffle[order_stack(matrix[np.ix_(shuffle, shuffle)])]
    assert order.tolist() in (place.tolist(), place[::-1].tolist())


def test_duplicates_name_the_first_row_and_carry_its_place(built):
    _, cohort = built
    first = {}
    for row in range(len(cohort)):
        if cohort.kind[row] == "duplicate":
            kept = first[cohort.duplicate_of[row]]
            assert cohort.duplicate_of[row] == cohort.pixel_sha256[row] == cohort.pixel_sha256[kept]
            assert (
                cohort.patient_id[row] == cohort.patient_id[kept]
                and cohort.slice_index[row] == cohort.slice_index[kept]
            )
        else:
            assert cohort.duplicate_of[row] == "" and cohort.pixel_sha256[row] not in first
            first[cohort.pixel_sha256[row]] = row


def test_the_table_has_the_contract_columns_and_round_trips(built, phantom, tmp_path):
    raw, cohort = built
    write_cohort(cohort, tmp_path / "a.csv")
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert tuple(rows[0]) == (
        "file_sha256",
        "pixel_sha256",
        "source_split",
        "label",
        "kind",
        "duplicate_of",
        "patient_id",
        "slice_index",
    )
    file = phantom / raw.paths[0]
    assert rows[0]["file_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (
        rows[0]["pixel_sha256"]
        == hashlib.sha256(np.asarray(Image.open(file).convert("L")).tobytes()).hexdigest()
    )
    assert all(
        row["patient_id"] == row["slice_index"] == "" for row in rows if row["kind"] == "synthetic"
    )
    write_cohort(read_cohort(tmp_path / "a.csv"), tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="columns"):
        read_cohort(tmp_path / "a.csv")


def test_a_known_cohort_is_taken_by_hash_without_recovery(built, phantom, tmp_path, monkeypatch):
    raw, cohort = built
    write_cohort(cohort, tmp_path / "cohort.csv")
    monkeypatch.setattr(table, "find_patients", lambda *_: pytest.fail("recovered again"))
    order = np.random.default_rng(0).permutation(len(raw))
    moved = RawImages(
        [raw.paths[i] for i in order],
        [raw.images[i] for i in order],
        [raw.file_sha256[i] for i in order],
        [""] * len(raw),
        raw.label[order],
    )
    found = cohort_for(moved, committed=tmp_path / "cohort.csv")
    assert (found.patient_id == cohort.patient_id[order]).all() and (
        found.slice_index == cohort.slice_index[order]
    ).all()
    assert Counter(found.kind.tolist()) == Counter(cohort.kind.tolist())


def test_other_files_are_recovered_and_kept_in_the_cache(built, tmp_path):
    raw, cohort = built
    cache = tmp_path / "cache" / "cohort.csv"
    first = cohort_for(raw, cache=cache)
    assert (first.patient_id == cohort.patient_id).all() and cache.is_file()
    assert (cohort_for(raw, cache=cache).patient_id == cohort.patient_id).all()


# -- reading ---------------------------------------------------------------------------------------


def test_a_zip_wrapped_in_a_folder_reads_like_the_folder(phantom, tmp_path):
    folder = read_raw(phantom)
    for prefix in ("", "outer/", "a/b/"):
        archive = read_raw(zipped(phantom, tmp_path / "raw.zip", prefix))
        assert archive.paths == folder.paths and archive.file_sha256 == folder.file_sha256
        assert archive.source_split == folder.source_split and (archive.label == folder.label).all()
    assert read_raw(phantom.parent).paths == folder.paths


@pytest.mark.parametrize(
    "names",
    [
        ("NonDemented", "VeryMildDemented", "MildDemented", "ModerateDemented"),
        ("non demented", "VERY MILD DEMENTED", "mild demented", "Moderate Demented"),
        ("No Impairment", "Very Mild Impairment", "Mild_Impairment", "moderate_impairment"),
    ],
)
def test_class_folders_of_the_copies_in_circulation_are_known(phantom, tmp_path, names):
    original = read_raw(phantom)
    kinds = ("Non_Demented", "Very_Mild_Demented", "Mild_Demented", "Moderate_Demented")
    for path in original.paths:
        split, kind, name = path.split("/")
        target = tmp_path / split / names[kinds.index(kind)] / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(phantom / path, target)
    renamed = read_raw(tmp_path)
    assert sorted(zip(renamed.file_sha256, renamed.label.tolist(), strict=True)) == sorted(
        zip(original.file_sha256, original.label.tolist(), strict=True)
    )


def test_splits_may_be_missing(phantom, tmp_path):
    shutil.copytree(phantom / "train", tmp_path / "raw")
    raw = read_raw(tmp_path / "raw")
    assert set(raw.source_split) == {""} and sorted(set(raw.label)) == [0, 1, 2, 3]


def make_tiny(folder: Path) -> Path:
    for k, name in enumerate(
        ("Non_Demented", "Very_Mild_Demented", "Mild_Demented", "Moderate_Demented")
    ):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((8, 8), 10 * k + i, np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_what_is_no_image_is_left_alone(tmp_path):
    folder = make_tiny(tmp_path / "raw")
    (folder / "notes.txt").write_text("no image")
    (folder / "__MACOSX" / "Odd").mkdir(parents=True)
    shutil.copy(folder / "Mild_Demented" / "0.png", folder / "__MACOSX" / "Odd" / "._0.png")
    shutil.copy(folder / "Mild_Demented" / "0.png", folder / "Mild_Demented" / ".hidden.png")
    assert len(read_raw(folder)) == 8


def test_rgb_16_bit_and_odd_sizes_become_8_bit_gray(tmp_path):
    folder = make_tiny(tmp_path / "raw")
    ramp = np.linspace(0, 255, 15 * 9).reshape(15, 9)
    Image.fromarray(np.dstack([ramp] * 3).astype(np.uint8)).save(
        folder / "Non_Demented" / "rgb.png"
    )
    Image.fromarray((ramp * 257).astype(np.uint16)).save(folder / "Non_Demented" / "sixteen.png")
    raw = read_raw(folder)
    for name in ("rgb", "sixteen"):
        image = raw.images[raw.paths.index(f"Non_Demented/{name}.png")]
        assert image.dtype == np.uint8 and image.shape == (15, 9)
        assert np.abs(image.astype(float) - ramp).max() <= 1


def refused(path: Path, words: str, **options) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read_raw(path, **options)
    assert "\n" not in str(caught.value)


def test_no_such_path_and_no_image_are_named(tmp_path):
    refused(tmp_path / "nothing", "nothing at")
    refused(tmp_path, "holds no image")
    (tmp_path / "text.txt").write_text("hello")
    refused(tmp_path / "text.txt", "neither a folder nor a zip")


def test_a_truncated_zip_is_named(phantom, tmp_path):
    whole = zipped(phantom, tmp_path / "raw.zip").read_bytes()
    (tmp_path / "half.zip").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "half.zip", "half.zip is no complete zip")


@pytest.mark.parametrize(
    "entry",
    [
        "../evil/Mild_Demented/1.jpg",
        "/etc/Mild_Demented/1.jpg",
        "C:/Mild_Demented/1.jpg",
        "a\\..\\..\\Mild_Demented\\1.jpg",
    ],
)
def test_an_entry_outside_the_archive_is_refused(tmp_path, entry):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr(entry, b"x")
    refused(tmp_path / "evil.zip", "outside its folder")


def test_an_unreadable_image_is_named_and_left_out_only_on_request(tmp_path, capsys):
    folder = make_tiny(tmp_path / "raw")
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(
        buffer, "JPEG"
    )
    (folder / "Mild_Demented" / "broken.jpg").write_bytes(buffer.getvalue()[:900])
    refused(folder, "Mild_Demented/broken.jpg cannot be read")
    assert len(read_raw(folder, skip_unreadable=True)) == 8
    assert "broken.jpg" in capsys.readouterr().err


def test_an_unknown_class_folder_and_an_empty_class_are_named(tmp_path):
    folder = make_tiny(tmp_path / "raw")
    (folder / "Severe_Demented").mkdir()
    shutil.copy(folder / "Mild_Demented" / "0.png", folder / "Severe_Demented" / "0.png")
    refused(folder, "unknown class folder 'Severe_Demented'")
    assert read_raw(folder, any_classes=True).classes[-1] == "Very_Mild_Demented"
    shutil.rmtree(folder / "Severe_Demented")
    for file in (folder / "Moderate_Demented").iterdir():
        file.unlink()
    refused(folder, "no readable image of the class Moderate")


def test_the_raw_data_are_found_in_the_documented_order(tmp_path, monkeypatch):
    monkeypatch.setenv("ALZHEIMER_RAW", str(tmp_path))
    assert find_raw() == tmp_path and find_raw(ROOT) == ROOT
    monkeypatch.setenv("ALZHEIMER_RAW", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="ALZHEIMER_RAW"):
        find_raw()
    monkeypatch.delenv("ALZHEIMER_RAW")
    monkeypatch.setenv("ALZHEIMER_OFFLINE", "1")
    monkeypatch.setattr(raw_module, "ROOT", tmp_path)
    assert find_raw() is None
    make_tiny(tmp_path / "dataset" / "raw_dataset")
    assert find_raw() == tmp_path / "dataset" / "raw_dataset"


def test_the_command_writes_the_table_and_answers_errors_in_one_sentence(phantom, tmp_path):
    command = [sys.executable, "-m", "utils.cohort"]
    done = subprocess.run(
        [*command, str(phantom), "--out", str(tmp_path / "cohort.csv")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "8 patients" in done.stdout
        and "threshold" in done.stdout
        and len(read_cohort(tmp_path / "cohort.csv")) == 105
    )
    done = subprocess.run(
        [*command, str(tmp_path / "no"), "--out", str(tmp_path / "x.csv")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and len(done.stderr.strip().splitlines()) == 1
        and not (tmp_path / "x.csv").exists()
    )
