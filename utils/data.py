"""Cohort and protocol → tensors: which patient is in which set, prepared files, augmentation."""

from __future__ import annotations

import csv
import functools
import hashlib
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.cohort.raw import RawImages
from utils.cohort.table import COMMITTED_COHORT, Cohort, cohort_identity
from utils.sampling import bit_reversed_order, classes_in_turn
from utils.utils_funcs import (
    CLASSES,
    ROOT,
    UserError,
    atomic_path,
    content_sha256,
    progress,
    short_name,
)

SETS = ("train", "validation", "test")
N_FOLDS = 5
#: Share of the patients outside the test fold, by class, that validate.
VALIDATION_SHARE = 1 / 8
COMMITTED_FOLDS = ROOT / "dataset" / "folds.csv"


class SharedPatientsError(UserError):
    """A patient is in two sets of the `patient` protocol."""


@dataclass(frozen=True)
class ImageSet:
    """One set of one protocol: rows of the images that all sets of a data set share.

    The shared images may be mapped from disk (`load_set`), and are read when they are asked for.
    """

    stack: Tensor
    """uint8 (M, 1, H, W), native size: the images of all sets."""
    rows: Tensor
    """int64 (N,), which of them are this set's."""
    labels: Tensor
    """int64 (N,), number of the class: 0-3, or of other classes in somebody's own data."""
    patients: Tensor
    """int64 (N,), patient id, -1 where unknown (synthetic images)."""
    slices: Tensor
    """int64 (N,), position along the body axis, -1 where unknown."""
    files: list[str]
    """SHA-256 of each image file."""
    name: str
    pixels: list[str]
    """SHA-256 of each file's pixels, as in `cohort.csv`."""
    cohort_sha256: str
    """Identity of the cohort that the images belong to; empty where there is none."""
    parts: tuple[str, ...] = ()
    """Name of the part of each image, where a set has parts that are scored apart; else empty."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """uint8 (N, 1, H, W), native size: a copy, made anew each time."""
        return self.stack[self.rows]

    def images_at(self, rows: Tensor) -> Tensor:
        """The images of some rows of this set, uint8 (n, 1, H, W)."""
        return self.stack[self.rows[rows]]

    def pick(self, rows: Tensor | np.ndarray) -> ImageSet:
        """The images of these rows, in their order."""
        rows = torch.as_tensor(rows, dtype=torch.long)
        return replace(
            self,
            rows=self.rows[rows],
            labels=self.labels[rows],
            patients=self.patients[rows],
            slices=self.slices[rows],
            files=[self.files[row] for row in rows.tolist()],
            pixels=[self.pixels[row] for row in rows.tolist()],
            parts=tuple(self.parts[row] for row in rows.tolist() if self.parts),
        )

    def balance(self) -> dict[str, tuple[int, int]]:
        """Class → (patients, slices); images of unknown patients count as slices only."""
        return balance(self.labels.numpy(), self.patients.numpy())


def balance(labels: np.ndarray, patients: np.ndarray) -> dict[str, tuple[int, int]]:
    """Class → (patients, slices); images of unknown patients (-1) count as slices only."""
    return {
        name: (
            len(np.unique(patients[(patients >= 0) & (labels == label)])),
            int((labels == label).sum()),
        )
        for label, name in enumerate(CLASSES)
    }


# -- which patient is in which set -------------------------------------------------------------


@dataclass(frozen=True)
class Folds:
    """Which patients test and validate in which fold; all columns have one row a patient."""

    patient_id: np.ndarray
    label: np.ndarray
    fold: np.ndarray
    """The fold in which the patient tests."""
    validation_of: list[tuple[int, ...]]
    """The folds in which the patient validates."""

    def roles(self, fold: int) -> dict[int, str]:
        """Patient id → `train`, `validation` or `test` when `fold` is the test fold."""
        return {
            int(patient): "test"
            if tests == fold
            else "validation"
            if fold in validates
            else "train"
            for patient, tests, validates in zip(
                self.patient_id, self.fold, self.validation_of, strict=True
            )
        }


def assign_folds(patient_id: np.ndarray, label: np.ndarray, seed: int = 0) -> Folds:
    """Five folds of patients, stratified by class.

    In each, one eighth of a class's patients outside the test fold validate. A class with fewer
    patients than folds (Moderate: two) tests in different folds and never validates. Where a class
    does not divide by five, its larger folds follow those of the class before, so that all folds
    have similar sizes.

    Args:
        patient_id, label: (P,), the patients and their classes.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    fold = np.zeros(len(patient_id), int)
    validates: list[list[int]] = [[] for _ in patient_id]
    offset = 0
    for value in np.unique(label):
        rows = generator.permutation(np.flatnonzero(label == value))
        fold[rows] = (np.arange(len(rows)) + offset) % N_FOLDS
        offset += len(rows)
        if len(rows) < N_FOLDS:
            continue
        for test in range(N_FOLDS):
            # Patients of the next folds in turn, so that no patient validates twice where a class
            # is large enough.
            order = sorted(
                (row for row in rows if fold[row] != test),
                key=lambda row: (fold[row] - test) % N_FOLDS,
            )
            for row in order[: max(1, round(VALIDATION_SHARE * len(order)))]:
                validates[row].append(test)
    return Folds(patient_id, label, fold, [tuple(folds) for folds in validates])


