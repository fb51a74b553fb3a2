"""Two generated pages: README's first screen, and `assets/results/README.md` with everything.

Values for `templates/summary.md.j2` and `templates/results.md.j2`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.drawing import MISSING, show, size_of
from utils.evaluation.comparisons import Comparisons
from utils.evaluation.records import Records, read_records, without_rehearsals
from utils.evaluation.rows import TableRow, provenance, table_rows
from utils.evaluation.schema import Score
from utils.report.claims import Claim, Findings, claims_of, findings, highest
from utils.report.differences import auroc_table, counterparts_table, sweep_table
from utils.report.example import example_path
from utils.report.files import compared, drawable, write_text
from utils.report.model_card import write_model_card
from utils.report.model_figures import MODEL_FIGURES, has_content
from utils.report.notes import planted_evidence, withdrawn_claim, without_search_patients
from utils.report.original import original_claim
from utils.report.rendering import render
from utils.report.scans_and_ensembles import choice_of_slices
from utils.report.tables import (
    BALANCED,
    HEADLINE,
    PATIENT_AUROC,
    PATIENT_BALANCED,
    WORST,
    age_part,
    bfloat16_searches,
    by_protocol,
    cell_text,
    commands_text,
    failed_checks,
    folds_text,
    full_table,
    is_whole,
    machines,
    markdown,
    row_number,
    runs_text,
)
from utils.utils_funcs import MODELS, PROTOCOLS, ROOT, UserError

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"

#: The page of all results, from the repository's root: GitHub shows it with its folder.
RESULTS_PAGE = "assets/results/README.md"

#: What README's table shows of controls, beside the constant answer: the linear model whose robust
#: accuracy is exact, and the one that ranks patients best.
SUMMARY_CONTROLS = ("robust_linear_32", "kernel_ridge_16")
#: The control of README's comparison in words.
LINEAR = "linear_32"
#: (protocol, column, title) of README's table.
SUMMARY_COLUMNS = (
    ("patient", PATIENT_AUROC, "AUROC by patient"),
    ("patient", PATIENT_BALANCED, "balanced accuracy by patient (%)"),
    ("patient", WORST, "robust at {eps} (%)"),
    ("slice", BALANCED, "published split: balanced accuracy (%)"),
)

#: Figures of ensembles and sequence models that README shows: model → name.
RUN_FIGURES = {"Ensemble": "relaxation", "Sequence": "slice_budget"}


def summary_markdown(records: Records, root: Path | str = ROOT) -> str:
    """README's generated part: a picture, the findings in a line each, one table.

    Args:
        root: the tree whose picture is linked.
    """
    records = without_rehearsals(records)
    rows = table_rows(records)
    if not rows:
        remedy = "`python reproduce.py` makes one under `runs/` in minutes."
        return f"*No record is committed yet. {remedy}*"
    values = findings_values(records, rows)
    found = values["found"]
    linear = [
        pair
        for pair in (found.controls.pairs if found.controls else ())
        if pair.row is found.controls.network.row and pair.comparison.second.variant == LINEAR
    ]
    clean = [
        one
        for one in (found.robustness.networks if found.robustness else ())
        if found.clean and one.row is found.clean.published.row
    ]
    return render(
        "summary.md.j2",
        **values,
        linear=linear[0] if linear else None,
        attacked=clean[0] if clean else None,
        age=_age_pair(found),
        original=original_claim(records),
        page=RESULTS_PAGE,
        picture=example_path(root).with_suffix(".png").is_file(),
        table=summary_table(rows, values["eps"]),
        sizes=size_of(rows[0].evaluations["patient"].clean),
    )


def _age_pair(found: Findings) -> tuple[Claim, Claim] | None:
    """Of the network that ranks best, AUROC on all patients and on those of about one age."""
    if not found.age or not found.controls:
        return None
    pairs = zip(found.age.everybody, found.age.part, strict=True)
    return next((pair for pair in pairs if pair[0].row is found.controls.network.row), None)


def summary_table(rows: Sequence[TableRow], eps: str) -> str:
    """The constant answer, some controls, the networks, and the whole-scan model that ranks
    patients best; rows of one fold are left to the page of all results."""
    scans = [row for row in rows if row.counts_patients and is_whole(row)]
    best = claims_of(scans, "patient", PATIENT_AUROC)
    shown = [
        row
        for row in rows
        if row is rows[0]
        or (row.model == "Baselines" and row.variant in SUMMARY_CONTROLS)
        or (row.model in MODELS and is_whole(row))
        or (best and row is highest(best).row)
    ]
    titles = ["row", *(title.format(eps=eps) for _, _, title in SUMMARY_COLUMNS)]
    table = [titles]
    for row in shown:
        cells = [
            cell_text(row, protocol, column, brief=True) for protocol, column, _ in SUMMARY_COLUMNS
        ]
        name = f"[{row.number}]({RESULTS_PAGE}#row-{row.number}) {row.name}"
        table.append([name + (" (scans)" if row.counts_patients else ""), *cells])
    return markdown(table)


def results_page(records: Records, root: Path | str = ROOT) -> str:
    """The page of all results, with links from its own folder."""
    text = render("results_page.md.j2", results=results_markdown(records, root))
    return rebased(text, Path(RESULTS_PAGE).parent) + "\n"


def rebased(text: str, folder: Path) -> str:
    """Markdown whose links from the repository's root become links from a folder of it."""

    def moved(match: re.Match[str]) -> str:
        path, anchor = match["path"], match["anchor"] or ""
        return match["before"] + Path(os.path.relpath(path, folder)).as_posix() + anchor

    return re.sub(
        r'(?P<before>\]\(|src=")(?!https?://|#)(?P<path>[^)#"\s]+)(?P<anchor>#[^)"]*)?', moved, text
    )


