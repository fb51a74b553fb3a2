"""Images of one's own as one set to attack: which part of them, whose they are, how many."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from utils import data
from utils.cohort.patients import NoPatientsError
from utils.cohort.raw import RawImages, find_raw, read_raw
from utils.cohort.table import COMMITTED_COHORT, build_cohort, cohort_identity, known_cohort
from utils.manifest.layout import class_of_folder
from utils.manifest.sources import manifest_of
from utils.utils_funcs import CLASSES, UserError

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class OwnImages:
    """The set, and what a reader must know of it.

    Attributes:
        notes: sentences on which images were taken and how intervals count them.
        patients_known: whether the images' patients are known; else each image counts as one.
        classes: what labels index: this project's four, or those of the data.
    """

    part: data.ImageSet
    notes: list[str]
    patients_known: bool
    classes: tuple[str, ...] = CLASSES


def classes_of(raw: str | None) -> tuple[str, ...]:
    """The classes of images: this project's four where the folders or labels are these; else those
    of the data, in their order.

    Three of the four beside a name that is none of them are the four with a mistake, which reading
    them names.

    Raises:
        UserError: no images.
    """
    found = manifest_of(_found(raw)).classes
    known = {label for name in found if (label := class_of_folder(name)) is not None}
    misspelled = len(known) == 3 and len(found) > 3
    return CLASSES if len(known) == len(CLASSES) or misspelled else found


def _found(raw: str | None) -> Path:
    folder = find_raw(raw)
    if folder is None:
        raise UserError(
            "Your own model needs images: give a folder or zip of class folders with --raw."
        )
    return folder


def own_images(
    raw: str | None,
    part: str | None = None,
    limit: int | None = None,
    classes: tuple[str, ...] | None = None,
) -> OwnImages:
    """Images of class folders as one set.

    Args:
        raw: folder or zip; None: see `utils.cohort.find_raw`.
        part: `train`, `validation`, `test` or `all`; None takes `test` where there is one.
        limit: take a sample of so many, spread over classes, then patients, then slices.
        classes: what `classes_of` says of them (None: it is asked).

    Raises:
        UserError: no images, or none of that part.
    """
    classes = classes_of(raw) if classes is None else classes
    images = read_raw(_found(raw), any_classes=classes != CLASSES)
    rows, taken = rows_of_part(images.source_split, part)
    patients, slices, identity, alone = patients_of_images(images)
    hashes = [hashlib.sha256(images.images[row].tobytes()).hexdigest() for row in rows]
    found = data.ImageSet(
        data.stack_images(images, rows),
        torch.arange(len(rows)),
        torch.from_numpy(images.label[rows]),
        torch.from_numpy(patients[rows]),
        torch.from_numpy(slices[rows]),
        [images.file_sha256[row] for row in rows],
        "your images",
        pixels=hashes,
        cohort_sha256=identity or "",
    )
    notes = [taken, _whose(patients[rows], alone[rows], identity is not None, any(images.patient))]
    if limit is not None and limit < len(found):
        found = found.pick(data.spread(found, limit))
        notes.append(
            f"a sample of {len(found):,} of these {len(rows):,} images, spread over classes, then "
            "patients, then slices (--limit)"
        )
    if classes != CLASSES:
        notes.append(f"the classes are those of the data, {', '.join(classes)}, none is merged")
    return OwnImages(found, notes, identity is not None, classes)


def rows_of_part(splits: Sequence[str], part: str | None) -> tuple[np.ndarray, str]:
    """The rows of a part, and in words which images they are."""
    if part not in (None, "all", *PARTS):
        raise UserError(f"--part is {part!r}: expected all, {', '.join(PARTS)}.")
    counts = Counter(splits)
    asked = part or ("test" if counts["test"] else "all")
    named = ", ".join(f"{counts[name]:,} in {name}" for name in PARTS if counts[name])
    if asked == "all":
        text = f"all {len(splits):,} images" + (f" ({named})" if named else "")
        if counts["train"]:
            text += "; a model that was trained on the training part is not tested by it"
        return np.arange(len(splits)), text
    rows = np.flatnonzero(np.array(splits) == asked)
    if not len(rows):
        raise UserError(
            f"--part {asked} holds no image: {f'there are {named}' if named else 'no split'}."
        )
    others = ", ".join(
        f"{counts[name]:,} in {name}" for name in PARTS if counts[name] and name != asked
    )
    text = f"the {len(rows):,} images in {asked}"
    return rows, text + (f"; not scored: {others}" if others else "")


def patients_of_images(
    images: RawImages,
) -> tuple[np.ndarray, np.ndarray, str | None, np.ndarray]:
    """(patient (N,), slice (N,), identity of the cohort, which images belong to no patient, bool
    (N,)): as given, or recovered from the pixels. An image of no patient counts as one; where no
    patients can be told apart, each image does, and the identity is None."""
    try:
        cohort = known_cohort(images, [COMMITTED_COHORT]) or build_cohort(images)[0]
    except NoPatientsError:
        count = len(images)
        return np.arange(count), np.zeros(count, np.int64), None, np.ones(count, bool)
    patients = cohort.patient_id.copy()
    alone = patients < 0
    patients[alone] = patients.max() + 1 + np.arange(alone.sum())
    return patients, cohort.slice_index, cohort_identity(cohort), alone


def _whose(patients: np.ndarray, alone: np.ndarray, known: bool, given: bool) -> str:
    """In words, whose the images of a part are, and what intervals count."""
    if not known:
        return (
            "no patients can be told apart in these images: slices are taken as independent, so "
            "the intervals are too narrow where a patient has several"
        )
    count = len(np.unique(patients[~alone]))
    text = f"{count:,} patients, {'as given' if given else 'recovered from the pixels'}"
    text += "; intervals are over patients"
    if alone.any():
        text += f", and over {int(alone.sum()):,} images that belong to none of them, each as one"
    return text