def write_folds(folds: Folds, path: Path) -> None:
    """Writes the folds as CSV, one row a patient; `read_folds` reads them."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["patient_id", "label", "fold", "validation_of"])
        columns = (folds.patient_id, folds.label, folds.fold, folds.validation_of)
        for patient, label, fold, validation_of in zip(*columns, strict=True):
            writer.writerow([patient, label, fold, " ".join(map(str, validation_of))])


def read_folds(path: Path) -> Folds:
    """The folds that `write_folds` wrote.

    Raises:
        UserError: the file holds something else.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return Folds(
            **{
                name: np.array([int(row[name]) for row in rows])
                for name in ("patient_id", "label", "fold")
            },
            validation_of=[tuple(map(int, row["validation_of"].split())) for row in rows],
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
        raise UserError(
            f"{path} is no table of folds ({type(error).__name__}: {error}): get it back with "
            "`git checkout`, or delete it where it is not of the repository."
        ) from error


def patients_of(cohort: Cohort) -> tuple[np.ndarray, np.ndarray]:
    """Patient ids and the class of each: the higher one where a patient has images of two."""
    real = cohort.patient_id >= 0
    patients = np.unique(cohort.patient_id[real])
    return patients, np.array(
        [cohort.label[cohort.patient_id == patient].max() for patient in patients]
    )


def folds_for(cohort: Cohort, path: Path) -> Folds:
    """The folds of this cohort's patients: the committed ones for the committed cohort, and for any
    other cohort, whatever its numbers of patients are, new ones, which are written to `path`."""
    if cohort_identity(cohort) == file_sha256(COMMITTED_COHORT):
        return read_folds(COMMITTED_FOLDS)
    folds = assign_folds(*patients_of(cohort))
    write_folds(folds, path)
    return folds


def split_slices(cohort: Cohort) -> dict[str, np.ndarray]:
    """Set → row numbers under the `slice` protocol.

    The published test folder is the test set; the train folder is divided 8:1 into training and
    validation, unless a validation folder is published too, which then is that set. This does not
    depend on any library's random numbers: within a class, images are ranked by their file's
    SHA-256, and every ninth validates. A copy of the data without a test folder is divided 8:1:1
    in the same way, with real images only in the test set. Synthetic images and duplicates are
    kept, because that is what the literature does.
    """
    parts: dict[str, list[int]] = {name: [] for name in SETS}
    order = sorted(
        range(len(cohort.label)), key=lambda row: (cohort.label[row], cohort.file_sha256[row])
    )
    rank: dict[int, int] = {}
    published = set(cohort.source_split.tolist())
    for row in order:
        split = str(cohort.source_split[row])
        split = "" if split == "train" and "test" not in published else split
        if split in ("test", "validation") or split == "train" and "validation" in published:
            parts[split].append(row)
            continue
        label = int(cohort.label[row])
        position = rank[label] = rank.get(label, -1) + 1
        if split == "train":
            parts["validation" if position % 9 == 0 else "train"].append(row)
        elif position % 10 == 0 and cohort.patient_id[row] >= 0:
            parts["test"].append(row)
        else:
            parts["validation" if position % 10 == 1 else "train"].append(row)
    return {name: np.array(sorted(rows), dtype=int) for name, rows in parts.items()}


def split_patients(cohort: Cohort, folds: Folds, fold: int) -> dict[str, np.ndarray]:
    """Set → row numbers under the `patient` protocol: real, de-duplicated images only."""
    roles = folds.roles(fold)
    role = np.array(
        [
            roles[patient] if kind == "real" else ""
            for patient, kind in zip(cohort.patient_id.tolist(), cohort.kind, strict=True)
        ]
    )
    return {name: np.flatnonzero(role == name) for name in SETS}


def check_patients_apart(sets: dict[str, ImageSet]) -> None:
    """Refuses sets that share a patient, or that hold an image of an unknown one.

    Raises:
        SharedPatientsError: with the sets and a patient's id.
    """
    names = list(sets)
    for position, first in enumerate(names):
        patients = set(sets[first].patients.tolist())
        if -1 in patients:
            raise SharedPatientsError(
                f"{first} holds an image whose patient is unknown (synthetic?); the patient "
                "protocol takes images of known patients only: prepare the sets again."
            )
        for second in names[position + 1 :]:
            shared = patients & set(sets[second].patients.tolist())
            if shared:
                raise SharedPatientsError(
                    f"Patient {min(shared)} is in both {first} and {second} ({len(shared)} such "
                    "patients); the patient protocol keeps patients apart: prepare the sets again "
                    "with dataset/prepare_dataset.ipynb."
                )


# -- files of tensors --------------------------------------------------------------------------


def stacked_size(raw: RawImages) -> tuple[int, int]:
    """Height and width of prepared images: the most common size of the raw ones."""
    sizes, counts = np.unique([image.shape for image in raw.images], axis=0, return_counts=True)
    height, width = (int(side) for side in sizes[counts.argmax()])
    return height, width


def stack_images(raw: RawImages, rows: np.ndarray | None = None) -> Tensor:
    """The images of `rows` (None: all) in memory, uint8 (N, 1, H, W) of `stacked_size`."""
    height, width = stacked_size(raw)
    rows = np.arange(len(raw)) if rows is None else rows
    stack = np.empty((len(rows), 1, height, width), np.uint8)
    for place, row in enumerate(rows):
        stack[place, 0] = _resized(raw.images[row], height, width)
    return torch.from_numpy(stack)


def write_images(raw: RawImages, path: Path) -> str:
    """Writes all images as one array, uint8 (N, 1, H, W), one after the other, so that memory never
    holds more than one; returns the SHA-256 of the file.

    Images of another size than `stacked_size` are resized to it.
    """
    height, width = stacked_size(raw)
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(raw), 1, height, width)}
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for image in progress(raw.images, "writing images"):
                file.write(_resized(image, height, width).tobytes())
        return file_sha256(temporary)


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    if image.shape == (height, width):
        return image
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def set_path(folder: Path, protocol: str, fold: int, name: str) -> Path:
    """The file of a prepared set; `name` is one of `SETS`."""
    return folder / (protocol if protocol == "slice" else f"patient/fold{fold}") / f"{name}_set.pt"


