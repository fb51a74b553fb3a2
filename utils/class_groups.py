"""Which of the four classes a view merges into one. NumPy only: metrics need no PyTorch."""

from __future__ import annotations

import numpy as np

#: Numbers of the classes in each group; every class is in one group.
Groups = tuple[tuple[int, ...], ...]

#: Mild and Moderate merged (a clinical rating of 1 or more): the headline's three classes.
THREE: Groups = ((0,), (1,), (2, 3))

#: Non against the rest: what AUROC measures.
BINARY: Groups = ((0,), (1, 2, 3))


def group_of_class(groups: Groups) -> np.ndarray:
    """Number of the group that holds each class, `int64` (classes,)."""
    table = np.empty(sum(len(group) for group in groups), dtype=np.int64)
    for number, group in enumerate(groups):
        table[list(group)] = number
    return table
