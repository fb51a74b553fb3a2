"""Shared patients by class and age, and scores on those whose age lies in a range."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils import metrics
from utils.audit.matching import OtherSet, SharedPatients
from utils.cohort import RawImages
from utils.evaluation.records import Arrays, Record, Rows, clean_of, variants_of
from utils.manifest.layout import class_of_folder
from utils.utils_funcs import CLASSES, UserError, progress

#: Of the file of scores that `utils.audit.against` writes.
SCHEMA_VERSION = 1

#: No count, age or score is given of fewer patients than this.
LEAST_GROUP = 5

FEWER = f"fewer than {LEAST_GROUP}"

#: Scores on the part have no more: each further one says more of which patients are in it.
DECIMALS = 3


# -- ages ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AgePart:
    """The found patients whose age lies in a range.

    Attributes:
        patient_id: (K,) this set's ids. They and the ages stay in memory.
        age: (K,) in years.
        bounds: least and greatest age, None where open.
        without_age: how many found patients have no known age.
    """

    patient_id: np.ndarray = field(repr=False)
    age: np.ndarray = field(repr=False)
    bounds: tuple[float | None, float | None]
    without_age: int

    @property
    def range_name(self) -> str:
        """The range in words, such as "60 years and more"."""
        low, high = self.bounds
        if low is None and high is None:
            return "any known age"
        if high is None:
            return f"{low:g} years and more"
        return f"up to {high:g} years" if low is None else f"{low:g} to {high:g} years"


def read_ages(path: Path, id_column: str = "ID", age_column: str = "Age") -> dict[str, float]:
    """Id → age in years from a CSV with a header; rows without an age are left out.

    Raises:
        UserError: no such file or column, an age that is no number, two ages of one id. The message
            shows no row's content.
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
    """The found patients whose age in the other set's table lies in [age_from, age_to].

    Args:
        ages: id in the other set → years.

    Raises:
        UserError: the table holds none of the other set's ids.
    """
    if not any(name in ages for name in other.ids):
        raise UserError(
            "No id in the file names of the other set is in the table of ages: name a regular "
            "expression that finds the id in a file's name (--id-pattern), and its column "
            "(--id-column)."
        )
    age = np.array([ages.get(other.ids[number], np.nan) for number in shared.other], np.float64)
    low = -np.inf if age_from is None else age_from
    high = np.inf if age_to is None else age_to
    inside = (age >= low) & (age <= high)
    return AgePart(
        shared.patient_id[inside], age[inside], (age_from, age_to), int(np.isnan(age).sum())
    )


# -- counts by class -------------------------------------------------------------------------------


def class_groups(counts: Sequence[int]) -> list[list[int]]:
    """Classes merged with their neighbors until each group holds `LEAST_GROUP` patients; none where
    all together do not.

    Args:
        counts: patients of each class, in the order of the classes.
    """
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
    """How many patients each group of classes has, and their ages.

    Args:
        labels: (K,) class of each patient.
        classes: names of the classes.
        groups: of `class_groups` for these labels, so that none is small.
        age: (K,) years, where known.

    Returns:
        Names of a group's classes → `n` and, where known, `age_mean` and `age_sd` in years.
    """
    result = {}
    for group in groups:
        members = np.isin(labels, group)
        numbers: dict[str, object] = {"n": int(members.sum())}
        if age is not None:
            numbers["age_mean"] = round(float(age[members].mean()), 1)
            numbers["age_sd"] = round(float(age[members].std(ddof=1)), 1)
        result[_group_name(group, classes)] = numbers
    return result


def counts_by_class(
    labels: np.ndarray, classes: Sequence[str], groups: Sequence[Sequence[int]]
) -> dict[str, int | str]:
    """Names of a group's classes → how many of the patients (K,) it has, or `FEWER`."""
    return {
        _group_name(group, classes): count_or_fewer(int(np.isin(labels, group).sum()))
        for group in groups
    }


def count_or_fewer(number: int) -> int | str:
    """A number of patients as it may be written: itself, or `FEWER`."""
    return number if number == 0 or number >= LEAST_GROUP else FEWER


def _group_name(group: Sequence[int], classes: Sequence[str]) -> str:
    return " and ".join(classes[label] for label in group)


# -- scores ----------------------------------------------------------------------------------------


