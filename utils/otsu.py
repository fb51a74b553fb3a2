"""Thresholds that part an image into dark and bright, from its histogram alone."""

from __future__ import annotations

import numpy as np

BINS = 64


def otsu_thresholds(
    values: np.ndarray, count: int = 1, value_range: tuple[float, float] | None = None
) -> list[float]:
    """The one or two thresholds that maximize the variance between classes (Otsu 1979).

    Args:
        values: gray values of any shape.
        count: 1 or 2 thresholds.
        value_range: lowest and highest value of the histogram (None: those of `values`).

    Returns:
        `count` edges of the histogram's 64 bins, ascending; the lowest of several
        that are equally good.
    """
    counts, edges = np.histogram(values.astype(np.float64), bins=BINS, range=value_range)
    centers = (edges[:-1] + edges[1:]) / 2
    weight = np.concatenate([[0], np.cumsum(counts)])
    total = np.concatenate([[0], np.cumsum(counts * centers)])

    def between(low: np.ndarray | int, high: np.ndarray | int) -> np.ndarray:
        """The share of the variance between classes that the bins from `low` to `high` give."""
        return (total[high] - total[low]) ** 2 / np.maximum(weight[high] - weight[low], 1)

    if count == 2:
        first, second = np.triu_indices(BINS + 1)
    else:
        first, second = np.arange(BINS + 1), np.full(BINS + 1, BINS)
    best = (between(0, first) + between(first, second) + between(second, BINS)).argmax()
    return [float(edges[first[best]]), float(edges[second[best]])][:count]
