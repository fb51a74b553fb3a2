"""The cohort table: one row per image file, with its patient and slice, its kind, its original."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.cohort.linking import middle
from utils.cohort.order import members_of, slice_indices
from utils.cohort.patients import NoPatientsError, Patients, find_patients, measure_gap
from utils.cohort.raw import RawImages, read_raw
from utils.cohort.similarity import background, correlations, features
from utils.images import chosen
from utils.utils_funcs import CLASSES, ROOT, UserError, atomic_path, check_output, progress

#: The table of the published data set, as this repository holds it.
COMMITTED_COHORT = ROOT / "dataset" / "cohort.csv"


@dataclass(frozen=True)
class Cohort:
    """The columns of `cohort.csv` in their order, each (N,) for N image files in sorted path order.

    Attributes:
        file_sha256: hex digest of the file's bytes.
        pixel_sha256: hex digest of its pixels, in grayscale.
        source_split: `train`, `validation`, `test` or empty, as published.
        label: the class.
        kind: `real`, `synthetic`, or `duplicate` for pixels that an earlier file has.
        duplicate_of: `pixel_sha256` of that earlier file; else empty.
        patient_id: from 0; -1 (in the file: empty) for synthetic images.
        slice_index: place in the patient's stack, 0 the most superior; -1 likewise.
    """

    file_sha256: np.ndarray
    pixel_sha256: np.ndarray
    source_split: np.ndarray
    label: np.ndarray
    kind: np.ndarray
    duplicate_of: np.ndarray
    patient_id: np.ndarray
    slice_index: np.ndarray

    def __len__(self) -> int:
        return len(self.label)


COLUMNS = tuple(field.name for field in dataclasses.fields(Cohort))


@dataclass(frozen=True)
class GivenIds:
    """How the ids that came with a data set agree with what its pixels show.

    Attributes:
        patients: how many ids there are.
        recovered: how many patients the pixels show; None where they show none apart.
        alike: pairs of ids whose images look like one head.
        divided: ids whose images look like several heads.
        copied: pairs of ids that share an image, pixel by pixel.
    """

    patients: int
    recovered: int | None
    alike: list[tuple[str, str]]
    divided: list[str]
    copied: list[tuple[str, str]]


@dataclass(frozen=True)
class Recovery:
    """What the pixels showed when a cohort was built.

    Where ids were given, these are the patients, and `given` says how the pixels agree; where the
    pixels then show no gap, `threshold`, `gap` and `search_gap` are NaN and `links` is empty.

    Attributes:
        threshold: correlation at and above which two images show one patient.
        gap: strongest link between two patients, and weakest link that joins a slice to its
            patient; at full size.
        search_gap: the same two at `SEARCH_SIDE`.
        links: correlations at `SEARCH_SIDE`, strongest first, of the tree that joins the distinct
            images among which the gap was sought.
        unusual: how many images joined a patient in spite of an unusual background.
        conflicts: patients whose images carry several labels: patient id → label → images.
        mislabeled_copies: pairs of rows with equal pixels and different labels.
    """

    threshold: float
    gap: tuple[float, float]
    search_gap: tuple[float, float]
    links: np.ndarray
    unusual: int
    conflicts: dict[int, dict[int, int]]
    mislabeled_copies: list[tuple[int, int]]
    given: GivenIds | None = None


# -- building --------------------------------------------------------------------------------------


def build_cohort(raw: RawImages) -> tuple[Cohort, Recovery]:
    """Recovers patients, slices, synthetic images and duplicates from the pixels; patients and
    places that were given with the images win, and the pixels check them.

    A patient whose images carry several labels stays one patient, because a split must keep the
    patient together, and is listed in `Recovery.conflicts`.

    Raises:
        NoPatientsError: there is no gap between patients, and no ids were given.
        UserError: only some images have an id.
    """
    pixels = np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in raw.images])
    first = first_with_same(pixels)
    if any(raw.patient):
        return cohort_of_given_patients(raw, pixels, first)
    distinct = np.unique(first)
    images = chosen(raw.images, distinct)
    patients = find_patients(features(images), background(images))
    matrices = [
        correlations(images, members)
        for members in progress(members_of(patients.patient), "measuring patients")
    ]
    gap = measure_gap(images, patients, matrices)
    patient, position = np.full(len(raw), -1), np.full(len(raw), -1)
    patient[distinct] = patients.patient
    position[distinct] = slice_indices(images, patients.patient, matrices)
    cohort = _assemble(raw, np.array(raw.file_sha256), pixels, patient[first], position[first])
    recovery = Recovery(
        threshold=middle(gap),
        gap=gap,
        search_gap=patients.gap,
        links=patients.links,
        unusual=patients.unusual,
        conflicts=_conflicts(cohort),
        mislabeled_copies=_mislabeled(raw, first),
    )
    return cohort, recovery


def cohort_of_given_patients(
    raw: RawImages, pixels: np.ndarray, first: np.ndarray
) -> tuple[Cohort, Recovery]:
    """The cohort of images whose patients are given.

    Args:
        pixels: (N,) pixel hashes.
        first: (N,) the first row with the same pixels.
    """
    if unknown := [name for name, one in zip(raw.paths, raw.patient, strict=True) if not one]:
        raise UserError(
            f"{len(unknown)} of {len(raw)} images have no patient_id, such as {unknown[0]}, and "
            "the others have one: give all of them ids, or none."
        )
    names = list(dict.fromkeys(raw.patient))
    number = {name: row for row, name in enumerate(names)}
    given = np.array([number[name] for name in raw.patient])
    distinct = np.unique(first)
    images = chosen(raw.images, distinct)
    try:
        seen = find_patients(features(images), background(images))
    except NoPatientsError:
        seen = None
    position = np.full(len(raw), -1)
    position[distinct] = given_positions(raw, distinct, images, given[distinct])
    cohort = _assemble(raw, np.array(raw.file_sha256), pixels, given[first], position[first])
    unknown_gap = (float("nan"), float("nan"))
    gap = seen.gap if seen is not None else unknown_gap
    recovery = Recovery(
        threshold=middle(gap) if seen is not None else float("nan"),
        gap=gap,
        search_gap=gap,
        links=seen.links if seen is not None else np.empty(0),
        unusual=0,
        conflicts=_conflicts(cohort),
        mislabeled_copies=_mislabeled(raw, first),
        given=_agreement(names, given, first, distinct, seen),
    )
    return cohort, recovery


def given_positions(
    raw: RawImages, rows: np.ndarray, images: Sequence[np.ndarray], patient: np.ndarray
) -> np.ndarray:
    """Place (n,) of each image in its patient's stack, one session after the other: by the slice
    numbers that were given, or else by the pixels.

    Args:
        rows: (n,) of the images in `raw`.
        patient: (n,) from 0.
    """
    sessions = [raw.session[row] if raw.session else "" for row in rows]
    stacks = {
        key: stack
        for stack, key in enumerate(sorted(set(zip(patient.tolist(), sessions, strict=True))))
    }
    stack = np.array([stacks[key] for key in zip(patient.tolist(), sessions, strict=True)])
    numbers = [raw.slice_index[row] if raw.slice_index else None for row in rows]
    if None in numbers:
        matrices = [correlations(images, members) for members in members_of(stack)]
        place = slice_indices(images, stack, matrices)
    else:
        place = np.array(numbers)
    order = np.lexsort((place, stack, patient))
    position = np.empty(len(rows), np.int64)
    for members in np.split(order, np.flatnonzero(np.diff(patient[order])) + 1):
        position[members] = np.arange(len(members))
    return position


def _agreement(
    names: Sequence[str],
    given: np.ndarray,
    first: np.ndarray,
    distinct: np.ndarray,
    seen: Patients | None,
) -> GivenIds:
    """How given patients (N,) agree with those that the pixels of the distinct images show."""
    copied = {
        tuple(sorted((names[given[row]], names[given[first[row]]])))
        for row in np.flatnonzero(given != given[first])
    }
    alike: set[tuple[str, str]] = set()
    divided: list[str] = []
    if seen is not None:
        of_distinct = given[distinct]
        for group in members_of(seen.patient):
            ids = sorted({names[one] for one in of_distinct[group]})
            alike |= set(itertools.pairwise(ids))
        divided = [
            names[one]
            for one in np.unique(of_distinct)
            if len(set(seen.patient[of_distinct == one].tolist()) - {-1}) > 1
        ]
    recovered = None if seen is None else int(seen.patient.max() + 1)
    return GivenIds(len(names), recovered, sorted(alike), divided, sorted(copied))


def _mislabeled(raw: RawImages, first: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of rows with equal pixels and different labels."""
    return [
        (original, row)
        for row, original in enumerate(first.tolist())
        if raw.label[row] != raw.label[original]
    ]


