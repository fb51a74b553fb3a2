"""Records → tables, figure files and the README's generated part; nothing here needs data, weights or a GPU.

    python -m utils.report figures   redraw every figure under assets/ from the committed records and predictions
    python -m utils.report table     print the results tables
    python -m utils.report recompute score every record again from its committed predictions
    python -m utils.report readme    rewrite README.md between `results:begin` and `results:end`
    python -m utils.report address   make badges, links and CITATION.cff follow pyproject's repository address
    python -m utils.report publish   copy a real-data run (default runs/demo-real) to the committed places

`--root DIR` is the tree that holds assets/: the repository (default), or a run such as runs/demo-phantom.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import shutil
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from utils import audit_figures, comparisons, diagnosis_report, figures, metrics
from utils.config import PROFILES, folds_of
from utils.figures import MISSING, save_figure, show
from utils.records import (
    CONSTANT,
    Entry,
    TableRow,
    attacks_of,
    headline_eps,
    provenance,
    read_entries,
    read_predictions,
    read_record,
    table_rows,
    summarise,
    without_rehearsals,
    write_record,
)
from utils.utils_funcs import (
    BACKBONES,
    CLASSES,
    MODELS,
    PROTOCOLS,
    ROOT,
    UserError,
    atomic_path,
    read_json,
    result_root,
)

__all__ = [
    "attacks_text",
    "draw_explanations",
    "draw_model_figures",
    "draw_result_figures",
    "findings_markdown",
    "original_markdown",
    "publish",
    "read_entries",
    "recompute",
    "read_predictions",
    "read_record",
    "results_markdown",
    "results_text",
    "save_figure",
    "scores_markdown",
    "summarise",
    "without_rehearsals",
    "write_readme",
    "write_record",
]

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
Entries = dict[tuple[str, str], Entry]

#: Column title → (where the score stands in a row's block, its name, how it is printed).
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
PATIENT_AUROC, AGE_AUROC = "by patient: AUROC", "by patient, of 60 years and more: AUROC"
#: The headline table: (protocol, column, short title). AUROC by patient comes first: it is the steadiest score.
HEADLINE = (
    ("patient", PATIENT_AUROC, "`patient`: AUROC by patient"),
    ("patient", AGE_AUROC, "60+ (n = {n_part}): AUROC by patient"),
    ("patient", BALANCED, "`patient`: balanced accuracy (%)"),
    ("patient", RECALLS, "`patient`: recall of Non / Very mild / Mild or Moderate (%)"),
    ("patient", WORST, "`patient`: worst case at {eps} (%)"),
    ("slice", BALANCED, "`slice`: balanced accuracy (%)"),
    ("slice", WORST, "`slice`: worst case at {eps} (%)"),
)


# ------------------------------------------------------------------------------------------------------- tables


def _score(row: TableRow, protocol: str, column: str) -> dict | None:
    if protocol not in row.blocks:
        return None
    block, (place, name, _) = row.blocks[protocol], COLUMNS[column]
    if place == "worst":
        return block["worst_case"].get(headline_eps(row.entries[protocol].record), {}).get(name)
    if place == "age":
        return _age_score(row, protocol, name)
    return block["clean"].get(place, {}).get(name)


def _cell(row: TableRow, protocol: str, column: str, brief: bool = False) -> str:
    if COLUMNS[column][2] == "recalls":
        return _recalls(row, protocol, brief)
    return show(_score(row, protocol, column), COLUMNS[column][2], brief=brief)


def _recalls(row: TableRow, protocol: str, brief: bool) -> str:
    """Recall of each of the three classes; with intervals unless `brief`. A row that counts patients has theirs."""
    found = row.blocks.get(protocol, {}).get("clean", {}).get("recall_3", {}).get("slice")
    if not found:
        return MISSING
    if brief:
        return " / ".join(
            MISSING if one["value"] is None else f"{100 * one['value']:.0f}" for one in found
        )
    return " / ".join(show(one) for one in found)


#: Scores on the age-matched part are rounded; a larger difference on everybody means other predictions.
AGE_TOLERANCE = 6e-4


@lru_cache(maxsize=4)
def _ages(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


def age_part(entries: Iterable[Entry]) -> dict:
    """The scores on the age-matched part that `python -m utils.audit --against --scores` left beside these records; empty
    where there are none or they are of another cohort."""
    for entry in entries:
        found = (
            _ages(entry.path.parents[1] / "Baselines" / "age.json")
            if len(entry.path.parents) > 1
            else {}
        )
        if found.get("cohort_sha256") == entry.record["cohort_sha256"]:
            return found
    return {}


def _age_score(row: TableRow, protocol: str, name: str) -> dict | None:
    if protocol not in row.entries:
        return None
    scores = age_part([row.entries[protocol]]).get("rows", {})
    of_row = scores.get("/".join(filter(None, (row.model, protocol, row.variant))), {})
    found = of_row.get(name)
    # A score of predictions that were replaced since is no score of this row: its value on everybody tells.
    known, now = of_row.get("person_auroc"), _score(row, protocol, PATIENT_AUROC)
    if not found or not found.get("ci") or not known or not now or now["value"] is None:
        return None
    return found if abs(known["everybody"]["value"] - now["value"]) <= AGE_TOLERANCE else None


def _number(row: TableRow, protocol: str) -> str:
    block = row.blocks[protocol]
    worst = (
        block["worst_case"]
        .get(headline_eps(row.entries[protocol].record), {})
        .get("n_slices", block["clean"]["n_slices"])
    )
    counted = block["clean"]["n_slices"]
    patients = "" if row.counts_patients else f" / {block['clean']['n_people']:,}"
    return f"{counted:,}{patients}{_attacked(counted, worst)}"


def _counted(rows: list[TableRow]) -> str:
    return "n persons" if rows[-1].counts_patients else "n slices / people"


def _apart(rows: list[TableRow]) -> list[list[TableRow]]:
    """Rows that count slices and rows that count persons, which share no table; persons alone keep their constant answer."""
    slices, patients = (
        [row for row in rows if row.counts_patients == counted] for counted in (False, True)
    )
    return (
        [group for group in (slices, patients) if group]
        if any(row.model != CONSTANT for row in slices)
        else [rows]
    )


def _checks(row: TableRow, protocol: str) -> str:
    checks = row.checks(protocol) if row.trained else []
    return f"{sum(bool(check['passed']) for check in checks)}/{len(checks)}" if checks else MISSING


def _runs(row: TableRow) -> str:
    if row.model == CONSTANT:
        return "control"
    runs = {
        protocol: f"{entry.record['data']} · {entry.record['profile']} · {entry.record['init']}{_folds(row, protocol)}"
        for protocol, entry in row.entries.items()
    }
    if len(set(runs.values())) == 1:
        return next(iter(runs.values()))
    return "; ".join(f"{protocol}: {run}" for protocol, run in runs.items())


def _folds(row: TableRow, protocol: str) -> str:
    """`, fold 0 of 5` where a row lacks folds that its profile has."""
    if not row.trained:
        return ""
    whole, have = (
        len(folds_of(row.entries[protocol].record["profile"], protocol)),
        row.folds(protocol),
    )
    return (
        f", fold{'s' * (len(have) > 1)} {', '.join(map(str, have))} of {whole}"
        if len(have) < whole
        else ""
    )


def _full_table(rows: list[TableRow], protocol: str, eps: str) -> list[list[str]]:
    titles = [
        "#",
        "row",
        *(column.format(eps=eps) for column in COLUMNS),
        _counted(rows),
        "checks passed",
        "data · profile · init",
    ]
    return [
        titles,
        *(
            [*cells, _runs(row)]
            for row, cells in zip(rows, _scores(rows, protocol, COLUMNS), strict=True)
        ),
    ]


def _scores(
    rows: list[TableRow], protocol: str, columns: Iterable[str], cell: Callable[..., str] = _cell
) -> list[list[str]]:
    """A line a row: its number and name, the columns, how many it counts, its checks."""
    return [
        [
            str(row.number),
            row.name,
            *(cell(row, protocol, column) for column in columns),
            _number(row, protocol),
            _checks(row, protocol),
        ]
        for row in rows
    ]


def _failed_checks(rows: list[TableRow], protocol: str) -> str:
    """What each check that did not pass says, by row and fold, as a note beneath the table; empty where all passed."""
    failed = [
        f"row {row.number}, `{row.name}`, fold {check['fold']}, seed {check['seed']}: {check['note']}"
        + _left_by_pgd(row, protocol, check)
        for row in rows
        if row.trained
        for check in row.checks(protocol)
        if not check["passed"]
    ]
    if not failed:
        return ""
    return (
        "\n\n<sub>Checks that did not pass: "
        + "; ".join(failed)
        + ". Whatever attack fells an image, the worst case counts it as "
        "fallen; a failed check says that some attack was weaker than it should be.</sub>"
    )


def _left_by_pgd(row: TableRow, protocol: str, check: dict) -> str:
    """Where PGD left images that FGSM felled: how many, the class that it had pulled them towards, and FGSM's. Empty for any
    other check."""
    if check["check"] != "pgd_le_fgsm":
        return ""
    predictions, told = row.entries[protocol].predictions, []
    own = (predictions["fold"] == check["fold"]) & (predictions["seed"] == check["seed"])
    labels = predictions["labels"][own].astype(int)
    for eps, attacks in attacks_of(predictions, row.variant).items():
        logits = {
            name.rstrip("0123456789"): rows[own].astype(float) for name, rows in attacks.items()
        }
        below, above = check["figure"].get(eps, (0.0, 0.0))
        if below <= above or not {"pgd", "fgsm"} <= set(logits):
            continue
        run = metrics.scored(logits["pgd"]) & metrics.scored(logits["fgsm"])
        left = run & (logits["pgd"].argmax(1) == labels) & (logits["fgsm"].argmax(1) != labels)
        pulled = np.where(
            np.eye(len(CLASSES), dtype=bool)[labels[left]], -np.inf, logits["pgd"][left]
        ).argmax(1)
        told.append(
            f"at {eps} PGD left {left.sum()} of {run.sum()} images that FGSM fells, pulled towards {_answers(pulled)}, where FGSM "
            f"makes them {_answers(logits['fgsm'][left].argmax(1))}"
        )
    return f" ({'; '.join(told)})" if told else ""


def _answers(classes: np.ndarray) -> str:
    """The classes among `classes`, most frequent first: *Very mild* or *Mild*."""
    return " or ".join(
        f"*{CLASSES[label]}*" for label, _ in Counter(classes.tolist()).most_common()
    )


def _bfloat16_searches(rows: list[TableRow], protocol: str) -> str:
    """Which units were attacked by a search in bfloat16, and what a search in float32 still found there, as a note beneath the
    table; empty where all searched in float32."""
    runs = [
        (row, check)
        for row in rows
        if row.trained
        for check in row.checks(protocol)
        if check["check"] == "float32_finds_no_more"
    ]
    if not runs:
        return ""
    told = "; ".join(
        f"row {row.number}, `{row.name}`, fold {check['fold']}, seed {check['seed']}: "
        + ", ".join(
            f"{fell} of {asked} ({'three' if name.endswith('_merged') else 'four'} classes)"
            for name, (fell, asked) in check["figure"].items()
        )
        for row, check in runs
    )
    return (
        "\n\n<sub>Attacks on these units searched in bfloat16, on all others in float32; what fell is decided in float32 everywhere. "
        "How many of the sample's images that such a search left standing at the headline eps then fell to APGD-T in float32, which "
        f"the worst case counts: {told}.</sub>"
    )


def _machines(rows: list[TableRow], protocol: str) -> str:
    """Where each trained unit ran, as a note beneath the table; empty where nothing was trained."""
    found: dict[str, dict[tuple[int, ...], list[int]]] = {}
    for row in rows:
        if not row.trained or protocol not in row.entries:
            continue
        folds: dict[str, list[int]] = {}
        for run in row.entries[protocol].record["units"]:
            if run["fold"] in row.folds(protocol):
                folds.setdefault(run["hardware"], []).append(run["fold"])
        for machine, own in folds.items():
            found.setdefault(machine, {}).setdefault(tuple(sorted(set(own))), []).append(row.number)
    if not found:
        return ""
    told = "; ".join(
        f"{machine}: "
        + ", ".join(
            f"{_plural('row', numbers)} ({_plural('fold', folds)})"
            for folds, numbers in groups.items()
        )
        for machine, groups in sorted(found.items())
    )
    return f"\n\n<sub>Machines (a + joins those that one unit went on on). {told}.</sub>"


def _plural(word: str, numbers: list[int] | tuple[int, ...]) -> str:
    return f"{word}{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _markdown(table: list[list[str]]) -> str:
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
    profile = max(
        (entry.record["profile"] for entry in row.entries.values()), key=list(PROFILES).index
    )
    if row.model == CONSTANT:
        return "python -m utils.report table"
    notebook = {"Baselines": "leak_audit", "Ensemble": "ensemble", "Sequence": "ensemble"}.get(
        row.model
    )
    return (
        f"python reproduce.py --profile {profile} --only {notebook}"
        if notebook
        else f"python -m utils.experiment grid --profile {profile} --models {row.model}"
    )


def _commands(rows: list[TableRow]) -> list[tuple[str, str, str]]:
    """(`Row 5` or `Rows 2, 3, 4`, their command, what kind of run they are)."""
    rows_of: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        rows_of.setdefault((command_of(row), _runs(row)), []).append(str(row.number))
    return [
        (f"Row{'s' * (len(of) > 1)} {', '.join(of)}", command, run)
        for (command, run), of in rows_of.items()
    ]


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
#: What notebooks show beside them for a row that counts slices.
BY_PATIENT = {
    "by patient: bal.acc. 3": "by patient: balanced accuracy, 3 classes (%)",
    "by patient: AUROC": "by patient: AUROC",
    "recalls": RECALLS,
}


def _rows_of(records: list[dict]) -> list[TableRow]:
    return table_rows(
        {(record["model"], record["protocol"]): Entry(Path(), record) for record in records}
    )


def _by_protocol(rows: list[TableRow]) -> Iterator[tuple[str, list[TableRow]]]:
    """Each protocol with the rows of one table: those that count slices, then those that count persons."""
    for protocol, group in itertools.product(rows[0].blocks, _apart(rows)):
        if shown := [row for row in group if protocol in row.blocks]:
            yield protocol, shown


def _provenance(records: list[dict]) -> str:
    return provenance([Entry(Path(), record) for record in records])


def _meaning(records: list[dict]) -> str:
    return (
        "Percent, but AUROC and kappa; [95 % interval over resampled patients]; bal.acc. over 3 classes (Mild "
        "and Moderate merged) or 4;\nworst case: bal.acc. 3 over all L-infinity attacks at eps "
        f"{headline_eps(records[-1])}; checks: how many sanity checks passed."
    )


def results_text(records: list[dict]) -> str:
    """Plain-text results of any set of records, for a terminal: one table a protocol, then what each row is and its command."""
    if not (rows := _rows_of(records)):
        return "No records yet: run `python reproduce.py`."
    parts = []
    for protocol, shown in _by_protocol(rows):
        titles = ["#", protocol, *SHORT_COLUMNS, _counted(shown), "checks"]
        parts.append(_plain([titles, *_scores(shown, protocol, SHORT_COLUMNS.values(), _narrow)]))
    parts.append(f"{_provenance(records)}\n{_meaning(records)}")
    parts.append(
        "\n".join(f"{which}: {command}   ({run})" for which, command, run in _commands(rows))
    )
    return "\n\n".join(parts)


def scores_markdown(records: list[dict]) -> str:
    """What `results_text` says, as tables for a notebook, which has the room to score persons by the mean of their slices too."""
    if not (rows := _rows_of(records)):
        return "*No records yet: run `python reproduce.py`.*"
    parts = []
    for protocol, shown in _by_protocol(rows):
        columns = SHORT_COLUMNS if shown[-1].counts_patients else SHORT_COLUMNS | BY_PATIENT
        parts.append(
            _markdown(
                [
                    ["#", f"`{protocol}`", *columns, _counted(shown), "checks"],
                    *_scores(shown, protocol, columns.values()),
                ]
            )
        )
    by_patient = (
        ""
        if all(row.counts_patients for row in rows if row.trained)
        else " By patient: one decision a patient, by the mean of its slices' probabilities. Recalls: of Non / Very mild / Mild or Moderate."
    )
    parts += [_provenance(records), _meaning(records) + by_patient]
    parts.append(
        "\n".join(f"- {which}: `{command}` ({run})" for which, command, run in _commands(rows))
    )
    return "\n\n".join(parts)


def _narrow(row: TableRow, protocol: str, column: str) -> str:
    """`61.0 [55, 67]` or `0.81 [.75, .84]`, for a terminal; percentages of the interval are rounded outwards."""
    score = _score(row, protocol, column)
    if not score or score["value"] is None:
        return MISSING
    if not score["ci"]:
        return (
            f"{100 * score['value']:.1f}"
            if COLUMNS[column][2] == "percent"
            else f"{score['value']:.2f}"
        )
    if COLUMNS[column][2] == "percent":
        value, low, high = (100 * x for x in (score["value"], *score["ci"]))
        return f"{value:.1f} [{math.floor(low)}, {math.ceil(high)}]"
    low, high = (f"{x:.2f}".replace("0.", ".", 1) for x in score["ci"])
    return f"{score['value']:.2f} [{low}, {high}]"


def attacks_text(record: dict) -> str:
    """Every attack of one record at every eps, and the worst case over them, as text."""
    table = [
        [
            "eps",
            "norm",
            "attack",
            "balanced accuracy, 3 classes (%)",
            "accuracy (%)",
            "n slices",
            "attacked",
            "seconds",
        ]
    ]
    clean = record["clean"]
    table.append(
        [
            "0",
            "",
            "clean",
            show(clean["slice"]["balanced_accuracy_3"]),
            show(clean["slice"]["accuracy"]),
            f"{clean['n_slices']:,}",
            "",
            "",
        ]
    )
    for norm, sweep in {"linf": record["attacks"], **record["other_norms"]}.items():
        for eps, attacks in sweep.items():
            for name, block in attacks.items():
                seconds = (
                    f"{block['seconds']:.1f}"
                    if isinstance(block.get("seconds"), int | float)
                    else ""
                )
                table.append(
                    [
                        eps,
                        norm,
                        name,
                        show(block["balanced_accuracy_3"]),
                        show(block["accuracy"]),
                        f"{block['n_slices']:,}",
                        f"{block['n_attacked']:,}",
                        seconds,
                    ]
                )
            if norm == "linf":
                worst = record["worst_case"][eps]
                table.append(
                    [
                        eps,
                        norm,
                        "WORST CASE",
                        show(worst["balanced_accuracy_3"]),
                        show(worst["accuracy"]),
                        f"{worst['n_slices']:,}",
                        "",
                        "",
                    ]
                )
    constant = show(record["constant_answer"]["slice"]["balanced_accuracy_3"])
    table.append(
        [
            "any",
            "any",
            CONSTANT,
            constant,
            show(record["constant_answer"]["slice"]["accuracy"]),
            f"{record['constant_answer']['n_slices']:,}",
            "",
            "",
        ]
    )
    return f"{record['model']} · {record['protocol']} · {provenance([Entry(Path(), record)])}\n\n{_plain(table)}"


# -- comparisons -----------------------------------------------------------------------------------------------------------


def _attacked(slices: int, attacked: int) -> str:
    """What to add to an n where attacks were run on fewer slices than clean scores are of."""
    return f" ({attacked:,} attacked)" if 0 < attacked < slices else ""


#: How a verdict after Holm's correction stands in a table.
VERDICTS = {"better": " ▲", "worse": " ▼", "undecided": ""}
ONE_SEED = "Each network is one training (seed 0): the intervals hold the patients' variance alone, not that of another seed."


def _difference(comparison: comparisons.Comparison, style: str) -> str:
    return show(comparison.score, style, signed=True) + VERDICTS[comparison.verdict]


def _legend(found: list[comparisons.Comparison], of: str) -> str:
    return (
        f"<sub>▲ {of} better, ▼ worse at 5 % after Holm's correction for the {len(found)} comparisons of this table; the intervals are "
        f"not corrected. {ONE_SEED}</sub>"
    )


def _pivot(
    found: list[comparisons.Comparison],
    column_of: Callable[[comparisons.Comparison], str],
    style: str,
    corner: str,
) -> str:
    columns = list(dict.fromkeys(column_of(one) for one in found))
    table = [[corner, *columns, "n slices / patients"]]
    for row in dict.fromkeys(one.first.number for one in found):
        own = {column_of(one): one for one in found if one.first.number == row}
        first = next(iter(own.values()))
        table.append(
            [
                f"{row} `{first.first.name}`",
                *(_difference(own[name], style) if name in own else MISSING for name in columns),
                f"{first.n_slices:,} / {first.n_patients:,}",
            ]
        )
    return _markdown(table)


def controls_markdown(rows: list[TableRow]) -> str:
    """Networks against controls with patients kept apart: AUROC by patient, and robust accuracy against the exact one."""
    clean = comparisons.patient_auroc_against_controls(rows)
    if not clean:
        return ""
    parts = [
        "**Networks against controls, patients kept apart**: AUROC by patient of the network minus that of the control, paired by "
        "patient [95 % interval]:",
        _pivot(
            clean, lambda one: f"− {one.second.number} `{one.second.name}`", "decimal", "network"
        ),
        _legend(clean, "the network"),
    ]
    sweep = [eps for eps in ("1/255", "2/255", "4/255", "8/255")]
    if robust := comparisons.robust_accuracy_against_exact(rows, sweep):
        control = robust[0].second
        parts += [
            f"**Robust accuracy against a linear model whose robust accuracy is exact** (row {control.number}, `{control.name}`; no "
            "attack can be too weak to find it): balanced over three classes, network minus control, points, on the slices that the "
            "network was attacked on:",
            _pivot(robust, lambda one: f"at {one.what}", "percent", "network"),
            _legend(robust, "the network"),
        ]
    return "\n\n".join(parts)


def _counterparts_markdown(rows: list[TableRow], protocols: list[str], eps: str) -> str:
    """What adversarial training costs on clean images and buys in the worst case, paired by patient."""
    found = comparisons.counterpart_comparisons(rows, protocols)
    if not found:
        return ""
    names = {"clean": "clean", "worst_case": f"worst case at {eps}"}
    table = [
        [
            "adversarial − clean, points",
            *(f"`{protocol}`: {name}" for protocol in protocols for name in names.values()),
            "n slices / patients (attacked)",
        ]
    ]
    for number in dict.fromkeys(one.first.number for one in found):
        own = {one.what: one for one in found if one.first.number == number}
        pair = next(iter(own.values()))
        sizes = []
        for protocol in protocols:
            if f"{protocol} clean" in own:
                clean, attacked = own[f"{protocol} clean"], own.get(f"{protocol} worst_case")
                sizes.append(
                    f"{clean.n_slices:,} / {clean.n_patients:,}{_attacked(clean.n_slices, attacked.n_slices if attacked else 0)}"
                )
        cells = [
            _difference(own[f"{protocol} {what}"], "percent")
            if f"{protocol} {what}" in own
            else MISSING
            for protocol in protocols
            for what in names
        ]
        table.append(
            [
                f"{pair.first.number} `{pair.first.name}` − {pair.second.number} `{pair.second.name}`",
                *cells,
                "; ".join(sizes),
            ]
        )
    title = (
        "**What adversarial training costs and buys**: differences in balanced accuracy over three classes, paired by patient "
        "[95 % interval]. That a cost is not seen is no proof that there is none:"
    )
    return "\n\n".join(
        [title, _markdown(table), _legend(found, "the adversarially trained network")]
    )


def withdrawn_markdown(rows: list[TableRow]) -> str:
    """What stood here and why it no longer does, with the numbers that show it."""
    entries = [
        entry
        for row in rows
        if row.model in MODELS and row.variant is None
        for entry in row.entries.values()
    ]
    entries = [entry for entry in entries if "neighbour" in comparisons.pooled_probe(entry)]
    if not entries:
        return ""
    apart, near = (
        comparisons.probe_differences(entries, what) for what in ("recognised", "neighbour")
    )
    (below, above), (below_near, above_near) = (
        comparisons.away_from_zero(apart),
        comparisons.away_from_zero(near),
    )
    return (
        "**Withdrawn: *the attack breaks the leak before the medicine*.** A table here compared the two protocols' models, which differ "
        "in augmentation, number of steps and fit as well as in the split, and asked by the nearest neighbor of a network's features "
        f"whether patients or diagnoses go first under PGD at {comparisons.PROBE_EPS}. The answer hangs on a choice of the probe: of "
        f"{len(apart)} records the patients seemed to go first in {below} and the diagnoses in {above} where slices nearer than four "
        f"did not count, in {below_near} and {above_near} of {len(near)} where all slices count (intervals beside 0, uncorrected). It "
        "takes one network that answers both questions, about slices of its training patients and about slices of others; until that "
        "is run nothing is claimed."
    )


# ------------------------------------------------------------------------------------------------------- figures


def draw_model_figures(root: Path | str, model: str) -> dict[Path, Figure]:
    """Writes and returns the figures of one model, path → figure; both protocols are panels of each."""
    own = {
        protocol: entry
        for (name, protocol), entry in read_entries(root).items()
        if name == model and "clean" in entry.record
    }
    own = without_rehearsals(own)
    drawn = {}
    for name, draw in figures.MODEL_FIGURES.items():
        if figures.has_content(name, own):
            figure = draw(model, own)
            drawn[save_figure(figure, Path(root) / "assets" / model / f"{name}.png")] = figure
    return drawn


def draw_result_figures(root: Path | str) -> dict[Path, Figure]:
    """Writes and returns the figures that compare models, path → figure."""
    entries, rows = _compared(without_rehearsals(read_entries(root)))
    drawn = {}
    for name, draw in figures.RESULT_FIGURES.items():
        if name in _drawable(entries, rows):
            figure = draw(rows, list(entries.values()))
            drawn[save_figure(figure, Path(root) / "assets" / "results" / f"{name}.png")] = figure
    return drawn


def _compared(entries: Entries) -> tuple[Entries, list[TableRow]]:
    """What the comparing figures show: rows that count persons have figures of their own (`utils/diagnosis_report.py`), and rows
    that lack folds stand beside no row of all patients."""
    rows = [
        row
        for row in table_rows(entries)
        if not row.counts_patients and (_is_whole(row) or not row.trained)
    ]
    kept = {row.model for row in rows}
    return {key: entry for key, entry in entries.items() if entry.model in kept}, rows


def explained_path(record: Path | str) -> Path:
    """`<protocol>_explained.npz` beside `<protocol>.json`: the few slices, and a model's maps of them."""
    return Path(record).with_name(f"{Path(record).stem}_explained.npz")


