"""The leak audit of any image folder as a page of HTML, and its command line."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from utils.audit.against import compare, explanation, facts, page_body, write_scores
from utils.audit.ages import in_model_order, read_ages, score_rows
from utils.audit.figures import links_figure, stack_figure
from utils.audit.matching import NoGapError, OtherSet, read_other
from utils.audit.measure import distance_to_training
from utils.cohort import (
    Cohort,
    NoPatientsError,
    RawImages,
    Recovery,
    build_cohort,
    cohort_for,
    cohort_identity,
    read_raw,
)
from utils.cohort.order import members_of
from utils.cohort.table import given_text
from utils.controls import as_rows, nearest_rows
from utils.evaluation.records import read_records
from utils.utils_funcs import ROOT, UserError, atomic_path, check_output

#: Exit code of the command where patients cannot be told apart or no gap separates shared ones.
NO_PATIENTS = 3

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:1000px;margin:2rem auto;padding:0 1rem;"
    "color:#222}"
    "img{max-width:100%;display:block;margin:1.5rem 0}table{border-collapse:collapse}"
    "th,td{text-align:left;padding:.3rem .8rem .3rem 0;border-bottom:1px solid #e6e6e6;"
    "font-weight:normal;vertical-align:top}"
    "th{color:#6b6b6b}.verdict{font-size:1.25rem;font-weight:bold}"
)


RECOVERED = (
    "Groups are recovered from pixels alone: images are linked by the correlation of a difference "
    "of two Gaussian blurs, and a gap in these links separates the groups. Each group is taken to "
    "be one patient."
)
GIVEN = (
    "Groups are the patients whose ids came with the images. The pixels check them: images are "
    "linked by the correlation of a difference of two Gaussian blurs, and where a gap in these "
    "links separates heads, they are compared with the ids."
)


# -- evidence --------------------------------------------------------------------------------------


def split_control(raw: RawImages, cohort: Cohort) -> dict[str, tuple[float, float]]:
    """How well the nearest neighbor on 32×32 pixels names the class.

    Returns:
        `published split` (where there is one) and `patients kept apart` (five groups of patients,
        real images only) → accuracy and balanced accuracy, from 0 to 1.
    """
    rows, result = as_rows(raw.images, 32), {}
    train, test = (np.flatnonzero(cohort.source_split == split) for split in ("train", "test"))
    if len(train) and len(test):
        closest = train[nearest_rows(rows[test], rows[train])]
        result["published split"] = _accuracies(cohort.label[test], cohort.label[closest])
    real = np.flatnonzero(cohort.kind == "real")
    fold = cohort.patient_id[real] % 5
    answers = np.empty(len(real), np.int64)
    for k in np.unique(fold):
        inside, others = real[fold == k], real[fold != k]
        answers[fold == k] = cohort.label[others[nearest_rows(rows[inside], rows[others])]]
    result["patients kept apart"] = _accuracies(cohort.label[real], answers)
    return result


def _accuracies(labels: np.ndarray, answers: np.ndarray) -> tuple[float, float]:
    right = labels == answers
    balanced = np.mean([right[labels == k].mean() for k in np.unique(labels)])
    return float(right.mean()), float(balanced)


def copies(raw: RawImages) -> tuple[int, int]:
    """How many images have the pixels of an earlier one, and how many images of a later part those
    of an image in an earlier part (train, validation, test)."""
    order = ("train", "validation", "test")
    parts: dict[bytes, list[int]] = {}
    for image, split in zip(raw.images, raw.source_split, strict=True):
        part = order.index(split) if split in order else -1
        parts.setdefault(hashlib.sha256(image.tobytes()).digest(), []).append(part)
    across = sum(
        part > min(known)
        for found in parts.values()
        if (known := [part for part in found if part >= 0])
        for part in known
    )
    return len(raw) - len(parts), across


def example_stacks(
    raw: RawImages, cohort: Cohort, columns: int = 16, seed: int = 0
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """One patient's slices in order, at most two rows of `columns`, and as many real images drawn
    at random."""
    groups = members_of(np.where(cohort.kind == "real", cohort.patient_id, -1))
    rng = np.random.default_rng(seed)
    members = max(groups, key=lambda group: (min(len(group), 2 * columns), -group[0]))
    ordered = members[np.argsort(cohort.slice_index[members])][: 2 * columns]
    drawn = rng.choice(np.flatnonzero(cohort.kind == "real"), len(ordered), replace=False)
    return [raw.images[i] for i in ordered], [raw.images[i] for i in drawn]


# -- the page --------------------------------------------------------------------------------------


def report_page(raw: RawImages, source: str) -> tuple[str, bool]:
    """The audit of one set as a self-contained page of HTML, and whether patients were found.

    Args:
        source: name of the set.
    """
    try:
        cohort, recovery = build_cohort(raw)
    except NoPatientsError as error:
        body = [
            f"<p class='verdict'>{html.escape(str(error))}</p>",
            "<p>So nothing can be said from the pixels about patients on both sides of a split. "
            "That is no proof that there are none.</p>",
            f"<p>Exact copies: {_copies_text(raw)}.</p>",
        ]
        if error.links is not None and len(error.links):
            body.append(_inline(links_figure(error.links, None, label=source)))
        return _page(source, raw, body), False
    return _page(source, raw, _findings(raw, cohort, recovery, source)), True


def _findings(raw: RawImages, cohort: Cohort, recovery: Recovery, source: str) -> list[str]:
    """Paragraphs, tables and figures of HTML."""
    ordered, drawn = example_stacks(raw, cohort)
    body = [
        f"<p class='verdict'>{html.escape(_verdict(cohort))}</p>",
        f"<table>{_table(_facts(raw, cohort, recovery))}</table>",
        _inline(stack_figure(ordered, drawn, label=source)),
    ]
    if len(recovery.links):
        body.insert(2, _inline(links_figure(recovery.links, recovery.search_gap, label=source)))
    if recovery.conflicts:
        conflicts = [
            (
                f"group {patient}",
                ", ".join(f"{raw.classes[label]}: {count}" for label, count in counts.items()),
            )
            for patient, counts in list(recovery.conflicts.items())[:50]
        ]
        body.append(f"<h2>Groups in more than one class</h2><table>{_table(conflicts)}</table>")
    return body


def _verdict(cohort: Cohort) -> str:
    shared = shared_between_parts(cohort)
    if not shared:
        return (
            "The set has no parts such as train and test, so no split is judged; split it by the "
            "groups found, never by image."
        )
    return " ".join(
        f"{pair.images:.1%} of the {pair.later} images that belong to a group have that group in "
        f"{pair.earlier} ({pair.both} of {pair.groups} {pair.later} groups)."
        for pair in shared
    )


@dataclass(frozen=True)
class SharedGroups:
    """The groups that two parts of a set share: of the later part's `groups`, `both` are in the
    earlier one too, with the share `images` of its images."""

    earlier: str
    later: str
    both: int
    groups: int
    images: float


def shared_between_parts(cohort: Cohort) -> list[SharedGroups]:
    """What each pair of parts shares, train and test first."""
    known = cohort.patient_id >= 0
    found = []
    for earlier, later in (("train", "test"), ("train", "validation"), ("validation", "test")):
        first, second = (
            cohort.patient_id[known & (cohort.source_split == part)] for part in (earlier, later)
        )
        if len(first) and len(second):
            both = set(first.tolist()) & set(second.tolist())
            inside = float(np.isin(second, sorted(both)).mean())
            groups = len(set(second.tolist()))
            found.append(SharedGroups(earlier, later, len(both), groups, inside))
    return found


def _facts(raw: RawImages, cohort: Cohort, recovery: Recovery) -> list[tuple[str, str]]:
    """Names and values of what the audit found."""
    groups = members_of(np.where(cohort.kind == "real", cohort.patient_id, -1))
    sizes = [len(members) for members in groups]
    kinds = Counter(cohort.kind.tolist())
    low, high = recovery.gap
    rows = [
        (
            "groups of slices (patients)",
            f"{len(sizes):,}, of {min(sizes)} to {max(sizes)} images "
            f"(median {int(np.median(sizes))})",
        ),
        ("images in a group", f"{kinds['real']:,}"),
        ("images in none (synthetic, or alone)", f"{kinds['synthetic']:,}"),
        ("exact copies", _copies_text(raw)),
        ("groups in more than one class", f"{len(recovery.conflicts):,}"),
    ]
    if np.isfinite(low):
        text = f"two groups reach a correlation of {low:.3f}, a slice joins its own at {high:.3f}"
        rows.insert(1, ("gap", text))
    if recovery.given is not None:
        rows.insert(0, ("ids", given_text(recovery.given)))
    distance = distance_to_training(cohort)
    if len(distance):
        name = "nearest training slice of a test image's own group"
        rows.append((name, _distances_text(distance)))
    controls = split_control(raw, cohort) if len(raw.classes) > 1 else {}
    for name, (accuracy, balanced) in controls.items():
        rows.append(
            (
                f"1-nearest neighbor on 32×32 pixels, {name}",
                f"{accuracy:.1%} accuracy, {balanced:.1%} balanced",
            )
        )
    return rows


def _copies_text(raw: RawImages) -> str:
    repeats, across = copies(raw)
    return f"{repeats:,}, of which {across:,} repeat an image of an earlier part"


def _distances_text(distance: np.ndarray) -> str:
    known = distance[distance >= 0]
    if not len(known):
        return "none"
    return (
        f"next to it for {np.mean(known <= 1):.1%}, "
        f"at most 3 slices away for {np.mean(known <= 3):.1%}"
    )


def _table(rows: list[tuple[str, str]]) -> str:
    return "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in rows
    )


def _inline(figure: Figure) -> str:
    """The figure as an image element that holds its pixels."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    pixels = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='' src='data:image/png;base64,{pixels}'>"


