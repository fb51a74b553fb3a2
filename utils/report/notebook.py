"""What a model's notebook shows of its records: narrow Markdown tables, all folds in one view, and
the detail of each fold folded away."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.drawing import MISSING, show, size_of
from utils.evaluation.plan import AttackName
from utils.evaluation.records import Records, read_records, without_rehearsals
from utils.evaluation.rows import provenance, table_rows
from utils.evaluation.schema import Check, Evaluation, Record, Score
from utils.report.rendering import render
from utils.report.tables import (
    BALANCED,
    PATIENT_AUROC,
    WORST,
    attacked_text,
    cell_text,
    checks_text,
    markdown,
    row_number,
)
from utils.utils_funcs import ROOT

#: Attacks that a sweep's table has a column of, as they are written there.
SWEPT = {"noise": "noise", "fgsm": "FGSM", "pgd": "PGD", "apgd_t": "APGD-T"}


def folded(title: str, text: str) -> str:
    """Markdown that a reader opens."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


# -- scores ----------------------------------------------------------------------------------------


def model_scores_markdown(records: Sequence[Record]) -> str:
    """The model's scores under each protocol beside those of the constant answer, in few columns;
    every other score is on the page of all results."""
    if not records:
        return "*No records yet: run `python reproduce.py`.*"
    rows = table_rows({(record.model, record.protocol): record for record in records})
    eps = records[-1].headline_eps
    columns = {
        PATIENT_AUROC: "AUROC by patient",
        BALANCED: "balanced accuracy (%)",
        WORST: f"robust at {eps} (%)",
    }
    table = [["protocol", "row", *columns.values(), "n slices / patients", "checks"]]
    for protocol in rows[0].evaluations:
        for row in rows:
            if protocol in row.evaluations:
                cells = [cell_text(row, protocol, column) for column in columns]
                size = row_number(row, protocol)
                table.append([f"`{protocol}`", row.name, *cells, size, checks_text(row, protocol)])
    return (
        f"{markdown(table)}\n\n{provenance(records)}. Three classes: *Mild* and *Moderate* merged; "
        "[95 % intervals over resampled patients]. [All scores](../assets/results/README.md)."
    )


def model_findings_markdown(model: str, records: Sequence[Record], root: Path | str = ROOT) -> str:
    """What a model's own record shows, in three sentences.

    Args:
        root: the tree whose records hold the clean counterpart of an adversarially trained model.
    """
    found = {record.protocol: record for record in records if record.clean}
    if "patient" not in found:
        return "*No record with patients kept apart yet.*"
    others: Records = without_rehearsals(read_records(root))
    counterpart = others.get((model.removesuffix("_atk"), "patient"))
    eps = found["patient"].headline_eps
    return render(
        "model_findings.md.j2",
        model=model,
        eps=eps,
        rehearsed=any(record.profile == "demo" or record.data != "real" for record in records),
        clean={protocol: _balanced(record) for protocol, record in found.items()},
        sizes={
            protocol: size_of(record.clean) for protocol, record in found.items() if record.clean
        },
        constant=found["patient"].constant_answer.slice["balanced_accuracy_3"],
        robust=_robust(found["patient"], eps),
        counterpart=_robust(counterpart, eps) if counterpart and model.endswith("_atk") else None,
        auroc=found["patient"].clean.patient["auroc"] if found["patient"].clean else None,
    )


def _balanced(record: Record) -> Score | None:
    return record.clean.slice["balanced_accuracy_3"] if record.clean else None


def _robust(record: Record, eps: str) -> Score | None:
    worst = (record.worst_case or {}).get(eps)
    return worst.scores["balanced_accuracy_3"] if worst else None


# -- attacks and checks ----------------------------------------------------------------------------


def sweep_markdown(record: Record) -> str:
    """Balanced accuracy over three classes at each eps: under a few attacks alone, and under all;
    every attack is folded away."""
    evaluation = record.evaluation
    table = [["eps", *SWEPT.values(), "all attacks"]]
    for eps, worst in evaluation.worst_case.items():
        cells = [_alone(evaluation, eps, name) for name in SWEPT]
        table.append([eps, *cells, show(worst.scores["balanced_accuracy_3"])])
    clean = evaluation.clean
    counts = [worst.n_slices for worst in evaluation.worst_case.values()]
    attacked = attacked_text(clean.n_slices, counts[0] if counts else 0)
    return (
        f"**`{record.protocol}`**, {size_of(clean)}{attacked}; clean "
        f"{show(clean.slice['balanced_accuracy_3'])} %\n\n{markdown(table)}\n\n"
        + folded("Every attack", markdown(_every_attack(evaluation)))
    )


def _alone(evaluation: Evaluation, eps: str, attack: str) -> str:
    """The score under one attack over four classes alone."""
    for name, scores in evaluation.attacks.get(eps, {}).items():
        parsed = AttackName.parse(name)
        if parsed.without_steps == attack and parsed.view == "four" and not parsed.rounded:
            return show(scores.scores["balanced_accuracy_3"])
    return MISSING


