"""A result never crosses from one cohort to another, and no file that was changed is scored."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from tests.test_training import COHORT, DEVICE, TRAIN, VALIDATION, small, striped, tiny  # noqa: F401
from utils import data, experiment, training
from utils.backbones import load_model, read_metadata
from utils.cohort import cohort_identity, read_cohort
from utils.cohort.table import COMMITTED_COHORT
from utils.manifest.command import main as write_manifest
from utils.manifest.table import sidecar
from utils.phantom import write_phantom
from utils.pipeline import command
from utils.pipeline import workspace as workspaces
from utils.provenance import seen_before
from utils.utils_funcs import ROOT, UserError

OTHER = "beef0000" * 8


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """Class folders of a cohort of one's own, with `runs/` in a folder of the test."""
    monkeypatch.setenv("ALZHEIMER_RUNS", str(tmp_path / "runs"))
    return write_phantom(tmp_path / "raw", patients=(6, 6, 6, 5), slices=(8, 10), size=64, seed=5)


def table(workspace) -> np.ndarray:
    return read_cohort(workspace.sets / "cohort.csv")


# --- Where results of another cohort go ---


@pytest.mark.parametrize("profile", ["demo", "cpu", "paper"])
def test_results_of_another_cohort_go_to_a_folder_of_its_name(raw, tmp_path, profile):
    opened = experiment.open_workspace(profile, raw)
    assert opened.root == tmp_path / "runs" / f"{profile}-{opened.cohort_sha256[:8]}"
    assert opened.data == "real"
    assert opened.cohort_sha256 == cohort_identity(table(opened))
    assert experiment.results_root(profile, raw) == opened.root
    for path in (opened.record("Resnet", "patient"), opened.sets, opened.optuna("Resnet")):
        assert ROOT not in path.parents


def test_the_committed_cohort_is_known_by_its_identity():
    committed = read_cohort(COMMITTED_COHORT)
    identity = cohort_identity(committed)
    assert identity == data.file_sha256(COMMITTED_COHORT)
    assert workspaces.root_of("cpu", "real", identity) == ROOT
    assert workspaces.root_of("demo", "real", identity).name == "demo-real"
    assert workspaces.root_of("cpu", "real", OTHER).name == "cpu-beef0000"


def test_a_part_of_the_committed_cohort_is_another_cohort_and_gets_folds_of_its_own(tmp_path):
    """Even where its patients have the same numbers and classes."""
    committed = read_cohort(COMMITTED_COHORT)
    keep = np.flatnonzero(committed.slice_index != 0)
    part = dataclasses.replace(
        committed,
        **{
            field.name: getattr(committed, field.name)[keep]
            for field in dataclasses.fields(committed)
        },
    )
    assert data.patients_of(part)[0].tolist() == data.patients_of(committed)[0].tolist()
    folds = data.folds_for(part, tmp_path / "folds.csv")
    whole = data.folds_for(committed, tmp_path / "whole.csv")
    assert whole.fold.tolist() == data.read_folds(data.COMMITTED_FOLDS).fold.tolist()
    assert not (tmp_path / "whole.csv").exists()
    assert data.read_folds(tmp_path / "folds.csv").fold.tolist() == folds.fold.tolist()


# --- Prepared tensors follow the files ---


def labels_by_file(workspace) -> dict[str, int]:
    return {
        file: label
        for name in data.SETS
        for part in [data.load_set(workspace.sets, "slice", 0, name)]
        for file, label in zip(part.files, part.labels.tolist(), strict=True)
    }


def a_whole_patient(raw: Path, workspace) -> list[Path]:
    """The files of one patient of class 1."""
    cohort = table(workspace)
    patient = cohort.patient_id[cohort.label == 1][0]
    files = set(cohort.file_sha256[cohort.patient_id == patient].tolist())
    return [path for path in raw.rglob("*.jpg") if data.file_sha256(path) in files]


