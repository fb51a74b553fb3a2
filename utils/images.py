"""Images that stay on disk: a sequence of arrays that is longer than memory."""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import numpy as np

from utils.utils_funcs import UserError

#: Images (H, W), each of its own size: a list of them, or a sequence that reads or computes them.
Images = Sequence[np.ndarray]


class LazyImages(Sequence[np.ndarray]):
    """Images that are made when they are asked for; a slice of them asks for none."""

    @abstractmethod
    def read(self, row: int) -> np.ndarray:
        """The image of a row, counted from 0 or, if negative, from the end."""

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> Images: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | Images:
        if isinstance(index, slice):
            return chosen(self, range(*index.indices(len(self))))
        return self.read(index)


class StoredImages(LazyImages):
    """Images in one temporary file, which are appended one by one and read one by one.

    The file lies where the system keeps temporary files (`TMPDIR`) and is gone with the process.
    Images that are read are read-only.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this object
        self._places: list[tuple[int, tuple[int, ...], np.dtype[Any]]] = []
        self._end = 0

    def append(self, image: np.ndarray) -> None:
        """Adds an image at the end."""
        content = np.ascontiguousarray(image).tobytes()
        try:
            self._file.seek(self._end)
            self._file.write(content)
        except OSError as error:
            raise UserError(
                f"The images do not fit into {tempfile.gettempdir()} ({error.strerror}): name a "
                "folder with more room in the environment variable TMPDIR."
            ) from error
        self._places.append((self._end, image.shape, image.dtype))
        self._end += len(content)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, row: int) -> np.ndarray:
        """The image of a row."""
        start, shape, dtype = self._places[row]
        self._file.seek(start)
        content = self._file.read(int(np.prod(shape)) * dtype.itemsize)
        return np.frombuffer(content, dtype).reshape(shape)


class Computed(LazyImages):
    """Some images of a sequence, each passed through a function when it is asked for."""

    def __init__(
        self,
        images: Images,
        rows: Sequence[int],
        function: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self._images, self._rows, self._function = images, rows, function

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int) -> np.ndarray:
        """The image of a row, passed through the function."""
        image = self._images[self._rows[row]]
        return image if self._function is None else self._function(image)


def chosen(images: Images, rows: Iterable[int] | np.ndarray) -> Images:
    """The images of some rows, in their order, without reading any."""
    return Computed(images, [int(row) for row in rows])


def computed(images: Images, function: Callable[[np.ndarray], np.ndarray]) -> Images:
    """All images, each passed through a function when it is asked for."""
    return Computed(images, range(len(images)), function)
