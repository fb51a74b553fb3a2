"""A procedural MRI-like cohort with known patients, for demonstrations and tests.

A class shows in the size of the ventricles, a patient in the pattern of the folds.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.utils_funcs import CLASSES, atomic_path

#: Radius of the ventricles by class, in units of the normal one; patients vary around it with the
#: standard deviation `VENTRICLE_SPREAD`.
VENTRICLE_SCALE = (0.62, 0.86, 1.10, 1.36)
VENTRICLE_SPREAD = 0.05

#: Body-axis range that is drawn, in slices: a patient with fewer shows a run of neighbors out of
#: it.
STACK = 40

#: Slices over which the folds change; neighbors then correlate near 0.97, as real ones do.
FOLD_LENGTH = 2.6

#: Share of a patient's slices in the test split.
TEST_SHARE = 0.2


@dataclass(frozen=True)
class PhantomCohort:
    """A drawn cohort of N images: real ones, then synthetic ones, then duplicates.

    Attributes:
        images: `uint8` (side, side) each.
        label: (N,) class.
        patient: (N,) from 0; -1 for synthetic images.
        slice_index: (N,) 0 the most superior; -1 for synthetic images.
        kind: `real`, `synthetic` or `duplicate`.
        duplicate_of: (N,) index of the image that a duplicate repeats; else -1.
        split: `train` or `test`.
    """

    images: list[np.ndarray]
    label: np.ndarray
    patient: np.ndarray
    slice_index: np.ndarray
    kind: list[str]
    duplicate_of: np.ndarray
    split: list[str]


# -- the cohort ------------------------------------------------------------------------------------


def draw_cohort(
    *,
    patients: Sequence[int] = (10, 7, 4, 2),
    slices: int | tuple[int, int] = 32,
    size: int | Sequence[int] = 128,
    synthetic: int = 60,
    duplicates: int = 8,
    cross_duplicates: int = 0,
    conflicts: int = 0,
    noise: float = 0.0,
    seed: int = 0,
) -> PhantomCohort:
    """Draws a cohort; equal arguments give equal pixels.

    Args:
        patients: how many patients of each class, Non first.
        slices: slices of each patient, or the range (least, most) from which each patient's number
            is drawn, at most 40. 1 gives independent images: a set in which no patients can be
            found.
        size: side in pixels, or several sides from which each image's is drawn.
        synthetic: images blended from two patients of one of the minority classes over a background
            that is not zero, as generators leave it; they are in the training split only.
        duplicates: exact copies of real training images inside the training split.
        cross_duplicates: exact copies of real training images in the test split.
        conflicts: so many patients have the second half of their slices filed under the next class.
        noise: standard deviation, in gray levels, of noise added before rounding to 8 bits.
    """
    rng = np.random.default_rng(seed)
    sides = (size,) if isinstance(size, int) else tuple(size)
    low, high = (slices, slices) if isinstance(slices, int) else slices
    images: list[np.ndarray] = []
    labels, numbers, positions, split = [], [], [], []
    for number, group in enumerate(np.repeat(np.arange(len(patients)), patients).tolist()):
        stack = draw_patient(rng, group, int(rng.integers(low, high + 1)), sides)
        held_out = _scatter_test(rng, len(stack))
        next_class = min(group + 1, len(patients) - 1)
        for position, image in enumerate(stack):
            in_conflict = number < conflicts and position >= len(stack) // 2
            images.append(image)
            labels.append(next_class if in_conflict else group)
            numbers.append(number)
            positions.append(position)
            split.append("test" if held_out[position] else "train")
    label, patient, index = np.array(labels), np.array(numbers), np.array(positions)
    blends, blend_labels = _draw_synthetic(rng, images, label, patient, index, synthetic)
    noisy = [_to_8_bits(rng, image, noise) for image in (*images, *blends)]
    training = np.flatnonzero(np.array(split) == "train")
    copied = rng.choice(training, min(duplicates + cross_duplicates, len(training)), replace=False)
    in_test = min(cross_duplicates, len(copied))
    copy_split = ["test"] * in_test + ["train"] * (len(copied) - in_test)
    unknown = np.full(len(blends), -1)
    no_original = np.full(len(images) + len(blends), -1)
    return PhantomCohort(
        images=noisy + [noisy[i] for i in copied],
        label=np.concatenate([label, blend_labels, label[copied]]).astype(np.int64),
        patient=np.concatenate([patient, unknown, patient[copied]]).astype(np.int64),
        slice_index=np.concatenate([index, unknown, index[copied]]).astype(np.int64),
        kind=["real"] * len(images) + ["synthetic"] * len(blends) + ["duplicate"] * len(copied),
        duplicate_of=np.concatenate([no_original, copied]).astype(np.int64),
        split=split + ["train"] * len(blends) + copy_split,
    )


def _scatter_test(rng: np.random.Generator, slices: int) -> np.ndarray:
    """Which slices of a patient go to the test split, bool (slices,): scattered through the stack,
    at least one on either side."""
    chosen = rng.random(slices) < TEST_SHARE
    if slices > 1 and (chosen.all() or not chosen.any()):
        chosen[rng.integers(slices)] ^= True
    return chosen


def _draw_synthetic(
    rng: np.random.Generator,
    images: list[np.ndarray],
    label: np.ndarray,
    patient: np.ndarray,
    index: np.ndarray,
    count: int,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Blends of two patients' slices of a similar level, `float32` in [0, 255], and their labels.

    Args:
        images: N slices with their labels, patients and places in the stack, (N,) each.
        count: how many blends to draw.
    """
    groups = [group for group in np.unique(label) if group > 0] or [0]
    blends, labels = [], []
    for _ in range(count):
        group = groups[int(rng.integers(len(groups)))]
        members = np.flatnonzero(label == group)
        first = members[rng.integers(len(members))]
        others = members[patient[members] != patient[first]]
        # Generators blend what they saw of several patients; with one patient in a class there is
        # only another class.
        others = others if len(others) else np.flatnonzero(patient != patient[first])
        others = others if len(others) else members
        level = np.abs(index[others] - index[first])
        second = rng.choice(others[level <= level.min() + 1])
        one, two, share = images[first], images[second], rng.uniform(0.4, 0.6)
        if two.shape != one.shape:
            size = one.shape[::-1]
            two = np.asarray(Image.fromarray(two).resize(size, Image.Resampling.BILINEAR))
        blend = np.maximum(share * one + (1 - share) * two, rng.integers(3, 9))
        blends.append(blend.astype(np.float32))
        labels.append(group)
    return blends, np.array(labels, np.int64)


