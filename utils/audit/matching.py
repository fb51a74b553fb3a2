"""Patients that two sets of images share, found from pixels."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from utils.cohort import Cohort, RawImages
from utils.cohort.linking import GAP_LEAST as GAP_LEAST_WITHIN
from utils.cohort.linking import GAP_RATIO, fisher_z, middle
from utils.cohort.order import members_of
from utils.cohort.similarity import NARROW, SEARCH_SIDE, WIDE, features
from utils.images import Images, StoredImages
from utils.manifest.files import UNREADABLE, ImageFile, decode, eight_bits, open_images
from utils.manifest.table import MANIFESTS, open_rows, read_manifest
from utils.utils_funcs import UserError, progress

#: What is brighter than this share of an image's brightest pixel is head; compression leaves less
#: in the background.
HEAD_LEVEL = 0.1

#: Side in pixels of the common square that heads are resized to, and of the features that are
#: compared.
HEAD_SIDE, SIDE = 96, SEARCH_SIDE

#: The eight orientations: so many quarter turns, then mirrored or not.
ORIENTATIONS = tuple((turns, mirrored) for mirrored in (False, True) for turns in range(4))

#: Images of the other set from which the orientation is chosen, and how many of the clearest ones
#: decide.
ORIENTATION_IMAGES, CLEAREST = 400, 3

#: Patients of this set that are compared again with an image of the other set, and slices of each.
CANDIDATES, SLICES = 6, 2

#: Images of the other set that are compared with all slices at once.
BLOCK = 256

#: The search over an axis: scale and shift in whole steps, within so many steps of the head as it
#: was cropped.
SCALE_STEP, SHIFT_STEP, REACH = 0.008, 0.004, 14

#: Distances in steps between the points of each round's 5 × 5 grid, from coarse to fine.
ROUNDS = (4, 2, 1)

#: Correlations above this say "the same image" and differ by compression alone: steps among them
#: are no gap.
SAME_IMAGE = 0.99

#: The least width of the gap in Fisher's z; twice that within one set, since the pairs of two sets
#: are searched over.
GAP_LEAST = 2 * GAP_LEAST_WITHIN


class NoGapError(UserError):
    """No gap separates patients that two sets share from look-alikes."""


# -- the other set ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class OtherSet:
    """Images of the other set.

    Attributes:
        images: `uint8` (H, W) each.
        patient: (N,) patient of each image, from 0.
        ids: what file names call each patient (P): needed for ages, never shown.
    """

    images: Images = field(repr=False)
    patient: np.ndarray = field(repr=False)
    ids: tuple[str, ...] = field(repr=False)


def read_other(path: Path, id_pattern: str | None = None) -> OtherSet:
    """Reads the images of a folder or zip, flat or in any folders, or those of a manifest, whose
    patient ids then name the patients.

    Args:
        id_pattern: see `ids_of`.

    Raises:
        UserError: no such path, no image, unreadable images, names without an id. The message
            counts files and names none.
    """
    if path.suffix.lower() in MANIFESTS:
        manifest = read_manifest(path)
        with open_rows(manifest) as readers:
            images = _decoded([("", read) for read in readers])
        given = [row.patient_id for row in manifest.rows]
        if id_pattern is not None or not all(given):
            given = ids_of([row.path for row in manifest.rows], id_pattern)
        ids, patient = np.unique(given, return_inverse=True)
        return OtherSet(images, patient, tuple(ids.tolist()))
    with open_images(path, "the other set") as files:
        images = _decoded(files)
        stems = [PurePosixPath(name).stem for name, _ in files]
    if not images:
        raise UserError(f"{path} holds no image.")
    ids, patient = np.unique(ids_of(stems, id_pattern), return_inverse=True)
    return OtherSet(images, patient, tuple(ids.tolist()))


def _decoded(files: Sequence[ImageFile]) -> Images:
    images, unreadable = StoredImages(), 0
    for _, read in progress(files, "reading the other set"):
        try:
            images.append(decode(read()))
        except UNREADABLE:
            unreadable += 1
    if unreadable:
        raise UserError(f"{unreadable} files of the other set are no readable images: remove them.")
    return eight_bits(images, ["a file of the other set"] * len(images))[0]


def ids_of(stems: Sequence[str], pattern: str | None) -> list[str]:
    """The patient's id in each file name without its ending.

    Args:
        pattern: regular expression that finds the id: its first group where it has one, else the
            whole match. None takes the whole name, so that each image is a patient of its own.

    Raises:
        UserError: the pattern is not valid, or does not match some of the names.
    """
    if pattern is None:
        return list(stems)
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{pattern!r} is no regular expression ({error}).") from error
    found = [match for match in map(expression.search, stems) if match]
    missing = len(stems) - len(found)
    if missing:
        raise UserError(
            f"{pattern!r} finds no id in the names of {missing} of {len(stems)} files of the other "
            "set."
        )
    return [match.group(1 if expression.groups else 0) for match in found]


# -- heads and orientation -------------------------------------------------------------------------


def head_square(image: np.ndarray) -> np.ndarray:
    """The bounding box of the head, resized to `uint8` (HEAD_SIDE, HEAD_SIDE); the whole image
    where it is blank."""
    bright = image > HEAD_LEVEL * image.max(initial=0)
    rows, columns = (np.flatnonzero(bright.sum(axis) > 1) for axis in (1, 0))
    if len(rows) and len(columns):
        image = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    size = (HEAD_SIDE, HEAD_SIDE)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


def turned(image: np.ndarray, orientation: tuple[int, bool]) -> np.ndarray:
    """The image after some quarter turns, then mirrored or not."""
    turns, mirrored = orientation
    image = np.rot90(image, turns)
    return image[:, ::-1] if mirrored else image


def _per_patient(correlations: np.ndarray, patient: np.ndarray) -> np.ndarray:
    """Strongest correlation (P, M) of each patient's slices, from those of the slices (N, M)."""
    return np.stack([correlations[members].max(0) for members in members_of(patient)])


