"""Paired comparisons → tables with verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from utils.drawing import MISSING, show
from utils.evaluation.comparisons import Comparison, Verdict
from utils.report.tables import attacked_text, markdown

#: How a verdict after Holm's correction is marked in a table.
VERDICTS: dict[Verdict, str] = {"better": " ▲", "worse": " ▼", "undecided": ""}


def auroc_table(found: Sequence[Comparison]) -> str:
    """AUROC by patient: a row a network, a column a control."""
    return _pivot(found, lambda one: f"− {one.second.number} `{one.second.name}`", "decimal")


def sweep_table(found: Sequence[Comparison]) -> str:
    """Robust accuracy against one control: a row a network, a column an eps."""
    return _pivot(found, lambda one: f"at {one.eps}", "percent")


def _difference(comparison: Comparison, style: str) -> str:
    return show(comparison.score, style, signed=True) + VERDICTS[comparison.verdict]


def _pivot(found: Sequence[Comparison], column_of: Callable[[Comparison], str], style: str) -> str:
    columns = list(dict.fromkeys(column_of(one) for one in found))
    table = [["network", *columns, "n slices / patients"]]
    for number in dict.fromkeys(one.first.number for one in found):
        in_row = {column_of(one): one for one in found if one.first.number == number}
        any_of_row = next(iter(in_row.values()))
        table.append(
            [
                f"{number} `{any_of_row.first.name}`",
                *(
                    _difference(in_row[name], style) if name in in_row else MISSING
                    for name in columns
                ),
                f"{any_of_row.n_slices:,} / {any_of_row.n_patients:,}",
            ]
        )
    return markdown(table)


def counterparts_table(found: Sequence[Comparison], protocols: Sequence[str], eps: str) -> str:
    """Adversarially trained minus clean networks, on clean images and in the worst case at eps: a
    row a pair, two columns a protocol."""
    columns = {None: "clean", eps: f"worst case at {eps}"}
    table = [
        [
            "adversarial − clean, points",
            *(f"`{protocol}`: {title}" for protocol in protocols for title in columns.values()),
            "n slices / patients (attacked)",
        ]
    ]
    for number in dict.fromkeys(one.first.number for one in found):
        in_row = {(one.protocol, one.eps): one for one in found if one.first.number == number}
        pair = next(iter(in_row.values()))
        sizes = []
        for protocol in protocols:
            if clean := in_row.get((protocol, None)):
                under_attack = in_row.get((protocol, eps))
                n_attacked = under_attack.n_slices if under_attack else 0
                sizes.append(
                    f"{clean.n_slices:,} / {clean.n_patients:,}"
                    + attacked_text(clean.n_slices, n_attacked)
                )
        cells = [
            _difference(in_row[protocol, at], "percent") if (protocol, at) in in_row else MISSING
            for protocol in protocols
            for at in columns
        ]
        first, second = pair.first, pair.second
        names = f"{first.number} `{first.name}` − {second.number} `{second.name}`"
        table.append([names, *cells, "; ".join(sizes)])
    return markdown(table)
