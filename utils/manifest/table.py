"""The manifest: a CSV with one row an image, and a JSON file beside it that names its classes.

    path,label,patient_id,session,slice_index,split

Paths are relative to the CSV and may lead into a zip archive (`set.zip/train/1.png`). Only `path`
(or `file_name`, as Hugging Face writes it) and `label` are needed; other columns are ignored.
"""

from __future__ import annotations

import contextlib
import csv
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.manifest.files import open_images
from utils.manifest.layout import SPLITS, in_order
from utils.utils_funcs import UserError, atomic_path, read_json, write_json

#: Endings of the names of manifests.
MANIFESTS = (".csv", ".tsv")
COLUMNS = ("path", "label", "patient_id", "session", "slice_index", "split")


@dataclass(frozen=True)
class Row:
    """What a data set says of one image.

    Attributes:
        path: relative to the manifest's base.
        label: name of the class.
        patient_id, session: as they were given; empty where nothing is known.
        slice_index: place along the body axis, 0 the most superior; None where unknown.
        split: `train`, `validation`, `test`, or empty.
        name: the path as messages and tables show it, without folders that say nothing.
    """

    path: str
    label: str
    patient_id: str = ""
    session: str = ""
    slice_index: int | None = None
    split: str = ""
    name: str = ""


@dataclass(frozen=True)
class Manifest:
    """Every image of a data set, in the order of their paths.

    Attributes:
        base: the folder or zip that paths are relative to.
        rows: one an image.
        classes: their names, in order.
        ordinal: whether that order is one of ratings, from healthy to ill.
        intensity: the rule by which values became 8 bits, where that was done already.
    """

    base: Path
    rows: list[Row]
    classes: tuple[str, ...]
    ordinal: bool = False
    intensity: str = ""


def manifest_from(base: Path, rows: Sequence[Row], **more: object) -> Manifest:
    """A manifest of these rows, with their classes in the order of what they mean."""
    classes, ordinal = in_order({row.label for row in rows})
    rows = sorted(rows, key=lambda row: row.path)
    return Manifest(base, rows, classes, ordinal, **more)  # type: ignore[arg-type]


def sidecar(path: Path) -> Path:
    """The JSON file beside a manifest."""
    return path.with_suffix(".json")


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Writes the CSV and its sidecar; paths must be relative to the CSV's folder already."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        for row in manifest.rows:
            position = "" if row.slice_index is None else row.slice_index
            rows.writerow([row.path, row.label, row.patient_id, row.session, position, row.split])
    write_json(
        sidecar(path),
        {
            "classes": list(manifest.classes),
            "ordinal": manifest.ordinal,
            "intensity": manifest.intensity,
            "images": len(manifest.rows),
        },
    )


