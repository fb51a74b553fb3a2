"""Patients that two sets of images share, found from pixels, and scores on those in a range of ages.

The slices of one set may be turned by multiples of 90 degrees, mirrored, cropped, stretched and compressed
against those of the other. All of it happens on this machine and in memory: who is who in the other set is
never written or printed, and no result tells of a group of fewer than `LEAST_GROUP` patients. `python -m
utils.audit RAW --against OTHER` is the command.

How: each slice is cropped to the head and resized to a common square, two slices are compared by the
correlation of their differences of two Gaussian blurs (`utils.cohort.features`), in the one of the eight
orientations that has the best evidence, and the best candidates again after a search over scale and shift of
each axis. A patient of the other set is found where the best patient of this set stands beyond an empty gap
above everything that must be wrong: the *second* best patients, since nobody is two patients.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import html
import re
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from utils import cohort as recovery
from utils import metrics
from utils.cohort import Cohort, RawImages, features, members_of
from utils.data import file_sha256
from utils.records import Arrays, Entry, Rows, clean_of, variants_of
from utils.utils_funcs import CLASSES, UserError, progress, write_json

SCHEMA_VERSION = 1
#: No count, age or score is given of fewer patients than this.
LEAST_GROUP = 5
FEWER = f"fewer than {LEAST_GROUP}"
#: Scores on the part have no more: each further one says more of which patients are in it.
DECIMALS = 3

#: What is brighter than this share of an image's brightest pixel is head; compression leaves less in the
#: background.
HEAD_LEVEL = 0.1
#: Side in pixels of the common square that heads are resized to, and of the features that are compared.
HEAD_SIDE, SIDE = 96, recovery.SEARCH_SIDE
#: The eight orientations: so many quarter turns, then mirrored or not.
ORIENTATIONS = tuple((turns, mirrored) for mirrored in (False, True) for turns in range(4))
#: Images of the other set from which the orientation is chosen, and the clearest of them that decide.
ORIENTATION_IMAGES, CLEAREST = 400, 3
#: Patients of this set that are compared again with an image of the other set, and slices of each.
CANDIDATES, SLICES = 6, 2
BLOCK = 256

#: The search over an axis: scale and shift in whole steps, within so many steps of the head as it was
#: cropped.
SCALE_STEP, SHIFT_STEP, REACH = 0.008, 0.004, 14
#: Distances in steps between the points of each round's 5 x 5 grid, from coarse to fine.
ROUNDS = (4, 2, 1)
#: Correlations above this say "the same image" and differ by compression alone: steps among them are no gap.
SAME_IMAGE = 0.99
#: The least width of the gap in Fisher's z; twice that within one set, since the pairs of two sets are
#: searched over.
GAP_LEAST = 2 * recovery.GAP_LEAST


class NoGapError(UserError):
    """Nothing separates patients that two sets share from look-alikes."""


# ---------------------------------------------------------------------------------------------- the other set


@dataclass(frozen=True)
class OtherSet:
    """Images of the other set, `uint8` (H, W) each; `patient` (N,) numbers their patients from 0. `ids` (P)
    are what file names call them: needed for ages, never shown."""

    images: list[np.ndarray] = field(repr=False)
    patient: np.ndarray = field(repr=False)
    ids: tuple[str, ...] = field(repr=False)


def read_other(path: Path, id_pattern: str | None = None) -> OtherSet:
    """Reads the images of a folder or zip, flat or in any folders.

    Args:
        id_pattern: regular expression that finds a patient's id in a file's name without its ending: the
            first group where it has one, else the whole match. None takes the whole name: each image is a
            patient of its own.

    Raises:
        StudyError: no such path, no image, unreadable images, names without an id. It counts files and names
        none.
    """
    if not path.exists():
        raise UserError(f"There is nothing at {path}: name the folder or zip of the other set.")
    if path.is_dir():
        names, images = _decoded(recovery._folder_entries(path))
    else:
        try:
            with zipfile.ZipFile(path) as archive:
                names, images = _decoded(recovery._zip_entries(archive, path))
        except zipfile.BadZipFile as error:
            raise UserError(f"{path} is no complete zip archive: download it again.") from error
    if not images:
        raise UserError(f"{path} holds no image.")
    found = _ids_of([PurePosixPath(name).stem for name in names], id_pattern)
    ids, patient = np.unique(found, return_inverse=True)
    return OtherSet(images, patient, tuple(ids.tolist()))


def _decoded(entries: Sequence[tuple]) -> tuple[list[str], list[np.ndarray]]:
    """Names and pixels, sorted by name, without hidden files."""
    names, images, unreadable = [], [], 0
    for name, read in progress(
        sorted(entries, key=lambda entry: entry[0]), "reading the other set"
    ):
        if any(part.startswith(".") or part == "__MACOSX" for part in name.split("/")):
            continue
        try:
            images.append(recovery.decode(read()))
        except recovery.UNREADABLE:
            unreadable += 1
            continue
        names.append(name)
    if unreadable:
        raise UserError(f"{unreadable} files of the other set are no readable images: remove them.")
    return names, images


def _ids_of(stems: Sequence[str], pattern: str | None) -> list[str]:
    if pattern is None:
        return list(stems)
    try:
        matches = [re.search(pattern, stem) for stem in stems]
    except re.error as error:
        raise UserError(f"{pattern!r} is no regular expression ({error}).") from error
    missing = sum(match is None for match in matches)
    if missing:
        raise UserError(
            f"{pattern!r} finds no id in the names of {missing} of {len(stems)} files of the other set."
        )
    return [match.group(1) if match.re.groups else match.group() for match in matches]


# ------------------------------------------------------------------------------------- heads and orientations


def head_square(image: np.ndarray) -> np.ndarray:
    """The bounding box of the head, resized to `uint8` (HEAD_SIDE, HEAD_SIDE); the whole image where it is
    blank."""
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
    """(P, M) strongest correlation of each patient's slices, from those of the slices (N, M)."""
    best = np.full((patient.max() + 1, correlations.shape[1]), -1, np.float32)
    for who, members in enumerate(members_of(patient)):
        best[who] = correlations[members].max(0)
    return best