def results_markdown(records: Records, root: Path | str = ROOT) -> str:
    """All results: findings, headline figure and table, commands, full tables, figures.

    Args:
        root: the tree whose figures of explanations are linked.
    """
    everything, records = records, without_rehearsals(records)
    rows = table_rows(records)
    if not rows:
        remedy = "`python reproduce.py` makes one under `runs/` in minutes."
        return f"*No record is committed yet. {remedy}*"
    values = findings_values(records, rows)
    values["tables"] |= headline_tables(rows, values["eps"])
    return render(
        "results.md.j2",
        **values,
        **table_values(everything, records, rows, values["eps"]),
        **figure_values(everything, records, rows, Path(root)),
    )


def findings_markdown(records: Records) -> str:
    """The findings in sentences with their rows, and the paired comparisons: what `results.ipynb`
    closes with."""
    records = without_rehearsals(records)
    rows = table_rows(records)
    if not rows:
        return "*No records yet: run `python reproduce.py`.*"
    return render("findings_page.md.j2", **findings_values(records, rows))


def findings_values(records: Records, rows: list[TableRow]) -> dict[str, Any]:
    """What `notice.md.j2`, `findings.md.j2` and `comparisons.md.j2` take."""
    eps = headline_eps(records)
    comparisons = Comparisons.of(rows, eps)
    protocols = list(rows[0].evaluations)
    rehearsals = [
        record for record in records.values() if record.profile == "demo" or record.data != "real"
    ]
    return {
        "eps": eps,
        "rehearsals": len(rehearsals),
        "n_records": len(records),
        "provenance": provenance(rehearsals),
        "found": findings(rows, eps, comparisons),
        "comparisons": comparisons,
        "tables": {
            "auroc": auroc_table(comparisons.auroc),
            "exact_sweep": sweep_table(comparisons.exact_sweep),
            "counterparts": counterparts_table(comparisons.counterparts, protocols, eps),
        },
        "search": without_search_patients(rows),
        "withdrawn": withdrawn_claim(rows),
    }


def headline_eps(records: Records) -> str:
    """The eps of the page, which is that of the last record."""
    return list(records.values())[-1].headline_eps


# -- tables ----------------------------------------------------------------------------------------


def table_values(
    everything: Records, records: Records, rows: list[TableRow], eps: str
) -> dict[str, Any]:
    """What `results.md.j2` takes beneath its first tables, and its tables of every score.

    Args:
        everything: rehearsals included, which `records` and `rows` leave out.
    """
    sizes = [
        f"`{protocol}` {size_of(evaluation.clean)}"
        for protocol, evaluation in rows[0].evaluations.items()
    ]
    rehearsed_only: dict[str, list[str]] = {}
    for model, protocol in everything:
        if (model, protocol) not in records:
            rehearsed_only.setdefault(model, []).append(protocol)
    full_tables = [
        {
            "protocol": protocol,
            "of_scans": shown[-1].counts_patients,
            "table": markdown(full_table(shown, protocol, eps)),
            "notes": failed_checks(shown, protocol)
            + bfloat16_searches(shown, protocol)
            + machines(shown, protocol),
        }
        for protocol, shown in by_protocol(
            [row for row in rows if not row.counts_patients or is_whole(row)]
        )
    ]
    return {
        "sizes": "; ".join(sizes),
        "constant_by_patient": cell_text(rows[0], "patient", PATIENT_BALANCED),
        "commands": commands_text(rows),
        "rehearsed_only": rehearsed_only,
        "full_tables": full_tables,
    }


def headline_tables(rows: list[TableRow], eps: str) -> dict[str, str]:
    """The first tables of the page: rows that count slices; whole scans, which must not be in one
    column with them; rows that lack folds. Empty where there are no such rows."""
    of_slices = [row for row in rows if not row.counts_patients]
    one_fold = [row for row in of_slices if row.trained and not is_whole(row)]
    scans = [row for row in rows if row.counts_patients and is_whole(row)]
    return {
        "headline": _headline_table(
            [row for row in of_slices if not row.trained or is_whole(row)], eps
        ),
        "scans": _headline_table(scans, eps, with_patients=True) if scans else "",
        "one_fold": _one_fold_table(one_fold, eps) if one_fold else "",
    }


