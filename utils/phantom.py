"""A procedural MRI-like cohort with known people, for demos and tests: a class shows in the size of the ventricles,
a person in the pattern of the folds."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils.utils_funcs import CLASSES, atomic_path

#: Radius of the ventricles by class, in units of the normal one; people vary by `VENTRICLE_SPREAD` around it.
VENTRICLE_SCALE = (0.62, 0.86, 1.10, 1.36)
VENTRICLE_SPREAD = 0.05
#: Body-axis range that is drawn, in slices: a person with fewer shows a run of neighbours out of it.
STACK = 40
#: Slices over which the folds change; neighbours then correlate near 0.97, as real ones do.
FOLD_LENGTH = 2.6
TEST_SHARE = 0.2


@dataclass(frozen=True)
class PhantomCohort:
    """One entry per image. `person` and `slice_index` are -1 for synthetic images; `slice_index` 0 is the most
    superior; `duplicate_of` is the entry that a copy repeats, else -1; `split` is `train` or `test`."""

    images: list[np.ndarray]
    label: np.ndarray
    patient: np.ndarray
    slice_index: np.ndarray
    kind: list[str]
    duplicate_of: np.ndarray
    split: list[str]


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
    """Draws a cohort of `uint8` images (size, size); equal arguments give equal pixels.

    Args:
        people: how many people of each class, Non first.
        slices: slices per person, or the range (least, most) from which each person's number is drawn, at most 40.
            1 gives independent images: a set without people in it.
        size: side in pixels, or several sides from which each image's is drawn.
        synthetic: images blended from two people of one of the minority classes over a background that is not zero, as
            generators leave it; they stand in the training split only.
        duplicates: exact copies of real training images inside the training split.
        cross_duplicates: exact copies of real training images in the test split.
        conflicts: so many people have the second half of their slices filed under the next class.
        noise: standard deviation, in grey levels, of noise added before rounding to 8 bits.
    """
    rng = np.random.default_rng(seed)
    sides = (size,) if isinstance(size, int) else tuple(size)
    low, high = (slices, slices) if isinstance(slices, int) else slices
    images, label, patient, index, split = [], [], [], [], []
    for who, group in enumerate(np.repeat(np.arange(len(patients)), patients)):
        stack = draw_patient(rng, int(group), int(rng.integers(low, high + 1)), sides)
        held_out = _scatter_test(rng, len(stack))
        for position, image in enumerate(stack):
            filed = (
                min(group + 1, len(patients) - 1)
                if who < conflicts and position >= len(stack) // 2
                else group
            )
            images.append(image)
            label.append(filed)
            patient.append(who)
            index.append(position)
            split.append("test" if held_out[position] else "train")
    label, patient, index = np.array(label), np.array(patient), np.array(index)
    blends, blend_labels = _draw_synthetic(rng, images, label, patient, index, synthetic)
    noisy = [_to_8_bits(rng, image, noise) for image in (*images, *blends)]
    training = np.flatnonzero(np.array(split) == "train")
    copied = rng.choice(training, min(duplicates + cross_duplicates, len(training)), replace=False)
    copy_split = ["test"] * min(cross_duplicates, len(copied)) + ["train"] * max(
        0, len(copied) - cross_duplicates
    )
    nobody, nothing = np.full(len(blends), -1), np.full(len(images) + len(blends), -1)
    return PhantomCohort(
        images=noisy + [noisy[i] for i in copied],
        label=np.concatenate([label, blend_labels, label[copied]]).astype(np.int64),
        patient=np.concatenate([patient, nobody, patient[copied]]).astype(np.int64),
        slice_index=np.concatenate([index, nobody, index[copied]]).astype(np.int64),
        kind=["real"] * len(images) + ["synthetic"] * len(blends) + ["duplicate"] * len(copied),
        duplicate_of=np.concatenate([nothing, copied]).astype(np.int64),
        split=split + ["train"] * len(blends) + copy_split,
    )


def write_phantom(folder: Path | str, *, quality: int = 90, seed: int = 0, **options) -> Path:
    """Writes a drawn cohort as JPEG in the raw layout, `<folder>/train/Non_Demented/Non_Demented_12.jpg`, numbered at
    random so that a name gives nothing away, and the truth beside the class folders in `people.csv`
    (`path,person,slice_index,kind`).

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
    for name, image in zip(names, cohort.images):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        (folder / name).write_bytes(buffer.getvalue())
    with (
        atomic_path(folder / "people.csv") as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["path", "person", "slice_index", "kind"])
        rows.writerows(
            sorted(zip(names, cohort.patient.tolist(), cohort.slice_index.tolist(), cohort.kind))
        )
    return folder