def choose_orientation(
    vectors: np.ndarray, patient: np.ndarray, heads: Sequence[np.ndarray]
) -> tuple[int, bool]:
    """The orientation that lays the other set on this one: there some images resemble one patient far more
    than any other. A wrong one can resemble everybody well, since a head is nearly its own mirror image.

    Args:
        vectors: `float32` (N, SIDE²) unit rows of this set; `patient` (N,) theirs, from 0.
        heads: squares of the other set.
    """
    step = -(-len(heads) // ORIENTATION_IMAGES)
    evidence = []
    for orientation in ORIENTATIONS:
        others = features([turned(head, orientation) for head in heads[::step]], SIDE)
        best = np.sort(_fisher(_per_patient(vectors @ others.T, patient)), 0)
        evidence.append(np.sort(best[-1] - best[-2])[-CLEAREST:].mean())
    return ORIENTATIONS[int(np.argmax(evidence))]


def _fisher(correlation: np.ndarray) -> np.ndarray:
    """Fisher's z, in which the error of a correlation is the same at every height; not above
    `SAME_IMAGE`'s."""
    return np.arctanh(np.clip(correlation, -SAME_IMAGE, SAME_IMAGE))


# -------------------------------------------------------------------------------------------- scale and shift


@functools.cache
def _samplers() -> np.ndarray:
    """`float32` (K, K, SIDE, 2·HEAD_SIDE), K = 2·REACH + 1 scales and shifts of one axis: the narrow blur's
    weights of the head's pixels at each sampled point, and minus the wide one's. Beyond the head there is
    background, 0."""
    steps = np.arange(-REACH, REACH + 1)
    points = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    scale, shift = (1 + SCALE_STEP * steps)[:, None, None], (SHIFT_STEP * steps)[:, None]
    centre = (0.5 + points * scale + shift) * HEAD_SIDE
    distance = np.arange(HEAD_SIDE) + 0.5 - centre[..., None]
    weights = []
    for width, sign in ((recovery.NARROW, 1), (recovery.WIDE, -1)):
        # A sampled point stands for the mean over its pixel, of which the standard deviation is side / √12.
        sigma = HEAD_SIDE * np.hypot(width / 128, scale / SIDE / np.sqrt(12))[..., None]
        blur = np.exp(-((distance / sigma) ** 2) / 2) / (sigma * np.sqrt(2 * np.pi))
        weights.append(sign * np.where(blur < 1e-6, 0, blur))
    return np.concatenate(weights, -1).astype(np.float32)


def _blurred(head: np.ndarray, axis: int, place: Sequence[int]) -> np.ndarray:
    """`float32` (2·HEAD_SIDE, SIDE): the head sampled along the *other* axis at a place of the grid, by both
    blurs."""
    narrow, wide = np.split(_samplers()[tuple(place)], 2, axis=1)
    rows = head if axis == 0 else head.T
    return np.concatenate([rows @ narrow.T, rows @ -wide.T])


def _bands(head: np.ndarray, axis: int, grid: np.ndarray, place: Sequence[int]) -> np.ndarray:
    """`float32` (G, SIDE, SIDE): differences of two blurs, of zero mean and unit length, sampled axis first.

    Args:
        head: `float32` (HEAD_SIDE, HEAD_SIDE).
        grid: (G, 2) scales and shifts of this axis; `place` (2,) those of the other one.
    """
    samplers = _samplers()[grid[:, 0], grid[:, 1]].reshape(len(grid) * SIDE, -1)
    bands = (samplers @ _blurred(head, axis, place)).reshape(len(grid), SIDE, SIDE)
    bands -= bands.mean((1, 2), keepdims=True)
    length = np.sqrt((bands**2).sum((1, 2), keepdims=True))
    # A blank image has no direction: its correlation with everything is 0.
    return bands / np.maximum(length, 1e-6)


def refined_correlation(head: np.ndarray, target: np.ndarray) -> float:
    """The best correlation of two heads after scale and shift of each axis of the first, by turns, coarse to
    fine.

    Args:
        head, target: `float32` (HEAD_SIDE, HEAD_SIDE) in one orientation.
    """
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
    own: Sequence[np.ndarray],
    vectors: np.ndarray,
    patient: np.ndarray,
    heads: Sequence[np.ndarray],
    other_patient: np.ndarray,
) -> np.ndarray:
    """`float32` (P, M): the best refined correlation of each patient of this set with each of the other; -1
    where no image made the pair a candidate.

    Args:
        own: N squares of this set's slices, `vectors` (N, SIDE²) their features, `patient` (N,) from 0.
        heads: squares of the other set, in this set's orientation; `other_patient` theirs, from 0.
    """
    result = np.full((patient.max() + 1, other_patient.max() + 1), -1, np.float32)
    members = members_of(patient)
    for start in range(0, len(heads), BLOCK):
        correlations = vectors @ features(heads[start : start + BLOCK], SIDE).T
        best = _per_patient(correlations, patient)
        for column, head in enumerate(progress(heads[start : start + BLOCK], "comparing two sets")):
            whom = other_patient[start + column]
            for who in np.argsort(-best[:, column])[:CANDIDATES]:
                rows = members[who]
                closest = rows[np.argsort(-correlations[rows, column])[:SLICES]]
                found = max(
                    refined_correlation(np.float32(head), np.float32(own[row])) for row in closest
                )
                result[who, whom] = max(result[who, whom], found)
    return result


