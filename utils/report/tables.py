"""Records → tables, as Markdown or text."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from utils import metrics
from utils.config import PROFILES, folds_of
from utils.drawing import MISSING, show
from utils.evaluation.plan import AttackName
from utils.evaluation.rows import CONSTANT, TableRow, provenance, table_rows
from utils.evaluation.schema import Check, Record, Score, Scores, attacks_of
from utils.utils_funcs import CLASSES, read_json

#: Column title → (which of a row's scores, the name of the score, how it is printed).
COLUMNS = {
    "balanced accuracy, 3 classes (%)": ("slice", "balanced_accuracy_3", "percent"),
    "balanced accuracy, 4 classes (%)": ("slice", "balanced_accuracy", "percent"),
    "accuracy (%)": ("slice", "accuracy", "percent"),
    "recall of Non / Very mild / Mild or Moderate (%)": ("slice", "recall_3", "recalls"),
    "AUROC, Non vs rest": ("slice", "auroc", "decimal"),
    "kappa, quadratic": ("slice", "qwk", "decimal"),
    "macro-F1 (%)": ("slice", "macro_f1", "percent"),
    "ECE (%)": ("slice", "ece", "percent"),
    "by patient: AUROC": ("person", "auroc", "decimal"),
    "by patient, of 60 years and more: AUROC": ("age", "person_auroc", "decimal"),
    "by patient: balanced accuracy, 3 classes (%)": ("person", "balanced_accuracy_3", "percent"),
    "worst case at {eps}: balanced accuracy, 3 classes (%)": (
        "worst",
        "balanced_accuracy_3",
        "percent",
    ),
    "worst case at {eps}: balanced accuracy, 4 classes (%)": (
        "worst",
        "balanced_accuracy",
        "percent",
    ),
    "worst case at {eps}: AUROC": ("worst", "auroc", "decimal"),
}


BALANCED, AUROC, RECALLS = (
    "balanced accuracy, 3 classes (%)",
    "AUROC, Non vs rest",
    "recall of Non / Very mild / Mild or Moderate (%)",
)


WORST = "worst case at {eps}: balanced accuracy, 3 classes (%)"


PATIENT_BALANCED = "by patient: balanced accuracy, 3 classes (%)"


PATIENT_AUROC, AGE_AUROC = "by patient: AUROC", "by patient, of 60 years and more: AUROC"


#: The headline table: (protocol, column, short title). AUROC by patient comes first: it is the
#: steadiest score.
HEADLINE = (
    ("patient", PATIENT_AUROC, "`patient`: AUROC by patient"),
    ("patient", AGE_AUROC, "60+ (n = {n_part}): AUROC by patient"),
    ("patient", BALANCED, "`patient`: balanced accuracy (%)"),
    ("patient", RECALLS, "`patient`: recall of Non / Very mild / Mild or Moderate (%)"),
    ("patient", WORST, "`patient`: worst case at {eps} (%)"),
    ("slice", BALANCED, "`slice`: balanced accuracy (%)"),
    ("slice", WORST, "`slice`: worst case at {eps} (%)"),
)


@dataclass(frozen=True)
class AgeScore:
    """One score on the age-matched part of the patients, and on all of them."""

    part: Score
    everybody: Score


def score_of(row: TableRow, protocol: str, column: str) -> Score | None:
    """The score of a row in a column of one score; None where the row has none."""
    if protocol not in row.evaluations:
        return None
    place, name, _ = COLUMNS[column]
    if place == "worst":
        worst = row.worst_case(protocol)
        return None if worst is None else worst.scores.get(name)
    if place == "age":
        found = age_score(row, protocol, name)
        return None if found is None else found.part
    clean = row.evaluations[protocol].clean
    return (clean.patient if place == "person" else clean.slice).get(name)


def cell_text(row: TableRow, protocol: str, column: str, brief: bool = False) -> str:
    """A cell: the score with its interval, or the recalls of the three classes, which `brief` gives
    without intervals."""
    style = COLUMNS[column][2]
    if style != "recalls":
        return show(score_of(row, protocol, column), style, brief=brief)
    found = row.evaluations[protocol].clean.recalls if protocol in row.evaluations else None
    if not found:
        return MISSING
    if not brief:
        return " / ".join(show(recall) for recall in found["slice"])
    return " / ".join(
        MISSING if recall.value is None else f"{100 * recall.value:.0f}"
        for recall in found["slice"]
    )


#: Scores on the age-matched part are rounded; a larger difference on everybody means other
#: predictions.
AGE_TOLERANCE = 6e-4


@lru_cache(maxsize=4)
def ages(path: Path) -> dict:
    """The scores on the age-matched part at this path; empty where there are none."""
    return read_json(path) if path.is_file() else {}


def age_part(records: Iterable[Record]) -> dict:
    """The scores on the age-matched part that `python -m utils.audit --against --scores` left next
    to these records; empty where there are none or they are of another cohort."""
    for record in records:
        if record.path is None:
            continue
        found = ages(record.path.parents[1] / "Baselines" / "age.json")
        if found.get("cohort_sha256") == record.cohort_sha256:
            return found
    return {}


def age_score(row: TableRow, protocol: str, name: str) -> AgeScore | None:
    """A row's score on the age-matched part; None where there is none, or it is of predictions that
    were replaced since, which shows in their score on everybody."""
    if protocol not in row.records:
        return None
    scores = age_part([row.records[protocol]]).get("rows", {})
    of_row = scores.get("/".join(filter(None, (row.model, protocol, row.variant))), {})
    found, known = of_row.get(name), of_row.get("person_auroc")
    now = score_of(row, protocol, PATIENT_AUROC)
    if not found or not found.get("ci") or not known or now is None or now.value is None:
        return None
    if abs(known["everybody"]["value"] - now.value) > AGE_TOLERANCE:
        return None
    return AgeScore(
        Score.from_json(found, name), Score.from_json(found["everybody"], f"{name} of everybody")
    )


def row_number(row: TableRow, protocol: str) -> str:
    """What a row counts: `1,279 / 200 (80 attacked)`, slices and patients; patients alone where its
    decisions are of them."""
    clean, worst = row.evaluations[protocol].clean, row.worst_case(protocol)
    attacked = worst.n_slices if worst else clean.n_slices
    patients = "" if row.counts_patients else f" / {clean.n_patients:,}"
    return f"{clean.n_slices:,}{patients}{attacked_text(clean.n_slices, attacked)}"


def attacked_text(slices: int, attacked: int) -> str:
    """What to add to an n where attacks were run on fewer slices than clean scores are of."""
    return f" ({attacked:,} attacked)" if 0 < attacked < slices else ""


def _counted(rows: list[TableRow]) -> str:
    return "n patients" if rows[-1].counts_patients else "n slices / patients"


def _apart(rows: list[TableRow]) -> list[list[TableRow]]:
    """Rows that count slices, and rows that count patients with the constant answer: they share no
    table."""
    slices, patients = (
        [row for row in rows if row.counts_patients == counted] for counted in (False, True)
    )
    if all(row.model == CONSTANT for row in slices):
        return [rows]
    return [group for group in (slices, patients) if group]


def by_protocol(rows: list[TableRow]) -> Iterator[tuple[str, list[TableRow]]]:
    """Each protocol with the rows of one table: those that count slices, then those that count
    patients."""
    for protocol, group in itertools.product(rows[0].evaluations, _apart(rows)):
        if shown := [row for row in group if protocol in row.evaluations]:
            yield protocol, shown


def checks_text(row: TableRow, protocol: str) -> str:
    """How many of a trained row's sanity checks passed: `21/22`."""
    checks = row.checks(protocol) if row.trained else []
    return f"{sum(check.passed for check in checks)}/{len(checks)}" if checks else MISSING


