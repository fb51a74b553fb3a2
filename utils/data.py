"""Cohort and protocol → tensors: who is in which set, the prepared files, batches and augmentation."""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.cohort import Cohort, RawImages
from utils.utils_funcs import CLASSES, ROOT, UserError, atomic_path

SETS = ("train", "validation", "test")
N_FOLDS = 5
#: Share of the training people (by class) that validate.
VALIDATION_SHARE = 1 / 8
COMMITTED_FOLDS = ROOT / "dataset" / "folds.csv"


class SharedPatientsError(UserError):
    """Somebody stands in two sets of the `patient` protocol."""


@dataclass(frozen=True)
class ImageSet:
    """One set of one protocol, as it lies on disk.

    images: `uint8` (N, 1, H, W), native size; labels: `int64` (N,), 0-3; people, slices: `int64` (N,), patient id and
    position along the body axis, -1 where unknown (synthetic images); files: SHA-256 of each image file.
    """

    images: Tensor
    labels: Tensor
    patients: Tensor
    slices: Tensor
    files: list[str]
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, rows: Tensor | np.ndarray) -> ImageSet:
        rows = torch.as_tensor(rows, dtype=torch.long)
        return replace(
            self,
            images=self.images[rows],
            labels=self.labels[rows],
            patients=self.patients[rows],
            slices=self.slices[rows],
            files=[self.files[row] for row in rows.tolist()],
        )

    def balance(self) -> dict[str, tuple[int, int]]:
        """Class → (people, slices); images of nobody known count as slices only."""
        return balance(self.labels.numpy(), self.patients.numpy())


def balance(labels: np.ndarray, patients: np.ndarray) -> dict[str, tuple[int, int]]:
    """Class → (people, slices); images of nobody known (-1) count as slices only."""
    return {
        name: (
            len(np.unique(patients[(patients >= 0) & (labels == label)])),
            int((labels == label).sum()),
        )
        for label, name in enumerate(CLASSES)
    }


# ---------------------------------------------------------------------------------------------------- who goes where


@dataclass(frozen=True)
class Folds:
    """Test fold of every person, and the folds in which the person validates."""

    patient_id: np.ndarray
    label: np.ndarray
    fold: np.ndarray
    validation_of: list[tuple[int, ...]]

    def roles(self, fold: int) -> dict[int, str]:
        """Patient id → `train`, `validation` or `test` when `fold` is the test fold."""
        return {
            int(patient): "test" if own == fold else "validation" if fold in validates else "train"
            for patient, own, validates in zip(self.patient_id, self.fold, self.validation_of)
        }


def assign_folds(patient_id: np.ndarray, label: np.ndarray, seed: int = 0) -> Folds:
    """Five folds of people, stratified by class; in each, one eighth of the training people of a class validate.

    A class with fewer people than folds (Moderate: two) sits in different test folds and never validates.
    A class's largest remainder falls on other folds than the class before it, so that folds have like sizes.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    fold, validates = np.zeros(len(patient_id), int), [[] for _ in patient_id]
    offset = 0
    for value in np.unique(label):
        rows = generator.permutation(np.flatnonzero(label == value))
        fold[rows] = (np.arange(len(rows)) + offset) % N_FOLDS
        offset += len(rows)
        if len(rows) < N_FOLDS:
            continue
        for test in range(N_FOLDS):
            # The next folds' people in turn, so that nobody validates twice where a class is large enough.
            order = sorted(
                (row for row in rows if fold[row] != test),
                key=lambda row: (fold[row] - test) % N_FOLDS,
            )
            for row in order[: max(1, round(VALIDATION_SHARE * len(order)))]:
                validates[row].append(test)
    return Folds(patient_id, label, fold, [tuple(v) for v in validates])


def write_folds(folds: Folds, path: Path) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["patient_id", "label", "fold", "validation_of"])
        for row in zip(folds.patient_id, folds.label, folds.fold, folds.validation_of):
            writer.writerow([*row[:3], " ".join(map(str, row[3]))])


def read_folds(path: Path) -> Folds:
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    column = lambda name: np.array([int(row[name]) for row in rows])  # noqa: E731
    return Folds(
        column("patient_id"),
        column("label"),
        column("fold"),
        [tuple(map(int, row["validation_of"].split())) for row in rows],
    )


def patients_of(cohort: Cohort) -> tuple[np.ndarray, np.ndarray]:
    """(patient ids, class of each). Somebody with images in two classes counts as the higher one."""
    real = cohort.patient_id >= 0
    patients = np.unique(cohort.patient_id[real])
    return patients, np.array(
        [cohort.label[cohort.patient_id == patient].max() for patient in patients]
    )


def folds_for(cohort: Cohort, cache: Path, committed: Path = COMMITTED_FOLDS) -> Folds:
    """The committed assignment where it fits this cohort's people, else the one beside the prepared sets, else a new one."""
    patients, label = patients_of(cohort)
    for path in (committed, cache):
        if path.is_file():
            folds = read_folds(path)
            if np.array_equal(folds.patient_id, patients) and np.array_equal(folds.label, label):
                return folds
    folds = assign_folds(patients, label)
    write_folds(folds, cache)
    return folds