def choose_orientation(
    vectors: np.ndarray, patient: np.ndarray, heads: Sequence[np.ndarray]
) -> tuple[int, bool]:
    """The orientation that lays the other set's heads on this set's.

    In the right one, some images resemble one patient far more than any other. In a wrong one an
    image can be similar to all patients, since a head is nearly its own mirror image.

    Args:
        vectors: `float32` (N, SIDE²), unit features of this set's slices.
        patient: (N,) patient of each slice, from 0.
        heads: squares of the other set.
    """
    step = -(-len(heads) // ORIENTATION_IMAGES)
    evidence = []
    for orientation in ORIENTATIONS:
        others = features([turned(head, orientation) for head in heads[::step]], SIDE)
        best = np.sort(fisher_z(_per_patient(vectors @ others.T, patient), SAME_IMAGE), 0)
        evidence.append(np.sort(best[-1] - best[-2])[-CLEAREST:].mean())
    return ORIENTATIONS[int(np.argmax(evidence))]


# -- correlation of two heads ----------------------------------------------------------------------


@functools.cache
def _samplers() -> np.ndarray:
    """Weights that sample a head along one axis at each scale and shift of the search.

    Returns:
        `float32` (K, K, SIDE, 2·HEAD_SIDE), K = 2·REACH + 1 scales and shifts: for each sampled
        point the narrow blur's weights of the head's pixels, then minus the wide blur's. Beyond the
        head there is background, 0.
    """
    steps = np.arange(-REACH, REACH + 1)
    points = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    scale, shift = (1 + SCALE_STEP * steps)[:, None, None], (SHIFT_STEP * steps)[:, None]
    center = (0.5 + points * scale + shift) * HEAD_SIDE
    distance = np.arange(HEAD_SIDE) + 0.5 - center[..., None]
    weights = []
    for width, sign in ((NARROW, 1), (WIDE, -1)):
        # A sampled point is the mean over its pixel, whose standard deviation is side / √12.
        sigma = HEAD_SIDE * np.hypot(width / 128, scale / SIDE / np.sqrt(12))[..., None]
        blur = np.exp(-((distance / sigma) ** 2) / 2) / (sigma * np.sqrt(2 * np.pi))
        weights.append(sign * np.where(blur < 1e-6, 0, blur))
    return np.concatenate(weights, -1).astype(np.float32)


def _blurred(head: np.ndarray, axis: int, place: Sequence[int]) -> np.ndarray:
    """The head sampled along the *other* axis at a place of the grid, by both blurs: `float32`
    (2·HEAD_SIDE, SIDE)."""
    narrow, wide = np.split(_samplers()[tuple(place)], 2, axis=1)
    rows = head if axis == 0 else head.T
    return np.concatenate([rows @ narrow.T, rows @ -wide.T])


def _bands(head: np.ndarray, axis: int, grid: np.ndarray, place: Sequence[int]) -> np.ndarray:
    """Differences of two blurs of a head, of zero mean and unit length, at each point of a grid.

    Args:
        head: `float32` (HEAD_SIDE, HEAD_SIDE).
        grid: (G, 2) scales and shifts of this axis.
        place: (2,) scale and shift of the other axis.

    Returns:
        `float32` (G, SIDE, SIDE), this axis first.
    """
    samplers = _samplers()[grid[:, 0], grid[:, 1]].reshape(len(grid) * SIDE, -1)
    bands = (samplers @ _blurred(head, axis, place)).reshape(len(grid), SIDE, SIDE)
    bands -= bands.mean((1, 2), keepdims=True)
    length = np.sqrt((bands**2).sum((1, 2), keepdims=True))
    # A blank image has no direction: its correlation with everything is 0.
    return bands / np.maximum(length, 1e-6)


def refined_correlation(head: np.ndarray, target: np.ndarray) -> float:
    """The best correlation of two heads after scale and shift of each axis of the first.

    The axes are searched in turn, from coarse to fine.

    Args:
        head, target: (HEAD_SIDE, HEAD_SIDE), in one orientation.
    """
    head, target = head.astype(np.float32), target.astype(np.float32)
    unmoved = np.full((2, 2), REACH)
    wanted = _bands(target, 0, unmoved[:1], unmoved[1])[0]
    place, best = unmoved.copy(), -1.0
    offsets = np.array([(scale, shift) for scale in range(-2, 3) for shift in range(-2, 3)])
    for distance in ROUNDS:
        for axis in (0, 1):
            grid = place[axis] + distance * offsets
            bands = _bands(head, axis, grid, place[1 - axis])
            found = np.tensordot(bands, wanted if axis == 0 else wanted.T)
            place[axis] = grid[found.argmax()]
            best = max(best, float(found.max()))
    return best


def patient_correlations(
    squares: Sequence[np.ndarray],
    vectors: np.ndarray,
    patient: np.ndarray,
    heads: Sequence[np.ndarray],
    other_patient: np.ndarray,
) -> np.ndarray:
    """The best refined correlation of each patient of this set with each of the other.

    Args:
        squares: N head squares of this set's slices.
        vectors: `float32` (N, SIDE²), their unit features.
        patient: (N,) their patients, from 0.
        heads: M head squares of the other set, in this set's orientation.
        other_patient: (M,) their patients, from 0.

    Returns:
        `float32` (P, Q); -1 where no image made the pair a candidate.
    """
    result = np.full((patient.max() + 1, other_patient.max() + 1), -1, np.float32)
    members = members_of(patient)
    for start in range(0, len(heads), BLOCK):
        correlations = vectors @ features(heads[start : start + BLOCK], SIDE).T
        best = _per_patient(correlations, patient)
        for column, head in enumerate(progress(heads[start : start + BLOCK], "comparing two sets")):
            other = other_patient[start + column]
            for candidate in np.argsort(-best[:, column])[:CANDIDATES]:
                rows = members[candidate]
                closest = rows[np.argsort(-correlations[rows, column])[:SLICES]]
                found = max(refined_correlation(head, squares[row]) for row in closest)
                result[candidate, other] = max(result[candidate, other], found)
    return result


# -- shared patients -------------------------------------------------------------------------------


@dataclass(frozen=True)
class SharedPatients:
    """Patients that two sets share.

    Attributes:
        patient_id: (F,) this set's id of each patient found. This and `other` stay in memory: they
            are no part of `repr`, page or file.
        other: (F,) the other set's number of the same patients.
        gap: strongest rejected and weakest accepted correlation.
        orientation: quarter turns, and whether mirrored, that lay the other set on this one.
        repeats: patients of the other set that show a patient who was found already.
        n_patients, n_other: how many patients each set holds.
    """

    patient_id: np.ndarray = field(repr=False)
    other: np.ndarray = field(repr=False)
    gap: tuple[float, float]
    orientation: tuple[int, bool]
    repeats: int
    n_patients: int
    n_other: int


def find_shared_gap(correlations: np.ndarray) -> tuple[float, float] | None:
    """The gap between right and wrong pairs of patients.

    It is the widest empty step, in Fisher's z, between the best correlations of the other set's
    patients that lie above all second best ones, which must be wrong.

    Args:
        correlations: (P, Q) of this set's patients with the other's.

    Returns:
        The correlations below and above the step; None where no step is clearly wider than others.
    """
    if len(correlations) < 2:
        return None
    second, best = np.sort(correlations, 0)[-2:]
    wrong = second.max()
    descending = np.append(np.sort(best[best > wrong])[::-1], wrong)
    steps = -np.diff(fisher_z(descending, SAME_IMAGE))
    if not len(steps):
        return None
    widest = int(np.argmax(steps))
    next_widest = max(np.delete(steps, widest), default=0.0)
    is_clear = steps[widest] >= max(GAP_LEAST, GAP_RATIO * next_widest)
    if not is_clear or descending[widest] ** 2 < 0.5:
        return None
    return float(descending[widest + 1]), float(descending[widest])


def one_to_one(correlations: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Pairs of patients at or above a threshold, each patient of either set once.

    Args:
        correlations: (P, Q) of this set's patients with the other's.

    Returns:
        Indices (F,) of this set's patients and (F,) of the other's; and how many of the other's
        were left out because another one resembles the same patient more.
    """
    accepted = np.flatnonzero(correlations.max(0) >= threshold)
    accepted = accepted[np.argsort(-correlations[:, accepted].max(0), kind="stable")]
    partner = correlations[:, accepted].argmax(0)
    patients, first = np.unique(partner, return_index=True)
    return patients, accepted[first], len(accepted) - len(patients)


def find_shared(raw: RawImages, cohort: Cohort, other: OtherSet) -> SharedPatients:
    """The patients of a cohort that the other set shows too.

    Raises:
        NoGapError: this set holds a single patient, or nothing separates shared patients from
            look-alikes.
    """
    real = np.flatnonzero(cohort.kind == "real")
    ids, patient = np.unique(cohort.patient_id[real], return_inverse=True)
    if len(ids) < 2:
        raise NoGapError(
            "A correlation has to be compared with another patient's: the set needs two or more."
        )
    squares = [head_square(raw.images[int(i)]) for i in real]
    vectors = features(squares, SIDE)
    heads = [head_square(image) for image in other.images]
    orientation = choose_orientation(vectors, patient, heads)
    heads = [turned(head, orientation) for head in heads]
    correlations = patient_correlations(squares, vectors, patient, heads, other.patient)
    gap = find_shared_gap(correlations)
    if gap is None:
        raise NoGapError(
            "No gap separates patients that the two sets share from look-alikes: either they share "
            "none, or the slices show other levels of the head, or one set is not cut out of its "
            "background."
        )
    mine, others, repeats = one_to_one(correlations, middle(gap))
    return SharedPatients(ids[mine], others, gap, orientation, repeats, len(ids), len(other.ids))
