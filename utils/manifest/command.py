"""`python -m utils.manifest RAW --out manifest.csv`: the manifest of a data set, and what it is."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

from utils.manifest.files import UNREADABLE, decode
from utils.manifest.sources import manifest_of, volume_kind
from utils.manifest.table import Manifest, open_rows, write_manifest
from utils.manifest.volumes import Plane, Slices, import_volumes
from utils.utils_funcs import check_output, files_below, progress


def main(
    raw: Path,
    /,
    out: Path,
    patient: str | None = None,
    session: str | None = None,
    labels: Path | None = None,
    path_column: str | None = None,
    label_column: str | None = None,
    label: str | None = None,
    plane: Plane = "axial",
    slices: tuple[float, float] = (20, 45),
    step: int = 1,
) -> None:
    """Writes the manifest of a data set: one row an image, with its class, patient and part.

    Everything else reads it in place of the data: RAW may be its path from then on.

    Args:
        raw: folder or zip of images; CSV; folder of NIfTI, DICOM or parquet files.
        out: the CSV to write; a JSON file beside it names classes and the rule of intensities.
        patient: regular expression that finds a patient's id in paths, as 'OAS1_[0-9]+'.
        session: likewise a visit's.
        labels: table of labels, of images or (of volumes) of patients.
        path_column: its column that names the images.
        label_column: its column of classes.
        label: the class of all volumes, where they are of one.
        plane: of the slices cut from volumes.
        slices: first and last slice, in percent of the head's extent from the top, front or right.
        step: cut every n-th slice.
    """
    check_output(out, raw, labels)
    cutting = Slices(plane, *slices, step)
    if _holds_volumes(raw):
        manifest = import_volumes(
            raw,
            out,
            cutting,
            patient=patient,
            session=session,
            labels=labels,
            path_column=path_column,
            label_column=label_column,
            label=label,
        )
    else:
        found = manifest_of(
            raw,
            patient=patient,
            session=session,
            labels=labels,
            path_column=path_column,
            label_column=label_column,
        )
        if label is not None:
            found = replace(
                found, rows=[replace(row, label=label) for row in found.rows], classes=(label,)
            )
        manifest = relative_to(found, out.parent)
    write_manifest(manifest, out)
    print(summary(manifest))
    print(f"written to {out}")


def _holds_volumes(raw: Path) -> bool:
    if raw.is_file():
        return volume_kind(raw.name) is not None
    return raw.is_dir() and any(volume_kind(path.name) for path in files_below(raw))


def relative_to(manifest: Manifest, folder: Path) -> Manifest:
    """The manifest with paths relative to another folder, that of its CSV."""
    prefix = Path(os.path.relpath(manifest.base.resolve(), folder.resolve())).as_posix()
    prefix = "" if prefix == "." else f"{prefix}/"
    rows = [replace(row, path=f"{prefix}{row.path}") for row in manifest.rows]
    return replace(manifest, base=folder, rows=rows)


def summary(manifest: Manifest) -> str:
    """Classes, patients, parts, sizes, depth and range of gray, in a line each."""
    rows = manifest.rows
    counts = Counter(row.label for row in rows)
    parts = Counter(row.split or "no part" for row in rows)
    people = len({row.patient_id for row in rows if row.patient_id})
    sizes: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    low, high, unreadable = float("inf"), float("-inf"), 0
    with open_rows(manifest) as readers:
        for read in progress(readers, "reading images"):
            try:
                image = decode(read())
            except UNREADABLE:
                unreadable += 1
                continue
            sizes["×".join(map(str, image.shape[::-1]))] += 1
            kinds[str(image.dtype)] += 1
            low, high = min(low, float(image.min())), max(high, float(image.max()))
    known = f"{people:,} given" if people else "not given (they are recovered from the pixels)"
    lines = [
        f"{len(rows):,} images",
        "classes"
        + (" (ordinal): " if manifest.ordinal else ": ")
        + ", ".join(f"{name or '(none)'} {counts[name]:,}" for name in manifest.classes),
        f"patients: {known}",
        "parts: " + ", ".join(f"{name} {count:,}" for name, count in sorted(parts.items())),
        "sizes: " + _counted(sizes),
        f"stored as {_counted(kinds)}, values from {low:g} to {high:g}",
    ]
    if manifest.intensity:
        lines.append(f"intensities: {manifest.intensity}")
    if unreadable:
        lines.append(f"{unreadable:,} files cannot be read as images")
    return "\n".join(lines)


def _counted(counts: Counter[str], most: int = 5) -> str:
    shown = ", ".join(f"{name} ({count:,})" for name, count in counts.most_common(most))
    return shown + (f" and {len(counts) - most} more" if len(counts) > most else "")