def split_slices(cohort: Cohort) -> dict[str, np.ndarray]:
    """Row numbers of the `slice` protocol: the published test folder; the train folder 8:1 into training and validation.

    The division is random but no library's shuffling: within a class, images are ranked by their file's SHA-256, and
    every ninth validates. A copy of the data without train/ and test/ is divided 8:1:1 the same way; only real images
    are tested. Synthetic images and duplicates stay in, because that is what the literature does.
    """
    parts: dict[str, list[int]] = {name: [] for name in SETS}
    order = sorted(
        range(len(cohort.label)), key=lambda row: (cohort.label[row], cohort.file_sha256[row])
    )
    rank: dict[int, int] = {}
    for row in order:
        if cohort.source_split[row] == "test":
            parts["test"].append(row)
            continue
        label = int(cohort.label[row])
        position = rank[label] = rank.get(label, -1) + 1
        if cohort.source_split[row] == "train":
            parts["validation" if position % 9 == 0 else "train"].append(row)
        elif position % 10 == 0 and cohort.patient_id[row] >= 0:
            parts["test"].append(row)
        else:
            parts["validation" if position % 10 == 1 else "train"].append(row)
    return {name: np.array(sorted(rows), dtype=int) for name, rows in parts.items()}


def split_patients(cohort: Cohort, folds: Folds, fold: int) -> dict[str, np.ndarray]:
    """Row numbers of the `patient` protocol with this test fold: real, de-duplicated images only."""
    roles = folds.roles(fold)
    role = np.array(
        [
            roles[patient] if kind == "real" else ""
            for patient, kind in zip(cohort.patient_id.tolist(), cohort.kind)
        ]
    )
    return {name: np.flatnonzero(role == name) for name in SETS}


def check_patients_apart(sets: dict[str, ImageSet]) -> None:
    """Raises `PeopleSharedError`, naming the person, where any two sets share one, or hold an image of nobody known."""
    names = list(sets)
    for position, first in enumerate(names):
        patients = set(sets[first].patients.tolist())
        if -1 in patients:
            raise SharedPatientsError(
                f"{first} holds an image whose person is unknown (synthetic?); the patient protocol takes "
                "images of known people only: prepare the sets again."
            )
        for second in names[position + 1 :]:
            shared = patients & set(sets[second].patients.tolist())
            if shared:
                raise SharedPatientsError(
                    f"Person {min(shared)} is in both {first} and {second} ({len(shared)} such people); the patient "
                    "protocol keeps people apart: prepare the sets again with dataset/prepare_dataset.ipynb."
                )


# -------------------------------------------------------------------------------------------------- files of tensors


def stack_images(raw: RawImages, rows: np.ndarray | None = None) -> Tensor:
    """The images (those of `rows`, None: all) as `uint8` (N, 1, H, W) at the commonest size of all; the others are resized to it."""
    sizes, counts = np.unique([image.shape for image in raw.images], axis=0, return_counts=True)
    height, width = (int(side) for side in sizes[counts.argmax()])
    rows = np.arange(len(raw.images)) if rows is None else rows
    stack = np.empty((len(rows), 1, height, width), np.uint8)
    for place, row in enumerate(rows):
        image = raw.images[row]
        if image.shape != (height, width):
            from PIL import Image

            image = np.asarray(
                Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
            )
        stack[place, 0] = image
    return torch.from_numpy(stack)