def runs_text(row: TableRow) -> str:
    """What kind of runs a row is of: `real · cpu · random, fold 0 of 5`, by protocol where they
    differ."""
    if row.model == CONSTANT:
        return "control"
    runs = {
        protocol: f"{record.data} · {record.profile} · {record.init}{folds_text(row, protocol)}"
        for protocol, record in row.records.items()
    }
    if len(set(runs.values())) == 1:
        return next(iter(runs.values()))
    return "; ".join(f"{protocol}: {run}" for protocol, run in runs.items())


def folds_text(row: TableRow, protocol: str) -> str:
    """`, fold 0 of 5` where a row lacks folds that its profile has."""
    if not row.trained:
        return ""
    whole, have = len(folds_of(row.records[protocol].profile, protocol)), row.folds(protocol)
    return f", {_plural('fold', have)} of {whole}" if len(have) < whole else ""


def is_whole(row: TableRow) -> bool:
    """Whether a row has all folds of its profile. One that lacks some shares no table with rows of
    all patients."""
    return not any(folds_text(row, protocol) for protocol in row.records)


def full_table(rows: list[TableRow], protocol: str, eps: str) -> list[list[str]]:
    """Every column for these rows, the titles first."""
    columns = [column.format(eps=eps) for column in COLUMNS]
    titles = ["#", "row", *columns, _counted(rows), "checks passed", "data · profile · init"]
    lines = _lines(rows, protocol, COLUMNS)
    return [titles, *([*line, runs_text(row)] for row, line in zip(rows, lines, strict=True))]