def draw_explanations(root: Path | str) -> dict[Path, Figure]:
    """Writes and returns, for each protocol, Grad-CAM of every model on the same few slices, path → figure."""
    from utils import grad_cam  # torch, which nothing else here needs

    entries, drawn = without_rehearsals(read_entries(root)), {}
    for protocol in PROTOCOLS:
        own = [
            entry
            for entry in entries.values()
            if entry.protocol == protocol and explained_path(entry.path).is_file()
        ]
        found = {}
        for entry in own:
            with np.load(explained_path(entry.path), allow_pickle=False) as file:
                found[entry.model] = {key: file[key] for key in file.files}
        shown = {
            name: kept
            for name, kept in found.items()
            if kept["files"].tolist() == next(iter(found.values()))["files"].tolist()
        }
        if shown:
            rows = {
                name: (kept["images"][:, None] / 255, kept["maps"] / 255, kept["probabilities"])
                for name, kept in shown.items()
            }
            figure = grad_cam.comparison_figure(
                rows,
                next(iter(shown.values()))["labels"],
                title=f"Grad-CAM, the same slices for all models · {protocol} · {provenance(own)}",
            )
            drawn[
                save_figure(
                    figure,
                    Path(root) / "assets" / "results" / f"explanations_{protocol}.png",
                    dpi=100,
                    colours=192,
                )
            ] = figure
    return drawn