def first_with_same(keys: np.ndarray) -> np.ndarray:
    """For each row the first row (N,) that has the same key."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse]


def _assemble(
    raw: RawImages,
    file_sha256: np.ndarray,
    pixel_sha256: np.ndarray,
    patient: np.ndarray,
    position: np.ndarray,
) -> Cohort:
    """The table of the raw images; arrays (N,) in their order."""
    first = first_with_same(pixel_sha256)
    copy = first != np.arange(len(first))
    return Cohort(
        file_sha256=file_sha256,
        pixel_sha256=pixel_sha256,
        source_split=np.array(raw.source_split),
        label=np.asarray(raw.label, np.int64),
        kind=np.where(copy, "duplicate", np.where(patient >= 0, "real", "synthetic")),
        duplicate_of=np.where(copy, pixel_sha256[first], ""),
        patient_id=patient.astype(np.int64),
        slice_index=position.astype(np.int64),
    )


def _conflicts(cohort: Cohort) -> dict[int, dict[int, int]]:
    """Patients with several labels: patient id → label → images."""
    labels = [Counter(cohort.label[rows].tolist()) for rows in members_of(cohort.patient_id)]
    return {
        patient: dict(sorted(counts.items()))
        for patient, counts in enumerate(labels)
        if len(counts) > 1
    }


def apply_cohort(raw: RawImages, known: Cohort) -> Cohort | None:
    """Patients and slices of raw images from a known table, looked up by the files' hashes.

    Renamed folders change neither pixels nor patients; order, split and label are those of the raw
    images.

    Returns:
        None where the table lists other files.
    """
    if sorted(raw.file_sha256) != sorted(known.file_sha256.tolist()):
        return None
    row = {name: i for i, name in enumerate(known.file_sha256.tolist())}
    rows = np.array([row[name] for name in raw.file_sha256])
    return _assemble(
        raw,
        known.file_sha256[rows],
        known.pixel_sha256[rows],
        known.patient_id[rows],
        known.slice_index[rows],
    )


def known_cohort(raw: RawImages, tables: Sequence[Path]) -> Cohort | None:
    """The cohort of these images by the first table that lists exactly these files; None where
    their patients are given, which win over any table."""
    if any(raw.patient):
        return None
    for path in tables:
        if path.is_file() and (cohort := apply_cohort(raw, read_cohort(path))) is not None:
            return cohort
    return None


def cohort_for(
    raw: RawImages,
    committed: Path | str = COMMITTED_COHORT,
    cache: Path | str | None = None,
) -> Cohort:
    """The cohort of these images, from a table that lists exactly these files where there is one.

    Args:
        committed: the table to look in first.
        cache: the table to look in next. A cohort that had to be built from the pixels is kept
            there.
    """
    tables = [Path(path) for path in (committed, cache) if path is not None]
    if (known := known_cohort(raw, tables)) is not None:
        return known
    cohort, _ = build_cohort(raw)
    if cache is not None:
        write_cohort(cohort, cache)
    return cohort


# -- the file --------------------------------------------------------------------------------------


def write_cohort(cohort: Cohort, path: Path | str) -> None:
    """Writes `cohort.csv` atomically; equal cohorts give equal bytes."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(_table_bytes(cohort))