def _rounded(score: dict) -> dict:
    """{"value", "ci"} with `DECIMALS`; no interval where no resample changes the score."""
    if score["value"] is None:
        return {"value": None, "ci": None}
    # Adding 0 makes -0.0 a plain 0.
    ends = None if score["ci"] is None else [round(end, DECIMALS) + 0.0 for end in score["ci"]]
    if ends and ends[0] == ends[1]:
        ends = None
    return {"value": round(score["value"], DECIMALS) + 0.0, "ci": ends}


def _difference(tally: metrics.Tally, inside: np.ndarray, name: str, n_boot: int) -> dict:
    """A score on some patients minus that on all, {"value", "ci"}.

    Both come from one resample of all patients, stratified by class, so that how many patients of
    the part are drawn varies as well.

    Args:
        inside: bool (P,), which of the tally's patients are in the part.
    """
    statistic = metrics.statistic_of(tally)

    def values(weights: np.ndarray) -> np.ndarray:
        return statistic(weights * inside)[name] - statistic(weights)[name]

    value = float(values(np.ones((1, len(inside))))[0])
    draws = values(metrics.resampling_weights(tally.class_of_patient, n_boot, 0))
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
    """One score on the part, on all patients ("everybody"), and their difference.

    The first and last are null where a class (for AUROC: Non or the rest) holds fewer than
    `LEAST_GROUP` patients of the part.
    """
    everybody = _rounded(metrics.score(logits, labels, patients, n_boot=n_boot)[name])
    ids, first = np.unique(patients, return_index=True)
    inside = np.isin(ids, part)
    kind = labels[first] > 0 if name == "auroc" else metrics.THREE[labels[first]]
    if min((inside & (kind == value)).sum() for value in np.unique(kind)) < LEAST_GROUP:
        return {"value": None, "ci": None, "everybody": everybody, "difference": None}
    rows = np.isin(patients, part)
    of_part = metrics.score(logits[rows], labels[rows], patients[rows], n_boot=n_boot)[name]
    difference = _difference(metrics.tally(logits, labels, patients), inside, name, n_boot)
    return {**_rounded(of_part), "everybody": everybody, "difference": _rounded(difference)}


def part_scores(
    predictions: Arrays, variant: str | None, part: np.ndarray, n_boot: int = 2000
) -> dict:
    """Scores of a model's clean answers on a part of the patients, and on all of them.

    Predictions are public, so a score without a handful of patients would reveal who these are:
    where fewer than `LEAST_GROUP` patients of the record are in the part, or outside it but some,
    there is a `reason` instead of scores.

    Args:
        predictions: the arrays of a record.
        part: (K,) patient ids.

    Returns:
        `n_people` of the part and `n_people_everybody`; `person_auroc`, `slice_auroc` (Non against
        the rest) and `balanced_accuracy_3` (slices, three classes), each {"value", "ci",
        "everybody", "difference"}.
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
    records: Iterable[Record], part: np.ndarray, cohort_sha256: str, n_boot: int = 2000
) -> dict[str, dict]:
    """The `part_scores` of every record and variant, by `<Model>/<protocol>[/<variant>]`.

    Raises:
        UserError: a record is of another cohort, so that its patient ids are other patients; or the
            part is small.
    """
    if len(part) < LEAST_GROUP:
        raise UserError(f"The part holds {FEWER} patients: no score of it is given.")
    rows = {}
    for record in progress(list(records), "scoring the part"):
        known = record.cohort_sha256
        if known != cohort_sha256:
            raise UserError(
                f"{record.model}/{record.protocol} is a record of the cohort {known[:8]}, these "
                f"images are the cohort {cohort_sha256[:8]}: the patient ids of one say nothing "
                "about the other."
            )
        for variant in variants_of(record.predictions):
            name = "/".join(filter(None, (record.model, record.protocol, variant)))
            rows[name] = part_scores(record.predictions, variant, part, n_boot)
    return rows


# -- identity --------------------------------------------------------------------------------------


def in_model_order(raw: RawImages) -> RawImages:
    """Gives images of the four known classes the labels of the models, 0 Non to 3 Moderate; images
    with any other class folder are returned as they are."""
    known = [label for label in map(class_of_folder, raw.classes) if label is not None]
    if len(known) < len(raw.classes):
        return raw
    return dataclasses.replace(raw, label=np.array(known)[raw.label], classes=CLASSES)