def _drawable(entries: Entries, rows: list[TableRow]) -> list[str]:
    """The study figures that these records have something for."""
    if not any(row.trained for row in rows):
        return ["headline"] if rows else []
    transfer = any(figures.transfer_cells([*entries.values()], protocol) for protocol in PROTOCOLS)
    has = {"transfer": transfer, "confusion_matrices": any(model in MODELS for model, _ in entries)}
    return [name for name in figures.RESULT_FIGURES if has.get(name, True)]


def draw_audit_figures(root: Path | str) -> dict[str, Figure]:
    """Writes and returns the figures of the leak audit, name → figure, from its small arrays and records under `root`."""
    folder = Path(root) / "assets" / "Baselines"
    found = {
        protocol: read_record(folder / f"{protocol}.json")
        for protocol in PROTOCOLS
        if (folder / f"{protocol}.json").is_file()
    }
    drawn = audit_figures.audit_figures(audit_figures.read_arrays(folder), found)
    for name, figure in drawn.items():
        save_figure(figure, folder / f"{name}.png")
    return drawn


def draw_figures(root: Path | str) -> list[Path]:
    """Redraws every figure that follows from the records under `root`; returns the paths."""
    models = dict.fromkeys(model for model, _ in read_entries(root))
    paths = [path for model in models for path in draw_model_figures(root, model)] + list(
        draw_result_figures(root)
    )
    paths += list(draw_explanations(root))
    paths += list(diagnosis_report.draw_figures(root))
    folder = Path(root) / "assets" / "Baselines"
    if (folder / audit_figures.ARRAYS).is_file():
        paths += [folder / f"{name}.png" for name in draw_audit_figures(root)]
    return paths


