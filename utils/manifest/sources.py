"""Folders, archives and tables of labels → a manifest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from utils.manifest.files import open_images
from utils.manifest.layout import places_of
from utils.manifest.table import (
    MANIFESTS,
    Manifest,
    Row,
    manifest_from,
    read_manifest,
    read_table,
    split_named,
)
from utils.utils_funcs import UserError, files_below

#: Names of columns that hold labels, and of those that hold patients, in lower case.
LABEL_COLUMNS = ("label", "class", "diagnosis", "group", "dx", "target", "category")
PATIENT_COLUMNS = ("patient_id", "patient", "subject_id", "subject", "participant_id")
#: What needs a reader of its own (`utils.manifest.volumes`), by the end of its name.
VOLUMES = {".nii": "NIfTI", ".nii.gz": "NIfTI", ".dcm": "DICOM", ".parquet": "parquet"}


def manifest_of(
    raw: Path,
    *,
    patient: str | None = None,
    session: str | None = None,
    labels: Path | None = None,
    path_column: str | None = None,
    label_column: str | None = None,
) -> Manifest:
    """The manifest of a folder or zip of images by its layout, or of a CSV.

    Args:
        patient, session: regular expressions that find ids in paths: the first group, or the whole
            match.
        labels: a table of the images' labels.
        path_column, label_column: its columns; None: found by their content and names.

    Raises:
        UserError: in one sentence, what cannot be read, or what to choose.
    """
    if raw.is_file() and raw.suffix.lower() in MANIFESTS:
        return _with_ids(read_manifest(raw), patient, session)
    with open_images(raw, "the raw images") as files:
        names = [name for name, _ in files]
    if not names:
        raise UserError(_no_image(raw))
    if labels is None and raw.is_dir():
        labels = _table_beside(raw, names)
    if labels is not None:
        rows = _labelled(names, labels, path_column, label_column)
        return _with_ids(manifest_from(raw, rows), patient, session)
    _refuse_augmented(names, raw)
    rows = [
        Row(name, place.folder, place.subject, split=place.split, name=place.path)
        for name, place in zip(names, places_of(names), strict=True)
    ]
    return _with_ids(manifest_from(raw, rows), patient, session)


def _refuse_augmented(names: Sequence[str], raw: Path) -> None:
    """Refuses augmented copies beside their originals.

    Raises:
        UserError: with the folder to name instead.
    """
    folders = {name.split("/")[0] for name in names if "/" in name}
    augmented = {folder for folder in folders if "augment" in folder.lower()}
    others = folders - augmented
    if augmented and others:
        raise UserError(
            f"{raw} holds {_listed(augmented)} beside {_listed(others)}: augmented copies are no "
            f"images of their own and hide which images show one patient; name "
            f"{(raw / sorted(others)[0]).as_posix()} alone."
        )


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _no_image(raw: Path) -> str:
    """Why there is no image in a folder or zip, and what to do."""
    files = files_below(raw) if raw.is_dir() else iter(())
    kinds = {kind for path in files if (kind := volume_kind(path.name))}
    if kinds:
        return (
            f"{raw} holds {' and '.join(sorted(kinds))} files and no images: make slices and a "
            f"manifest of them first (`python -m utils.manifest {raw.name} --out manifest.csv`)."
        )
    archives = sorted(raw.glob("*.zip")) if raw.is_dir() else []
    if archives:
        return f"{raw} holds no image, but the archive {archives[0].name}: name that instead."
    return f"{raw} holds no image: expected class folders such as train/Non_Demented/*.jpg."


def volume_kind(name: str) -> str | None:
    """`NIfTI`, `DICOM` or `parquet`, by the end of a file's name."""
    return next((kind for end, kind in VOLUMES.items() if name.lower().endswith(end)), None)


def _with_ids(manifest: Manifest, patient: str | None, session: str | None) -> Manifest:
    """The manifest with ids that regular expressions find in its paths."""
    rows = manifest.rows
    for column, pattern in (("patient_id", patient), ("session", session)):
        if pattern is not None:
            found = ids_in([row.path for row in rows], pattern, column)
            rows = [
                replace(row, **{column: name})  # type: ignore[arg-type]
                for row, name in zip(rows, found, strict=True)
            ]
    return replace(manifest, rows=rows)


