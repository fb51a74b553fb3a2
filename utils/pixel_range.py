"""What every model, attack and explanation takes: floating pixels in [0, 1]."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar

from torch import Tensor

_CHECKED: ContextVar[bool] = ContextVar("checked", default=True)


def pixel_fault(images: Tensor) -> str | None:
    """In a sentence, why images are not floating pixels in [0, 1]; None where they are, and inside
    `any_pixels`."""
    if not images.is_floating_point():
        return (
            f"images are {images.dtype}, expected floating pixels in [0, 1]: divide gray levels "
            "by 255"
        )
    if not images.numel() or not _CHECKED.get():
        return None
    low, high = (float(bound) for bound in images.detach().aminmax())
    if low >= 0 and high <= 1:
        return None
    if math.isnan(low) or math.isnan(high):
        return "images hold NaN, expected pixels in [0, 1]: leave those images out"
    return (
        f"images must lie in [0, 1] and reach from {low:.4g} to {high:.4g}: give raw pixels, gray "
        "levels divided by 255, before any normalization"
    )


@contextlib.contextmanager
def any_pixels() -> Iterator[None]:
    """Models take pixels outside [0, 1] meanwhile: for measures that impute pixels with noise."""
    token = _CHECKED.set(False)
    try:
        yield
    finally:
        _CHECKED.reset(token)