def _to_8_bits(rng: np.random.Generator, image: np.ndarray, noise: float) -> np.ndarray:
    if noise:
        image = image + rng.normal(0, noise, image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


# -- one patient -----------------------------------------------------------------------------------


def draw_patient(
    rng: np.random.Generator, group: int, slices: int, sides: Sequence[int]
) -> list[np.ndarray]:
    """A patient's neighboring slices, `float32` (side, side) in [0, 255], the most superior first.

    Args:
        group: the class.
        sides: from which each slice's side is drawn.
    """
    shape = _draw_shape(rng, group)
    side = sides[int(rng.integers(len(sides)))]
    fields = rng.standard_normal((STACK + 8, 22, 22)).astype(np.float32)
    start = int(rng.integers(0, STACK - slices + 1)) if slices == 1 else (STACK - slices) // 2
    stack = []
    for position in range(start, start + slices):
        stack.append(_draw_slice(shape, _folds_at(fields, position), position / (STACK - 1), side))
        side = sides[int(rng.integers(len(sides)))]
    return stack


@dataclass(frozen=True)
class _Shape:
    """A patient's head, in units of half the image's side; brightness in gray levels.

    Attributes:
        ventricle: size of the ventricles, 1 the normal one.
        width, length: half axes of the head.
        tilt: rotation in radians; `x`, `y`: shift.
        slant: how far the ventricles diverge; `gap`: half the distance between them.
        bright, contrast: mean brightness of the tissue, and amplitude of its folds.
    """

    ventricle: float
    width: float
    length: float
    tilt: float
    x: float
    y: float
    slant: float
    gap: float
    bright: float
    contrast: float


def _draw_shape(rng: np.random.Generator, group: int) -> _Shape:
    return _Shape(
        ventricle=VENTRICLE_SCALE[group] + rng.normal(0, VENTRICLE_SPREAD),
        width=rng.normal(0.76, 0.02),
        length=rng.normal(0.84, 0.02),
        tilt=rng.normal(0, 0.04),
        x=rng.normal(0, 0.012),
        y=rng.normal(0, 0.012),
        slant=rng.normal(0.28, 0.05),
        gap=rng.normal(0.10, 0.008),
        bright=rng.normal(150, 8),
        contrast=rng.normal(62, 5),
    )


def _folds_at(fields: np.ndarray, position: int) -> np.ndarray:
    """The folds' coarse field (22, 22) at one position: a moving average of independent fields, so
    that neighbors are alike and slices far apart are not."""
    offsets = np.arange(len(fields)) - position - 4
    weights = np.exp(-((offsets / FOLD_LENGTH) ** 2) / 2).astype(np.float32)
    return np.tensordot(weights / np.linalg.norm(weights), fields, 1)


def _draw_slice(shape: _Shape, folds: np.ndarray, height: float, side: int) -> np.ndarray:
    """One slice.

    Args:
        folds: (22, 22) of `_folds_at`.
        height: from 0, near the top of the head, to 1 at its widest.
    """
    axis = ((np.arange(side) + 0.5) / side * 2 - 1).astype(np.float32)
    x, y = np.meshgrid(axis - shape.x, axis - shape.y)
    x, y = x + shape.tilt * y, y - shape.tilt * x
    extent = float(np.sqrt(1 - (0.78 * (1 - height)) ** 2))
    radius = np.hypot(x / (shape.width * extent), y / (shape.length * extent))
    spread = _spline(side, folds.shape[0])
    texture = np.tanh(1.6 * (spread @ folds @ spread.T))
    # The cortex is folded, the middle is smoother: the texture fades toward the center.
    tissue = shape.bright + shape.contrast * texture * np.clip(0.35 + 0.8 * radius, 0, 1)
    # A dark cleft between the hemispheres.
    tissue = tissue * (1 - 0.75 * np.exp(-((x / 0.018) ** 2)) * (radius > 0.45))
    size = float(shape.ventricle * np.exp(-(((height - 0.55) / 0.28) ** 2)))
    ventricles = np.zeros_like(x)
    for sign in (-1, 1):
        u = sign * x - shape.gap - shape.slant * np.abs(y) * 0.6
        distance = 1 - np.hypot(u / (0.095 * size + 1e-6), y / (0.34 * size + 1e-6))
        ventricles = np.maximum(ventricles, _soft_step(distance, 0.12))
    head = tissue * (1 - 0.88 * ventricles) * _soft_step(1 - radius, 0.02)
    return np.where(radius < 1, np.clip(head, 0, 255), 0).astype(np.float32)


def _soft_step(distance: np.ndarray, width: float) -> np.ndarray:
    """A step from 0 to 1 where `distance` turns positive, `width` wide."""
    return np.clip(distance / width, 0, 1)


@functools.cache
def _spline(side: int, knots: int) -> np.ndarray:
    """Interpolation matrix (side, knots) that turns white noise on the knots into a smooth field of
    unit variance."""
    at = (np.arange(side) + 0.5) / side * (knots - 1)
    weights = np.exp(-(((at[:, None] - np.arange(knots)) / 0.75) ** 2) / 2)
    return (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)


# -- files -----------------------------------------------------------------------------------------


def write_phantom(folder: Path | str, *, quality: int = 90, seed: int = 0, **options: Any) -> Path:
    """Writes a drawn cohort as JPEG in the raw layout, and the truth next to the class folders.

    Images are at `<folder>/train/Non_Demented/Non_Demented_12.jpg`, numbered at random so that a
    name reveals nothing; the truth is in `people.csv` (`path,person,slice_index,kind`).

    Args:
        quality: JPEG quality.
        options: arguments of `draw_cohort`.

    Returns:
        The folder.
    """
    cohort, folder = draw_cohort(seed=seed, **options), Path(folder)
    names = _file_names(np.random.default_rng([seed, 1]), cohort)
    for name in sorted({str(Path(name).parent) for name in names}):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, cohort.images, strict=True):
        Image.fromarray(image).save(folder / name, "JPEG", quality=quality)
    truth = zip(
        names, cohort.patient.tolist(), cohort.slice_index.tolist(), cohort.kind, strict=True
    )
    with (
        atomic_path(folder / "people.csv") as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["path", "person", "slice_index", "kind"])
        rows.writerows(sorted(truth))
    return folder


def _file_names(rng: np.random.Generator, cohort: PhantomCohort) -> list[str]:
    """The path of each image below the cohort's folder."""
    names = [""] * len(cohort.images)
    for split in ("train", "test"):
        for group, title in enumerate(CLASSES):
            members = [
                i
                for i in range(len(names))
                if cohort.split[i] == split and cohort.label[i] == group
            ]
            stem = f"{title.title().replace(' ', '_')}_Demented"
            for number, i in enumerate(rng.permutation(members), start=1):
                names[int(i)] = f"{split}/{stem}/{stem}_{number}.jpg"
    return names
