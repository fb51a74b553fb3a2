"""Image files of a folder or zip, safely opened, and their bytes as gray values of 8 bits."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from utils.images import Images, computed
from utils.utils_funcs import UserError, files_below

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
        if file.suffix.lower() in IMAGE_SUFFIXES
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


def eight_bits(images: Images, names: Sequence[str]) -> tuple[Images, str]:
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
    deep, low, high, floating = [], float("inf"), float("-inf"), False
    for row, image in enumerate(images):
        if image.dtype == np.uint8:
            continue
        deep.append(row)
        low, high = min(low, float(image.min())), max(high, float(image.max()))
        floating = floating or image.dtype.kind == "f"
    if not deep:
        return images, EIGHT_BITS
    if low < 0 or high > 65535 or floating and high > 255:
        start, end = low, high
    elif floating and high <= 1:
        start, end = 0.0, 1.0
    else:
        start, end = 0.0, next(full for full in (255.0, 4095.0, 65535.0) if high <= full)
    if len(deep) < len(images) and (start, end) not in {(0.0, 255.0), (0.0, 1.0), (0.0, 65535.0)}:
        other = min(set(range(len(images))) - set(deep))
        raise UserError(
            f"{names[deep[0]]} holds values from {low:g} to {high:g} and {names[other]} has 8 "
            "bits, so that no one rule gives both the same gray: convert all files to one depth."
        )
    if (start, end) == (0.0, 255.0):
        rule, factor = EIGHT_BITS, 1.0
    else:
        rule, factor = f"{start:g} to {end:g} scaled to 0 to 255", 255 / max(end - start, 1e-30)

    def scaled(image: np.ndarray) -> np.ndarray:
        if image.dtype == np.uint8:
            return image
        return np.rint((image.astype(np.float64) - start) * factor).astype(np.uint8)

    return computed(images, scaled), rule