def images_path(folder: Path) -> Path:
    """The file of the images that all prepared sets share."""
    return folder / "images.npy"


def is_complete(folder: Path) -> bool:
    """Whether the images and every set of both protocols are in the `folder` that `prepare`
    wrote."""
    parts = [("slice", 0), *(("patient", fold) for fold in range(N_FOLDS))]
    files = [set_path(folder, *part, name) for part in parts for name in SETS]
    return all(path.is_file() for path in (images_path(folder), *files))


def prepare(raw: RawImages, cohort: Cohort, folds: Folds, folder: Path) -> None:
    """Writes `images.npy`, all images once, and under `slice/` and `patient/fold<k>/` the
    {train,validation,test}_set.pt, which say which of them belong to each set.

    Raises:
        UserError: a set would be empty, or two sets under `patient` share a patient.
    """
    identity = cohort_identity(cohort)
    plans = {("slice", 0): split_slices(cohort)}
    plans |= {("patient", fold): split_patients(cohort, folds, fold) for fold in range(N_FOLDS)}
    found: dict[Path, ImageSet] = {}
    for (protocol, fold), parts in plans.items():
        for name in SETS:
            if not len(parts[name]):
                raise UserError(
                    f"The {name} set of protocol {protocol}, fold {fold} is empty: the cohort has "
                    f"too few patients or images ({len(patients_of(cohort)[0])} patients "
                    f"found, at least {N_FOLDS} needed)."
                )
        sets = {
            name: set_of_rows(cohort, rows, f"{protocol} {name}", identity)
            for name, rows in parts.items()
        }
        if protocol == "patient":
            check_patients_apart(sets)
        found |= {set_path(folder, protocol, fold, name): part for name, part in sets.items()}
    digest = write_images(raw, images_path(folder))
    for path, part in found.items():
        save_set(part, digest, path)