def set_path(folder: Path, protocol: str, fold: int, name: str) -> Path:
    return folder / (protocol if protocol == "slice" else f"patient/fold{fold}") / f"{name}_set.pt"


def prepare(raw: RawImages, cohort: Cohort, folds: Folds, folder: Path) -> None:
    """Writes `slice/` and `patient/fold<k>/`, each {train,validation,test}_set.pt, under `folder`."""
    plans = {("slice", 0): split_slices(cohort)}
    plans |= {("patient", fold): split_patients(cohort, folds, fold) for fold in range(N_FOLDS)}
    for (protocol, fold), parts in plans.items():
        for name in SETS:
            if not len(parts[name]):
                raise UserError(
                    f"The {name} set of protocol {protocol}, fold {fold} is empty: the cohort has too few "
                    f"people or images ({len(np.unique(cohort.patient_id)) - 1} people found, at least {N_FOLDS} needed)."
                )
        sets = {
            name: _without_images(cohort, rows, f"{protocol} {name}")
            for name, rows in parts.items()
        }
        if protocol == "patient":
            check_patients_apart(sets)
        for name, part in sets.items():
            # One set at a time: beside the raw images there is never more than one copy of a part of them.
            save_set(
                replace(part, images=stack_images(raw, parts[name])),
                set_path(folder, protocol, fold, name),
            )


def _without_images(cohort: Cohort, rows: np.ndarray, name: str) -> ImageSet:
    column = lambda values: torch.from_numpy(np.asarray(values)[rows].astype(np.int64))  # noqa: E731
    return ImageSet(
        torch.empty(0, dtype=torch.uint8),
        column(cohort.label),
        column(cohort.patient_id),
        column(cohort.slice_index),
        [str(cohort.file_sha256[row]) for row in rows],
        name,
    )


def save_set(part: ImageSet, path: Path) -> None:
    with atomic_path(path) as temporary:
        torch.save(
            {
                "images": part.images.contiguous(),
                "labels": part.labels,
                "people": part.patients,
                "slices": part.slices,
                "files": list(part.files),
            },
            temporary,
        )


def load_set(folder: Path, protocol: str, fold: int, name: str) -> ImageSet:
    path = set_path(folder, protocol, fold, name)
    if not path.is_file():
        raise UserError(
            f"{path} is missing: run dataset/prepare_dataset.ipynb (or `python -m utils.experiment prepare`) first."
        )
    content = torch.load(path, weights_only=True)
    return ImageSet(name=f"{protocol} {name}", patients=content.pop("people"), **content)


def load_sets(
    folder: Path,
    protocol: str,
    fold: int,
    *,
    max_train: int | None = None,
    max_test: int | None = None,
) -> dict[str, ImageSet]:
    """The three sets of a unit, cut to a small stratified part where a budget is given (`spread`).

    Raises:
        PeopleSharedError: under `patient`, when two of them share a person.
    """
    sets = {name: load_set(folder, protocol, fold, name) for name in SETS}
    if protocol == "patient":
        check_patients_apart(sets)
    limits = {"train": max_train, "validation": max_test, "test": max_test}
    return {
        name: part if limits[name] is None else part.pick(spread(part, limits[name]))
        for name, part in sets.items()
    }


def spread(part: ImageSet, count: int) -> np.ndarray:
    """At most `count` sorted rows spread evenly over classes, then over people, then over the slices of a person."""
    labels, patients = part.labels.numpy(), part.patients.numpy().copy()
    patients[patients < 0] = -1 - np.arange(
        (patients < 0).sum()
    )  # an image of nobody known stands alone
    turn = np.empty(
        len(labels)
    )  # how early a row is drawn: bit-reversed position in the person's stack, then the person
    for patient in np.unique(patients):
        rows = np.flatnonzero(patients == patient)
        rows = rows[np.argsort(part.slices.numpy()[rows], kind="stable")]
        turn[rows[_van_der_corput(len(rows))]] = np.arange(len(rows))
    queues = []
    for label in range(len(CLASSES)):
        rows = np.flatnonzero(labels == label)
        names = np.array([part.files[row] for row in rows])
        queues.append(rows[np.lexsort((names, turn[rows]))].tolist() if len(rows) else [])
    picked: list[int] = []
    while len(picked) < count and any(queues):
        for queue in queues:
            if queue and len(picked) < count:
                picked.append(queue.pop(0))
    return np.array(sorted(picked), dtype=int)