def _page(source: str, raw: RawImages, body: list[str]) -> str:
    splits = Counter(raw.source_split)
    counts = ", ".join(
        f"{count:,} {split or 'without a split'}" for split, count in sorted(splits.items())
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Leak audit</title>"
        f"<style>{STYLE}</style></head><body>"
        f"<h1>Leak audit of {html.escape(source)}</h1><p>{len(raw):,} images ({counts}) in "
        f"{len(raw.classes)} classes.</p>"
        + "\n".join(body)
        + f"<p>{GIVEN if any(raw.patient) else RECOVERED}</p></body></html>\n"
    )


# -- the command line ------------------------------------------------------------------------------


def main(
    raw: Path,
    /,
    out: Path | None = None,
    against: Path | None = None,
    other_name: str | None = None,
    id_pattern: str | None = None,
    ages: Path | None = None,
    id_column: str = "ID",
    age_column: str = "Age",
    age_from: float | None = None,
    age_to: float | None = None,
    scores: Path | None = None,
    records_root: Path = ROOT,
    skip_unreadable: bool = False,
) -> None:
    """Audits a folder or zip of class folders, or finds the patients that it shares with another
    set.

    Args:
        raw: class folders of any names, with or without train/ and test/ above them.
        out: the HTML page to write.
        against: another folder or zip of images; the audit is then of what the two sets share, as
            counts.
        other_name: what the page and the file of scores call the other set; its path's name by
            default.
        id_pattern: regular expression that finds a patient's id in the other set's file names, by
            its first group where it has one; without it each image is a patient of its own.
        ages: CSV of the other set's patients. The patients found in a range of ages are then the
            age-matched part.
        id_column: the column of `ages` that holds the ids.
        age_column: the column of `ages` that holds ages in years.
        age_from: the least age of the part.
        age_to: the greatest age of the part.
        scores: JSON file for the scores of committed predictions on the part, and on all patients.
        records_root: the folder whose assets/ hold the records to score.
        skip_unreadable: go on without images of this set that cannot be read.
    """
    if against is None:
        needs_other = {
            "--ages": ages,
            "--scores": scores,
            "--id-pattern": id_pattern,
            "--age-from": age_from,
            "--age-to": age_to,
        }
        given = [name for name, value in needs_other.items() if value is not None]
        if given:
            raise UserError(
                f"{' and '.join(given)} need another set of images: name it with --against."
            )
        if out is None:
            raise UserError("Name the page to write with --out.")
    for path in (out, scores):
        check_output(path, raw, against, ages)
    images = read_raw(raw, skip_unreadable=skip_unreadable, any_classes=True)
    if against is None:
        assert out is not None  # refused above
        _audit_one(images, raw, out)
        return
    if ages is None and (age_from, age_to) != (None, None):
        raise UserError("A range of ages needs a table of ages: name it with --ages.")
    _audit_two(
        in_model_order(images),
        raw.name,
        read_other(against, id_pattern),
        other_name or against.name,
        None if ages is None else read_ages(ages, id_column, age_column),
        age_from=age_from,
        age_to=age_to,
        out=out,
        scores=scores,
        records_root=records_root,
    )