# -------------------------------------------------------------------------------------------------------- README

CAPTIONS = {
    "robustness": "Worst case over every L∞ attack of the suite against eps. What falls at one eps counts as fallen "
    "at every larger one, so the curves cannot rise.",
    "trade_off": "What adversarial training costs (leftwards) and buys (upwards): an arrow leads from each clean "
    "model to its adversarially trained counterpart.",
    "per_class": "The same by class. Moderate is two people: no claim rests on it.",
    "confusion_matrices": "What each model decides on clean images: percent of the true class, and slices.",
    "reliability": "Confidence against accuracy; open marks, where present, after temperature scaling on validation "
    "images.",
    "transfer": "Momentum PGD on one model, shown to another; the diagonal is PGD on the model itself.",
}


def _clean_size(row: TableRow, protocol: str) -> str:
    """`n = 1,280 slices of 40 people, fold 0 of 5`: what the row's clean score under a protocol rests on."""
    return figures.size_of(row.blocks[protocol]["clean"]) + _folds(row, protocol)


def _attacked_size(row: TableRow, protocol: str = "patient") -> str:
    """`n = 80 slices of 40 people, fold 0 of 5`: what the row's worst case under a protocol was scored on."""
    entry = row.entries[protocol]
    return f"{figures.size_of(row.blocks[protocol]['worst_case'][headline_eps(entry.record)])}{_folds(row, protocol)}"