def _headline_table(rows: Sequence[TableRow], eps: str, with_patients: bool = False) -> str:
    """The columns of `HEADLINE` that any row has, and how many patients each row counts under
    `patient` where asked for."""
    part = age_part(record for row in rows for record in row.records.values()).get("n_part", "")
    columns = [
        (protocol, column, title.format(eps=eps, n_part=part))
        for protocol, column, title in HEADLINE
        if any(cell_text(row, protocol, column) != MISSING for row in rows)
    ]
    titles = [title for _, _, title in columns] + ["n patients"] * with_patients
    table = [["#", "row", *titles, "data · profile · init"]]
    for row in rows:
        cells = [cell_text(row, protocol, column, brief=True) for protocol, column, _ in columns]
        if with_patients:
            cells.append(row_number(row, "patient"))
        table.append([_anchored(row), row.name, *cells, runs_text(row)])
    return markdown(table)


def _anchored(row: TableRow) -> str:
    """A row's number, to which other pages link."""
    return f'<a id="row-{row.number}"></a>{row.number}'


def _one_fold_table(rows: Sequence[TableRow], eps: str) -> str:
    """Rows that lack folds, and their members' scores on the same patients."""
    scores = ["balanced accuracy (%)", "AUROC by patient", f"worst case at {eps} (%)"]
    table = [["#", "row", *scores, "folds", "n slices / patients"]]
    members: dict[str, Score] = {}
    for row in rows:
        protocol = next(iter(row.records))
        cells = [cell_text(row, protocol, column) for column in (BALANCED, PATIENT_AUROC, WORST)]
        folds = f"`{protocol}`{folds_text(row, protocol)}"
        table.append([_anchored(row), row.name, *cells, folds, row_number(row, protocol)])
        for record in row.records.values():
            for run in record.runs:
                members |= run.members
    for name, score in members.items():
        title, size = f"member `{name}`, as trained for them", f"{score.n_slices:,}"
        cells = [show(score), MISSING, MISSING, "the same", f"{size} / {score.n_patients:,}"]
        table.append(["", title, *cells])
    return markdown(table)


# -- figures and links -----------------------------------------------------------------------------


def figure_values(
    everything: Records, records: Records, rows: list[TableRow], root: Path
) -> dict[str, Any]:
    """Which figures and files `results.md.j2` shows or links: none where nothing was trained, and
    those of explanations only where they are drawn.

    Args:
        everything: rehearsals included, which `records` and `rows` leave out.
    """
    if not any(row.trained for row in rows):
        names = ("result_figures", "run_figures", "explained", "animated", "models")
        return dict.fromkeys(names, ()) | {"planted": None, "slices": None}
    scans = records.get(("Sequence", "patient"))
    shown = drawable(*compared(records))
    return {
        "result_figures": [name for name in shown if name != "headline"],
        "run_figures": [
            (model, protocol, RUN_FIGURES[model])
            for model, protocol in records
            if model in RUN_FIGURES
        ],
        "explained": [
            protocol
            for protocol in PROTOCOLS
            if (root / "assets" / "results" / f"explanations_{protocol}.png").is_file()
        ],
        "animated": [
            model for model in MODELS if (root / "assets" / model / "person_patient.gif").is_file()
        ],
        "planted": planted_evidence(root),
        "slices": None if scans is None else choice_of_slices(scans),
        "models": model_links(everything),
    }


def model_links(records: Records) -> dict[str, list[tuple[str, str]]]:
    """Model → (title, path) of its figures and records."""
    found: dict[str, list[tuple[str, str]]] = {}
    for model in dict.fromkeys(name for name, _ in records):
        of_model = {protocol: one for (name, protocol), one in records.items() if name == model}
        plain = {protocol: record for protocol, record in of_model.items() if record.clean}
        found[model] = [
            (name.replace("_", " "), f"assets/{model}/{name}.png")
            for name in MODEL_FIGURES
            if has_content(name, plain)
        ] + [(f"record, {protocol}", f"assets/{model}/{protocol}.json") for protocol in of_model]
    return found


def write_readme(root: Path | str = ROOT) -> Path:
    """Rewrites README.md between its markers from the records under `root`, the page of all
    results, and the model card."""
    path = Path(root) / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(
            f"{path} lacks the lines {BEGIN} and {END}, between which the results go; restore them."
        )
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_model_card(root)
    records = read_records(root)
    write_text(Path(root) / RESULTS_PAGE, results_page(records, root))
    write_text(path, f"{before}{BEGIN}\n\n{summary_markdown(records, root)}\n\n{END}{after}")
    return path