def _audit_one(images: RawImages, raw: Path, out: Path) -> None:
    """Writes the page of one set; ends with `NO_PATIENTS` where none can be told apart."""
    page, found = report_page(images, raw.name)
    _write_page(page, out)
    if not found:
        print(
            f"No patients can be told apart in {raw}: its images show no gap between groups of "
            "slices. Augmented copies (turned, shifted or noisy) fill the gap: leave them out, or "
            "give patient ids in a manifest.",
            file=sys.stderr,
        )
        sys.exit(NO_PATIENTS)


def _audit_two(
    images: RawImages,
    source: str,
    other: OtherSet,
    other_name: str,
    ages: dict[str, float] | None,
    *,
    age_from: float | None,
    age_to: float | None,
    out: Path | None,
    scores: Path | None,
    records_root: Path,
) -> None:
    """Prints what two sets share, and writes it where a page or a file of scores is asked for."""
    try:
        cohort = cohort_for(images)
        comparison, part = compare(
            images, cohort, other, other_name, ages, age_from=age_from, age_to=age_to
        )
    except (NoPatientsError, NoGapError) as error:
        print(error, file=sys.stderr)
        sys.exit(NO_PATIENTS)
    for name, value in facts(comparison):
        print(f"{name}: {value}")
    print(explanation(comparison))
    rows: dict[str, dict] = {}
    if scores is not None:
        identity = cohort_identity(cohort)
        rows = score_rows(read_records(records_root).values(), part, identity)
        write_scores(scores, comparison, rows, identity)
        print(f"written to {scores}")
    if out is not None:
        _write_page(_page(source, images, page_body(comparison, rows)), out)


def _write_page(page: str, out: Path) -> None:
    with atomic_path(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"written to {out}")