def _is_result(row: TableRow, protocol: str) -> bool:
    """Whether a row is more than a rehearsal under a protocol."""
    return protocol in row.entries and row.entries[protocol].record["profile"] != "demo"


def _findings(rows: list[TableRow], eps: str) -> str:
    """The abstract: a paragraph a question, in numbers, each with the row that bears it. A verdict stands here only where a
    paired interval, or a test corrected for the number of comparisons, bears it."""
    controls = {row.variant: row for row in rows if row.model == "Baselines"}
    networks = [row for row in rows if row.model in MODELS and _is_result(row, "patient")]
    said = [_said_of_the_split(controls)]
    if not networks and any(row.trained for row in rows):
        if any(_is_result(row, "patient") for row in controls.values()):
            return "\n\n".join(
                [
                    *filter(None, said),
                    "The models below were rehearsed only: no number of theirs is a finding.",
                ]
            )
        networks = [row for row in rows if row.model in MODELS and "patient" in row.blocks]
    said += [
        _said_of_clean_images(rows, networks),
        _said_of_controls(rows),
        _said_of_robustness(rows, networks, eps),
        _said_of_adversarial_training(rows, eps),
        _said_of_age(networks, controls),
    ]
    return "\n\n".join(filter(None, said))


def _value(row: TableRow, protocol: str, column: str) -> float | None:
    return (_score(row, protocol, column) or {}).get("value")


def _said_of_the_split(controls: dict[str, TableRow]) -> str:
    if not {"nearest_neighbour", "nearest_neighbour_permuted"} <= set(controls):
        return ""
    plain, permuted = controls["nearest_neighbour"], controls["nearest_neighbour_permuted"]
    if "slice" not in plain.blocks or "patient" not in plain.blocks:
        return ""
    return (
        f"**The split.** Under the published split a nearest neighbor with nothing learned (row {plain.number}) reaches a balanced "
        f"accuracy over three classes of {_cell(plain, 'slice', BALANCED)} %, and with the patients' labels permuted (row "
        f"{permuted.number}) still {_cell(permuted, 'slice', BALANCED)} %: the split rewards recognizing patients. With patients kept "
        f"apart it reaches {_cell(plain, 'patient', BALANCED)} %."
    )


def _said_of_clean_images(rows: list[TableRow], networks: list[TableRow]) -> str:
    both = [
        row
        for row in networks
        if _value(row, "slice", BALANCED) is not None
        and _value(row, "patient", BALANCED) is not None
    ]
    if not both:
        return ""
    best = max(both, key=lambda row: _value(row, "slice", BALANCED))
    return (
        f"**Clean images.** Under the published split the network that scores highest there, `{best.name}` (row {best.number}), reaches "
        f"{_cell(best, 'slice', BALANCED)} % ({_clean_size(best, 'slice')}). With patients kept apart the same kind of network reaches "
        f"{_cell(best, 'patient', BALANCED)} % ({_clean_size(best, 'patient')}), where always answering *Non* (row 1) gives "
        f"{_cell(rows[0], 'patient', BALANCED)} %."
    )


def _said_of_controls(rows: list[TableRow]) -> str:
    found = comparisons.patient_auroc_against_controls(rows)
    if not found:
        return ""
    counts = Counter(one.verdict for one in found)
    network = max(
        (one.first for one in found), key=lambda row: _value(row, "patient", PATIENT_AUROC)
    )
    control = max(
        (one.second for one in found), key=lambda row: _value(row, "patient", PATIENT_AUROC)
    )
    pair = next(one for one in found if (one.first, one.second) == (network, control))
    better = (
        "No comparison finds a network better at ranking unseen patients than"
        if not counts["better"]
        else (
            f"{counts['better']} of {len(found)} comparisons find a network better at ranking unseen patients than"
        )
    )
    return (
        f"**Networks against controls.** {better} small models without a hidden layer: of {len(found)} paired comparisons of AUROC by "
        f"patient, {counts['better']} favor the network and {counts['worse']} the control after Holm's correction. The network that "
        f"ranks best, `{network.name}` (row {network.number}), has {_cell(network, 'patient', PATIENT_AUROC)}; `{control.name}` (row "
        f"{control.number}) has {_cell(control, 'patient', PATIENT_AUROC)}; the difference is {show(pair.score, 'decimal', signed=True)} "
        f"(n = {pair.n_patients} patients)."
    )


def _said_of_robustness(rows: list[TableRow], networks: list[TableRow], eps: str) -> str:
    attacked = [row for row in networks if _value(row, "patient", WORST) is not None]
    if not attacked:
        return ""
    best = max(attacked, key=lambda row: _value(row, "patient", WORST))
    said = [
        f"**Under attack.** At eps {eps}, over all attacks of the suite, the network that keeps most with patients apart is "
        f"`{best.name}` (row {best.number}): {_cell(best, 'patient', WORST)} % ({_attacked_size(best)})."
    ]
    exact = [
        one for one in comparisons.robust_accuracy_against_exact(rows, [eps]) if one.first == best
    ]
    if exact:
        verdict = {
            "better": "more than",
            "worse": "less than",
            "undecided": "not distinguishable from",
        }[exact[0].verdict]
        control = exact[0].second
        said.append(
            f"That is {verdict} what a robust linear model keeps, whose robust accuracy is exact (row {control.number}, "
            f"{_cell(control, 'patient', WORST)} % of all slices): network minus linear model "
            f"{show(exact[0].score, signed=True)} points on the same slices."
        )
    against = comparisons.robust_accuracy_against_constant(rows, eps)
    told = {"better": "above", "undecided": "not distinguishable from", "worse": "below"}
    groups = [
        f"{word} the constant answer: "
        + ", ".join(
            f"`{one.first.name}` (row {one.first.number}) {_cell(one.first, 'patient', WORST)} %"
            for one in against
            if one.verdict == verdict
        )
        for verdict, word in told.items()
        if any(one.verdict == verdict for one in against)
    ]
    if groups:
        said.append(f"After Holm's correction for {len(against)} comparisons, {'; '.join(groups)}.")
    return " ".join(said)


def _said_of_adversarial_training(rows: list[TableRow], eps: str) -> str:
    found = {
        (one.first.number, one.what): one
        for one in comparisons.counterpart_comparisons(rows, ["patient"])
    }
    lines = []
    for row in rows:
        clean, attacked = (
            found.get((row.number, "patient clean")),
            found.get((row.number, "patient worst_case")),
        )
        if clean and attacked:
            lines.append(
                f"`{row.name}` (row {row.number}) {show(attacked.score, signed=True)} points in the worst case and "
                f"{show(clean.score, signed=True)} on clean images"
            )
    if not lines:
        return ""
    return (
        f"**Adversarial training**, paired by patient with the clean counterpart at {eps}: {'; '.join(lines)}. These are single "
        "trainings: the intervals hold the patients' variance and not that of a seed, so a cost that is not seen is not shown to be "
        "absent."
    )


def _said_of_age(networks: list[TableRow], controls: dict[str, TableRow]) -> str:
    part = age_part(
        row.entries["patient"]
        for row in [*networks, *controls.values()]
        if "patient" in row.entries
    )
    shown = [
        row
        for row in [*networks, *controls.values()]
        if row.model in BACKBONES or row.variant == "atrophy_scan"
    ]
    lines = []
    for row in shown:
        if score := _age_score(row, "patient", "person_auroc"):
            lines.append(
                f"`{row.name}` (row {row.number}) {show(score['everybody'], 'decimal')} on all, {show(score, 'decimal')} on these"
            )
    if not lines:
        return ""
    return (
        f"**Age.** {part['n_part']} of the {part['n_patients']} patients are also in {part['other']}, found by their pixels. Not found "
        f"are {_not_found(part)}: younger, not in it, or there under another slice. "
        f"AUROC by patient: {'; '.join(lines)}. A "
        "score on all patients is in part a score of age."
    )