def read_manifest(path: Path) -> Manifest:
    """The manifest at a path.

    Raises:
        UserError: it is no CSV of these columns, or a row of it makes no sense.
    """
    records = read_table(path)
    columns = list(records[0]) if records else []
    place = "path" if "path" in columns else "file_name"
    if place not in columns or "label" not in columns:
        raise UserError(
            f"{path} has the columns {', '.join(columns) or 'none'}: expected path (or file_name) "
            "and label, and where known patient_id, session, slice_index, split."
        )
    declared = read_json(sidecar(path)) if sidecar(path).is_file() else {}
    names = [str(name) for name in declared.get("classes", [])]
    rows = [
        _row(record, f"{path}, line {number}", record[place], names)
        for number, record in enumerate(records, 2)
    ]
    if twice := [name for name, count in Counter(row.path for row in rows).items() if count > 1]:
        raise UserError(f"{path} names {twice[0]} more than once: leave one row for each image.")
    found = manifest_from(path.parent, rows, intensity=str(declared.get("intensity", "")))
    if not names:
        return found
    if unknown := sorted({row.label for row in rows} - set(names)):
        raise UserError(
            f"{path} holds the label {unknown[0]!r}, which {sidecar(path).name} does not declare: "
            "add it to the classes there."
        )
    present = tuple(name for name in names if any(row.label == name for row in rows))
    ordinal = bool(declared.get("ordinal", False))
    return Manifest(found.base, found.rows, present, ordinal, found.intensity)


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV with a header, as texts without surrounding spaces; its columns may be
    separated by semicolons or tabs too.

    Raises:
        UserError: it cannot be read as such.
    """
    try:
        # Universal newlines: some tables end their lines with a carriage return alone.
        with open(path, encoding="utf-8-sig") as file:
            header = file.readline()
            delimiter = max(",;\t", key=header.count)
            file.seek(0)
            rows = list(csv.DictReader(file, delimiter=delimiter, skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a table ({error}): save it as UTF-8 CSV.") from (
            error
        )
    if ragged := [number for number, row in enumerate(rows, 2) if None in row.values()]:
        raise UserError(f"{path}, line {ragged[0]} has fewer columns than the header: mend it.")
    return [
        {str(key).strip(): value.strip() for key, value in row.items() if isinstance(value, str)}
        for row in rows
    ]


def _row(record: dict[str, str], where: str, path: str, names: Sequence[str]) -> Row:
    """One row of a manifest; `names` are the declared classes, which a number may stand for."""
    label, split, position = (record.get(key, "") for key in ("label", "split", "slice_index"))
    if not path or not label:
        raise UserError(f"{where} has no {'path' if not path else 'label'}: fill it in.")
    if label.isdigit() and label not in names:
        if int(label) >= len(names):
            raise UserError(
                f"{where} has the label {label}, a number without a name: declare the names in "
                'order in the JSON file beside it, as {"classes": ["Non", "Very mild", …]}.'
            )
        label = names[int(label)]
    if position and not position.lstrip("-").isdigit():
        raise UserError(f"{where} has the slice_index {position!r}: expected a whole number.")
    return Row(
        path=path,
        label=label,
        patient_id=record.get("patient_id", ""),
        session=record.get("session", ""),
        slice_index=int(position) if position else None,
        split=split_named(split, where),
        name="/".join(part for part in path.split("/") if part != ".."),
    )


def split_named(split: str, where: str) -> str:
    """The part that a table's word means; empty where it has none.

    Raises:
        UserError: it is no word for one.
    """
    if split and split.lower() not in SPLITS:
        raise UserError(f"{where} has the split {split!r}: expected train, validation or test.")
    return SPLITS.get(split.lower(), "")


@contextlib.contextmanager
def open_rows(manifest: Manifest) -> Iterator[list[Callable[[], bytes]]]:
    """For each row a function that reads its file's bytes, inside the `with`; archives are opened
    once.

    Raises:
        UserError: a file is missing.
    """
    with contextlib.ExitStack() as opened:
        archives: dict[Path, dict[str, Callable[[], bytes]]] = {}

        def reader(row: Row) -> Callable[[], bytes]:
            archive, inside = archive_of(manifest.base, row.path)
            if archive is None:
                file = manifest.base / row.path
                if not file.is_file():
                    raise UserError(f"There is no {file}, which the manifest names: put it there.")
                return file.read_bytes
            if archive not in archives:
                files = opened.enter_context(open_images(archive, "the manifest's images"))
                archives[archive] = dict(files)
            if inside not in archives[archive]:
                raise UserError(
                    f"{archive} holds no {inside}, which the manifest names: put it there."
                )
            return archives[archive][inside]

        yield [reader(row) for row in manifest.rows]


def files_of(manifest: Manifest) -> set[Path]:
    """The files, archives among them, that hold the images.

    Raises:
        UserError: one is missing.
    """
    found = set()
    for row in manifest.rows:
        archive, _ = archive_of(manifest.base, row.path)
        path = archive or manifest.base / row.path
        if not path.is_file():
            raise UserError(f"There is no {path}, which the manifest names: put it there.")
        found.add(path)
    return found


def archive_of(base: Path, path: str) -> tuple[Path | None, str]:
    """(zip archive, path inside it) of a row; (None, "") where the file lies in a folder."""
    if base.is_file():
        return base, path
    parts = Path(path).parts
    for count in range(1, len(parts)):
        candidate = base.joinpath(*parts[:count])
        if candidate.is_file():
            return candidate, "/".join(parts[count:])
    return None, ""