def _every_attack(evaluation: Evaluation) -> list[list[str]]:
    table = [["eps", "attack", "balanced accuracy (%)", "accuracy (%)", "n", "attacked"]]
    sweeps = {"": evaluation.attacks} | {
        f"{norm} ": sweep for norm, sweep in evaluation.other_norms.items()
    }
    for norm, sweep in sweeps.items():
        for eps, attacks in sweep.items():
            for name, scores in attacks.items():
                cells = [show(scores.scores[key]) for key in ("balanced_accuracy_3", "accuracy")]
                counts = [f"{scores.n_slices:,}", f"{scores.n_attacked:,}"]
                table.append([f"{norm}{eps}", f"`{name}`", *cells, *counts])
    return table


def checks_markdown(records: Sequence[Record]) -> str:
    """How many checks of all runs passed, and what those that did not say."""
    checks = [(record.protocol, check) for record in records for check in record.sanity]
    runs = {(protocol, check.fold, check.seed) for protocol, check in checks}
    failed = [(protocol, check) for protocol, check in checks if not check.passed]
    passed = len(checks) - len(failed)
    text = f"**{passed:,} of {len(checks):,} checks passed** in {len(runs)} runs."
    if failed:
        text += " Not passed:\n\n" + "\n".join(
            f"- `{protocol}` fold {check.fold}, seed {check.seed}: {check.note}"
            for protocol, check in failed
        )
    return text + "\n\n" + folded("The checks", _last_checks(records[-1].sanity if records else ()))


def _last_checks(checks: Sequence[Check]) -> str:
    """What the checks of the last run say, in a line each."""
    last = [check for check in checks if (check.fold, check.seed) == _run_of(checks[-1])]
    return "\n".join(f"- {check.note}" for check in last)


def _run_of(check: Check) -> tuple[int | None, int | None]:
    return check.fold, check.seed


# -- text and maps -----------------------------------------------------------------------------


def text_as_markdown(text: str) -> str:
    """Text for a terminal as Markdown: lines in aligned columns become a table, others a paragraph.

    A table's columns begin where each of its lines has two spaces before.
    """
    return "\n\n".join(_block(block.split("\n")) for block in re.split(r"\n\s*\n", text.rstrip()))


def _block(lines: list[str]) -> str:
    first = next((place for place, line in enumerate(lines) if _is_aligned(line)), len(lines))
    last = max((place for place, line in enumerate(lines) if _is_aligned(line)), default=-1)
    table = lines[first : last + 1]
    around = [" ".join(part) for part in (lines[:first], lines[last + 1 :]) if part]
    if len(table) < 2:
        return "\n\n".join(lines)
    width = max(map(len, table))
    padded = [line.ljust(width) for line in table]
    starts = [0] + [
        place
        for place in range(2, width)
        if all(line[place - 2 : place] == "  " for line in padded)
        and any(line[place] != " " for line in padded)
    ]
    cells = [
        [line[start:end].strip() for start, end in zip(starts, [*starts[1:], width], strict=True)]
        for line in padded
    ]
    if not any(row[0] for row in cells):  # all lines are indented: rows without titles
        cells = [[""] * (len(cells[0]) - 1), *(row[1:] for row in cells)]
    around.insert(1 if first else 0, markdown(cells))
    return "\n\n".join(around)


def _is_aligned(line: str) -> bool:
    return re.search(r"\S {2,}\S|^ {2,}\S", line) is not None


#: What the maps' table shows: title → (keys of `explanation_record`, what a value above 0 means).
MAPS = {
    "better than a random map by ROAD": ("faithfulness", "road", "beyond_random"),
    "… by insertion": ("faithfulness", "insertion", "beyond_random"),
    "… by deletion": ("faithfulness", "deletion", "beyond_random"),
    "share on the brain − its area": ("anatomy", "brain", "beyond_area"),
    "share on the ventricles − their area": ("anatomy", "csf", "beyond_area"),
}


def maps_markdown(explanations: Mapping[str, Mapping], method: str = "gradcam") -> str:
    """What the maps of all runs say, in one table: how many runs are above 0, below, or undecided,
    by each run's interval over patients.

    Args:
        explanations: what each run is called → its `explanation_record`.
    """
    found = {name: one[method] for name, one in explanations.items() if method in one}
    if not found:
        return "*No maps were measured in these runs.*"
    table = [["measure", "least to greatest of the runs", "above 0", "below 0", "undecided"]]
    for title, keys in MAPS.items():
        scores = [score for one in found.values() if (score := _deep(one, keys))]
        if not scores:
            continue
        values = [score["value"] for score in scores]
        above = sum(score["ci"][0] > 0 for score in scores)
        below = sum(score["ci"][1] < 0 for score in scores)
        counts = [str(count) for count in (above, below, len(scores) - above - below)]
        table.append([title, f"{min(values):+.3f} to {max(values):+.3f}", *counts])
    passed = sum(bool(one.get("randomisation", {}).get("passed")) for one in found.values())
    return (
        f"{markdown(table)}\n\nThe map becomes another one when the network is made random in "
        f"{passed} of {len(found)} runs. Each run measures few slices (n in the detail)."
    )


def _deep(found: Mapping, keys: Sequence[str]) -> Mapping | None:
    for key in keys:
        if not isinstance(found, Mapping) or key not in found:
            return None
        found = found[key]
    return found if found.get("value") is not None else None
