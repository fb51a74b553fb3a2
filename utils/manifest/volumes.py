"""NIfTI volumes, DICOM series and parquet files → image files, and the manifest of them.

Volumes are turned to their closest canonical orientation. A slice is shown as radiologists see it:
the patient's right on the left, anterior or superior at the top. Its number counts from the most
superior, the most anterior, or the patient's right. Each volume is scaled as a whole, from 0 (or
its smallest value, where that is below) to the value that 99.5 % of its voxels with signal stay
below.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from PIL import Image

from utils.manifest.layout import SPLITS, places_of
from utils.manifest.sources import LABEL_COLUMNS, ids_in, keys_of, records_of, volume_kind
from utils.manifest.table import Manifest, Row, manifest_from
from utils.utils_funcs import UserError, atomic_path, files_below, progress

Plane = Literal["axial", "coronal", "sagittal"]
#: The axis of a canonical volume (right, anterior, superior) that a plane's slices lie along.
AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
INTENSITY = "each volume from 0 to its 99.5th percentile scaled to 0 to 255"
#: Share of voxels with signal that stay below white.
WHITE = 99.5


@dataclass(frozen=True)
class Slices:
    """Which slices of a volume are taken.

    Attributes:
        plane: of the slices.
        start, end: first and last place, in percent of the extent of the head along the plane's
            axis, from the most superior, the most anterior, or the right.
        step: every n-th.
    """

    plane: Plane = "axial"
    start: float = 20
    end: float = 45
    step: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 100 or self.step < 1:
            raise UserError(
                f"--slices {self.start:g} {self.end:g} --step {self.step}: expected two "
                "percentages from 0 to 100, the smaller first, and a step from 1 on."
            )


def optional(module: str, package: str) -> ModuleType:
    """A module of a package that only some data need.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"These files need the package {package}: install it with `pip install {package}` "
            "(env/requirements.txt has all readers)."
        ) from error


def import_volumes(
    raw: Path,
    out: Path,
    slices: Slices,
    *,
    patient: str | None = None,
    session: str | None = None,
    labels: Path | None = None,
    path_column: str | None = None,
    label_column: str | None = None,
    label: str | None = None,
) -> Manifest:
    """Writes the slices of every volume, or the images of every parquet file, into a folder beside
    the manifest `out`; returns the manifest.

    Args:
        raw: folder of such files, or one.
        patient, session: regular expressions that find ids in paths (None: BIDS's sub- and ses-,
            DICOM's PatientID, or else the file is a patient).
        labels: table of the patients' labels (None: participants.tsv, or class folders).
        path_column, label_column: its columns; None: found by their content and names.
        label: the label of all images, where they are of one class.
    """
    files = [raw] if raw.is_file() else sorted(files_below(raw))
    kinds = {kind for path in files if (kind := volume_kind(path.name))}
    if len(kinds) != 1:
        raise UserError(
            f"{raw} holds {' and '.join(sorted(kinds)) or 'no volumes'}: give NIfTI, DICOM or "
            "parquet files, of one kind."
        )
    (kind,) = kinds
    base = raw.parent if raw.is_file() else raw
    names = [path.relative_to(base).as_posix() for path in files if volume_kind(path.name) == kind]
    folder = out.parent / f"{out.stem}_images"
    if kind == "parquet":
        if any((patient, session, labels, path_column, label_column, label)):
            raise UserError(
                "Parquet files hold their labels and no paths: leave out --patient, --session, "
                "--labels, its columns and --label."
            )
        return from_parquet(base, names, folder, out)
    volumes = nifti_volumes(base, names) if kind == "NIfTI" else dicom_series(base, names)
    given = labels or next(iter(sorted(base.glob("participants.tsv"))), None)
    named = labels_of_volumes(volumes, given, path_column, label_column, label)
    rows: list[Row] = []
    for volume, name in zip(progress(volumes, "cutting volumes"), named, strict=True):
        one = ids_in([volume.path], patient, "patient")[0] if patient else volume.patient
        visit = ids_in([volume.path], session, "session")[0] if session else volume.session
        pictures, plane = cut(volume.read(), slices)
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", re.sub(r"\.nii(\.gz)?$", "", volume.path))
        for number, picture in pictures:
            path = folder / f"{stem}_{plane}{number:03d}.png"
            with atomic_path(path) as temporary:
                Image.fromarray(picture).save(temporary, "PNG")
            relative = path.relative_to(out.parent).as_posix()
            rows.append(Row(relative, name, one, visit, number, volume.split, relative))
    return manifest_from(out.parent, rows, intensity=INTENSITY)