def cohort_identity(cohort: Cohort) -> str:
    """SHA-256 of the cohort's table: it holds the pixels, class and patient of every image, so two
    cohorts of one identity are the same in all of them."""
    return hashlib.sha256(_table_bytes(cohort)).hexdigest()


def _table_bytes(cohort: Cohort) -> bytes:
    columns = {name: getattr(cohort, name).tolist() for name in COLUMNS}
    for name in ("patient_id", "slice_index"):
        columns[name] = ["" if value < 0 else value for value in columns[name]]
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    rows.writerows(zip(*columns.values(), strict=True))
    return text.getvalue().encode()


def read_cohort(path: Path | str) -> Cohort:
    """Reads what `write_cohort` wrote.

    Raises:
        UserError: no such file, or other columns.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"There is no cohort at {path}: build it with "
            f"`python -m utils.cohort RAW --out {path}`."
        )
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if not rows or tuple(rows[0]) != COLUMNS or any(len(row) != len(COLUMNS) for row in rows):
        raise UserError(
            f"{path} has not the columns {', '.join(COLUMNS)}: build it again with "
            "`python -m utils.cohort`."
        )
    column = {name: [row[k] for row in rows[1:]] for k, name in enumerate(COLUMNS)}
    return Cohort(
        file_sha256=np.array(column["file_sha256"], str),
        pixel_sha256=np.array(column["pixel_sha256"], str),
        source_split=np.array(column["source_split"], str),
        label=_integers(column["label"]),
        kind=np.array(column["kind"], str),
        duplicate_of=np.array(column["duplicate_of"], str),
        patient_id=_integers(column["patient_id"]),
        slice_index=_integers(column["slice_index"]),
    )


def _integers(values: Sequence[str]) -> np.ndarray:
    """Numbers as `int64` (N,), -1 where empty."""
    return np.array([int(value) if value else -1 for value in values], np.int64)


# -- the command line ------------------------------------------------------------------------------


def describe(cohort: Cohort, recovery: Recovery) -> str:
    """A summary in a few lines: counts, patients by class, threshold, gap, conflicts."""
    kinds = Counter(cohort.kind.tolist())
    patients = members_of(np.where(cohort.kind == "real", cohort.patient_id, -1))
    sizes = Counter(len(rows) for rows in patients)
    by_class = Counter(int(cohort.label[rows[0]]) for rows in patients)
    lines = [
        f"{len(cohort)} files: {kinds['real']} real, {kinds['synthetic']} synthetic, "
        f"{kinds['duplicate']} duplicates",
        f"{len(patients)} patients ("
        + ", ".join(f"{name} {by_class[k]}" for k, name in enumerate(CLASSES))
        + ") of "
        + ", ".join(f"{size} slices × {count}" for size, count in sorted(sizes.items())),
    ]
    if np.isfinite(recovery.threshold):
        lines.append(
            f"threshold {recovery.threshold:.3f} in the middle of a gap: two patients reach "
            f"{recovery.gap[0]:.3f}, a slice joins its own patient at {recovery.gap[1]:.3f}"
        )
    if recovery.given is not None:
        lines.append(given_text(recovery.given))
    if recovery.unusual:
        lines.append(f"{recovery.unusual} images joined a patient in spite of their background")
    lines.append(f"patients in more than one class: {len(recovery.conflicts)}")
    for patient, counts in recovery.conflicts.items():
        text = ", ".join(f"{count} {CLASSES[label]}" for label, count in counts.items())
        lines.append(f"  patient {patient}: {text}")
    if recovery.mislabeled_copies:
        lines.append(
            "copies filed under another class than their original: "
            f"{len(recovery.mislabeled_copies)}"
        )
    return "\n".join(lines)


def given_text(given: GivenIds) -> str:
    """How given ids agree with the pixels, in one line; counts alone, no id is named."""
    seen = (
        "the pixels show no patients apart"
        if given.recovered is None
        else f"the pixels show {given.recovered:,}, {len(given.alike):,} pairs of ids look like "
        f"one head, {len(given.divided):,} ids like several"
    )
    return (
        f"{given.patients:,} ids were given and are the patients; {seen}; {len(given.copied):,} "
        "pairs of ids share an image"
    )


def main(raw: Path, /, out: Path, skip_unreadable: bool = False) -> None:
    """Recovers the patient and slice of each image from the pixels; writes one row per image file.

    Args:
        raw: folder or zip of class folders.
        out: the table to write.
        skip_unreadable: go on without images that cannot be read.
    """
    check_output(out, raw)
    cohort, recovery = build_cohort(read_raw(raw, skip_unreadable=skip_unreadable))
    write_cohort(cohort, out)
    print(describe(cohort, recovery))
    print(f"written to {out}")
