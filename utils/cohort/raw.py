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
from PIL import Image

from utils.utils_funcs import CLASSES, ROOT, UserError, progress

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

#: Folder name, in lower case → split.
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}

#: Folder name, letters alone and in lower case → class: the names of the copies in circulation.
CLASS_NAMES = {
    "nondemented": 0,
    "noimpairment": 0,
    "verymilddemented": 1,
    "verymildimpairment": 1,
    "milddemented": 2,
    "mildimpairment": 2,
    "moderatedemented": 3,
    "moderateimpairment": 3,
}

#: Path of an image file inside its folder or archive, and the function that reads its bytes.
ImageFile = tuple[str, Callable[[], bytes]]


@dataclass(frozen=True)
class RawImages:
    """The readable image files of a data set, in sorted path order.

    Attributes:
        paths: below the folders that all files share.
        images: `uint8` (H, W), each at its native size.
        file_sha256: hex digests of the files' bytes.
        source_split: `train`, `test` or empty.
        label: (N,) indices into `classes`.
    """

    paths: list[str]
    images: list[np.ndarray]
    file_sha256: list[str]
    source_split: list[str]
    label: np.ndarray
    classes: tuple[str, ...] = CLASSES

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
    if local.is_dir() and any(path.suffix.lower() in IMAGE_SUFFIXES for path in local.rglob("*")):
        return local
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
    """Reads class folders, with or without `train/` and `test/` above them, from a folder or zip.

    Images of any mode and size become 8-bit grayscale (see `decode`).

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
        names = _without_outer_folders([name for name, _ in files])
        labels, classes = _labels_of(path, names, any_classes)
        kept, images, hashes = [], [], []
        unreadable: list[tuple[str, Exception]] = []
        for row, (_, read) in enumerate(progress(files, "reading images")):
            try:
                data = read()
                image = decode(data)
            except UNREADABLE as error:
                unreadable.append((names[row], error))
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
    paths = [names[row] for row in kept]
    return RawImages(paths, images, hashes, [_split_of(name) for name in paths], label, classes)


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
        for file in folder.rglob("*")
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
    """Bytes of an image file → `uint8` (H, W).

    16-bit images are scaled to 8 bits; Pillow's `convert("L")` would clip them at 255.
    """
    with Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith("I;16"):
            return (np.asarray(image) >> 8).astype(np.uint8)
        if image.mode in ("I", "F"):
            pixels = np.asarray(image, np.float64)
            return np.clip(pixels / (257 if pixels.max() > 255 else 1), 0, 255).astype(np.uint8)
        return np.asarray(image.convert("L"))


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


# -- what paths say --------------------------------------------------------------------------------


def _split_of(name: str) -> str:
    """The split that the folder above the class folder names; empty where it names none."""
    above = name.split("/")[-3:-2]
    return SPLITS.get(above[0].lower(), "") if above else ""


def _without_outer_folders(names: Sequence[str]) -> list[str]:
    """Drops the folders that all paths share above their class and split folders.

    So a wrapped archive, its unpacked folder and the folder inside give the same paths.
    """
    parents = []
    for name in names:
        folders = name.split("/")[:-1]
        keep = 2 if len(folders) >= 2 and folders[-2].lower() in SPLITS else 1
        parents.append(folders[: len(folders) - keep])
    shared = os.path.commonprefix(parents)
    return ["/".join(name.split("/")[len(shared) :]) for name in names]


def class_of_folder(folder: str) -> int | None:
    """The class, 0 to 3, that a folder's name means; None where it is none of the known names."""
    return CLASS_NAMES.get(re.sub(r"[^a-z]", "", folder.lower()))


def _labels_of(
    source: Path | str, names: Sequence[str], any_classes: bool
) -> tuple[list[int], tuple[str, ...]]:
    """The label of each path, and the classes that labels index."""
    folders = [(name.split("/")[-2] if "/" in name else "") for name in names]
    if any_classes:
        classes = tuple(sorted(set(folders)))
        return [classes.index(folder) for folder in folders], classes
    labels = []
    for name, folder in zip(names, folders, strict=True):
        label = class_of_folder(folder)
        if label is None:
            where = f"the unknown class folder {folder!r}" if "/" in name else "no class folder"
            raise UserError(
                f"{source} holds {name} in {where}: expected Non, Very Mild, Mild and Moderate "
                "Demented (or No … Impairment), in any case, with spaces, underscores or nothing "
                "between."
            )
        labels.append(label)
    return labels, CLASSES