def every_nth(part: ImageSet, stride: int) -> np.ndarray:
    """Sorted rows of about one in `stride` slices of each person, at least one, from the middle of equal stretches of the
    person's own slices (neither end of the head leads); images of nobody known count as one person's."""
    patients, slices = part.patients.numpy(), part.slices.numpy()
    order = np.lexsort((slices, patients))
    chosen = []
    for own in np.split(order, np.flatnonzero(np.diff(patients[order])) + 1):
        count = max(1, round(len(own) / stride))
        chosen.append(own[((np.arange(count) + 0.5) * len(own) / count).astype(int)])
    return np.sort(np.concatenate(chosen))


def _van_der_corput(count: int) -> np.ndarray:
    """A permutation of 0 … count-1 of which every prefix is spread evenly (middle first)."""
    bits = max(1, math.ceil(math.log2(max(count, 2))))
    order = [int(f"{position:0{bits}b}"[::-1], 2) for position in range(1, 2**bits)] + [0]
    return np.array([position for position in order if position < count], dtype=int)


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------- batches and augmentation


def pixels(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """`uint8` → `float32` in [0, 1] on the device, where it is cheapest: a quarter of the bytes travel."""
    return images.to(device, non_blocking=True).float().div_(255)


def epoch_rows(part: ImageSet, stride: int, generator: torch.Generator) -> Tensor:
    """Shuffled rows of one epoch: every `stride`-th slice of each person from a random start (neighbours are nearly the
    same image), and one in `stride` of the images of nobody known."""
    order = torch.randperm(len(part), generator=generator)
    if stride <= 1:
        return order
    patients, slices = part.patients.numpy(), part.slices.numpy()
    by_patient = np.lexsort((np.where(patients >= 0, slices, order.argsort().numpy()), patients))
    start = torch.randint(stride, (len(part),), generator=generator).numpy()
    position, keep, last = 0, np.zeros(len(part), bool), None
    for row in by_patient:
        position = 0 if patients[row] != last else position + 1
        if position == 0:
            last, phase = patients[row], start[row]
        keep[row] = position % stride == phase
    return order[torch.from_numpy(keep)[order]]


def join_last(chunks: Sequence[Tensor], least: int) -> list[Tensor]:
    """The batches, the last one joined to the one before it where it has fewer than `least` rows."""
    chunks = list(chunks)
    if len(chunks) > 1 and len(chunks[-1]) < least:
        chunks[-2:] = [torch.cat(chunks[-2:])]
    return chunks


def draw_augmentation(count: int, strength: float, generator: torch.Generator) -> Tensor | None:
    """Random mirror, rotation, zoom, shift, brightness and contrast of `count` images, (count, 7): a 2×3 affine matrix and a
    factor on grey levels. None at strength 0.

    At strength 1: ±15°, ±10% zoom, ±8% shift, ±20% brightness and contrast. Drawn on the CPU, so that a run is the same
    on every device.
    """
    if strength <= 0:
        return None
    uniform = lambda scale: (torch.rand(count, generator=generator) * 2 - 1) * scale * strength  # noqa: E731
    angle, zoom = uniform(math.radians(15)), 1 + uniform(0.10)
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    cosine, sine = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    matrix = [cosine * mirror, -sine, uniform(0.16), sine * mirror, cosine, uniform(0.16)]
    brightness, contrast = uniform(0.20), 1 + uniform(0.20)
    return torch.stack([*matrix, contrast * (1 + brightness)], 1)


def apply_augmentation(images: Tensor, drawn: Tensor | None) -> Tensor:
    """Images (N, 1, H, W) in [0, 1] moved and brightened by rows of `draw_augmentation`; the result stays in [0, 1]."""
    if drawn is None:
        return images
    drawn = drawn.to(images.device)
    grid = F.affine_grid(drawn[:, :6].reshape(-1, 2, 3), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (moved * drawn[:, 6].view(-1, 1, 1, 1)).clamp_(0, 1)