def _not_found(part: dict) -> str:
    return ", ".join(
        f"{count} {name}" for name, count in part["not_found_by_class"].items() if count
    )


def _without_search_patients(rows: list[TableRow]) -> str:
    """The headline again for records whose search saw people that are test people of another fold."""
    lines, column = [], BALANCED
    for row in rows[1:]:
        for protocol, entry in row.entries.items():
            part = entry.record.get("clean_without_search_people") if row.variant is None else None
            if part:
                worst = "".join(
                    f"; worst case at {eps} {show(scores['balanced_accuracy_3'])} %"
                    for eps, scores in part.get("worst_case", {}).items()
                )
                lines.append(
                    f"- Row {row.number}, `{protocol}`: {show(part['slice'][COLUMNS[column][1]])} %{worst} "
                    f"(n = {part['n_slices']:,} slices of {part['n_people']:,} people)"
                )
    title = (
        "Settings were chosen after looking at fold 0's validation patients (`search: fold0 recipes`, "
        "assets/*/defaults.json), who are test patients of another fold; the epoch of every training was chosen by its own "
        "validation patients, twenty under `patient`. Balanced accuracy over three classes without fold 0's:\n"
    )
    return "\n".join([title, *lines]) if lines else ""


def _is_whole(row: TableRow) -> bool:
    """Whether a row has all folds of its profile. One that lacks some stands in no table beside rows of all patients."""
    return not any(_folds(row, protocol) for protocol in row.entries)


def _headline_table(rows: list[TableRow], eps: str, size: bool = False) -> str:
    """The columns of `HEADLINE` that any row has; `size` adds how many patients each row under `patient` counts."""
    part = age_part(entry for row in rows for entry in row.entries.values()).get("n_part", "")
    columns = [
        (protocol, column, title.format(eps=eps, n_part=part))
        for protocol, column, title in HEADLINE
        if any(_cell(row, protocol, column) != MISSING for row in rows)
    ]
    table = [
        [
            "#",
            "row",
            *(title for _, _, title in columns),
            *["n patients"] * size,
            "data · profile · init",
        ]
    ]
    for row in rows:
        cells = [_cell(row, protocol, column, brief=True) for protocol, column, _ in columns]
        table.append(
            [
                str(row.number),
                row.name,
                *cells,
                *([_number(row, "patient")] if size else []),
                _runs(row),
            ]
        )
    return _markdown(table)


def _scans_table(rows: list[TableRow], eps: str) -> list[str]:
    """The rows that answer whole scans, whose numbers must not stand in one column with those that count slices."""
    scans = [row for row in rows if row.counts_patients and _is_whole(row)]
    if not scans:
        return []
    return [
        "**Whole scans**: a patient diagnosed from the ordered slices by a model over a backbone's features; the attacker may change "
        f"every slice. Row 1 by patient: {_cell(rows[0], 'patient', 'by patient: balanced accuracy, 3 classes (%)')} %:",
        _headline_table(scans, eps, size=True),
    ]


def _one_fold_table(rows: list[TableRow], eps: str) -> list[str]:
    """Rows that lack folds, apart from all others, beside their members' scores on the same patients."""
    part = [row for row in rows if row.trained and not row.counts_patients and not _is_whole(row)]
    if not part:
        return []
    table = [
        [
            "#",
            "row",
            "balanced accuracy (%)",
            "AUROC by patient",
            f"worst case at {eps} (%)",
            "folds",
            "n slices / patients",
        ]
    ]
    for row in part:
        protocol = next(iter(row.entries))
        table.append(
            [
                str(row.number),
                row.name,
                *(_cell(row, protocol, column) for column in (BALANCED, PATIENT_AUROC, WORST)),
                f"`{protocol}`{_folds(row, protocol)}",
                _number(row, protocol),
            ]
        )
    members = {
        name: score
        for row in part
        for entry in row.entries.values()
        for run in entry.record["units"]
        for name, score in run.get("members", {}).items()
    }
    table += [
        [
            "",
            f"member `{name}`, as trained for them",
            show(score),
            MISSING,
            MISSING,
            "the same",
            f"{score['n_slices']:,} / {score['n_people']:,}",
        ]
        for name, score in members.items()
    ]
    return [
        "**One fold alone**: ensembles, beside their members on the same patients. Not to be read beside the rows above, which are of "
        "all patients; the members were trained again for them and are not the networks of those rows:",
        _markdown(table),
    ]


def _notice(entries: Entries) -> list[str]:
    demo = [
        entry
        for entry in entries.values()
        if entry.record["profile"] == "demo" or entry.record["data"] != "real"
    ]
    if not demo:
        return []
    return [
        "> [!WARNING]\n> **A short run, not a result.** "
        f"{len(demo)} of the {len(entries)} records below come from minutes of training on few images "
        f"({provenance(demo)}). They show that every step works; what the models can do is for `cpu` and `paper` "
        "runs on the real cohort to say."
    ]


#: Model → figure of ensembles and whole persons that README shows → what it says.
RUN_CAPTIONS = {
    "Ensemble": {
        "relaxation": "Ensembles under one image that all members see, and under an image of its own for each member, which is no "
        "input. The original project attacked the second way, with steps of 0.0001."
    },
    "Sequence": {
        "slice_budget": "Whole persons: whose diagnosis is right and stands, against the number of slices that an attacker may "
        "touch; n stands above each panel."
    },
}


def results_markdown(entries: Entries, root: Path | str = ROOT) -> str:
    """README's generated part: findings, headline figure and table, commands, full tables, figures.

    Args:
        root: the tree whose figures of explanations are linked.
    """
    everything, entries = entries, without_rehearsals(entries)
    rows = table_rows(entries)
    if not rows:
        return "*No record is committed yet. `python reproduce.py` makes one under `runs/` in minutes.*"
    protocols = list(rows[0].blocks)
    eps = headline_eps(list(entries.values())[-1].record)
    sizes = "; ".join(
        f"`{protocol}` {figures.size_of(rows[0].blocks[protocol]['clean'])}"
        for protocol in protocols
    )
    parts = [
        *_notice(entries),
        _findings(rows, eps),
        "![Clean and worst-case balanced accuracy of every row that counts slices, by "
        "protocol](assets/results/headline.png)",
        _headline_table(
            [
                row
                for row in rows
                if not row.counts_patients and (_is_whole(row) or not row.trained)
            ],
            eps,
        ),
        "<sub>Balanced accuracy over three classes (Mild and Moderate merged); beneath each value its 95 % interval over resampled "
        f"patients (none where a score is known exactly); {sizes}, unless a full table below gives a row another n. {ONE_SEED}</sub>",
        *_scans_table(rows, eps),
        *_one_fold_table(rows, eps),
        "\n".join(f"- {which}: `{command}`" for which, command, _ in _commands(rows)),
        _still_to_run(everything, entries),
    ]
    parts += _comparisons(entries, rows, eps)
    for protocol, shown in _by_protocol(
        [row for row in rows if not row.counts_patients or _is_whole(row)]
    ):
        whose = "Every score of whole scans" if shown[-1].counts_patients else "Every score"
        parts.append(
            f"<details><summary>{whose} under <code>{protocol}</code></summary>\n\n"
            f"{_markdown(_full_table(shown, protocol, eps))}"
            f"{_failed_checks(shown, protocol)}{_bfloat16_searches(shown, protocol)}{_machines(shown, protocol)}"
            "\n\n</details>"
        )
    if any(row.trained for row in rows):
        parts += [
            f"![{name.replace('_', ' ')}](assets/results/{name}.png)\n\n<sub>{caption}</sub>"
            for name, caption in CAPTIONS.items()
            if name in _drawable(*_compared(entries))
        ]
        parts += [
            f"![{model}, {protocol}: {name.replace('_', ' ')}](assets/{model}/{name}_{protocol}.png)\n\n<sub>{caption}</sub>"
            for model, protocol in entries
            for name, caption in RUN_CAPTIONS.get(model, {}).items()
        ]
        parts += [*_explanations(Path(root)), _model_links(everything)]
    return "\n\n".join(part for part in parts if part)