def draw_patient(
    rng: np.random.Generator, group: int, slices: int, sides: Sequence[int]
) -> list[np.ndarray]:
    """One person's neighbouring slices, `float32` (side, side) in [0, 255], the most superior first."""
    shape = _draw_shape(rng, group)
    side = sides[int(rng.integers(len(sides)))]
    fields = rng.standard_normal((STACK + 8, 22, 22)).astype(np.float32)
    start = int(rng.integers(0, STACK - slices + 1)) if slices == 1 else (STACK - slices) // 2
    stack = []
    for position in range(start, start + slices):
        stack.append(_draw_slice(shape, _folds_at(fields, position), position / (STACK - 1), side))
        side = sides[int(rng.integers(len(sides)))]
    return stack


def _draw_shape(rng: np.random.Generator, group: int) -> dict[str, float]:
    return dict(
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
    """The folds' coarse field (22, 22) at one position: a moving average of independent fields, so that neighbours are
    alike and slices far apart are not."""
    offsets = np.arange(len(fields)) - position - 4
    weights = np.exp(-((offsets / FOLD_LENGTH) ** 2) / 2).astype(np.float32)
    return np.tensordot(weights / np.linalg.norm(weights), fields, 1)


def _draw_slice(shape: dict[str, float], folds: np.ndarray, height: float, side: int) -> np.ndarray:
    """One slice; `height` runs from 0, near the top of the head, to 1 at its widest."""
    axis = ((np.arange(side) + 0.5) / side * 2 - 1).astype(np.float32)
    x, y = np.meshgrid(axis - shape["x"], axis - shape["y"])
    x, y = x + shape["tilt"] * y, y - shape["tilt"] * x
    extent = float(np.sqrt(1 - (0.78 * (1 - height)) ** 2))
    radius = np.hypot(x / (shape["width"] * extent), y / (shape["length"] * extent))
    spread = _spline(side, folds.shape[0])
    texture = np.tanh(1.6 * (spread @ folds @ spread.T))
    # The cortex is folded, the middle is smoother: the texture fades towards the centre.
    tissue = shape["bright"] + shape["contrast"] * texture * np.clip(0.35 + 0.8 * radius, 0, 1)
    tissue = tissue * (1 - 0.75 * np.exp(-((x / 0.018) ** 2)) * (radius > 0.45))
    size = float(shape["ventricle"] * np.exp(-(((height - 0.55) / 0.28) ** 2)))
    inside = np.zeros_like(x)
    for sign in (-1, 1):
        u = sign * x - shape["gap"] - shape["slant"] * np.abs(y) * 0.6
        inside = np.maximum(
            inside, _soft(1 - np.hypot(u / (0.095 * size + 1e-6), y / (0.34 * size + 1e-6)), 0.12)
        )
    image = tissue * (1 - 0.88 * inside)
    return np.where(radius < 1, np.clip(image * _soft(1 - radius, 0.02), 0, 255), 0).astype(
        np.float32
    )


def _soft(distance: np.ndarray, width: float) -> np.ndarray:
    """A step from 0 to 1 where `distance` turns positive, `width` wide."""
    return np.clip(distance / width, 0, 1)


@functools.cache
def _spline(side: int, knots: int) -> np.ndarray:
    """Interpolation matrix (side, knots) that turns white noise on the knots into a smooth field of unit variance."""
    at = (np.arange(side) + 0.5) / side * (knots - 1)
    weights = np.exp(-(((at[:, None] - np.arange(knots)) / 0.75) ** 2) / 2)
    return (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)


def _scatter_test(rng: np.random.Generator, slices: int) -> np.ndarray:
    """Which slices of a person go to the test split: scattered through the stack, at least one on either side."""
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
    groups = [group for group in np.unique(label) if group > 0] or [0]
    blends, labels = [], []
    for _ in range(count):
        group = groups[int(rng.integers(len(groups)))]
        members = np.flatnonzero(label == group)
        first = members[rng.integers(len(members))]
        others = members[patient[members] != patient[first]]
        # Generators blend what they saw of several people; with one person in a class there is only another class.
        others = others if len(others) else np.flatnonzero(patient != patient[first])
        others = others if len(others) else members
        level = np.abs(index[others] - index[first])
        second = rng.choice(others[level <= level.min() + 1])
        one, two, share = images[first], images[second], rng.uniform(0.4, 0.6)
        if two.shape != one.shape:
            two = np.asarray(
                Image.fromarray(two).resize(one.shape[::-1], Image.Resampling.BILINEAR)
            )
        blends.append(
            np.maximum(share * one + (1 - share) * two, rng.integers(3, 9)).astype(np.float32)
        )
        labels.append(group)
    return blends, np.array(labels, np.int64)


def _to_8_bits(rng: np.random.Generator, image: np.ndarray, noise: float) -> np.ndarray:
    if noise:
        image = image + rng.normal(0, noise, image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _file_names(rng: np.random.Generator, cohort: PhantomCohort) -> list[str]:
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
