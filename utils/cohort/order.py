"""The slices of one patient → their order along the body axis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from utils.cohort.similarity import SEARCH_SIDE, features
from utils.images import chosen

#: No scanner makes longer stacks: a longer group is no stack, and its order not worth improving.
LONGEST_STACK = 600


def members_of(patient: np.ndarray) -> list[np.ndarray]:
    """Indices of each patient's images, by patient id; images of -1 are left out."""
    order = np.argsort(patient, kind="stable")
    order = order[patient[order] >= 0]
    return np.split(order, np.flatnonzero(np.diff(patient[order])) + 1) if len(order) else []


# -- order of one stack ----------------------------------------------------------------------------


def order_stack(matrix: np.ndarray) -> np.ndarray:
    """Indices (M,) of a patient's slices along the body axis, from either end.

    Spectral seriation (Atkins, Boman & Hendrickson 1998): the second eigenvector of the Laplacian
    of a similarity that fades with the distance along a line runs monotonically along the line.
    Raising the similarity to a power keeps it local.

    Args:
        matrix: (M, M) correlations of the slices.
    """
    if len(matrix) < 3:
        return np.arange(len(matrix))
    similarity = np.clip(matrix, 0, 1) ** 8
    degree = similarity.sum(1)
    laplacian = np.eye(len(matrix)) - similarity / np.sqrt(np.outer(degree, degree))
    _, vectors = np.linalg.eigh(laplacian)
    order = np.argsort(vectors[:, 1] / np.sqrt(degree), kind="stable")
    return _shorten(order, matrix) if len(order) <= LONGEST_STACK else order


def _shorten(order: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Reverses runs of slices while that makes neighbors more alike (2-opt, Croes 1958)."""
    distance, last, improved = 1 - matrix, len(order) - 1, True
    while improved:
        improved = False
        for a in range(last):
            for b in range(a + 1, last + 1):
                if a == 0 and b == last:
                    continue  # the whole stack reversed is the same order
                now = reversed_ = 0.0
                if a > 0:
                    now += distance[order[a - 1], order[a]]
                    reversed_ += distance[order[a - 1], order[b]]
                if b < last:
                    now += distance[order[b], order[b + 1]]
                    reversed_ += distance[order[a], order[b + 1]]
                if reversed_ < now - 1e-9:
                    order = np.concatenate([order[:a], order[a : b + 1][::-1], order[b + 1 :]])
                    improved = True
    return order


# -- one direction for all stacks ------------------------------------------------------------------


def head_area(images: Sequence[np.ndarray]) -> np.ndarray:
    """The cross-section of the head, as a share of each image (N,): what is brighter than a tenth
    of the image's brightest pixel."""
    return np.array([(image > 0.1 * image.max()).mean() for image in images])


def align_ends(
    stacks: Sequence[np.ndarray], areas: Sequence[np.ndarray], bins: int = 16
) -> list[bool]:
    """Which stacks to reverse so that all run the same way, from the smaller cross-section of the
    head down.

    The cross-section alone mistakes patients whose slices change little. It makes the first guess,
    from which a consensus stack is computed; each slice then votes for the place in the consensus
    that it is most similar to, and so on until no stack changes its direction.

    Args:
        stacks: each patient's `float32` (M, D) unit features, in order.
        areas: each patient's head areas (M,), in the same order.
        bins: places of the consensus stack.
    """
    reverse = [_slope(area) < 0 for area in areas]
    for _ in range(10):
        consensus = np.zeros((bins, stacks[0].shape[1]))
        for stack, turn in zip(stacks, reverse, strict=True):
            place = np.arange(len(stack)) * bins // len(stack)
            np.add.at(consensus, place, stack[::-1] if turn else stack)
        consensus /= np.maximum(np.linalg.norm(consensus, axis=1, keepdims=True), 1e-9)
        votes = [(stack @ consensus.T).argmax(1) for stack in stacks]
        before = reverse
        reverse = [
            bool(np.cov(np.arange(len(vote)), vote)[0, 1] < 0) if vote.std() else turn
            for vote, turn in zip(votes, before, strict=True)
        ]
        if reverse == before:
            break
    slopes = [
        _slope(area[::-1] if turn else area) for area, turn in zip(areas, reverse, strict=True)
    ]
    return [not turn for turn in reverse] if sum(slopes) < 0 else reverse


def _slope(values: np.ndarray) -> float:
    """Slope of the line fitted to values along a stack, from one end (0) to the other (1)."""
    if len(values) < 2:
        return 0.0
    return float(np.polyfit(np.linspace(0, 1, len(values)), values, 1)[0])


def slice_indices(
    images: Sequence[np.ndarray], patient: np.ndarray, matrices: Sequence[np.ndarray]
) -> np.ndarray:
    """Position (N,) of each image in its patient's stack, 0 the most superior; -1 for images of no
    patient.

    Args:
        patient: (N,) patient of each image, from 0; -1 for none.
        matrices: each patient's correlations (M, M).
    """
    index = np.full(len(patient), -1)
    orders = [
        members[order_stack(matrix)]
        for members, matrix in zip(members_of(patient), matrices, strict=True)
    ]
    ordered = [chosen(images, order) for order in orders]
    # Blurs this wide keep the shapes that all heads have in common, by which stacks are aligned.
    stacks = [features(stack, SEARCH_SIDE, narrow=4.0, wide=24.0) for stack in ordered]
    areas = [head_area(stack) for stack in ordered]
    for order, turn in zip(orders, align_ends(stacks, areas), strict=True):
        index[order[::-1] if turn else order] = np.arange(len(order))
    return index