def _still_to_run(everything: Entries, shown_: Entries) -> str:
    """What has been rehearsed and not yet run, and whose rows are therefore not here."""
    left = {}
    for model, protocol in everything:
        if (model, protocol) not in shown_:
            left.setdefault(model, []).append(f"`{protocol}`")
    models = "; ".join(f"{model} {', '.join(own)}" for model, own in left.items())
    return (
        f"<sub>Rehearsed only (profile `demo`), and so not in these tables: {models}.</sub>"
        if left
        else ""
    )


def _comparisons(entries: Entries, rows: list[TableRow], eps: str) -> list[str]:
    return list(
        filter(
            None,
            [
                controls_markdown(rows),
                _counterparts_markdown(rows, list(rows[0].blocks), eps),
                _without_search_patients(rows),
                withdrawn_markdown(rows),
            ],
        )
    )


def findings_markdown(entries: Entries) -> str:
    """The findings in sentences with their rows, and the paired comparisons: what `results.ipynb` closes with."""
    entries = without_rehearsals(entries)
    rows = table_rows(entries)
    if not rows:
        return "*No records yet: run `python reproduce.py`.*"
    eps = headline_eps(list(entries.values())[-1].record)
    return "\n\n".join(
        filter(None, [*_notice(entries), _findings(rows, eps), *_comparisons(entries, rows, eps)])
    )


#: What the project reported from which this repository grew (published split, 224 px, L-infinity eps 0.005, accuracy in
#: percent): without and with adversarial training, and the latter under its own FGSM and PGD.
ORIGINAL = {
    "Dinov2": ("96.0", "92.0", "41.7", "71.9 to 73.7"),
    "Resnet": ("98.6", "93.4", "43.8", "88.6"),
    "Efficientnet": ("98.9", "99.5", "8.1", "98.7 to 98.8"),
}
ORIGINAL_EPS = "0.005"


def original_markdown(entries: Entries) -> str:
    """The original project's figures beside ours, accuracy in percent, and why they differ."""
    entries = without_rehearsals(entries)

    def ours(model: str, protocol: str, worst: bool) -> str:
        entry = entries.get((model, protocol))
        if entry is None:
            return MISSING
        block = entry.record["worst_case"].get(ORIGINAL_EPS) if worst else entry.record["clean"]
        score = block and (block if worst else block["slice"]).get("accuracy")
        return (
            f"{show(score)} (n = {block['n_slices']:,} / {block['n_people']:,})"
            if score
            else MISSING
        )

    table = [
        [
            "model",
            "reported: clean",
            "reported: FGSM",
            "reported: PGD",
            "ours, `slice`: clean",
            f"ours, `slice`: worst case at {ORIGINAL_EPS}",
            "ours, `patient`: clean",
            f"ours, `patient`: worst case at {ORIGINAL_EPS}",
        ]
    ]
    for backbone, (clean, trained, fgsm, pgd) in ORIGINAL.items():
        for model, reported in (
            (backbone, (clean, "0.3 to 3.4 over the three", "not given for each")),
            (f"{backbone}_atk", (trained, fgsm, pgd)),
        ):
            table.append(
                [
                    model,
                    *reported,
                    *(
                        ours(model, protocol, worst)
                        for protocol in ("slice", "patient")
                        for worst in (False, True)
                    ),
                ]
            )
    return (
        _markdown(table)
        + """

Accuracy in percent; *n* slices / people. The reported figures are of the published split, where everybody is on both sides;
only the `slice` columns are their like. That PGD scores *above* FGSM cannot be, for a working PGD: its step of 0.0001 with few
steps never reaches the edge of the ball, and the images were standardised outside [0, 1] while the attack clipped to [0, 1]. The
reported ensemble (98.5 clean, FGSM 32.6, PGD 92.2) was shown a separate image for each member, which no single input can be."""
    )


def _explanations(root: Path) -> list[str]:
    """The comparison of all models' maps, and one person's slices as a moving picture, where they are drawn."""
    parts = [
        f"![Grad-CAM of every model on the same slices, {protocol}](assets/results/explanations_{protocol}.png)"
        for protocol in PROTOCOLS
        if (root / "assets" / "results" / f"explanations_{protocol}.png").is_file()
    ]
    moving = [
        f"assets/{model}/person_patient.gif"
        for model in MODELS
        if (root / "assets" / model / "person_patient.gif").is_file()
    ]
    if moving:
        parts.append(
            " ".join(
                f'<img src="{path}" width="256" alt="Grad-CAM of {path.split("/")[1]} through the slices of one person">'
                for path in moving
            )
        )
        names = ", ".join(f"`{path.split('/')[1]}`" for path in moving)
        parts.append(
            f"<sub>One test person from the top of the head down, each slice beside its Grad-CAM: {names}. Whether a map can be "
            f"believed is measured in each model's notebook.{_planted(root)}</sub>"
        )
    return parts


def _planted(root: Path) -> str:
    """How much of a map lies on evidence whose place is known: the weakest kind of map of each backbone, on its finest grid."""
    path = root / "assets" / "planted_evidence.json"
    if not path.is_file():
        return ""
    record = read_json(path)
    ways = {
        (name, row["training"]): row
        for name, rows in sorted(record["backbones"].items())
        for row in sorted(rows, key=lambda row: row["cells"])
    }  # the finest of each stays
    found = []
    for (name, training), row in ways.items():
        method, share = min(row["inside"].items(), key=lambda item: item[1]["value"])
        how = "" if training == "whole" else f" trained {training}"
        found.append(
            f"{share['value']:.2f} [{share['ci'][0]:.2f}, {share['ci'][1]:.2f}] for `{name}`{how} ({method}, {row['cells']} × "
            f"{row['cells']} cells, {'noise' if row['noise'] else 'plain grey'} around the patch, n = {share['n']})"
        )
    return (
        f" On phantom images in which one patch, {row['area']:.2f} of the area, alone decides the class, the weakest kind "
        f"of map of a network trained from {record['init']} weights has this share of itself inside (an empty map: none; "
        f"[record](assets/planted_evidence.json), `python tests/benchmarks/planted_evidence.py`): {'; '.join(found)}. "
        "Tokens first: its patch tokens learned what lies under them before its last block and head learned the class; everything else "
        "here, and every model of the tables above that started from random weights, learned whole from the class. "
        "A slice of 128 px has 4 × 4 cells in a ResNet or EfficientNet: "
        "a map of it is no finer than a quarter of its width."
    )


def _model_links(entries: Entries) -> str:
    lines = ["Each model by itself:\n"]
    for model in dict.fromkeys(name for name, _ in entries):
        own = {protocol: entry for (name, protocol), entry in entries.items() if name == model}
        plain = {protocol: entry for protocol, entry in own.items() if "clean" in entry.record}
        links = [
            f"[{name.replace('_', ' ')}](assets/{model}/{name}.png)"
            for name in figures.MODEL_FIGURES
            if figures.has_content(name, plain)
        ]
        links += [f"[record, {protocol}](assets/{model}/{protocol}.json)" for protocol in own]
        lines.append(f"- `{model}`: " + " · ".join(links))
    return "\n".join(lines)


