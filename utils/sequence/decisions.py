"""A patient's answer and label in a view: four classes, three, or Non against the rest."""

from __future__ import annotations

from torch import Tensor

from utils.attacks.base import group_labels, group_logits
from utils.evaluation.plan import VIEWS


def grouped_logits(logits: Tensor, view: str) -> Tensor:
    """Logits (B, groups of the view) from (B, 4)."""
    groups = VIEWS[view][0]
    return logits if groups is None else group_logits(logits, groups)


def scan_decisions(logits: Tensor, view: str) -> Tensor:
    """Answers (B,) in a view, as numbers of its groups, from logits (B, 4)."""
    return grouped_logits(logits, view).argmax(1)


def scan_labels(labels: Tensor, view: str) -> Tensor:
    """Labels (B,) as numbers of a view's groups."""
    groups = VIEWS[view][0]
    return labels if groups is None else group_labels(labels, groups)