# ---------------------------------------------------------------------------------------------- who is shared


@dataclass(frozen=True)
class SharedPatients:
    """What the pixels said. `patient_id` (F,) and `other` (F,), this set's id and the other's number of each
    patient found, stay in memory: they are no part of `repr`, page or file.

    Attributes:
        gap: strongest rejected and weakest accepted correlation.
        orientation: quarter turns, and whether mirrored, that lay the other set on this one.
        repeats: patients of the other set that show one who was found with another of them already.
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
    """The widest empty step, in Fisher's z, between the best correlations of the other set's patients, above
    everything that must be wrong; None where no step stands out.

    Args:
        correlations: (P, M) of this set's patients with the other's.

    Returns:
        The correlations below and above the step.
    """
    if len(correlations) < 2:
        return None
    second, best = np.sort(correlations, 0)[-2:]
    wrong = second.max()
    sorted_best = np.append(np.sort(best[best > wrong])[::-1], wrong)
    steps = -np.diff(_fisher(sorted_best))
    if not len(steps):
        return None
    widest = int(np.argmax(steps))
    next_widest = max(np.delete(steps, widest), default=0.0)
    if (
        steps[widest] < max(GAP_LEAST, recovery.GAP_RATIO * next_widest)
        or sorted_best[widest] ** 2 < 0.5
    ):
        return None
    return float(sorted_best[widest + 1]), float(sorted_best[widest])


def one_to_one(correlations: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Pairs above a threshold, each patient of either set once: indices (F,) of this set's and of the other's
    patients, and how many of the other set's were left out because another one resembles the same patient
    more."""
    accepted = np.flatnonzero(correlations.max(0) >= threshold)
    accepted = accepted[np.argsort(-correlations[:, accepted].max(0), kind="stable")]
    whose = correlations[:, accepted].argmax(0)
    patients, first = np.unique(whose, return_index=True)
    return patients, accepted[first], len(accepted) - len(patients)