def set_of_rows(cohort: Cohort, rows: np.ndarray, name: str, identity: str) -> ImageSet:
    """These rows of the table of the cohort `identity` as a set, without the images."""

    def column(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(values)[rows].astype(np.int64))

    return ImageSet(
        stack=torch.empty(0, dtype=torch.uint8),
        rows=torch.from_numpy(rows.astype(np.int64)),
        labels=column(cohort.label),
        patients=column(cohort.patient_id),
        slices=column(cohort.slice_index),
        files=[str(cohort.file_sha256[row]) for row in rows],
        name=name,
        pixels=[str(cohort.pixel_sha256[row]) for row in rows],
        cohort_sha256=identity,
    )


def save_set(part: ImageSet, images_sha256: str, path: Path) -> None:
    """Writes which images are a set's; `load_set` reads it."""
    content: dict[str, Tensor | list[str] | str] = {
        "rows": part.rows,
        "labels": part.labels,
        "patients": part.patients,
        "slices": part.slices,
        "files": list(part.files),
        "pixels": list(part.pixels),
        "cohort_sha256": part.cohort_sha256,
        "images_sha256": images_sha256,
    }
    with atomic_path(path) as temporary:
        torch.save({**content, "sha256": content_sha256(content)}, temporary)


#: What to do about prepared files that cannot be used.
PREPARE_AGAIN = "prepare the sets again (`python -m utils.experiment prepare`)"


def load_set(folder: Path, protocol: str, fold: int, name: str) -> ImageSet:
    """One prepared set of the `folder` that `prepare` wrote; its images stay on disk until they are
    asked for."""
    path, images = set_path(folder, protocol, fold, name), images_path(folder)
    for needed in (path, images):
        if not needed.is_file():
            raise UserError(
                f"{needed} is missing: run dataset/prepare_dataset.ipynb (or `python -m "
                "utils.experiment prepare`) first."
            )
    try:
        content = torch.load(path, weights_only=True)
    except (RuntimeError, ValueError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): {PREPARE_AGAIN}."
        ) from error
    if not {"sha256", "images_sha256"} <= content.keys():
        raise UserError(f"{path} is of an older version of this project: {PREPARE_AGAIN}.")
    if content.pop("sha256") != content_sha256(content):
        raise UserError(f"{path} is damaged, its content is not what was written: {PREPARE_AGAIN}.")
    status = images.stat()
    if content.pop("images_sha256") != _digest_of(images, status.st_size, status.st_mtime_ns):
        raise UserError(
            f"{images} is damaged, its content is not what was written: {PREPARE_AGAIN}."
        )
    # Copy on write: nothing that is done to the tensor reaches the file.
    stack = torch.from_numpy(np.load(images, mmap_mode="c"))
    return ImageSet(name=f"{protocol} {name}", stack=stack, **content)


