"""A patient's slices in body order, as one row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.utils_funcs import UserError


@dataclass(frozen=True)
class Scans:
    """Scans of P patients with up to S slices each, from the most superior slice downwards."""

    values: Tensor
    """(P, S, …), features or uint8 images; 0 where there is no slice."""
    mask: Tensor
    """bool (P, S), True where a slice exists."""
    labels: Tensor
    """(P,)"""
    patients: Tensor
    """(P,), patient ids."""

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, rows: np.ndarray | Tensor | Sequence[int]) -> Scans:
        """The scans of these rows, in their order."""
        rows = torch.as_tensor(rows)
        return Scans(self.values[rows], self.mask[rows], self.labels[rows], self.patients[rows])


def gather_scans(values: Tensor, labels: Tensor, patients: Tensor, slices: Tensor) -> Scans:
    """One scan a patient, from slices in any order.

    Args:
        values: (N, …) of each slice; labels, patients: (N,); slices: (N,), the position along the
            body axis.

    Raises:
        UserError: a slice without a patient; a patient with two labels, or without slice order (a
            negative or doubled position).
    """
    if bool((patients < 0).any()):
        raise UserError(
            f"{int((patients < 0).sum())} slices belong to no known patient: a scan is made of "
            "real slices only."
        )
    identity = patients.unique()
    rows_of = []
    for patient in identity:
        rows = (patients == patient).nonzero().squeeze(1)
        rows_of.append(rows[slices[rows].argsort()])
    for patient, rows in zip(identity.tolist(), rows_of, strict=True):
        order = slices[rows]
        if bool((order < 0).any()) or len(order.unique()) < len(order):
            raise UserError(
                f"Patient {patient} has no slice order (an index is missing or doubled): recover "
                "it with `python -m utils.cohort`, or score this patient slice by slice."
            )
        if len(labels[rows].unique()) > 1:
            raise UserError(
                f"Patient {patient} has slices of {len(labels[rows].unique())} classes: a scan has "
                "one label."
            )
    longest = max(map(len, rows_of))
    gathered = values.new_zeros((len(identity), longest, *values.shape[1:]))
    mask = torch.zeros(len(identity), longest, dtype=torch.bool)
    for row, rows in enumerate(rows_of):
        gathered[row, : len(rows)], mask[row, : len(rows)] = values[rows], True
    return Scans(gathered, mask, torch.stack([labels[rows[0]] for rows in rows_of]), identity)
