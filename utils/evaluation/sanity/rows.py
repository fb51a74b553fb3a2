"""What the checks have in common: the row that each returns, and when two answers are the same."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from utils.evaluation.predictions import misclassified
from utils.evaluation.suite_run import SuiteRun

#: Largest difference between two predictions of the same images that still counts as the same.
SAME_LOGITS = 1e-4

#: Accuracy differences up to this share, or one image, are chance.
CHANCE = 0.005

#: Images in a batch where a check predicts the sample.
BATCH = 64


def sanity_row(check: str, passed: bool, figure: object, note: str) -> dict:
    """One row of the sanity table; `figure` is JSON."""
    return {"check": check, "passed": bool(passed), "figure": figure, "note": note}


def three_digits(value: float) -> float | str:
    """A number of three digits for a `figure`, which cannot be infinite in JSON."""
    return float(f"{value:.3g}") if np.isfinite(value) else "infinite"


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of two sets of logits, in units of their scale where that is above 1."""
    if not (a.isfinite().all() and b.isfinite().all()):
        return 0.0 if torch.equal(a.isfinite(), b.isfinite()) else float("inf")
    return float((a - b).abs().max() / a.abs().max().clamp_min(1.0))


def sampled_images(run: SuiteRun) -> tuple[Tensor, Tensor]:
    """Images and labels of the sample, on the model's device."""
    labels = torch.as_tensor(run.labels[run.sample])
    return run.pixels[run.sample].to(run.device), labels.to(run.device)


def robust_share(logits: np.ndarray, labels: np.ndarray) -> float:
    """The share of images (N,) that are classified right, four classes, from logits (N, 4)."""
    return float((~misclassified(logits, labels)).mean())


def chance(labels: np.ndarray) -> float:
    """The largest difference of two accuracies that counts as chance."""
    return max(CHANCE, 1 / len(labels)) + 1e-9
