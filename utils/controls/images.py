"""Slices with what is known of them, as rows of pixels and as a few statistics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from utils import metrics
from utils.cohort.similarity import SEARCH_SIDE
from utils.utils_funcs import progress


@dataclass(frozen=True)
class Slices:
    """Images with what is known of them: `images` uint8 (N, H, W); `labels` (N,) in 0..3;
    `patients` and `positions` in the scan, both (N,) and -1 where unknown (synthetic images)."""

    images: np.ndarray
    labels: np.ndarray
    patients: np.ndarray
    positions: np.ndarray

    @classmethod
    def joined(cls, parts: Iterable[Slices]) -> Slices:
        """The slices of all parts, in this order."""
        parts = list(parts)
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, rows: np.ndarray) -> Slices:
        """Some of the slices, by their numbers."""
        return Slices(
            self.images[rows], self.labels[rows], self.patients[rows], self.positions[rows]
        )

    @property
    def three(self) -> np.ndarray:
        """Labels with Mild and Moderate merged."""
        return metrics.THREE[self.labels]


# -- pixels ----------------------------------------------------------------------------------------


def shrunk(image: np.ndarray, side: int) -> np.ndarray:
    """A uint8 image (H, W) at (side, side), by block means rounded to uint8."""
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX))


def as_rows(images: Iterable[np.ndarray], side: int | None = None) -> np.ndarray:
    """uint8 images (H, W) as float32 rows (N, H·W) in [-0.5, 0.5].

    Args:
        side: that images are shrunk to; None leaves them as they are, but takes `SEARCH_SIDE` where
            their sizes differ.
    """
    if side is None:
        images = list(images)
        side = SEARCH_SIDE if len({image.shape for image in images}) > 1 else None
    if side is not None:
        images = [shrunk(image, side) for image in images]
    return np.stack([image.ravel() for image in images]).astype(np.float32) / 255 - 0.5


def block_means(images: np.ndarray, side: int) -> np.ndarray:
    """Means over blocks of pixels, not rounded: uint8 (N, H, W) → float32 (N, side·side) in
    [0, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(images))[:, None]
    parts = [
        F.adaptive_avg_pool2d(part.float() / 255, side).flatten(1) for part in pixels.split(1024)
    ]
    return torch.cat(parts).numpy()


def nearest_rows(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Row of the gallery (M, D) with the least Euclidean distance to each query (N, D), (N,)."""
    length = (gallery**2).sum(1) / 2
    found = np.empty(len(queries), np.int64)
    for start in progress(range(0, len(queries), 512), "nearest neighbors"):
        found[start : start + 512] = (queries[start : start + 512] @ gallery.T - length).argmax(1)
    return found


# -- statistics that see atrophy -------------------------------------------------------------------


def intensity_statistics(images: np.ndarray) -> np.ndarray:
    """Five numbers a slice, float64 (N, 5), of uint8 images (N, H, W): the shares of dark pixels
    inside the head (below a quarter and below half of its 95th percentile), mean, standard
    deviation, and the head's share of the image.

    Fluid is dark on T1: where brain has been lost, ventricles and sulci are wide.
    """
    from scipy import ndimage

    found = np.zeros((len(images), 5))
    for row, image in enumerate(images):
        head = ndimage.binary_fill_holes(image > 0)
        if not head.any():
            continue
        inside = image[head].astype(np.float64)
        bright = np.percentile(inside, 95)
        found[row] = (
            (inside < 0.25 * bright).mean(),
            (inside < 0.5 * bright).mean(),
            inside.mean() / 255,
            inside.std() / 255,
            head.mean(),
        )
    return found


def along_the_scan(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Each value (N, D) times 1, its relative position in the scan and that squared: (N, 3·D), so
    that the weights of a linear model can vary along the scan."""
    place = 2 * positions / max(positions.max(), 1) - 1
    basis = np.stack([np.ones_like(place), place, place**2], axis=1)
    return (values[:, :, None] * basis[:, None]).reshape(len(values), -1)


def standardized(values: np.ndarray, positions: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Values (N, D) with mean 0 and deviation 1 at each position, by the rows `reference`.

    Where fewer than two rows of the reference are at a position, all of them are taken.
    """
    result = np.empty_like(values, dtype=np.float64)
    for position in np.unique(positions):
        at_position = reference[positions[reference] == position]
        basis = values[at_position if len(at_position) > 1 else reference]
        here = positions == position
        result[here] = (values[here] - basis.mean(0)) / (basis.std(0) + 1e-6)
    return result


def scan_statistics(slices: Slices, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`intensity_statistics` of whole ordered scans, resampled to `length` slices.

    Returns:
        (patients (P,), labels (P,), statistics (P, length·5)).
    """
    statistics = intensity_statistics(slices.images)
    patients = np.unique(slices.patients)
    labels, scans = np.empty(len(patients), np.int64), []
    grid = np.linspace(0, 1, length)
    for row, patient in enumerate(patients):
        scan = np.flatnonzero(slices.patients == patient)
        scan = scan[np.argsort(slices.positions[scan])]
        place = np.linspace(0, 1, len(scan))
        resampled = [np.interp(grid, place, column) for column in statistics[scan].T]
        scans.append(np.stack(resampled, axis=1).ravel())
        labels[row] = np.bincount(slices.labels[scan]).argmax()
    return patients, labels, np.stack(scans)
