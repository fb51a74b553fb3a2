"""Protocol `within` as a table: what a model's answers are worth for patients of its training and
for other patients."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from utils.drawing import MISSING, show
from utils.evaluation.records import read_record
from utils.evaluation.schema import Record
from utils.evaluation.within import Gap, corrected, gaps
from utils.report.tables import markdown
from utils.utils_funcs import MODELS

#: Protocols of one model and two questions: as it is, and with labels permuted among patients.
WITHIN = ("within", "within_permuted")


def read_within(root: Path | str) -> list[Record]:
    """The records of these protocols under `root`/assets."""
    paths = [
        Path(root) / "assets" / model / f"{protocol}.json"
        for protocol in WITHIN
        for model in MODELS
    ]
    return [read_record(path) for path in paths if path.is_file()]


def within_markdown(records: Sequence[Record]) -> str:
    """The gaps of all records, clean and at each eps, with Holm's correction over all of them."""
    found = [(record, gap) for record in records for gap in gaps(record)]
    if not found:
        return (
            "*No patient was tested both as one of the training and as another yet: fold k and "
            "fold k + 2 are needed.*"
        )
    tested = corrected([gap for _, gap in found])
    named = [(record, gap) for (record, _), gap in zip(found, tested, strict=True)]
    parts = []
    for (protocol, model), rows in groupby(named, lambda one: (one[0].protocol, one[0].model)):
        of_model = [gap for _, gap in rows]
        size = f"n = {of_model[0].n_slices:,} slices of {of_model[0].n_patients:,} patients a part"
        parts.append(f"**`{model}`, `{protocol}`**, {size}\n\n{markdown(_table(of_model))}")
    parts.append(
        "Balanced accuracy over three classes, percent [95 % intervals over resampled patients], "
        "of the same slices when their patient was in the training and when not; the difference; "
        "and the difference in the share that withstood every attack, among slices that were right "
        "in both parts. p: of the difference on clean images, of the share under attack, after "
        f"Holm's correction for {len(tested)} comparisons."
    )
    return "\n\n".join(parts)


def _table(found: Sequence[Gap]) -> list[list[str]]:
    table = [["eps", "known", "other", "difference", "kept, known − other", "p"]]
    for gap in found:
        kept = MISSING if gap.kept_by_both is None else show(gap.kept_by_both, signed=True)
        table.append(
            [
                gap.eps or "clean",
                show(gap.same),
                show(gap.other),
                show(gap.difference, signed=True),
                kept,
                f"{gap.p_holm:.3f}",
            ]
        )
    return table