# --- Volumes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Volume:
    """One head, and what its files say of it.

    Attributes:
        path: of its (first) file.
        read: returns its `float32` voxels (right, anterior, superior) in canonical orientation.
        patient, session, split: as far as paths or headers say.
        folder: its class folder.
    """

    path: str
    read: Callable[[], np.ndarray]
    patient: str
    session: str
    folder: str
    split: str


def nifti_volumes(base: Path, names: Sequence[str]) -> list[Volume]:
    """The volumes of NIfTI files."""
    optional("nibabel", "nibabel")
    found = []
    for name, (split, folder, below) in zip(names, places_of_volumes(names), strict=True):
        stem = re.sub(r"\.nii(\.gz)?$", "", Path(name).name)
        subject, visit = re.search(r"sub-([^_/]+)", name), re.search(r"ses-([^_/]+)", name)
        found.append(
            Volume(
                name,
                functools.partial(read_nifti, base / name),
                f"sub-{subject[1]}" if subject else below or stem,
                f"ses-{visit[1]}" if visit else "",
                folder,
                split,
            )
        )
    return found


def read_nifti(path: Path) -> np.ndarray:
    """The voxels of a NIfTI file, `float32`, in canonical orientation.

    Raises:
        UserError: it is damaged, or holds more than one volume.
    """
    nibabel = optional("nibabel", "nibabel")
    try:
        image = nibabel.load(path)
        if len(image.shape) == 2:  # a single slice; its axes are those of a volume
            image = nibabel.Nifti1Image(np.asarray(image.dataobj)[..., None], image.affine)
        voxels = np.asarray(nibabel.as_closest_canonical(image).dataobj, np.float32)
    except Exception as error:  # noqa: BLE001  nibabel raises many kinds on damaged files
        raise UserError(
            f"{path} cannot be read as NIfTI ({type(error).__name__}: {error}): replace it or "
            "leave it out."
        ) from error
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim != 3 or not np.isfinite(voxels).all():
        raise UserError(
            f"{path} has the shape {voxels.shape} or values that are no numbers: expected one "
            "volume of three axes."
        )
    return voxels


def places_of_volumes(names: Sequence[str]) -> list[tuple[str, str, str]]:
    """(split, class folder, subject folder) of each path; BIDS folders are neither class nor
    subject."""
    bids = re.compile(r"(sub|ses)-|(anat|func|dwi|rawdata|derivatives)$")
    plain = [
        "/".join([*(part for part in name.split("/")[:-1] if not bids.match(part)), "file"])
        for name in names
    ]
    return [(place.split, place.folder, place.subject) for place in places_of(plain)]


def dicom_series(base: Path, names: Sequence[str]) -> list[Volume]:
    """The volumes of DICOM series."""
    pydicom = optional("pydicom", "pydicom")
    optional("nibabel", "nibabel")
    places = dict(zip(names, places_of_volumes(names), strict=True))
    series: dict[str, list[tuple[str, Any]]] = defaultdict(list)
    for name in names:
        try:
            header = pydicom.dcmread(base / name, stop_before_pixels=True)
            series[str(header.SeriesInstanceUID)].append((name, header))
        except Exception as error:  # noqa: BLE001  pydicom raises many kinds on damaged files
            raise UserError(
                f"{base / name} cannot be read as DICOM ({type(error).__name__}: {error}): replace "
                "it or leave it out."
            ) from error
    found = []
    for members in series.values():
        name, header = members[0]
        split, folder, subject = places[name]
        found.append(
            Volume(
                name,
                functools.partial(read_series, base, [one for one, _ in members]),
                str(getattr(header, "PatientID", "")) or subject or Path(name).parent.name,
                str(getattr(header, "StudyDate", "")),
                folder,
                split,
            )
        )
    return found


