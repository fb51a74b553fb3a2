"""A folder, a zip or a manifest → grayscale images, with labels, splits and hashes."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.images import Images, StoredImages
from utils.manifest.files import (
    EIGHT_BITS,
    IMAGE_SUFFIXES,
    UNREADABLE,
    decode,
    eight_bits,
)
from utils.manifest.layout import class_of_folder
from utils.manifest.sources import manifest_of
from utils.manifest.table import Manifest, open_rows
from utils.utils_funcs import CLASSES, ROOT, UserError, files_below, progress

KAGGLE_DATASET = "lukechugh/best-alzheimer-mri-dataset-99-accuracy"

#: Seconds that Kaggle gets to answer before the phantom cohort takes its place.
DOWNLOAD_TIMEOUT = 5


@dataclass(frozen=True)
class RawImages:
    """The readable image files of a data set, in sorted path order.

    Attributes:
        paths: below the folders that all files share.
        images: `uint8` (H, W), each at its native size; read from disk when they are asked for.
        file_sha256: hex digests of the files' bytes.
        source_split: `train`, `validation`, `test` or empty.
        label: (N,) indices into `classes`.
        intensity: the rule by which the files' values became 8 bits, the same for all of them.
        patient, session, slice_index: what a manifest, or a folder a subject, says of each image;
            empty where nothing does.
    """

    paths: list[str]
    images: Images
    file_sha256: list[str]
    source_split: list[str]
    label: np.ndarray
    classes: tuple[str, ...] = CLASSES
    intensity: str = EIGHT_BITS
    patient: list[str] = field(default_factory=list)
    session: list[str] = field(default_factory=list)
    slice_index: list[int | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.paths)


# -- where the data are ----------------------------------------------------------------------------


def find_raw(explicit: Path | str | None = None) -> Path | None:
    """The raw data: the given path, else `ALZHEIMER_RAW`, `dataset/raw_dataset/`, or a download.

    `ALZHEIMER_OFFLINE=1` forbids the download from Kaggle.

    Returns:
        None where there is nothing; the caller then takes the phantom cohort and says so.

    Raises:
        UserError: a path that was named does not exist.
    """
    for source, named in (
        ("the path given", explicit),
        ("ALZHEIMER_RAW", os.environ.get("ALZHEIMER_RAW")),
    ):
        if named:
            if not Path(named).exists():
                raise UserError(
                    f"There is nothing at {named} ({source}): "
                    "name the folder or zip of the raw images."
                )
            return Path(named)
    local = ROOT / "dataset" / "raw_dataset"
    suffixes = [path.suffix.lower() for path in files_below(local)] if local.is_dir() else []
    if IMAGE_SUFFIXES & set(suffixes):
        return local
    if archives := sorted(local.glob("*.[zZ][iI][pP]")):
        if len(archives) > 1:
            raise UserError(
                f"{local} holds {len(archives)} archives ({archives[0].name}, {archives[1].name}, "
                "…): leave one of them there, or name one with --raw."
            )
        return archives[0]
    return None if os.environ.get("ALZHEIMER_OFFLINE") == "1" else _download()


def _download() -> Path | None:
    """The data set from Kaggle; None where it cannot be had.

    Kaggle is first asked with a short time-out: its client would wait for minutes.
    """
    import urllib.request

    try:
        request = urllib.request.Request(
            "https://www.kaggle.com", method="HEAD", headers={"User-Agent": "Mozilla/5.0"}
        )
        urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT).close()
        import kagglehub

        return Path(kagglehub.dataset_download(KAGGLE_DATASET))
    # Whatever Kaggle's client raises means the same: no data from there.
    except Exception as error:
        print(f"No download from Kaggle ({type(error).__name__}).", file=sys.stderr)
        return None


# -- reading ---------------------------------------------------------------------------------------


def read_raw(
    path: Path | str, *, skip_unreadable: bool = False, any_classes: bool = False
) -> RawImages:
    """Reads class folders, with or without `train/`, `val/` and `test/`, from a folder or zip, or
    the images that a manifest names.

    Images of any mode and size become 8-bit grayscale (see `decode` and `eight_bits`).

    Args:
        skip_unreadable: leave out images that cannot be read and name them on standard error.
        any_classes: take any folder names as classes, in sorted order, instead of the four.

    Raises:
        UserError: no such path; neither folder nor zip; no image in it; a damaged archive, or one
            with files outside its folder; an unknown class folder; a class without images; an
            unreadable image.
    """
    manifest = manifest_of(Path(path))
    labels, classes = _labels_of(path, manifest, any_classes)
    kept, hashes, decoded = [], [], StoredImages()
    unreadable: list[tuple[str, Exception]] = []
    with open_rows(manifest) as readers:
        for row, read in enumerate(progress(readers, "reading images")):
            try:
                data = read()
                image = decode(data)
            except UNREADABLE as error:
                unreadable.append((manifest.rows[row].name, error))
                continue
            kept.append(row)
            decoded.append(image)
            hashes.append(hashlib.sha256(data).hexdigest())
    _report_unreadable(unreadable, skip_unreadable)
    label = np.array([labels[row] for row in kept], np.int64)
    missing = [name for k, name in enumerate(classes) if k not in label]
    if missing:
        raise UserError(
            f"{path} holds no readable image of the class {' and '.join(missing)}: "
            "expected all of " + ", ".join(classes) + "; is it unpacked completely?"
        )
    rows = [manifest.rows[row] for row in kept]
    paths = [row.name for row in rows]
    images, intensity = eight_bits(decoded, paths)
    return RawImages(
        paths,
        images,
        hashes,
        [row.split for row in rows],
        label,
        classes,
        manifest.intensity or intensity,
        patient=[row.patient_id for row in rows],
        session=[row.session for row in rows],
        slice_index=[row.slice_index for row in rows],
    )


def _report_unreadable(unreadable: list[tuple[str, Exception]], skip: bool) -> None:
    """Names the unreadable files on standard error, or refuses them."""
    if unreadable and not skip:
        name, error = unreadable[0]
        others = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
        raise UserError(
            f"{name}{others} cannot be read as an image ({error}): replace it, or go on without "
            "it with --skip-unreadable (skip_unreadable=True)."
        )
    for name, error in unreadable:
        print(f"Left out {name}: {error}", file=sys.stderr)


# -- classes ---------------------------------------------------------------------------------------


def _labels_of(
    source: Path | str, manifest: Manifest, any_classes: bool
) -> tuple[list[int], tuple[str, ...]]:
    """The label of each image, and the classes that labels index."""
    if any_classes:
        number = {name: label for label, name in enumerate(manifest.classes)}
        return [number[row.label] for row in manifest.rows], manifest.classes
    labels = []
    for row in manifest.rows:
        label = class_of_folder(row.label)
        if label is None:
            unknown = f"the unknown class folder {row.label!r}"
            raise UserError(
                f"{source} holds {row.name} in {unknown if row.label else 'no class folder'}: "
                "expected Non, Very Mild, Mild and Moderate Demented (or No … Impairment), in any "
                "case, with spaces, underscores or nothing between."
            )
        labels.append(label)
    return labels, CLASSES
