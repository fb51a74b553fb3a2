"""What logits decide in each view, and which images and which model they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from utils.attacks.base import group_labels, group_logits
from utils.data import pixels
from utils.evaluation.plan import VIEWS
from utils.sampling import bit_reversed_order, classes_in_proportion
from utils.utils_funcs import UserError

# -- decisions -------------------------------------------------------------------------------------


def decisions(logits: np.ndarray, view: str = "four") -> np.ndarray:
    """The most probable group of a view, int64 (N,), from logits (N, 4)."""
    groups, tensor = VIEWS[view].groups, torch.as_tensor(logits).float()
    return (tensor if groups is None else group_logits(tensor, groups)).argmax(1).numpy()


def view_labels(labels: np.ndarray, view: str = "four") -> np.ndarray:
    """Labels (N,) as group numbers of a view."""
    groups = VIEWS[view].groups
    return labels if groups is None else group_labels(torch.as_tensor(labels), groups).numpy()


def misclassified(logits: np.ndarray, labels: np.ndarray, view: str = "four") -> np.ndarray:
    """Whether each image's answer is wrong in a view, bool (N,). False where its logits are NaN:
    the image is outside of the attack's declared set."""
    outside = np.isnan(logits).any(1)
    wrong = decisions(np.where(outside[:, None], 0, logits), view) != view_labels(labels, view)
    return wrong & ~outside


def worst_case(
    logits: Mapping[tuple[str, str], np.ndarray],
    labels: np.ndarray,
    eps_text: str,
    view: str = "four",
) -> np.ndarray:
    """Whether each image is robust against every attack at an eps, bool (N,).

    Args:
        logits: (eps as written, attack) → logits (N, 4), of attacks of one norm.
    """
    robust = np.ones(len(labels), bool)
    for (eps, _), attacked in logits.items():
        if eps == eps_text:
            robust &= ~misclassified(attacked, labels, view)
    return robust


def wrong_where_not_finite(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Logits, float32 (N, 4), in which an image whose logits are not finite gets an answer that is
    wrong in every view, since NaN is no right answer."""
    classes = logits.shape[1]
    wrong = np.full((len(labels), classes), -10.0, np.float32)
    wrong[np.arange(len(labels)), np.where(labels == 0, classes - 1, 0)] = 0
    finite = np.isfinite(logits).all(1)
    return np.where(finite[:, None], logits, wrong).astype(np.float32)


# -- images and models -----------------------------------------------------------------------------


def as_pixels(images: np.ndarray | Tensor) -> Tensor:
    """float32 (N, 1, H, W) in [0, 1] from uint8 of the same shape.

    Raises:
        UserError: another type or shape.
    """
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise UserError(
            "The evaluation takes uint8 images of shape (N, 1, H, W), "
            f"not {images.dtype} {tuple(images.shape)}."
        )
    return pixels(images)


def stratified_sample(labels: np.ndarray, patients: np.ndarray, size: int) -> np.ndarray:
    """Sorted indices of `size` images: the classes in proportion, each at least once, and within a
    class evenly over patients and then over each patient's slices.

    Without randomness: the same set of images gives the same sample.

    Args:
        labels, patients: of each image (N,), the images of a patient in the order of the slices.
    """
    if size >= len(labels):
        return np.arange(len(labels))
    # Of each patient one slice after the other, so that every prefix covers the patient's scan.
    turn = np.empty(len(labels))
    for label in np.unique(labels):
        for patient in np.unique(patients[labels == label]):
            slices = np.flatnonzero((labels == label) & (patients == patient))
            turn[slices[bit_reversed_order(len(slices))]] = np.arange(len(slices))
    order = np.lexsort((patients, turn))
    return np.sort(classes_in_proportion(labels, order)[:size])


def model_digest(model: nn.Module) -> str:
    """SHA-256 of a model's class and of all its weights and buffers."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