def read_series(base: Path, names: Sequence[str]) -> np.ndarray:
    """The voxels of a DICOM series, `float32`, in canonical orientation.

    Raises:
        UserError: its files lack what places a slice in the head.
    """
    pydicom, nibabel = optional("pydicom", "pydicom"), optional("nibabel", "nibabel")
    try:
        read = [pydicom.dcmread(base / name) for name in names]
        across = np.array(read[0].ImageOrientationPatient, float).reshape(2, 3)
        normal = np.cross(*across)
        heights = [float(np.dot(normal, one.ImagePositionPatient)) for one in read]
        read = [read[row] for row in np.argsort(heights)]
        stack = np.stack([_rescaled(one) for one in read], -1)
        spacing = [float(value) for value in read[0].PixelSpacing]
    except Exception as error:  # noqa: BLE001  pydicom raises many kinds on damaged files
        raise UserError(
            f"The DICOM series of {base / names[0]} cannot be read ({type(error).__name__}: "
            f"{error}): replace it or leave it out."
        ) from error
    # Columns of the affine: a step down a column of pixels, along a row, to the next slice. DICOM
    # counts to the patient's left and back, NIfTI to the right and front.
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = across[1] * spacing[0], across[0] * spacing[1]
    affine[:3, 2] = normal * ((max(heights) - min(heights)) / max(len(read) - 1, 1) or 1.0)
    affine[:2] *= -1
    canonical = nibabel.as_closest_canonical(nibabel.Nifti1Image(stack, affine))
    return np.asarray(canonical.dataobj, np.float32)


def _rescaled(file: Any) -> np.ndarray:
    """The values of a DICOM file (rows, columns) in the units that it declares."""
    slope, start = (
        float(getattr(file, name, usual))
        for name, usual in (("RescaleSlope", 1), ("RescaleIntercept", 0))
    )
    return file.pixel_array.astype(np.float32) * slope + start


def cut(voxels: np.ndarray, slices: Slices) -> tuple[list[tuple[int, np.ndarray]], str]:
    """(number, `uint8` (H, W)) of each slice taken, and their plane: the one asked for, or that of
    a volume of a single slice."""
    thin = min(voxels.shape) == 1
    axis = int(np.argmin(voxels.shape)) if thin else AXES[slices.plane]
    plane = next(name for name, number in AXES.items() if number == axis)
    low = min(float(voxels.min()), 0.0)
    signal = voxels[voxels > low]
    high = float(np.percentile(signal, WHITE)) if len(signal) else 1.0
    gray = np.rint(np.clip((voxels - low) / max(high - low, 1e-12), 0, 1) * 255).astype(np.uint8)
    gray = np.flip(gray, axis)  # from superior, anterior or right
    if thin:
        return [(0, _as_seen(gray.take([0], axis).squeeze(axis)))], plane
    others = tuple(other for other in range(3) if other != axis)
    inside = np.flatnonzero((gray > 25).any(others))  # the head's extent
    first, last = (inside[0], inside[-1]) if len(inside) else (0, gray.shape[axis] - 1)
    start, end = (first + share / 100 * (last - first) for share in (slices.start, slices.end))
    numbers = range(round(start), round(end) + 1, slices.step)
    pictures = [_as_seen(gray.take([number], axis).squeeze(axis)) for number in numbers]
    return list(zip(numbers, pictures, strict=True)), plane