def find_shared(raw: RawImages, cohort: Cohort, other: OtherSet) -> SharedPatients:
    """The patients of a cohort that the other set shows too. Raises `NoGapError` where none stand out."""
    real = np.flatnonzero(cohort.kind == "real")
    ids, patient = np.unique(cohort.patient_id[real], return_inverse=True)
    if len(ids) < 2:
        raise NoGapError(
            "A likeness has to be compared with another patient's: the set needs two or more."
        )
    own = [head_square(raw.images[i]) for i in real]
    vectors = features(own, SIDE)
    heads = [head_square(image) for image in other.images]
    orientation = choose_orientation(vectors, patient, heads)
    heads = [turned(head, orientation) for head in heads]
    correlations = patient_correlations(own, vectors, patient, heads, other.patient)
    gap = find_shared_gap(correlations)
    if gap is None:
        raise NoGapError(
            "No gap separates patients that the two sets share from look-alikes: either they share nobody, "
            "or the slices show other levels of the head, or one set is not cut out of its background."
        )
    mine, others, repeats = one_to_one(correlations, recovery.middle(gap))
    return SharedPatients(ids[mine], others, gap, orientation, repeats, len(ids), len(other.ids))


# ------------------------------------------------------------------------------------------------------- ages


@dataclass(frozen=True)
class AgePart:
    """The found patients whose age lies in a range; `patient_id` and `age` (K,), in years, stay in memory.

    `bounds` are the least and greatest age, None where open; `without_age` counts found patients of unknown
    age.
    """

    patient_id: np.ndarray = field(repr=False)
    age: np.ndarray = field(repr=False)
    bounds: tuple[float | None, float | None]
    without_age: int

    @property
    def range_name(self) -> str:
        low, high = self.bounds
        if low is None and high is None:
            return "any known age"
        if high is None:
            return f"{low:g} years and more"
        return f"up to {high:g} years" if low is None else f"{low:g} to {high:g} years"


