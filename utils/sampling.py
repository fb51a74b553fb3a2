"""Which slices and patients a small sample takes, without any randomness."""

from __future__ import annotations

import numpy as np


def bit_reversed_order(count: int) -> np.ndarray:
    """The positions 0 … count − 1 in an order of which every prefix covers the whole range evenly.

    They are sorted by their binary digits read backwards, as in van der Corput's sequence: for
    count 8 the order is 0, 4, 2, 6, 1, 5, 3, 7.
    """
    digits = max(1, (count - 1).bit_length())
    backwards = [int(f"{position:0{digits}b}"[::-1], 2) for position in range(count)]
    return np.argsort(backwards)


def place_in_class(labels: np.ndarray, order: np.ndarray | None = None) -> np.ndarray:
    """How many rows of the same class come before each row, int (N,).

    Args:
        labels: (N,).
        order: all row numbers, the first to take first (None: as they are).
    """
    order = np.arange(len(labels)) if order is None else order
    place = np.empty(len(labels), int)
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        place[rows] = np.arange(len(rows))
    return place


def classes_in_turn(labels: np.ndarray, order: np.ndarray | None = None) -> np.ndarray:
    """All row numbers, the classes taking turns: every prefix holds equally many of each class,
    as long as a class has rows left.

    Args:
        labels, order: see `place_in_class`.
    """
    return np.lexsort((labels, place_in_class(labels, order)))


def classes_in_proportion(labels: np.ndarray, order: np.ndarray | None = None) -> np.ndarray:
    """All row numbers so that every prefix holds the classes in proportion to their sizes, after
    one row of each class.

    Args:
        labels, order: see `place_in_class`.
    """
    place = place_in_class(labels, order)
    size = np.zeros(len(labels))
    for label in np.unique(labels):
        size[labels == label] = (labels == label).sum()
    # The k-th row of a class of n belongs at (k + 1/2)/n of the whole.
    due = np.where(place == 0, -1.0, (place + 0.5) / size)
    return np.argsort(due, kind="stable")
