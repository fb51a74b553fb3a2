"""Class folders, or a zip of them → grayscale images in memory, with labels, splits and hashes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import re
import stat
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from utils.cohort.layout import Place, class_of_folder, places_of
from utils.utils_funcs import CLASSES, ROOT, UserError, files_below, progress

KAGGLE_DATASET = "lukechugh/best-alzheimer-mri-dataset-99-accuracy"

#: Seconds that Kaggle gets to answer before the phantom cohort takes its place.
DOWNLOAD_TIMEOUT = 5

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".gif", ".webp"))

#: What Pillow and the archive raise on damaged bytes.
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    RuntimeError,
    Image.DecompressionBombError,
    zipfile.BadZipFile,
    zlib.error,
)

#: Bytes above which a file in an archive is no image of a slice.
LARGEST_FILE = 64 << 20
#: The rule of a set whose files have 8 bits.
EIGHT_BITS = "8 bits, as they are"

#: Path of an image file inside its folder or archive, and the function that reads its bytes.
ImageFile = tuple[str, Callable[[], bytes]]


@dataclass(frozen=True)
class RawImages:
    """The readable image files of a data set, in sorted path order.

    Attributes:
        paths: below the folders that all files share.
        images: `uint8` (H, W), each at its native size.
        file_sha256: hex digests of the files' bytes.
        source_split: `train`, `validation`, `test` or empty.
        label: (N,) indices into `classes`.
        intensity: the rule by which the files' values became 8 bits, the same for all of them.
    """

    paths: list[str]
    images: list[np.ndarray]
    file_sha256: list[str]
    source_split: list[str]
    label: np.ndarray
    classes: tuple[str, ...] = CLASSES
    intensity: str = EIGHT_BITS

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
    """Reads class folders, with or without `train/`, `val/` and `test/`, from a folder or zip.

    Images of any mode and size become 8-bit grayscale (see `decode` and `eight_bits`).

    Args:
        skip_unreadable: leave out images that cannot be read and name them on standard error.
        any_classes: take any folder names as classes, in sorted order, instead of the four.

    Raises:
        UserError: no such path; neither folder nor zip; no image in it; a damaged archive, or one
            with files outside its folder; an unknown class folder; a class without images; an
            unreadable image.
    """
    with open_images(Path(path), "the raw images") as files:
        if not files:
            raise UserError(
                f"{path} holds no image: expected class folders such as train/Non_Demented/*.jpg."
            )
        places = places_of([name for name, _ in files])
        labels, classes = _labels_of(path, places, any_classes)
        kept, images, hashes = [], [], []
        unreadable: list[tuple[str, Exception]] = []
        for row, (_, read) in enumerate(progress(files, "reading images")):
            try:
                data = read()
                image = decode(data)
            except UNREADABLE as error:
                unreadable.append((places[row].path, error))
                continue
            kept.append(row)
            images.append(image)
            hashes.append(hashlib.sha256(data).hexdigest())
    _report_unreadable(unreadable, skip_unreadable)
    label = np.array([labels[row] for row in kept], np.int64)
    missing = [name for k, name in enumerate(classes) if k not in label]
    if missing:
        raise UserError(
            f"{path} holds no readable image of the class {' and '.join(missing)}: "
            "expected all of " + ", ".join(classes) + "; is it unpacked completely?"
        )
    paths = [places[row].path for row in kept]
    images, intensity = eight_bits(images, paths)
    splits = [places[row].split for row in kept]
    return RawImages(paths, images, hashes, splits, label, classes, intensity)


@contextlib.contextmanager
def open_images(path: Path, what: str) -> Iterator[list[ImageFile]]:
    """The image files of a folder or zip by name, without hidden ones; readable inside the `with`.

    Args:
        what: what the path should hold, for the message where there is nothing.

    Raises:
        UserError: no such path; a damaged archive, or one with files outside its folder.
    """
    if not path.exists():
        raise UserError(f"There is nothing at {path}: name the folder or zip of {what}.")
    if path.is_dir():
        yield _visible(_folder_files(path))
        return
    if path.suffix.lower() != ".zip" and not zipfile.is_zipfile(path):
        raise UserError(
            f"{path} is neither a folder nor a zip archive: name the folder or zip of {what}, and "
            "unpack archives of other kinds first."
        )
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{path} is no complete zip archive ({error}): download it again."
        ) from error
    with archive:
        yield _visible(_zip_files(archive, path))


def _folder_files(folder: Path) -> list[ImageFile]:
    return [
        (file.relative_to(folder).as_posix(), file.read_bytes)
        for file in files_below(folder)
        if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
    ]


def _zip_files(archive: zipfile.ZipFile, path: Path) -> list[ImageFile]:
    files: list[ImageFile] = []
    for info in archive.infolist():
        name = info.filename.replace("\\", "/")
        if (
            name.startswith("/")
            or re.match(r"[A-Za-z]:", name)
            or ".." in name.split("/")
            or stat.S_ISLNK(info.external_attr >> 16)
        ):
            raise UserError(
                f"{path} holds an entry that points outside its folder ({info.filename}): "
                "do not trust this archive, get it from its source."
            )
        if not info.is_dir() and PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
            if info.file_size > LARGEST_FILE:
                raise UserError(
                    f"{path} holds {name}, which unpacks to {info.file_size / 1e6:,.0f} MB, more "
                    f"than any image of a slice has ({LARGEST_FILE / 1e6:.0f} MB): do not trust "
                    "this archive, get it from its source."
                )
            files.append((name, functools.partial(archive.read, info)))
    return files


def _visible(files: list[ImageFile]) -> list[ImageFile]:
    """The files without hidden ones and those that macOS adds to its archives, sorted by name."""
    visible = [
        (name, read)
        for name, read in files
        if not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    ]
    return sorted(visible, key=lambda file: file[0])


def decode(data: bytes) -> np.ndarray:
    """Bytes of an image file → gray values (H, W) as they are stored: `uint8`, or `uint16`,
    `int32` or `float32` where the file has more than 8 bits. A photograph's EXIF rotation is
    applied.

    Raises:
        ValueError: several pages, or values that are no numbers.
    """
    with Image.open(io.BytesIO(data)) as image:
        if (pages := getattr(image, "n_frames", 1)) > 1:
            raise ValueError(f"it holds {pages} pages, expected one image a file")
        turned = ImageOps.exif_transpose(image)
        if turned.mode.startswith("I;16"):
            return np.asarray(turned).astype(np.uint16)
        if turned.mode in ("I", "F"):
            values = np.asarray(turned)
            if not np.isfinite(values).all():
                raise ValueError("it holds values that are no numbers (NaN or infinite)")
            return values
        return np.asarray(turned.convert("L"))


def eight_bits(images: Sequence[np.ndarray], names: Sequence[str]) -> tuple[list[np.ndarray], str]:
    """The images as `uint8`, by one rule for the whole set, and that rule in words.

    Values of up to 8 bits stay as they are. More bits, and floats from 0 to 1, are scaled by their
    full range; where no full range is known (negative values, floats above 255) by the set's
    smallest and largest value.

    Args:
        images: as `decode` returns them.
        names: of their files, for the message.

    Raises:
        UserError: some files have 8 bits, and the others another range than 8 or 16 full bits.
    """
    deep = [image for image in images if image.dtype != np.uint8]
    if not deep:
        return list(images), EIGHT_BITS
    low, high = min(float(image.min()) for image in deep), max(float(image.max()) for image in deep)
    floating = any(image.dtype.kind == "f" for image in deep)
    if low < 0 or high > 65535 or floating and high > 255:
        start, end = low, high
    elif floating and high <= 1:
        start, end = 0.0, 1.0
    else:
        start, end = 0.0, next(full for full in (255.0, 4095.0, 65535.0) if high <= full)
    if len(deep) < len(images) and (start, end) not in {(0.0, 255.0), (0.0, 1.0), (0.0, 65535.0)}:
        rows = [row for row, image in enumerate(images) if image.dtype != np.uint8]
        other = next(row for row, image in enumerate(images) if image.dtype == np.uint8)
        raise UserError(
            f"{names[rows[0]]} holds values from {low:g} to {high:g} and {names[other]} has 8 "
            "bits, so that no one rule gives both the same gray: convert all files to one depth."
        )
    if (start, end) == (0.0, 255.0):
        rule, factor = EIGHT_BITS, 1.0
    else:
        rule, factor = f"{start:g} to {end:g} scaled to 0 to 255", 255 / max(end - start, 1e-30)
    scaled = [
        image
        if image.dtype == np.uint8
        else np.rint((image.astype(np.float64) - start) * factor).astype(np.uint8)
        for image in images
    ]
    return scaled, rule


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
    source: Path | str, places: Sequence[Place], any_classes: bool
) -> tuple[list[int], tuple[str, ...]]:
    """The label of each image, and the classes that labels index."""
    if any_classes:
        classes = tuple(sorted({place.folder for place in places}))
        return [classes.index(place.folder) for place in places], classes
    labels = []
    for place in places:
        label = class_of_folder(place.folder)
        if label is None:
            where = (
                f"the unknown class folder {place.folder!r}" if place.folder else "no class folder"
            )
            raise UserError(
                f"{source} holds {place.path} in {where}: expected Non, Very Mild, Mild and "
                "Moderate Demented (or No … Impairment), in any case, with spaces, underscores or "
                "nothing between."
            )
        labels.append(label)
    return labels, CLASSES