@functools.lru_cache(maxsize=8)
def _digest_of(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file that has this size and time of change: read once in a process."""
    return file_sha256(path)


def load_sets(
    folder: Path,
    protocol: str,
    fold: int,
    *,
    cohort_sha256: str | None = None,
    max_train: int | None = None,
    max_test: int | None = None,
) -> dict[str, ImageSet]:
    """The three sets of a run, by name.

    Args:
        cohort_sha256: the cohort that they must be of (None: one cohort, whichever).
        max_train, max_test: keep a small part of that many slices of the training set, and of the
            validation and test sets (None: all), chosen by `spread`.

    Raises:
        SharedPatientsError: two sets under `patient` share a patient.
        UserError: a set is missing, damaged, or of another cohort.
    """
    sets = {name: load_set(folder, protocol, fold, name) for name in SETS}
    for name, part in sets.items():
        check_cohort(
            part.cohort_sha256,
            cohort_sha256 or sets["train"].cohort_sha256,
            set_path(folder, protocol, fold, name),
            PREPARE_AGAIN,
        )
    if protocol == "patient":
        check_patients_apart(sets)
    limits = {"train": max_train, "validation": max_test, "test": max_test}
    return {
        name: part if (limit := limits[name]) is None else part.pick(spread(part, limit))
        for name, part in sets.items()
    }


def spread(part: ImageSet, count: int) -> np.ndarray:
    """At most `count` sorted rows, spread evenly over classes, then over patients, then over the
    slices of a patient. There is no randomness."""
    labels, slices = part.labels.numpy(), part.slices.numpy()
    patients = part.patients.numpy().copy()
    unknown = patients < 0
    patients[unknown] = -1 - np.arange(unknown.sum())  # each is a patient without other slices
    # How many slices of its patient are taken before a slice: the middle one is the first.
    turn = np.empty(len(labels), int)
    for patient in np.unique(patients):
        rows = np.flatnonzero(patients == patient)
        rows = rows[np.argsort(slices[rows], kind="stable")]
        turn[rows[np.roll(bit_reversed_order(len(rows)), -1)]] = np.arange(len(rows))
    order = np.lexsort((np.array(part.files), turn))
    return np.sort(classes_in_turn(labels, order)[:count])


def every_nth(part: ImageSet, stride: int) -> np.ndarray:
    """Sorted rows of about one in `stride` slices of each patient, at least one.

    A patient's slices are cut into equal stretches, of which the middle slice is taken: so neither
    end of the head is preferred. All images of unknown patients count as one patient's.
    """
    patients = part.patients.numpy()
    order = np.lexsort((part.slices.numpy(), patients))
    chosen = []
    for rows in np.split(order, np.flatnonzero(np.diff(patients[order])) + 1):
        count = max(1, round(len(rows) / stride))
        chosen.append(rows[((np.arange(count) + 0.5) * len(rows) / count).astype(int)])
    return np.sort(np.concatenate(chosen))


def check_cohort(found: str | None, expected: str, path: Path, remedy: str) -> None:
    """Refuses the file at `path` where it is of another cohort than the one in use.

    Args:
        found: the identity that the file names; None or empty where it names none.
        remedy: what to do about it.

    Raises:
        UserError: with both.
    """
    if found != expected:
        other = f"cohort {short_name(found)}" if found else "a cohort that it does not name"
        raise UserError(
            f"{path} is of {other}, and the data in use are cohort {short_name(expected)}: "
            f"{remedy}."
        )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- batches and augmentation ------------------------------------------------------------------


def pixels(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Images on the device as float32 in [0, 1].

    uint8 is divided by 255 on the device, so that a quarter of the bytes travel. Floating images
    stay as they are.
    """
    images = images.to(device, non_blocking=True)
    return images if images.is_floating_point() else images.float().div_(255)


def epoch_rows(part: ImageSet, stride: int, generator: torch.Generator) -> Tensor:
    """Shuffled rows of one epoch.

    Every `stride`-th slice of each patient from a random start, since neighbors are nearly the same
    image, and one in `stride` of the images of unknown patients.
    """
    order = torch.randperm(len(part), generator=generator)
    if stride <= 1:
        return order
    patients, slices = part.patients.numpy(), part.slices.numpy()
    # Images of unknown patients have no order along the body, so a random one.
    by_patient = np.lexsort((np.where(patients >= 0, slices, order.argsort().numpy()), patients))
    start = torch.randint(stride, (len(part),), generator=generator).numpy()
    keep = np.zeros(len(part), bool)
    for rows in np.split(by_patient, np.flatnonzero(np.diff(patients[by_patient])) + 1):
        keep[rows[start[rows[0]] :: stride]] = True
    return order[torch.from_numpy(keep)[order]]


def join_last(chunks: Sequence[Tensor], least: int) -> list[Tensor]:
    """The batches; a last one of fewer than `least` rows is joined to the one before it."""
    chunks = list(chunks)
    if len(chunks) > 1 and len(chunks[-1]) < least:
        chunks[-2:] = [torch.cat(chunks[-2:])]
    return chunks


def draw_augmentation(count: int, strength: float, generator: torch.Generator) -> Tensor | None:
    """Random changes of `count` images, float32 (count, 7), for `apply_augmentation`.

    Mirror, rotation, zoom, shift, brightness and contrast: a 2×3 affine matrix and a factor on gray
    levels. At strength 1 ±15°, ±10% zoom, ±8% shift, ±20% brightness and contrast; None at
    strength 0. Drawn on the CPU, so that a training is the same on every device.
    """
    if strength <= 0:
        return None

    def uniform(scale: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * scale * strength

    angle, zoom = uniform(math.radians(15)), 1 + uniform(0.10)
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    cosine, sine = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    matrix = [cosine * mirror, -sine, uniform(0.16), sine * mirror, cosine, uniform(0.16)]
    brightness, contrast = uniform(0.20), 1 + uniform(0.20)
    return torch.stack([*matrix, contrast * (1 + brightness)], 1)


def apply_augmentation(images: Tensor, drawn: Tensor | None) -> Tensor:
    """Images (N, 1, H, W) in [0, 1], moved and brightened by what `draw_augmentation` drew; the
    result is in [0, 1] too."""
    if drawn is None:
        return images
    drawn = drawn.to(images.device)
    grid = F.affine_grid(drawn[:, :6].reshape(-1, 2, 3), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (moved * drawn[:, 6].view(-1, 1, 1, 1)).clamp_(0, 1)
