"""Small imitations of the layouts in circulation, from the data to an attack on a model."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from utils import experiment
from utils.audit import page
from utils.cohort import build_cohort, read_raw
from utils.manifest.command import main as write_manifest
from utils.phantom import write_phantom
from utils.pipeline import command
from utils.utils_funcs import UserError

pytestmark = pytest.mark.slow  # a dozen data sets, each through every step

KAGGLE = ("NonDemented", "VeryMildDemented", "MildDemented", "ModerateDemented")
OASIS = ("Non Demented", "Very mild Dementia", "Mild Dementia", "Moderate Dementia")


class Source:
    """Real phantom images with their classes and patients, five or more patients a class."""

    def __init__(self, folder: Path) -> None:
        raw = read_raw(write_phantom(folder, patients=(6, 6, 5, 5), slices=(8, 9), size=64, seed=8))
        cohort = build_cohort(raw)[0]
        rows = np.flatnonzero(cohort.kind == "real")
        self.images = [raw.images[row] for row in rows]
        self.label = cohort.label[rows]
        self.patient = cohort.patient_id[rows]
        self.place = cohort.slice_index[rows]

    def write(self, root: Path, name: Callable[[int], str], save=None) -> Path:
        """Every image under the name that `name` gives its number."""
        for number, image in enumerate(self.images):
            path = root / name(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            (save or (lambda pixels, path: Image.fromarray(pixels).save(path)))(image, path)
        return root


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    return Source(tmp_path_factory.mktemp("source") / "raw")


def kaggle_with_splits(source: Source, root: Path) -> tuple[Path, dict]:
    parts = ("train", "val", "test")
    name = lambda n: f"{parts[n % 3]}/{KAGGLE[source.label[n]]}/{n}.png"  # noqa: E731
    return source.write(root, name), {}


def kaggle_without_split(source: Source, root: Path) -> tuple[Path, dict]:
    return source.write(root, lambda n: f"{KAGGLE[source.label[n]]}/{n}.png"), {}


def class_above_split(source: Source, root: Path) -> tuple[Path, dict]:
    name = lambda n: f"{KAGGLE[source.label[n]]}/{'test' if n % 4 == 0 else 'train'}/{n}.png"  # noqa: E731
    return source.write(root, name), {}


def oasis_of_kaggle(source: Source, root: Path) -> tuple[Path, dict]:
    def name(n: int) -> str:
        subject = f"OAS1_{source.patient[n]:04d}_MR1_mpr-1_{source.place[n]}"
        return f"Data/{OASIS[source.label[n]]}/{subject}.png"

    def in_color(pixels: np.ndarray, path: Path) -> None:
        Image.fromarray(np.dstack([pixels] * 3)).save(path)

    return source.write(root, name, in_color), {"patient": "OAS1_[0-9]+"}


def folder_a_subject(source: Source, root: Path) -> tuple[Path, dict]:
    name = lambda n: f"train/{KAGGLE[source.label[n]]}/S_{source.patient[n]}/{n}.png"  # noqa: E731
    return source.write(root, name), {}


def images_and_a_table(source: Source, root: Path) -> tuple[Path, dict]:
    source.write(root, lambda n: f"images/{n:04d}.png")
    lines = [f"{n},{KAGGLE[value]}" for n, value in enumerate(source.label)]
    (root / "labels.csv").write_text("\n".join(["id,diagnosis", *lines]))
    return root, {}


def zip_of_sixteen_bits(source: Source, root: Path) -> tuple[Path, dict]:
    def deep(pixels: np.ndarray, path: Path) -> None:
        Image.fromarray(pixels.astype(np.uint16) * 16).save(path)  # 12 bits in 16

    source.write(root / "set", lambda n: f"{KAGGLE[source.label[n]]}/{n}.png", deep)
    return Path(shutil.make_archive(str(root / "set"), "zip", root / "set")), {}


def float_tiffs(source: Source, root: Path) -> tuple[Path, dict]:
    def floating(pixels: np.ndarray, path: Path) -> None:
        Image.fromarray((pixels / 255).astype(np.float32)).save(path)

    return source.write(root, lambda n: f"{KAGGLE[source.label[n]]}/{n}.tif", floating), {}


def hugging_face(source: Source, root: Path) -> tuple[Path, dict]:
    names = [KAGGLE[k] for k in (2, 3, 0, 1)]  # another order of labels

    def content(pixels: np.ndarray) -> dict:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    numbers = [names.index(KAGGLE[value]) for value in source.label]
    described = {"info": {"features": {"label": {"names": names}}}}
    for part, rows in (("train", range(0, len(numbers), 2)), ("test", range(1, len(numbers), 2))):
        table = pyarrow.table(
            {
                "image": [content(source.images[row]) for row in rows],
                "label": [numbers[row] for row in rows],
            }
        ).replace_schema_metadata({b"huggingface": json.dumps(described).encode()})
        (root / "data").mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, root / "data" / f"{part}-00000-of-00001.parquet")
    return root, {}


def stacks(source: Source) -> dict[int, np.ndarray]:
    """Patient → volume (right, anterior, superior) of its slices."""
    found = {}
    for patient in np.unique(source.patient):
        rows = np.flatnonzero(source.patient == patient)
        rows = rows[np.argsort(-source.place[rows])]
        found[int(patient)] = np.stack([source.images[row][::-1, ::-1].T for row in rows], -1)
    return found


def bids(source: Source, root: Path) -> tuple[Path, dict]:
    lines = ["participant_id\tdiagnosis"]
    for patient, voxels in stacks(source).items():
        folder = root / f"sub-{patient:02d}" / "ses-1" / "anat"
        folder.mkdir(parents=True)
        image = nibabel.Nifti1Image(voxels.astype(np.float32), np.eye(4))
        nibabel.save(image, folder / f"sub-{patient:02d}_ses-1_T1w.nii.gz")
        label = source.label[source.patient == patient][0]
        lines.append(f"sub-{patient:02d}\t{KAGGLE[label]}")
    (root / "participants.tsv").write_text("\n".join(lines))
    return root, {"slices": (0, 100)}


def nifti_in_class_folders(source: Source, root: Path) -> tuple[Path, dict]:
    for patient, voxels in stacks(source).items():
        folder = root / KAGGLE[source.label[source.patient == patient][0]]
        folder.mkdir(parents=True, exist_ok=True)
        image = nibabel.Nifti1Image(voxels.astype(np.int16), np.eye(4))
        nibabel.save(image, folder / f"I{patient}.nii")
    return root, {"slices": (0, 100)}


def linked_parts(source: Source, root: Path) -> tuple[Path, dict]:
    source.write(root / "disk", lambda n: f"{KAGGLE[source.label[n]]}/{n}.png")
    (root / "set").mkdir()
    (root / "set" / "train").symlink_to(root / "disk")
    return root / "set", {}


LAYOUTS = (
    kaggle_with_splits,
    kaggle_without_split,
    class_above_split,
    oasis_of_kaggle,
    folder_a_subject,
    images_and_a_table,
    zip_of_sixteen_bits,
    float_tiffs,
    hugging_face,
    bids,
    nifti_in_class_folders,
    linked_parts,
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_layout_goes_from_manifest_to_attack(layout, source, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ALZHEIMER_RUNS", str(tmp_path / "runs"))
    raw, options = layout(source, tmp_path / "raw")
    manifest = tmp_path / "manifest.csv"
    write_manifest(raw, manifest, **options)
    images = read_raw(manifest)
    assert np.bincount(images.label).tolist() == np.bincount(source.label).tolist()

    page.main(manifest, tmp_path / "audit.html")
    text = (tmp_path / "audit.html").read_text()
    assert "22 of 22" in text or "22 ids were given" in text or "22, of" in text

    opened = experiment.open_workspace("demo", manifest)
    assert opened.root.name == f"demo-{opened.cohort_sha256[:8]}"
    if layout in (kaggle_with_splits, bids):
        arguments = ["experiment", "run", "--raw", str(manifest), "--trials", "0"]
        monkeypatch.setattr("sys.argv", arguments)
        experiment.main()
        assert opened.record("Resnet", "patient").is_file()

    capsys.readouterr()
    command.attack_command(
        "tests.own_models:right", raw=str(manifest), suite="quick", limit=8, part="all"
    )
    assert "checks" in capsys.readouterr().out


def test_augmented_copies_beside_originals_are_refused_with_the_folder_to_name(source, tmp_path):
    name = lambda n: f"{KAGGLE[source.label[n]]}/{n}.png"  # noqa: E731
    source.write(tmp_path / "set" / "OriginalDataset", name)
    shutil.copytree(
        tmp_path / "set" / "OriginalDataset", tmp_path / "set" / "AugmentedAlzheimerDataset"
    )
    with pytest.raises(UserError, match="augmented copies .*OriginalDataset alone"):
        write_manifest(tmp_path / "set", tmp_path / "manifest.csv")


def test_ratings_of_another_study_are_audited_and_not_trained_on(source, tmp_path):
    names = ("CN", "EMCI", "LMCI", "AD")
    raw = source.write(tmp_path / "set", lambda n: f"{names[source.label[n]]}/{n}.png")
    write_manifest(raw, tmp_path / "manifest.csv")
    assert read_raw(tmp_path / "manifest.csv", any_classes=True).classes == names
    page.main(tmp_path / "manifest.csv", tmp_path / "audit.html")
    with pytest.raises(UserError, match="unknown class folder 'AD'.*expected Non"):
        read_raw(tmp_path / "manifest.csv")