def _lines(
    rows: list[TableRow],
    protocol: str,
    columns: Iterable[str],
    cell: Callable[[TableRow, str, str], str] = cell_text,
) -> list[list[str]]:
    """A line a row: its number and name, the columns, how many it counts, its checks."""
    return [
        [
            str(row.number),
            row.name,
            *(cell(row, protocol, column) for column in columns),
            row_number(row, protocol),
            checks_text(row, protocol),
        ]
        for row in rows
    ]


# -- notes beneath a table -------------------------------------------------------------------------


def failed_checks(rows: list[TableRow], protocol: str) -> str:
    """What each check that did not pass says, by row and fold; empty where all passed."""
    failed = [
        f"row {row.number}, `{row.name}`, fold {check.fold}, seed {check.seed}: {check.note}"
        + _missed_by_pgd(row, protocol, check)
        for row in rows
        if row.trained
        for check in row.checks(protocol)
        if not check.passed
    ]
    if not failed:
        return ""
    return (
        "\n\n<sub>Checks that did not pass: "
        + "; ".join(failed)
        + ". An image counts as misclassified in the worst case whichever attack misclassifies "
        "it; a failed check says that some attack was weaker than it should be.</sub>"
    )


def _missed_by_pgd(row: TableRow, protocol: str, check: Check) -> str:
    """Where FGSM misclassified images that PGD did not: how many, the class that PGD had pulled
    them towards, and FGSM's. Empty for any other check."""
    if check.name != "pgd_le_fgsm":
        return ""
    predictions, found = row.records[protocol].predictions, []
    of_run = (predictions["fold"] == check.fold) & (predictions["seed"] == check.seed)
    labels = predictions["labels"][of_run].astype(int)
    for eps, attacks in attacks_of(predictions, row.variant).items():
        logits = {
            parsed.without_steps: rows[of_run].astype(float)
            for name, rows in attacks.items()
            if (parsed := AttackName.parse(name)).view == "four" and not parsed.rounded
        }
        after_pgd, after_fgsm = check.figure.get(eps, (0.0, 0.0))
        if after_pgd <= after_fgsm or not {"pgd", "fgsm"} <= set(logits):
            continue
        both = metrics.scored(logits["pgd"]) & metrics.scored(logits["fgsm"])
        missed = both & (logits["pgd"].argmax(1) == labels) & (logits["fgsm"].argmax(1) != labels)
        of_label = np.eye(len(CLASSES), dtype=bool)[labels[missed]]
        pulled = np.where(of_label, -np.inf, logits["pgd"][missed]).argmax(1)
        found.append(
            f"at {eps} PGD missed {missed.sum()} of {both.sum()} images that FGSM misclassifies, "
            f"pulled towards {_answers(pulled)}, where FGSM makes them "
            + _answers(logits["fgsm"][missed].argmax(1))
        )
    return f" ({'; '.join(found)})" if found else ""


def _answers(classes: np.ndarray) -> str:
    """The classes among `classes` (N,), most frequent first: *Very mild* or *Mild*."""
    return " or ".join(
        f"*{CLASSES[label]}*" for label, _ in Counter(classes.tolist()).most_common()
    )