def model_card(entries: Entries) -> str:
    """What the trained models are, what they were trained on, what they may be used for, and their scores with intervals."""
    entries = without_rehearsals(entries)
    rows = [row for row in table_rows(entries) if row.model in MODELS]
    table = [
        [
            "model",
            "protocol",
            "trained",
            "init",
            "profile, folds",
            "balanced accuracy, 3 classes (%)",
            "AUROC, Non vs rest",
            "worst case (%)",
            "n slices / people",
        ]
    ]
    for row in rows:
        for protocol, entry in row.entries.items():
            record = entry.record
            how = "clean" if record["regime"] == "clean" else "adversarially"
            eps = headline_eps(record)
            table.append(
                [
                    f"`{row.model}`",
                    f"`{protocol}`",
                    how,
                    record["init"],
                    f"{record['profile']}, {', '.join(map(str, record['folds']))}",
                    *(_cell(row, protocol, column) for column in (BALANCED, AUROC)),
                    f"{_cell(row, protocol, WORST)} at {eps}",
                    _number(row, protocol),
                ]
            )
    return "\n\n".join(
        [
            "# Model card",
            provenance(list(entries.values())) if entries else "no record yet",
            _markdown(table) if rows else "",
            MODEL_CARD,
        ]
    )


MODEL_CARD = """- **What they are.** DINOv2 ViT-S/14, EfficientNet-B0 and ResNet-34 with four outputs (Non, Very mild, Mild, Moderate),
  from one grey slice of a brain MRI, pixels in [0, 1]; resizing and normalisation happen inside. `_atk` was trained on
  adversarial images (PGD or TRADES, L-infinity).
- **Trained on** the training people of one fold (`patient`) or the published training folder (`slice`); the epoch chosen on
  validation data alone. See the [data card](Baselines/data_card.md).
- **For** research on evaluation, robustness and explanation. **Not for** diagnosis or any other clinical use, and not for
  images of other scanners, sequences or planes: nothing here was tested on them.
- **Known faults.** Scores under `slice` measure recognition of people. Moderate is two people. Age is a confound. Without
  adversarial training a change that nobody sees turns the answer; with it a stronger attack than ours may.
- **Licence** of code and weights: that of this repository. The images are not part of it.
"""


def write_model_card(root: Path | str = ROOT) -> Path:
    """Rewrites assets/model_card.md from the records under `root`."""
    path = Path(root) / "assets" / "model_card.md"
    _write_text(path, model_card(read_entries(root)))
    return path


def write_readme(root: Path | str = ROOT) -> Path:
    """Rewrites README.md between its markers from the records under `root`."""
    path = Path(root) / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(
            f"{path} lacks the lines {BEGIN} and {END}, between which the results go; restore them."
        )
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_model_card(root)
    _write_text(
        path, f"{before}{BEGIN}\n\n{results_markdown(read_entries(root), root)}\n\n{END}{after}"
    )
    return path


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


# ------------------------------------------------------------------------------------------- address and publishing


def repository_address(root: Path | str = ROOT) -> str:
    """`owner/name` as pyproject.toml [tool.alzheimer] gives it."""
    with open(Path(root) / "pyproject.toml", "rb") as file:
        address = tomllib.load(file).get("tool", {}).get("alzheimer", {}).get("repository", "")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", address):
        raise UserError(
            f"pyproject.toml [tool.alzheimer] repository is {address!r}, expected owner/name."
        )
    return address


def write_address(root: Path | str = ROOT) -> list[Path]:
    """Makes README, CITATION.cff and the notebooks' badges and clone commands follow pyproject; returns the changed."""
    root, address = Path(root), repository_address(root)
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    found = re.search(r'repository-code:\s*"?https://github\.com/([\w.-]+/[\w.-]+)', citation)
    if not found:
        raise UserError(
            f'{root / "CITATION.cff"} has no line `repository-code: "https://github.com/owner/name"`; '
            "restore it."
        )
    own = rf"(github\.com/|githubusercontent\.com/)({re.escape(found[1])})(?![\w-])"
    changed = []
    # CITATION.cff last: it holds the old address that the others are searched for, should this be stopped half-way.
    for path in [
        root / "README.md",
        *sorted(root.glob("models/*.ipynb")),
        *sorted(root.glob("dataset/*.ipynb")),
        root / "CITATION.cff",
    ]:
        before = path.read_bytes().decode("utf-8")
        after = re.sub(own, lambda match: match[1] + address, before)
        after = re.sub(
            r"(colab\.research\.google\.com/github/)[\w.-]+/[\w.-]+(/blob/)",
            lambda match: match[1] + address + match[2],
            after,
        )
        after = re.sub(
            rf"\bcd {re.escape(found[1].split('/')[1])}\b", f"cd {address.split('/')[1]}", after
        )
        if after != before:
            _write_text(path, after)
            changed.append(path)
    return changed


def publish(run: Path | str, destination: Path | str = ROOT) -> list[Path]:
    """Copies a real-data run's records, figures and executed notebooks to the committed places, then redraws what
    compares models and rewrites README. Everything is checked before anything is copied.

    Raises:
        StudyError: nothing to publish, phantom data, or a committed record of a higher profile would be replaced.
    """
    run, destination = Path(run), Path(destination)
    entries, committed = read_entries(run), read_entries(destination)
    if not entries:
        raise UserError(
            f"{run} holds no records; make them with `python reproduce.py` and ALZHEIMER_RAW set to the "
            "real images."
        )
    rank = list(PROFILES).index
    for entry in entries.values():
        entry.predictions  # noqa: B018 - a record without its predictions is refused before anything is copied
    for key, entry in entries.items():
        if entry.record["data"] != "real":
            raise UserError(
                f"{entry.path} is of {entry.record['data']} data; only results on real data are "
                "published."
            )
        if key in committed and rank(committed[key].record["profile"]) > rank(
            entry.record["profile"]
        ):
            raise UserError(
                f"{committed[key].path} is of profile {committed[key].record['profile']}, which a run of "
                f"profile {entry.record['profile']} must not replace; publish a run of that profile or a "
                "higher one."
            )
    files = [
        path
        for model in dict.fromkeys(model for model, _ in entries)
        for path in sorted((run / "assets" / model).iterdir())
        if path.suffix in (".json", ".npz", ".png", ".gif")
    ]
    files += [*sorted(run.glob("models/*.ipynb")), *sorted(run.glob("dataset/*.ipynb"))]
    for path in files:
        with atomic_path(destination / path.relative_to(run)) as temporary:
            shutil.copyfile(path, temporary)
    return (
        [destination / path.relative_to(run) for path in files]
        + draw_figures(destination)
        + [write_readme(destination)]
    )


def recompute(root: Path | str = ROOT) -> list[Path]:
    """Scores every record under `root` again from its predictions and rewrites it; returns the paths. What was run stays as it
    was: only scores and intervals follow the code."""
    paths = []
    for entry in read_entries(root).values():
        write_record(
            entry.path, summarise(entry.predictions, entry.record["units"]), entry.predictions
        )
        paths.append(entry.path)
    return paths


# -------------------------------------------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m utils.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command", choices=("figures", "readme", "table", "recompute", "address", "publish")
    )
    parser.add_argument(
        "--root", type=Path, help="tree that holds assets/ (for publish: the run to publish)"
    )
    options = parser.parse_args(arguments)
    root = options.root or (result_root("demo", "real") if options.command == "publish" else ROOT)
    if not root.is_dir():
        sys.exit(f"error: {root} is not a folder: give --root the tree that holds assets/.")
    try:
        if options.command == "table":
            print(results_text([entry.record for entry in read_entries(root).values()]))
            return
        written = {
            "figures": draw_figures,
            "recompute": recompute,
            "readme": lambda tree: [write_readme(tree)],
            "address": write_address,
            "publish": publish,
        }[options.command](root)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(*written, sep="\n") if written else print("Nothing to write.")


if __name__ == "__main__":
    main()