def test_images_moved_to_another_class_have_their_new_label(raw):
    first = experiment.open_workspace("demo", raw)
    moved = a_whole_patient(raw, first)
    digests = {data.file_sha256(path) for path in moved}
    assert {labels_by_file(first)[digest] for digest in digests} == {1}
    for path in moved:
        shutil.move(path, path.parent.parent / "Mild_Demented" / f"moved_{path.name}")
    second = experiment.open_workspace("demo", raw)
    assert {labels_by_file(second)[digest] for digest in digests} == {2}
    assert second.cohort_sha256 != first.cohort_sha256 and second.root != first.root


def test_an_image_replaced_under_its_name_and_size_is_noticed(raw):
    first = experiment.open_workspace("demo", raw)
    one, other = sorted(raw.rglob("*.jpg"))[:2]
    digest, folder = data.file_sha256(other), os.stat(one.parent)
    one.write_bytes(other.read_bytes())
    os.utime(one.parent, (folder.st_atime, folder.st_mtime))  # its folder tells nothing
    second = experiment.open_workspace("demo", raw)
    files = table(second).file_sha256.tolist()
    assert files.count(digest) == 2 and second.cohort_sha256 != first.cohort_sha256


@pytest.mark.parametrize("packed", [False, True])
def test_an_image_replaced_behind_a_manifest_is_noticed(raw, tmp_path, packed):
    source = Path(shutil.make_archive(str(tmp_path / "set"), "zip", raw)) if packed else raw
    write_manifest(source, tmp_path / "manifest.csv")
    before = workspaces.files_sha256(tmp_path / "manifest.csv")
    assert workspaces.files_sha256(tmp_path / "manifest.csv") == before
    changed = source if packed else next(raw.rglob("*.jpg"))
    changed.touch()
    after = workspaces.files_sha256(tmp_path / "manifest.csv")
    assert after != before
    sidecar(tmp_path / "manifest.csv").touch()
    assert workspaces.files_sha256(tmp_path / "manifest.csv") != after


def test_unchanged_files_are_prepared_once_and_by_prepare_again(raw, monkeypatch):
    first = experiment.open_workspace("demo", raw)
    path = data.set_path(first.sets, "patient", 0, "test")
    written = path.stat().st_mtime_ns
    assert experiment.open_workspace("demo", raw) == first
    assert path.stat().st_mtime_ns == written
    command.prepare(str(raw), "demo")
    assert path.stat().st_mtime_ns > written
    path.unlink()
    experiment.open_workspace("demo", raw)
    assert path.is_file(), "a set that is missing is written again"


def test_links_to_images_are_followed(raw, tmp_path):
    (tmp_path / "linked").mkdir()
    for folder in raw.iterdir():
        if folder.is_dir():
            (tmp_path / "linked" / folder.name).symlink_to(folder)
    before = workspaces.files_sha256(tmp_path / "linked")
    next(raw.rglob("*.jpg")).touch()
    assert workspaces.files_sha256(tmp_path / "linked") != before


def test_sets_of_another_cohort_are_refused(raw, tmp_path):
    opened = experiment.open_workspace("demo", raw)
    expected = f"{OTHER[:8]}.*|{opened.cohort_sha256[:8]}.*{OTHER[:8]}"
    with pytest.raises(UserError, match=expected):
        data.load_sets(opened.sets, "patient", 0, cohort_sha256=OTHER)


@pytest.mark.parametrize("where", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", ["slice/train_set.pt", "images.npy"])
def test_a_changed_byte_of_prepared_tensors_is_noticed(raw, where, name):
    opened = experiment.open_workspace("demo", raw)
    path = opened.sets / name
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path.name} (is damaged|cannot be read).*prepare"):
        data.load_set(opened.sets, "slice", 0, "train")


# --- Weights ---