def bfloat16_searches(rows: list[TableRow], protocol: str) -> str:
    """Which runs were attacked by a search in bfloat16, and what a search in float32 still found
    there; empty where all searched in float32."""
    found = [
        f"row {row.number}, `{row.name}`, fold {check.fold}, seed {check.seed}: "
        + ", ".join(
            f"{wrong} of {asked} ({'three' if name.endswith('_merged') else 'four'} classes)"
            for name, (wrong, asked) in check.figure.items()
        )
        for row in rows
        if row.trained
        for check in row.checks(protocol)
        if check.name == "float32_finds_no_more"
    ]
    if not found:
        return ""
    return (
        "\n\n<sub>Attacks on these runs searched in bfloat16, on all others in float32; whether an "
        "image is misclassified is decided in float32 everywhere. How many of the sample's images "
        "that such a search found robust at the headline eps APGD-T in float32 then misclassified, "
        f"which the worst case counts: {'; '.join(found)}.</sub>"
    )


def machines(rows: list[TableRow], protocol: str) -> str:
    """Where each trained run was computed; empty where nothing was trained."""
    found: dict[str, dict[tuple[int, ...], list[int]]] = {}
    for row in rows:
        if not row.trained or protocol not in row.records:
            continue
        folds: dict[str, set[int]] = {}
        for run in row.records[protocol].runs:
            if run.fold in row.folds(protocol):
                folds.setdefault(run.hardware or "unknown machine", set()).add(run.fold)
        for machine, on_machine in folds.items():
            of_machine = found.setdefault(machine, {})
            of_machine.setdefault(tuple(sorted(on_machine)), []).append(row.number)
    if not found:
        return ""
    lines = "; ".join(
        f"{machine}: "
        + ", ".join(
            f"{_plural('row', numbers)} ({_plural('fold', folds)})"
            for folds, numbers in groups.items()
        )
        for machine, groups in sorted(found.items())
    )
    return (
        "\n\n<sub>Machines (+ joins the machines of one run that was resumed elsewhere): "
        f"{lines}.</sub>"
    )


def _plural(word: str, numbers: list[int] | tuple[int, ...]) -> str:
    return f"{word}{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


# -- Markdown and plain text -----------------------------------------------------------------------


def markdown(table: list[list[str]]) -> str:
    """A table, its titles first, as Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def _plain(table: list[list[str]]) -> str:
    widths = [max(len(cells[column]) for cells in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in table
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def command_of(row: TableRow) -> str:
    """The command that makes this row."""
    profiles = [record.profile for record in row.records.values()]
    profile = max(profiles, key=list(PROFILES).index)
    if row.model == CONSTANT:
        return "python -m utils.report table"
    notebooks = {"Baselines": "leak_audit", "Ensemble": "ensemble", "Sequence": "ensemble"}
    if row.model in notebooks:
        return f"python reproduce.py --profile {profile} --only {notebooks[row.model]}"
    return f"python -m utils.experiment grid --profile {profile} --models {row.model}"


def commands_text(rows: list[TableRow]) -> list[tuple[str, str, str]]:
    """(`Row 5` or `Rows 2, 3, 4`, their command, what kind of runs they are of)."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        numbers.setdefault((command_of(row), runs_text(row)), []).append(row.number)
    return [(_plural("Row", of), command, runs) for (command, runs), of in numbers.items()]


#: The tables of terminal and notebooks: short title → column.
SHORT_COLUMNS = {
    "bal.acc. 3": "balanced accuracy, 3 classes (%)",
    "bal.acc. 4": "balanced accuracy, 4 classes (%)",
    "AUROC": "AUROC, Non vs rest",
    "kappa": "kappa, quadratic",
    "macro-F1": "macro-F1 (%)",
    "ECE": "ECE (%)",
    "worst case": "worst case at {eps}: balanced accuracy, 3 classes (%)",
}


#: What notebooks add to them for a row that counts slices.
BY_PATIENT = {
    "by patient: bal.acc. 3": "by patient: balanced accuracy, 3 classes (%)",
    "by patient: AUROC": "by patient: AUROC",
    "recalls": RECALLS,
}


def _rows_of(records: list[Record]) -> list[TableRow]:
    return table_rows({(record.model, record.protocol): record for record in records})


def _meaning(records: list[Record]) -> str:
    return (
        "Percent, but AUROC and kappa; [95 % interval over resampled patients]; bal.acc. over 3 "
        "classes (Mild and Moderate merged) or 4;\n"
        "worst case: bal.acc. 3 over all L-infinity attacks at eps "
        f"{records[-1].headline_eps}; checks: how many sanity checks passed."
    )


