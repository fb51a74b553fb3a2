"""Groups of images that are patients; what a generator made is left out.

A real image is one that joins a patient. Generated images resemble the patients that they were
learned from closely enough to fill the gap between patients. So patients are first sought among the
images with the set's usual background, which generators seldom reproduce; then every other image is
tested, and it joins a patient where it is a slice of that patient's stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.cohort.linking import (
    LEAST_SLICES,
    NEIGHBORS,
    exact_groups,
    find_gap,
    groups_above,
    middle,
    strongest_tree,
    tree_within,
)
from utils.cohort.order import LONGEST_STACK, order_stack
from utils.cohort.similarity import features, full_side, nearest, usual_background
from utils.images import chosen
from utils.utils_funcs import UserError


class NoPatientsError(UserError):
    """The images show no patients that can be told apart.

    Attributes:
        links: correlations of the tree that joins all images, strongest first, where measured.
    """

    def __init__(self, message: str, links: np.ndarray | None = None) -> None:
        super().__init__(message)
        self.links = links


@dataclass(frozen=True)
class Patients:
    """Distinct images grouped into patients, as measured at `SEARCH_SIDE`.

    Attributes:
        patient: (N,) numbered by first appearance, -1 for images of no patient.
        gap: strongest link between two patients, and weakest link that joins a slice to its
            patient.
        links: correlations, strongest first, of the tree that joins the images among which the gap
            was sought.
        unusual: how many images of patients have an unusual background.
        rivals: (R, 2) pairs of images that come nearest to joining two patients, -1 for no partner.
    """

    patient: np.ndarray
    gap: tuple[float, float]
    links: np.ndarray
    unusual: int
    rivals: np.ndarray


def find_patients(vectors: np.ndarray, levels: np.ndarray) -> Patients:
    """Groups images into patients and leaves synthetic images out.

    The gap between patients is sought among the images with the set's usual background, and where
    that shows none, among all images.

    Args:
        vectors: `float32` (N, D), unit rows of distinct images.
        levels: (N,) gray levels of the backgrounds.

    Raises:
        NoPatientsError: there is no gap.
    """
    usual = usual_background(levels)
    rows = np.flatnonzero(usual)
    tree = strongest_tree(vectors[rows])
    gap = find_gap(tree, len(rows), ~usual[rows])
    if gap is None and not usual.all():
        rows = np.arange(len(vectors))
        tree = strongest_tree(vectors)
        gap = find_gap(tree, len(vectors), ~usual)
    if gap is None:
        raise NoPatientsError(
            f"No gap separates patients in these {len(vectors)} images: their links thin out "
            "evenly, so patients cannot be told apart from the pixels; expected several "
            "neighboring slices of each of several patients, without augmented copies (turned, "
            "shifted or noisy ones fill the gap: leave them out), or patient ids in a manifest.",
            tree[:, 2],
        )
    group = np.full(len(vectors), -1)
    group[rows], rivals = exact_groups(vectors[rows], tree, middle(gap))
    group = _without_small_groups(_without_side_branches(vectors, group, ~usual))
    patient = _numbered_by_first_appearance(_with_other_images(vectors, group, gap))
    unusual = int(((patient >= 0) & ~usual).sum())
    return Patients(patient, gap, tree[:, 2], unusual, rows[rivals])


def _without_small_groups(group: np.ndarray) -> np.ndarray:
    """-1 for the members of groups with fewer than `LEAST_SLICES` images."""
    sizes = np.bincount(group[group >= 0], minlength=group.max(initial=-1) + 1)
    return np.where((group >= 0) & (sizes[group] >= LEAST_SLICES), group, -1)


def _numbered_by_first_appearance(group: np.ndarray) -> np.ndarray:
    """Groups numbered 0, 1, … in the order in which they first appear; -1 stays."""
    names, first, inverse = np.unique(group, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(np.where(names < 0, -1, first))) - int((names < 0).any())
    return rank[inverse]


# -- images of no patient yet ----------------------------------------------------------------------


def _with_other_images(
    vectors: np.ndarray, group: np.ndarray, gap: tuple[float, float]
) -> np.ndarray:
    """Adds ungrouped images to patients, or forms patients of them, and keeps the gap empty.

    An image joins as firmly as the weakest slice that is known to be real does. Images that are
    blended from several patients break one of these rules, and stay out:

    - a part holds no more ungrouped images than a stack has slices;
    - a part does not join two patients;
    - of a part without any known slice, at most half have a correlation *inside* the gap with an
      image outside the part;
    - each image is a slice of its part's stack (`_without_side_branches`).

    Args:
        group: (N,) patients of the known slices, -1 for the other images.
        gap: correlations between which links of real images do not lie.
    """
    others = np.flatnonzero(group < 0)
    if not len(others):
        return group
    n, (low, threshold) = len(vectors), gap
    links = _chains(group)
    while True:
        part = groups_above(links, n, threshold)
        n_others = np.bincount(part[others], minlength=n)
        asked = others[n_others[part[others]] <= LONGEST_STACK]  # the rest is left out already
        value, index = nearest(
            vectors, k=NEIGHBORS, group=part, of=asked, description="testing the other images"
        )
        rows, places = np.nonzero(value >= threshold)
        if not len(rows):
            break
        found = np.column_stack([asked[rows], index[rows, places], value[rows, places]])
        links = np.vstack([links, found])
    inside_gap = (value[:, 0] > low) & (value[:, 0] < threshold)
    n_inside_gap = np.bincount(part[asked[inside_gap]], minlength=n)
    parts_of_patients = np.unique(np.column_stack([part, group])[group >= 0], axis=0)[:, 0]
    n_patients = np.bincount(parts_of_patients, minlength=n)
    refused = np.flatnonzero(
        (n_others > LONGEST_STACK)
        | (n_patients > 1)
        | (n_patients == 0) & (2 * n_inside_gap > n_others)
    )
    # Known slices of a refused part keep their patient, under a number that no part has.
    known_patient = np.where(group >= 0, n + group, -1)
    joined = np.where(np.isin(part, refused), known_patient, part)
    return _without_small_groups(_without_side_branches(vectors, joined, group < 0))


def _chains(group: np.ndarray) -> np.ndarray:
    """Links (M, 3) of correlation 1 that join the members of each group; -1 is no group."""
    members = np.flatnonzero(group >= 0)
    members = members[np.argsort(group[members], kind="stable")]
    same = group[members[1:]] == group[members[:-1]]
    return np.column_stack([members[:-1][same], members[1:][same], np.ones(same.sum())])


# -- slices and side branches ----------------------------------------------------------------------


def _without_side_branches(
    vectors: np.ndarray, group: np.ndarray, doubtful: np.ndarray
) -> np.ndarray:
    """Takes the doubtful images that are no slices of their group's stack out of it (-1).

    A slice lies between its neighbors: the two are less alike than each is to the slice. An image
    that was generated from one slice is similar to that slice alone, and makes a detour on the way
    to the next one. The image that makes the longest detour is removed, and the stack is ordered
    again, until there is no detour.
    """
    group = group.copy()
    for name in np.unique(group[doubtful & (group >= 0)]):
        members = np.flatnonzero(group == name)
        while len(members) >= LEAST_SLICES:
            stack = members[order_stack(vectors[members] @ vectors[members].T)]
            detour = _detours(vectors[stack], doubtful[stack])
            if detour.max() <= 0:
                break
            worst = stack[detour.argmax()]
            group[worst] = -1
            members = members[members != worst]
    return group


def _detours(vectors: np.ndarray, doubtful: np.ndarray) -> np.ndarray:
    """By how much each doubtful image lengthens its stack, (M,): not above 0 for a slice.

    Lengths are measured in 1 - correlation. -1 for images that are not doubtful.

    Args:
        vectors: (M, D) unit rows of a stack in order, M at least 3.
    """
    before, here, after = vectors[:-2], vectors[1:-1], vectors[2:]
    detour = 1 + ((before * after) - (before * here) - (here * after)).sum(1)
    # Beyond the last trusted slice a next slice and a blend look the same, so a doubtful image
    # there is removed. In a stack of doubtful images the neighbor's detour decides.
    ends = detour if doubtful.all() else np.ones(2)
    detour = np.concatenate([ends[:1], detour, ends[-1:]])
    # Several images generated from one slice lie between each other, so they are also compared
    # with the trusted slices before and after all of them.
    return np.where(doubtful, np.maximum(detour, _detours_from_trusted(vectors, ~doubtful)), -1)


def _detours_from_trusted(vectors: np.ndarray, trusted: np.ndarray) -> np.ndarray:
    """Compares each untrusted image of a stack with the nearest trusted ones before and after it.

    Returns:
        (M,) the correlation of these two minus the smaller of theirs with the image: above 0 the
        image does not lie between them. -1 where there are not both.
    """
    places = np.arange(len(vectors))
    before = np.maximum.accumulate(np.where(trusted, places, -1))
    after = np.minimum.accumulate(np.where(trusted, places, len(vectors))[::-1])[::-1]
    between = ~trusted & (before >= 0) & (after < len(vectors))
    result = np.full(len(vectors), -1.0)
    first, row, last = vectors[before[between]], vectors[between], vectors[after[between]]
    result[between] = (first * last).sum(1) - np.minimum((first * row).sum(1), (row * last).sum(1))
    return result


# -- full size -------------------------------------------------------------------------------------


def measure_gap(
    images: Sequence[np.ndarray], patients: Patients, matrices: Sequence[np.ndarray]
) -> tuple[float, float]:
    """The gap at full size.

    Args:
        images: `uint8` (H, W), those that `patients` groups.
        matrices: each patient's full-size correlations (M, M).

    Returns:
        Correlation of the strongest link among the rivals, and of the weakest link that joins a
        slice to its patient.

    Raises:
        NoPatientsError: what was empty at `SEARCH_SIDE` is not at full size.
    """
    weakest = float(min(tree_within(matrix).min() for matrix in matrices))
    pairs, strongest = patients.rivals[patients.rivals[:, 1] >= 0], -1.0
    for start in range(0, len(pairs), 256):
        chunk = pairs[start : start + 256]
        rows, place = np.unique(chunk, return_inverse=True)
        vectors = features(chosen(images, rows), full_side(images))
        first, second = vectors[place.reshape(chunk.shape)].swapaxes(0, 1)
        strongest = max(strongest, float((first * second).sum(1).max()))
    if strongest >= weakest:
        raise NoPatientsError(
            f"No gap separates patients at full size: two groups reach a correlation of "
            f"{strongest:.3f}, a slice joins its own at {weakest:.3f}; expected several "
            "neighboring slices of each patient."
        )
    return strongest, weakest
