"""Values → Markdown, through the Jinja2 templates that hold the prose of README and model card.

A template wraps its prose like any source file. `render` undoes that: each block of prose becomes
one line, and blocks that came out empty (a question that no record answers) vanish.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2

from utils.drawing import show, size_of
from utils.evaluation.rows import TableRow
from utils.evaluation.schema import Score
from utils.report.claims import Claim
from utils.report.tables import folds_text

TEMPLATES = Path(__file__).with_name("templates")

#: A block that begins so is a table, a list, a quotation or a heading: its lines stay apart.
LINE_BY_LINE = ("| ", "- ", "> ", "#")


def percent(score: Score | None) -> str:
    """`61.0 [55.2, 66.8]`."""
    return show(score, "percent")


def decimal(score: Score | None) -> str:
    """`0.766 [0.700, 0.830]`."""
    return show(score, "decimal")


def points(difference: Score | None) -> str:
    """`+3.9 [-3.3, +10.9]`: a difference of two percentages."""
    return show(difference, "percent", signed=True)


def signed(difference: Score | None) -> str:
    """`-0.036 [-0.077, +0.003]`: a difference of two scores between 0 and 1."""
    return show(difference, "decimal", signed=True)


def named(row: TableRow) -> str:
    """`Resnet` with its number, as a sentence refers to it."""
    return f"`{row.name}` (row {row.number})"


def row_link(row: TableRow, page: str) -> str:
    """A link to the row in a page's tables."""
    return f"[row {row.number}]({page}#row-{row.number})"


def size(claim: Claim) -> str:
    """`n = 1,280 slices of 40 patients, fold 0 of 5`: what a score was counted on."""
    if claim.n_slices is None:
        return f"n = {claim.n_patients:,} patients"
    return f"n = {claim.n_slices:,} slices of {claim.n_patients:,} patients" + folds_text(
        claim.row, claim.protocol
    )


def blocks(text: str) -> str:
    """The text with each block of prose on one line, one blank line between blocks, and no empty
    block."""
    found = [block.strip() for block in re.split(r"\n\s*\n", text)]
    return "\n\n".join(
        block if block.startswith(LINE_BY_LINE) else " ".join(block.split())
        for block in found
        if block
    )


def render(template: str, **values: Any) -> str:
    """The template of this name, filled with `values`.

    Raises:
        jinja2.UndefinedError: the template names a value that was not given.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES, encoding="utf-8"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown
    )
    for filter_ in (percent, decimal, points, signed, named, row_link, size, size_of):
        environment.filters[filter_.__name__] = filter_
    return blocks(environment.get_template(template).render(**values))