def read_ages(path: Path, id_column: str = "ID", age_column: str = "Age") -> dict[str, float]:
    """Id → age in years from a CSV with a header; rows without an age are left out.

    Raises:
        StudyError: no such file or column, an age that is no number, two ages of one id. It shows no row's
        content.
    """
    if not path.is_file():
        raise UserError(f"There is no table of ages at {path}.")
    with open(path, newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        rows, columns = list(table), table.fieldnames or []
    for column in (id_column, age_column):
        if column not in columns:
            raise UserError(
                f"{path} has no column {column!r}; its columns are {', '.join(columns)}."
            )
    ages: dict[str, float] = {}
    for row in rows:
        if not (row[age_column] or "").strip():
            continue
        try:
            age = float(row[age_column])
        except ValueError:
            raise UserError(f"{path} holds an age in {age_column!r} that is no number.") from None
        if ages.setdefault(row[id_column], age) != age:
            raise UserError(
                f"{path} gives two ages for one id: keep the row of the scan that is shown."
            )
    return ages


def part_of_age(
    shared: SharedPatients,
    other: OtherSet,
    ages: dict[str, float],
    *,
    age_from: float | None = None,
    age_to: float | None = None,
) -> AgePart:
    """The found patients whose age in the other set's table lies in [age_from, age_to]."""
    if not any(name in ages for name in other.ids):
        raise UserError(
            "No id in the file names of the other set is in the table of ages: name a regular expression "
            "that finds the id in a file's name (--id-pattern), and its column (--id-column)."
        )
    age = np.array([ages.get(other.ids[whom], np.nan) for whom in shared.other], np.float64)
    low = -np.inf if age_from is None else age_from
    high = np.inf if age_to is None else age_to
    inside = (age >= low) & (age <= high)
    return AgePart(
        shared.patient_id[inside], age[inside], (age_from, age_to), int(np.isnan(age).sum())
    )


def class_groups(counts: Sequence[int]) -> list[list[int]]:
    """Classes merged with their neighbors until each group holds `LEAST_GROUP` patients; none where all
    together do not."""
    groups: list[list[int]] = []
    size = 0
    for label, count in enumerate(counts):
        if size >= LEAST_GROUP or not groups:
            groups.append([])
            size = 0
        groups[-1].append(label)
        size += count
    if size < LEAST_GROUP and len(groups) > 1:
        rest = groups.pop()
        groups[-1] += rest
    return groups if sum(counts) >= LEAST_GROUP else []


def by_class(
    labels: np.ndarray,
    classes: Sequence[str],
    groups: Sequence[Sequence[int]],
    age: np.ndarray | None = None,
) -> dict[str, dict]:
    """Classes of each group → {"n", "age_mean", "age_sd"}, ages in years.

    Args:
        labels: (K,) class of each patient; `age` (K,) theirs, where known.
        groups: of `class_groups` for these labels, so that none is small.
    """
    result = {}
    for group in groups:
        members = np.isin(labels, group)
        entry: dict[str, object] = {"n": int(members.sum())}
        if age is not None:
            entry["age_mean"] = round(float(age[members].mean()), 1)
            entry["age_sd"] = round(float(age[members].std(ddof=1)), 1)
        result[_group_name(group, classes)] = entry
    return result


def counts_by_class(
    labels: np.ndarray, classes: Sequence[str], groups: Sequence[Sequence[int]]
) -> dict[str, int | str]:
    """Classes of each group → how many patients (K,) are of it, or `FEWER`."""
    totals = {_group_name(group, classes): int(np.isin(labels, group).sum()) for group in groups}
    return {name: told(total) for name, total in totals.items()}


def told(number: int) -> int | str:
    """A number of patients as it may be written: itself, or `FEWER`."""
    return number if number == 0 or number >= LEAST_GROUP else FEWER


def _group_name(group: Sequence[int], classes: Sequence[str]) -> str:
    return " and ".join(classes[label] for label in group)


# ----------------------------------------------------------------------------------------- scores on the part


def _rounded(score: dict) -> dict:
    """{"value", "ci"} with `DECIMALS`; null where a score is undefined, and no interval where no resample
    moves it."""
    if score["value"] is None:
        return {"value": None, "ci": None}
    # Adding 0 makes -0.0 a plain 0.
    ends = None if score["ci"] is None else [round(end, DECIMALS) + 0.0 for end in score["ci"]]
    if ends and ends[0] == ends[1]:
        ends = None
    return {"value": round(score["value"], DECIMALS) + 0.0, "ci": ends}


def _difference(tally: metrics.Tally, inside: np.ndarray, name: str, n_boot: int) -> dict:
    """A score on some patients minus that on all, {"value", "ci"}: both from one resample of all patients,
    stratified by class, so that how many of the part are drawn varies as well.

    Args:
        inside: bool (P,), which of the tally's patients are in the part.
    """
    statistic = metrics._statistic(tally)

    def values(weights: np.ndarray) -> np.ndarray:
        return statistic(weights * inside)[name] - statistic(weights)[name]

    value = float(values(np.ones((1, len(inside))))[0])
    draws = values(metrics._weights(tally.class_of_patient.astype(np.int64).tobytes(), n_boot, 0))
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return {"value": value, "ci": [min(float(low), value), max(float(high), value)]}


def _part_and_all(
    name: str,
    logits: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    part: np.ndarray,
    n_boot: int,
) -> dict:
    """One score on the part, on everybody, and their difference; the first and last null where a class (for
    AUROC: Non or the rest) holds fewer than `LEAST_GROUP` patients of the part."""
    everybody = _rounded(metrics.score(logits, labels, patients, n_boot=n_boot)[name])
    ids, first = np.unique(patients, return_index=True)
    inside = np.isin(ids, part)
    kind = labels[first] > 0 if name == "auroc" else metrics.THREE[labels[first]]
    if min((inside & (kind == value)).sum() for value in np.unique(kind)) < LEAST_GROUP:
        return {"value": None, "ci": None, "everybody": everybody, "difference": None}
    rows = np.isin(patients, part)
    own = metrics.score(logits[rows], labels[rows], patients[rows], n_boot=n_boot)[name]
    difference = _difference(metrics.tally(logits, labels, patients), inside, name, n_boot)
    return {**_rounded(own), "everybody": everybody, "difference": _rounded(difference)}


def part_scores(
    predictions: Arrays, variant: str | None, part: np.ndarray, n_boot: int = 2000
) -> dict:
    """Scores of a model's clean answers on a part of the patients, beside those on everybody.

    Predictions are public, so a score without a handful of patients would tell who these are: where fewer
    than `LEAST_GROUP` patients of the record are in the part, or outside it but some, there is a `reason`
    instead of scores.

    Args:
        predictions: the arrays of a record; `part` (K,) patient ids.

    Returns:
        `n_people` of the part and `n_people_everybody`; `person_auroc`, `slice_auroc` (Non against the rest)
        and `balanced_accuracy_3` (slices, three classes), each {"value", "ci", "everybody", "difference"}.
    """
    logits = clean_of(predictions, variant)
    declared = metrics.scored(logits)
    logits, rows = logits[declared], Rows.of(predictions).take(declared)
    ids = np.unique(rows.patients)
    inside = int(np.isin(ids, part).sum())
    for size, where in ((inside, "in"), (len(ids) - inside, "outside")):
        if size < LEAST_GROUP and not (size == 0 and where == "outside"):
            return {
                "n_people": None,
                "n_people_everybody": len(ids),
                "reason": f"{FEWER} patients of this record are {where} the part",
            }
    slices = (logits, rows.labels, rows.patients)
    patients = metrics.by_patient(*slices, rows.seeds)
    return {
        "n_people": inside,
        "n_people_everybody": len(ids),
        "person_auroc": _part_and_all("auroc", *patients, part, n_boot),
        "slice_auroc": _part_and_all("auroc", *slices, part, n_boot),
        "balanced_accuracy_3": _part_and_all("balanced_accuracy_3", *slices, part, n_boot),
    }


def score_rows(
    entries: Iterable[Entry], part: np.ndarray, cohort_sha256: str, n_boot: int = 2000
) -> dict[str, dict]:
    """ "<Model>/<protocol>[/<variant>]" → `part_scores`, for every record and variant.

    Raises:
        StudyError: a record is of another cohort, so that its patient ids are other patients; or the part is
        small.
    """
    if len(part) < LEAST_GROUP:
        raise UserError(f"The part holds {FEWER} patients: no score of it is given.")
    rows = {}
    for entry in progress(list(entries), "scoring the part"):
        known = entry.record["cohort_sha256"]
        if known != cohort_sha256:
            raise UserError(
                f"{entry.model}/{entry.protocol} is a record of the cohort {known[:8]}, these images are the "
                f"cohort {cohort_sha256[:8]}: the patient ids of one say nothing about the other."
            )
        for variant in variants_of(entry.predictions):
            name = "/".join(filter(None, (entry.model, entry.protocol, variant)))
            rows[name] = part_scores(entry.predictions, variant, part, n_boot)
    return rows


def cohort_identity(cohort: Cohort) -> str:
    """`cohort_sha256` of a cohort: the hash of its table's file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cohort.csv"
        recovery.write_cohort(cohort, path)
        return file_sha256(path)


# ------------------------------------------------------------------------------------------------ the command


def in_model_order(raw: RawImages) -> RawImages:
    """Class folders of the study's names get the study's labels, 0 Non to 3 Moderate; any others stay as they
    are."""
    known = [recovery.CLASS_NAMES.get(re.sub(r"[^a-z]", "", name.lower())) for name in raw.classes]
    if None in known:
        return raw
    return dataclasses.replace(raw, label=np.array(known)[raw.label], classes=CLASSES)


@dataclass(frozen=True)
class Comparison:
    """Two sets compared, as counts alone: what page, terminal and file are made of.

    `n_part` and `classes` are of the part of the age range where ages are given, else of everybody found;
    `missing` is for the same classes how many patients of this set were not found, a number or `FEWER`.
    """

    other: str
    n_patients: int
    n_other: int
    n_found: int
    n_part: int
    repeats: int
    gap: tuple[float, float]
    orientation: tuple[int, bool]
    classes: dict[str, dict]
    missing: dict[str, int | str]
    age_range: str | None = None
    without_age: int = 0


def _label_of_patients(raw: RawImages, cohort: Cohort) -> dict[int, int]:
    """Patient id → the label of most of the patient's slices."""
    real = np.flatnonzero(cohort.kind == "real")
    ids = cohort.patient_id[real]
    return {
        int(ids[rows[0]]): int(np.bincount(raw.label[real[rows]]).argmax())
        for rows in members_of(ids)
    }


def compare(
    raw: RawImages,
    cohort: Cohort,
    other: OtherSet,
    other_name: str,
    ages: dict[str, float] | None = None,
    *,
    age_from: float | None = None,
    age_to: float | None = None,
) -> tuple[Comparison, np.ndarray]:
    """The comparison, and the ids (K,) of the part's patients, which are for scoring in memory alone.

    Args:
        raw: this set; its labels index its classes. `cohort` is its cohort.
        ages: id → years of the other set; None takes everybody found as the part.

    Raises:
        NoGapError: no patient stands out.
    """
    shared = find_shared(raw, cohort, other)
    part = (
        None if ages is None else part_of_age(shared, other, ages, age_from=age_from, age_to=age_to)
    )
    patients = shared.patient_id if part is None else part.patient_id
    label_of = _label_of_patients(raw, cohort)
    of_part = np.array([label_of[who] for who in patients.tolist()], np.int64)
    groups = class_groups(np.bincount(of_part, minlength=len(raw.classes)).tolist())
    absent = set(label_of) - set(shared.patient_id.tolist())
    comparison = Comparison(
        other_name,
        shared.n_patients,
        shared.n_other,
        len(shared.patient_id),
        len(patients),
        shared.repeats,
        tuple(round(edge, 3) for edge in shared.gap),
        shared.orientation,
        by_class(of_part, raw.classes, groups, None if part is None else part.age),
        counts_by_class(np.array([label_of[who] for who in absent], np.int64), raw.classes, groups),
        None if part is None else part.range_name,
        0 if part is None else part.without_age,
    )
    return comparison, patients


def _count(number: int) -> str:
    return f"{told(number):,}" if told(number) == number else FEWER


def _orientation_name(orientation: tuple[int, bool]) -> str:
    turns, mirrored = orientation
    return f"turned by {90 * turns} degrees" + (", then mirrored" if mirrored else "")


def _class_text(classes: dict[str, dict]) -> str:
    if not classes:
        return FEWER
    ages = {name: "" for name in classes}
    for name, entry in classes.items():
        if "age_mean" in entry:
            ages[name] = f" (age {entry['age_mean']:.1f} ± {entry['age_sd']:.1f})"
    return ", ".join(f"{name} {entry['n']}{ages[name]}" for name, entry in classes.items())


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """Names and values of what the comparison found."""
    low, high = comparison.gap
    sizes = (
        f"{comparison.n_patients:,} in this set and {comparison.n_other:,} in {comparison.other}"
    )
    rows = [
        ("patients in both sets", f"{_count(comparison.n_found)} of {sizes}"),
        (
            "gap",
            f"the strongest rejected pair correlates at {low:.3f}, the weakest accepted at {high:.3f}",
        ),
        ("the other set's slices lie on this one's", _orientation_name(comparison.orientation)),
        ("further images of a patient already found", _count(comparison.repeats)),
    ]
    if comparison.age_range is not None:
        rows.append((f"age-matched part: found, {comparison.age_range}", _count(comparison.n_part)))
        rows.append(("found, of unknown age", _count(comparison.without_age)))
    rows.append(("by class", _class_text(comparison.classes)))
    missing = comparison.n_patients - comparison.n_found
    of_class = ", ".join(f"{name} {count}" for name, count in comparison.missing.items())
    return [*rows, ("not found", _count(missing) + (f" ({of_class})" if of_class else ""))]


def explanation(comparison: Comparison) -> str:
    """What may be concluded about who was not found."""
    return (
        f"Not found: either not in {comparison.other}, or there under a slice that this set does not hold. "
        "Where that set holds everybody of its source in a range of ages, and this set comes from the same "
        "source, who is not found lies outside the range, such as patients who are younger."
    )


def page_body(comparison: Comparison, rows: dict[str, dict] | None = None) -> list[str]:
    """The comparison as paragraphs and tables of HTML."""
    found = _count(comparison.n_found)
    verdict = f"{found} of {comparison.n_patients:,} patients are also in {comparison.other}."
    table = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in facts(comparison)
    )
    body = [
        f"<p class='verdict'>{html.escape(verdict)}</p>",
        f"<table>{table}</table>",
        f"<p>{html.escape(explanation(comparison))}</p>",
        "<p>A patient found is one whose likeness stands beyond an empty gap above every second-best "
        f"likeness. Who is who was kept in memory alone; groups of {FEWER} patients are merged or not "
        "told.</p>",
    ]
    if rows:
        body.append("<h2>Patient-level AUROC, Non against the rest</h2>" + _score_table(rows))
    return body