def test_weights_of_another_cohort_are_neither_taken_nor_continued(tiny):  # noqa: F811
    training.fit(TRAIN, VALIDATION, small("Resnet"), tiny, DEVICE)
    other, apart = striped(32, 1, OTHER), striped(16, 2, OTHER)
    with pytest.raises(UserError, match=f"is of cohort {COHORT[:8]}.* are cohort {OTHER[:8]}"):
        training.fit(other, apart, small("Resnet"), tiny, DEVICE)

    def stop(scores):
        raise KeyboardInterrupt

    tiny.unlink()
    with pytest.raises(KeyboardInterrupt):
        training.fit(TRAIN, VALIDATION, small("Resnet"), tiny, DEVICE, on_epoch=stop)
    with pytest.raises(UserError, match=f"state.pt is of cohort {COHORT[:8]}"):
        training.fit(other, apart, small("Resnet"), tiny, DEVICE)


def test_a_training_starts_from_no_model_of_another_cohort(tiny, tmp_path):  # noqa: F811
    training.fit(TRAIN, VALIDATION, small("Resnet"), tiny, DEVICE)
    config = small("Resnet_atk", warm_start=True)
    with pytest.raises(UserError, match=f"{COHORT[:8]}.*{OTHER[:8]}.*start from"):
        training.fit(
            striped(32, 1, OTHER),
            striped(16, 2, OTHER),
            config,
            tmp_path / "robust.safetensors",
            DEVICE,
            start=tiny,
        )


def test_a_checkpoint_says_of_any_set_what_it_has_seen(tiny):  # noqa: F811
    training.fit(TRAIN, VALIDATION, small("Resnet"), tiny, DEVICE)
    metadata = read_metadata(tiny)
    assert metadata["cohort_sha256"] == COHORT and len(metadata["trained_on"]) == len(TRAIN)
    assert metadata["trained_on"] == sorted(metadata["trained_on"])
    assert {len(digits) for digits in metadata["trained_on"]} == {16}
    renamed = dataclasses.replace(TRAIN, files=[f"{row:064d}" for row in range(len(TRAIN))])
    seen = seen_before(metadata, renamed.pick(np.arange(5)))
    assert (seen.images, seen.of_images, seen.patients, seen.of_patients) == (5, 5, 2, 2)
    assert seen_before(metadata, VALIDATION).images == len(VALIDATION)
    assert seen_before(metadata, striped(8, 7)).images == 0
    assert not seen_before({}, TRAIN).known and "does not say" in str(seen_before({}, TRAIN))


@pytest.mark.parametrize("model", ["Efficientnet", "Efficientnet_atk"])
def test_the_committed_weights_have_seen_none_of_their_test_patients(model):
    cohort = read_cohort(COMMITTED_COHORT)
    folds = data.read_folds(data.COMMITTED_FOLDS)
    sets = {
        name: data.set_of_rows(cohort, rows, name, COHORT)
        for name, rows in data.split_patients(cohort, folds, 0).items()
    }
    metadata = read_metadata(ROOT / f"checkpoints/{model}/patient/fold0_seed0_fp16.safetensors")
    assert metadata["cohort_sha256"] == data.file_sha256(COMMITTED_COHORT)
    seen = {name: seen_before(metadata, part) for name, part in sets.items()}
    assert (seen["test"].images, seen["test"].patients, seen["test"].of_patients) == (0, 0, 40)
    assert seen["train"].images == seen["train"].of_images == 4480
    assert seen["validation"].patients == seen["validation"].of_patients == 20


@pytest.mark.parametrize("where", [0.2, 0.5, 0.8])
def test_a_changed_byte_of_weights_is_noticed(tiny, where):  # noqa: F811
    training.fit(TRAIN, VALIDATION, small("Resnet"), tiny, DEVICE)
    with safe_open(tiny, framework="pt") as file:
        count = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    content = bytearray(tiny.read_bytes())
    content[len(content) - count + int(where * count)] ^= 16
    tiny.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        load_model(tiny)
