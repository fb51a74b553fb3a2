"""The audit of one image set against another: what is shared, in words and as a file."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.audit.ages import (
    FEWER,
    SCHEMA_VERSION,
    by_class,
    class_groups,
    count_or_fewer,
    counts_by_class,
    part_of_age,
)
from utils.audit.matching import OtherSet, find_shared
from utils.cohort import Cohort, RawImages
from utils.cohort.order import members_of
from utils.utils_funcs import write_json


@dataclass(frozen=True)
class Comparison:
    """Two sets compared, as counts alone: the content of page, terminal and file.

    Attributes:
        other: name of the other set.
        n_patients, n_other: patients of either set.
        n_found: patients of this set that the other one shows too.
        n_part: those of them whose age lies in the range; all of them where no ages are given.
        repeats: further patients of the other set that show a patient who was found already.
        gap: strongest rejected and weakest accepted correlation.
        orientation: quarter turns, and whether mirrored, that lay the other set on this one.
        classes: of the part, see `by_class`.
        missing: for the same classes, how many patients of this set were not found, a number or
            `FEWER`.
        age_range: in words; None where no ages are given.
        without_age: found patients of unknown age.
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
    """Compares two sets.

    Args:
        raw: this set; its labels index its classes.
        cohort: of this set.
        ages: id → years of the other set; None takes all patients found as the part.
        age_from, age_to: least and greatest age of the part, in years.

    Returns:
        The comparison, and the ids (K,) of the part's patients, which are for scoring in memory
        alone.

    Raises:
        NoGapError: nothing separates shared patients from look-alikes.
    """
    shared = find_shared(raw, cohort, other)
    part = (
        None if ages is None else part_of_age(shared, other, ages, age_from=age_from, age_to=age_to)
    )
    patients = shared.patient_id if part is None else part.patient_id
    label_of = _label_of_patients(raw, cohort)
    labels = np.array([label_of[patient] for patient in patients.tolist()], np.int64)
    groups = class_groups(np.bincount(labels, minlength=len(raw.classes)).tolist())
    absent = set(label_of) - set(shared.patient_id.tolist())
    labels_of_absent = np.array([label_of[patient] for patient in absent], np.int64)
    low, high = shared.gap
    comparison = Comparison(
        other=other_name,
        n_patients=shared.n_patients,
        n_other=shared.n_other,
        n_found=len(shared.patient_id),
        n_part=len(patients),
        repeats=shared.repeats,
        gap=(round(low, 3), round(high, 3)),
        orientation=shared.orientation,
        classes=by_class(labels, raw.classes, groups, None if part is None else part.age),
        missing=counts_by_class(labels_of_absent, raw.classes, groups),
        age_range=None if part is None else part.range_name,
        without_age=0 if part is None else part.without_age,
    )
    return comparison, patients


def _label_of_patients(raw: RawImages, cohort: Cohort) -> dict[int, int]:
    """Patient id → the label of most of the patient's slices."""
    real = np.flatnonzero(cohort.kind == "real")
    ids = cohort.patient_id[real]
    return {
        int(ids[rows[0]]): int(np.bincount(raw.label[real[rows]]).argmax())
        for rows in members_of(ids)
    }


# -- in words --------------------------------------------------------------------------------------


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
            f"the strongest rejected pair correlates at {low:.3f}, "
            f"the weakest accepted at {high:.3f}",
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


def _count(number: int) -> str:
    return FEWER if count_or_fewer(number) == FEWER else f"{number:,}"


def _orientation_name(orientation: tuple[int, bool]) -> str:
    turns, mirrored = orientation
    return f"turned by {90 * turns} degrees" + (", then mirrored" if mirrored else "")


def _class_text(classes: dict[str, dict]) -> str:
    texts = []
    for name, numbers in classes.items():
        age = ""
        if "age_mean" in numbers:
            age = f" (age {numbers['age_mean']:.1f} ± {numbers['age_sd']:.1f})"
        texts.append(f"{name} {numbers['n']}{age}")
    return ", ".join(texts) or FEWER


def explanation(comparison: Comparison) -> str:
    """What may be concluded about patients who were not found."""
    return (
        f"Not found: either not in {comparison.other}, or there under a slice that this set does "
        "not hold. Where that set holds all patients of its source in a range of ages, and this "
        "set comes from the same source, a patient not found lies outside the range, such as a "
        "younger one."
    )


# -- as HTML ---------------------------------------------------------------------------------------


def page_body(comparison: Comparison, rows: dict[str, dict] | None = None) -> list[str]:
    """The comparison as paragraphs and tables of HTML.

    Args:
        rows: scores on the part, of `utils.audit.ages.score_rows`.
    """
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
        "<p>A patient counts as found whose correlation lies beyond an empty gap above every "
        "second best correlation. Which patients correspond was kept in memory alone; groups of "
        f"{FEWER} patients are merged or not shown.</p>",
    ]
    if rows:
        body.append("<h2>Patient-level AUROC, Non against the rest</h2>" + _score_table(rows))
    return body


def _score_table(rows: dict[str, dict]) -> str:
    titles = ("model and protocol", "patients", "this part", "all patients", "difference")
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


# -- as a file -------------------------------------------------------------------------------------


def write_scores(
    path: Path, comparison: Comparison, rows: dict[str, dict], cohort_sha256: str
) -> None:
    """Writes the aggregate atomically as JSON: counts, ages by class, the gap and scores; nothing
    about a single patient."""
    write_json(
        path,
        {
            "schema_version": SCHEMA_VERSION,
            "other": comparison.other,
            "age_range": comparison.age_range,
            "n_patients": comparison.n_patients,
            "n_other": comparison.n_other,
            "n_found": count_or_fewer(comparison.n_found),
            "n_part": count_or_fewer(comparison.n_part),
            "by_class": comparison.classes,
            "not_found_by_class": comparison.missing,
            "gap": list(comparison.gap),
            "rows": rows,
            "cohort_sha256": cohort_sha256,
        },
    )