def ids_in(paths: Sequence[str], pattern: str, what: str) -> list[str]:
    """What a regular expression finds in each path: its first group, or the whole match.

    Raises:
        UserError: it is not valid, or does not match some paths.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{pattern!r} is no regular expression ({error}): mend it.") from error
    found = [expression.search(path) for path in paths]
    if missing := [path for path, match in zip(paths, found, strict=True) if match is None]:
        raise UserError(
            f"{pattern!r} finds no {what} in {len(missing)} of {len(paths)} paths, such as "
            f"{missing[0]}: write one that matches all of them."
        )
    return [match.group(match.re.groups and 1) or "" for match in found if match is not None]


# --- Tables of labels ---------------------------------------------------------------------------


def _table_beside(raw: Path, names: Sequence[str]) -> Path | None:
    """The table of labels in a folder of images without class folders; None where there is none.

    Raises:
        UserError: there are several tables.
    """
    tables = sorted([*raw.glob("*.csv"), *raw.glob("*.tsv")])
    manifests = [path for path in tables if {"path", "file_name"} & set(_header(path))]
    if len(manifests) == 1 and "label" in _header(manifests[0]):
        return manifests[0]
    if not tables or len({place.folder for place in places_of(names)}) > 1:
        return None
    if len(tables) > 1:
        raise UserError(
            f"{raw} holds images in no class folders and the tables "
            f"{', '.join(path.name for path in tables)}: name that of the labels with --labels."
        )
    return tables[0]


def _header(path: Path) -> list[str]:
    rows = read_table(path)
    return list(rows[0]) if rows else []


def _labelled(
    names: Sequence[str], table: Path, path_column: str | None, label_column: str | None
) -> list[Row]:
    """Rows of images whose labels stand in a table."""
    found, label = records_of(table, [keys_of(name) for name in names], path_column, label_column)
    if missing := [
        name for name, row in zip(names, found, strict=True) if row is None or not row[label]
    ]:
        raise UserError(
            f"{table} has no label of {len(missing)} of {len(names)} images, such as {missing[0]}: "
            "add them, or leave these images out."
        )
    records = [row for row in found if row is not None]
    columns = {plain(name): name for name in records[0]}
    whose = next((columns[name] for name in PATIENT_COLUMNS if name in columns), None)
    split = columns.get("split")
    return [
        Row(
            name,
            row[label],
            row[whose] if whose else "",
            split=split_named(row[split], f"{table}, {name},") if split else "",
            name=name,
        )
        for name, row in zip(names, records, strict=True)
    ]


def plain(column: str) -> str:
    """A column's name in lower case, with underscores."""
    return re.sub(r"[^a-z0-9]+", "_", column.lower()).strip("_")


def keys_of(path: str) -> list[str]:
    """How a table may name the image or volume at a path, the most exact first: its path, its name,
    the beginnings of its name up to an underscore or a hyphen, or a folder that it lies in."""
    whole = re.sub(r"\.nii(\.gz)?$", "", path)
    pure = PurePosixPath(whole)
    stem = pure.stem if whole == path else pure.name
    starts = [stem[: match.start()] for match in re.finditer(r"[_-]", stem)][::-1]
    folders = list(pure.parts[:-1])[::-1]
    return [_key(name) for name in (path, stem, *starts, *folders) if name]


def _key(value: str) -> str:
    """A name as tables write it, so that 7, 007 and 007.png are one."""
    name = re.sub(r"\.(nii(\.gz)?|dcm|png|jpe?g|bmp|tiff?|gif|webp)$", "", value, flags=re.I)
    name = name.replace("\\", "/").strip("/")
    return str(int(name)) if name.isdigit() else name


def records_of(
    table: Path,
    keys: Sequence[Sequence[str]],
    path_column: str | None,
    label_column: str | None,
) -> tuple[list[dict[str, str] | None], str]:
    """The row of a table for each image or volume (None: it has none), and the column of labels.

    Args:
        keys: of each, as `keys_of` gives them.

    Raises:
        UserError: no column names them, or several columns could hold the labels.
    """
    records = read_table(table)
    columns = list(records[0]) if records else []
    for option, column in (("--path-column", path_column), ("--label-column", label_column)):
        if column is not None and column not in columns:
            raise UserError(
                f"{table} has no column {column!r}: choose {option} among {', '.join(columns)}."
            )
    indices = {
        column: {_key(row[column]): row for row in reversed(records) if row.get(column)}
        for column in ([path_column] if path_column else columns)
    }
    found = {
        column: [next((index[key] for key in names if key in index), None) for names in keys]
        for column, index in indices.items()
    }
    # Of columns that name as many, the one with most different values: a visit's number does not
    # name an image.
    best = max(
        found,
        key=lambda column: (
            sum(row is not None for row in found[column]),
            len(indices[column]),
        ),
        default=None,
    )
    if best is None or not any(found[best]):
        raise UserError(
            f"No column of {table} ({', '.join(columns)}) names the images: name it with "
            "--path-column, with values as the images are called."
        )
    return found[best], label_column or _label_column(columns, best, table)


def _label_column(columns: Sequence[str], path_column: str, table: Path) -> str:
    """The column of the labels: by its name, or the only one left."""
    others = [name for name in columns if name != path_column]
    known = [name for name in others if plain(name) in LABEL_COLUMNS]
    if len(known) == 1 or len(others) == 1:
        return (known or others)[0]
    raise UserError(
        f"{table} has the columns {', '.join(others)}: say with --label-column which holds the "
        "classes."
    )