def results_text(records: list[Record]) -> str:
    """Plain-text results of any set of records, for a terminal: a table a protocol, then what each
    row is and its command."""
    if not (rows := _rows_of(records)):
        return "No records yet: run `python reproduce.py`."
    parts = []
    for protocol, shown in by_protocol(rows):
        titles = ["#", protocol, *SHORT_COLUMNS, _counted(shown), "checks"]
        parts.append(_plain([titles, *_lines(shown, protocol, SHORT_COLUMNS.values(), _narrow)]))
    parts.append(f"{provenance(records)}\n{_meaning(records)}")
    parts.append(
        "\n".join(f"{which}: {command}   ({runs})" for which, command, runs in commands_text(rows))
    )
    return "\n\n".join(parts)


def scores_markdown(records: list[Record]) -> str:
    """What `results_text` says, as tables for a notebook, which has room for the scores by patient
    too."""
    if not (rows := _rows_of(records)):
        return "*No records yet: run `python reproduce.py`.*"
    parts = []
    for protocol, shown in by_protocol(rows):
        columns = SHORT_COLUMNS if shown[-1].counts_patients else SHORT_COLUMNS | BY_PATIENT
        titles = ["#", f"`{protocol}`", *columns, _counted(shown), "checks"]
        parts.append(markdown([titles, *_lines(shown, protocol, columns.values())]))
    meaning = _meaning(records)
    if not all(row.counts_patients for row in rows if row.trained):
        meaning += (
            " By patient: one decision a patient, by the mean of its slices' probabilities. "
            "Recalls: of Non / Very mild / Mild or Moderate."
        )
    parts += [provenance(records), meaning]
    parts.append(
        "\n".join(
            f"- {which}: `{command}` ({runs})" for which, command, runs in commands_text(rows)
        )
    )
    return "\n\n".join(parts)


def _narrow(row: TableRow, protocol: str, column: str) -> str:
    """`61.0 [55, 67]` or `0.81 [.75, .84]`, for a terminal; percentages of the interval are rounded
    outwards."""
    score, percent = score_of(row, protocol, column), COLUMNS[column][2] == "percent"
    if score is None or score.value is None:
        return MISSING
    value = f"{100 * score.value:.1f}" if percent else f"{score.value:.2f}"
    if score.ci is None:
        return value
    if percent:
        return f"{value} [{math.floor(100 * score.ci[0])}, {math.ceil(100 * score.ci[1])}]"
    low, high = (f"{bound:.2f}".replace("0.", ".", 1) for bound in score.ci)
    return f"{value} [{low}, {high}]"


def attacks_text(record: Record) -> str:
    """Every attack of one record at every eps, and the worst case over them, as text."""

    def line(names: tuple[str, str, str], scores: Scores, n_slices: int, *cost: str) -> list[str]:
        shown = (show(scores[name]) for name in ("balanced_accuracy_3", "accuracy"))
        return [*names, *shown, f"{n_slices:,}", *(cost or ("", ""))]

    titles = ["balanced accuracy, 3 classes (%)", "accuracy (%)", "n slices", "attacked", "seconds"]
    table = [["eps", "norm", "attack", *titles]]
    evaluation = record.evaluation
    clean = evaluation.clean
    table.append(line(("0", "", "clean"), clean.slice, clean.n_slices))
    for norm, sweep in {"linf": evaluation.attacks, **evaluation.other_norms}.items():
        for eps, attacks in sweep.items():
            for name, block in attacks.items():
                seconds = "" if block.seconds is None else f"{block.seconds:.1f}"
                cost = f"{block.n_attacked:,}", seconds
                table.append(line((eps, norm, name), block.scores, block.n_slices, *cost))
            if norm == "linf":
                worst = evaluation.worst_case[eps]
                table.append(line((eps, norm, "WORST CASE"), worst.scores, worst.n_slices))
    constant = record.constant_answer
    table.append(line(("any", "any", CONSTANT), constant.slice, constant.n_slices))
    title = f"{record.model} · {record.protocol} · {provenance([record])}"
    return f"{title}\n\n{_plain(table)}"
