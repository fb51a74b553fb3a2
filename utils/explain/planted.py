"""How well maps find evidence whose place is known, as text for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from utils.explain.tables import aligned, shown
from utils.utils_funcs import ROOT, read_json

RECORD = ROOT / "assets" / "planted_evidence.json"


def planted_text(model: str, path: Path | str = RECORD) -> str:
    """The record of planted evidence for this backbone, as a table and a sentence.

    The record is of phantom images and random weights (`tests/benchmarks/planted_evidence.py`):
    it says something about the method on this architecture, not about a model of the results.
    """
    record = read_json(path) if Path(path).is_file() else {"backbones": {}}
    rows = record["backbones"].get(model.removesuffix("_atk"), [])
    if not rows:
        return (
            "Planted evidence: not measured for this backbone "
            "(`python tests/benchmarks/planted_evidence.py`)."
        )
    methods, limit = list(rows[0]["inside"]), record["limit"]
    title = (
        "Planted evidence (phantom, random initialization): share of a map inside the patch that "
        f"alone decides the class; limit {limit:.2f}, {rows[0]['area']:.2f} for an even map, "
        f"0 for an empty one; n = {rows[0]['inside'][methods[0]]['n']} images a row"
    )
    head = ["trained", "on images", "side", "cells a side", "around the patch", "accuracy"]
    table = aligned([[*head, *methods], *(_cells_of(row, methods) for row in rows)])
    sentences = [
        _sentence([row for row in rows if row["training"] == training], methods, limit)
        for training in dict.fromkeys(row["training"] for row in rows)
    ]
    return "\n".join([title, table, " ".join(sentences)])


def _cells_of(row: dict, methods: Sequence[str]) -> list[str]:
    """One row of the table."""
    trained_on = f"{row['trained_on']:,}"
    if row["tokens_trained_on"]:
        trained_on = f"{row['tokens_trained_on']:,} + {trained_on}"
    shares = []
    for method in methods:
        inside = row["inside"][method]
        empty = f", {inside['empty']} empty" if inside["empty"] else ""
        shares.append(shown(inside) + empty)
    return [
        row["training"],
        trained_on,
        f"{row['side']} px",
        str(row["cells"]),
        "noise" if row["noise"] else "gray",
        f"{row['accuracy']:.2f}",
        *shares,
    ]


def _sentence(rows: Sequence[dict], methods: Sequence[str], limit: float) -> str:
    """What the rows of one way of training say about where the map of such a network is bright."""
    kept = [
        row["cells"]
        for row in rows
        if row["accuracy"] > 0.9
        and min(row["inside"][method]["value"] for method in methods) >= limit
    ]
    every = len(kept) == len(rows)
    if rows[0]["training"] != "whole":
        start = "Where the patch tokens first learned what lies under them, the limit is "
        if not every:
            return start + "not kept either."
        return (
            start + "kept: such a map finds evidence that stays in its token. A network that "
            "learns everything from the class may move it to other tokens; the models here that "
            "start from random weights learn so."
        )
    if not kept:
        return (
            "No row trained whole keeps the limit: the bright part of such a network's map need "
            "not be where its evidence is."
        )
    if every:
        return "Every row keeps the limit: a map of this network is bright where its evidence is."
    return (
        f"The limit is kept from {min(kept)} cells a side on: the map is bright where the evidence "
        "is, but no finer than a cell and its neighbors. "
        f"A slice of 128 px has {rows[0]['cells']} cells a side."
    )