def _as_seen(slice_: np.ndarray) -> np.ndarray:
    """A slice (first other axis, second other axis) with the second one up the image, and the
    patient's right on the left (in sagittal slices, anterior on the left)."""
    return np.ascontiguousarray(slice_.T[::-1, ::-1])


# --- Labels ---------------------------------------------------------------------------------------


def labels_of_volumes(
    volumes: Sequence[Volume],
    table: Path | None,
    path_column: str | None,
    label_column: str | None,
    label: str | None,
) -> list[str]:
    """The class of each volume: `label`, or by a table, or by its class folder.

    Raises:
        UserError: nothing says it.
    """
    if label is not None:
        return [label] * len(volumes)
    if table is None:
        if missing := [volume.path for volume in volumes if not volume.folder]:
            raise UserError(
                f"No class folder and no table says the class of {missing[0]}: give a table with "
                "--labels, or one class for all with --label."
            )
        return [volume.folder for volume in volumes]
    keys = [[*keys_of(volume.path), volume.patient] for volume in volumes]
    found, name = records_of(table, keys, path_column, label_column)
    if missing := [
        volume.path
        for volume, row in zip(volumes, found, strict=True)
        if row is None or not row[name]
    ]:
        raise UserError(
            f"{table} has no label of {len(missing)} of {len(volumes)} volumes, such as "
            f"{missing[0]}: add them, or leave these volumes out."
        )
    return [row[name] for row in found if row is not None]


# --- Parquet ------------------------------------------------------------------------------------


def from_parquet(base: Path, names: Sequence[str], folder: Path, out: Path) -> Manifest:
    """The images of parquet files as Hugging Face writes them: a column of image bytes, and one of
    labels, whose names stand in the file's metadata."""
    parquet = optional("pyarrow.parquet", "pyarrow")
    rows: list[Row] = []
    classes: list[str] = []
    for name in names:
        try:
            table = parquet.read_table(base / name)
        except Exception as error:  # noqa: BLE001  pyarrow raises many kinds on damaged files
            raise UserError(f"{base / name} cannot be read as parquet ({error}).") from error
        image, label, classes = _columns(table, base / name)
        split = next((SPLITS[word] for word in re.split(r"[^a-z]+", name) if word in SPLITS), "")
        stem = Path(name).with_suffix("").as_posix().replace("/", "_")
        for number, (picture, value) in enumerate(
            zip(table[image].to_pylist(), table[label].to_pylist(), strict=True)
        ):
            content = picture["bytes"] if isinstance(picture, dict) else picture
            path = folder / f"{stem}_{number:06d}{_ending(content, base / name, number)}"
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)
            relative = path.relative_to(out.parent).as_posix()
            named = classes[value] if classes else str(value)
            rows.append(Row(relative, named, split=split, name=relative))
    return manifest_from(out.parent, rows)


def _columns(table: Any, path: Path) -> tuple[str, str, list[str]]:
    """Names of the columns of images and of labels, and the labels' names ([]: they are names)."""
    columns = table.column_names
    image = next((name for name in columns if name in ("image", "img", "picture")), None)
    label = next((name for name in columns if name.lower() in LABEL_COLUMNS), None)
    if image is None or label is None:
        raise UserError(
            f"{path} has the columns {', '.join(columns)}: expected image (bytes) and label."
        )
    described = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    names = described.get("info", {}).get("features", {}).get(label, {}).get("names", [])
    if not names and not isinstance(table[label][0].as_py(), str):
        raise UserError(
            f"{path} has numbers as labels and does not name them: their order differs between "
            "sets, so add the names to its metadata, or save the labels as names."
        )
    return image, label, names


def _ending(content: object, path: Path, number: int) -> str:
    """The ending of an image file by its content."""
    try:
        with Image.open(io.BytesIO(content)) as image:  # type: ignore[arg-type]
            return f".{(image.format or 'png').lower()}"
    except Exception as error:  # noqa: BLE001  Pillow raises many kinds
        raise UserError(f"Row {number} of {path} holds no image ({error}).") from error