def _score_table(rows: dict[str, dict]) -> str:
    titles = ("model and protocol", "patients", "this part", "everybody", "difference")
    lines = ["<tr>" + "".join(f"<th>{title}</th>" for title in titles) + "</tr>"]
    for name, row in rows.items():
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in (name, *_score_cells(row)))
        lines.append(f"<tr>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _score_cells(row: dict) -> list[str]:
    if "reason" in row:
        return ["–", row["reason"]]
    score = row["person_auroc"]
    shown = (score, score["everybody"], score["difference"])
    return [f"{row['n_people']:,}", *(_interval_text(value) for value in shown)]


def _interval_text(score: dict | None) -> str:
    if score is None or score["value"] is None:
        return "–"
    if score["ci"] is None:
        return f"{score['value']:.3f}"
    return f"{score['value']:.3f} [{score['ci'][0]:.3f}, {score['ci'][1]:.3f}]"


def write_scores(
    path: Path, comparison: Comparison, rows: dict[str, dict], cohort_sha256: str
) -> None:
    """Writes the aggregate atomically: counts, ages by class, the gap and scores; nothing about any one
    patient."""
    write_json(
        path,
        {
            "schema_version": SCHEMA_VERSION,
            "other": comparison.other,
            "age_range": comparison.age_range,
            "n_patients": comparison.n_patients,
            "n_other": comparison.n_other,
            "n_found": told(comparison.n_found),
            "n_part": told(comparison.n_part),
            "by_class": comparison.classes,
            "not_found_by_class": comparison.missing,
            "gap": list(comparison.gap),
            "rows": rows,
            "cohort_sha256": cohort_sha256,
        },
    )
