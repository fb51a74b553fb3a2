"""The model card: values for `templates/model_card.md.j2`."""

from __future__ import annotations

from pathlib import Path

from utils.evaluation.records import Records, read_records, without_rehearsals
from utils.evaluation.rows import provenance, table_rows
from utils.report.files import write_text
from utils.report.rendering import render
from utils.report.tables import AUROC, BALANCED, WORST, cell_text, markdown, row_number
from utils.utils_funcs import MODELS, ROOT

TITLES = [
    "model",
    "protocol",
    "trained",
    "init",
    "profile, folds",
    "balanced accuracy, 3 classes (%)",
    "AUROC, Non vs rest",
    "worst case (%)",
    "n slices / patients",
]


def model_card(records: Records) -> str:
    """What the trained models are, what they were trained on, what they may be used for, and their
    scores with intervals."""
    records = without_rehearsals(records)
    table = [TITLES]
    for row in table_rows(records):
        for protocol, record in row.records.items() if row.model in MODELS else ():
            table.append(
                [
                    f"`{row.model}`",
                    f"`{protocol}`",
                    "clean" if record.regime == "clean" else "adversarially",
                    record.init,
                    f"{record.profile}, {', '.join(map(str, record.folds))}",
                    cell_text(row, protocol, BALANCED),
                    cell_text(row, protocol, AUROC),
                    f"{cell_text(row, protocol, WORST)} at {record.headline_eps}",
                    row_number(row, protocol),
                ]
            )
    text = render(
        "model_card.md.j2",
        provenance=provenance(list(records.values())) if records else "no record yet",
        table=markdown(table) if len(table) > 1 else "",
    )
    return f"{text}\n"


def write_model_card(root: Path | str = ROOT) -> Path:
    """Rewrites assets/model_card.md from the records under `root`."""
    path = Path(root) / "assets" / "model_card.md"
    write_text(path, model_card(read_records(root)))
    return path
