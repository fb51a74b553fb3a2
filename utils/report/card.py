"""The result card: one evaluation of one model on one self-contained page, and as JSON."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from utils.config import parse_eps
from utils.drawing import canvas, show, styled
from utils.evaluation.records import Record
from utils.evaluation.sanity import verdict
from utils.evaluation.schema import Scores
from utils.report.rendering import TEMPLATES
from utils.utils_funcs import atomic_path, write_json


@dataclass(frozen=True)
class Card:
    """What a card shows.

    Attributes:
        clean: name of a score → it; worst: eps → the same of what withstood every attack.
        shown: scores of the table, by name, as a reader reads them.
        checks: rows of the sanity table.
        content: of the JSON file.
    """

    model: str
    suite: str
    clean: Scores
    worst: dict[str, Scores]
    shown: dict[str, str]
    checks: list[dict]
    n_slices: int
    n_patients: int
    content: dict


def card_of(record: Record) -> Card:
    """The card of a record."""
    evaluation = record.evaluation
    suite = record.config.get("suite", "")
    return Card(
        model=record.model,
        suite=suite if isinstance(suite, str) else ", ".join(suite),
        clean=evaluation.clean.slice,
        worst={eps: worst.scores for eps, worst in evaluation.worst_case.items()},
        shown=SHOWN,
        checks=[check.to_json() for check in record.sanity],
        n_slices=evaluation.clean.n_slices,
        n_patients=evaluation.clean.n_patients,
        content=record.to_json(),
    )


def write_card(
    path: Path,
    card: Card,
    notes: Sequence[str],
    example: Figure | None,
    *,
    patients_known: bool = True,
) -> Path:
    """Writes the page, and beside it the same as JSON; returns the latter's path.

    Args:
        path: of the page.
        notes: sentences on the images, the patients and what the model has seen.
        example: a picture of attacked images (None: none was made).
        patients_known: whether intervals are over patients, or each image counts as one.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("card.html.j2").render(
        card=card,
        notes=notes,
        clean={name: show(score, "percent") for name, score in card.clean.items()},
        n_patients=card.n_patients if patients_known else None,
        worst={
            eps: [show(scores[name], "percent") for name in card.shown]
            for eps, scores in card.worst.items()
        },
        verdict=verdict(card.checks),
        curve=as_image(curve_figure(card)),
        example=None if example is None else as_image(example),
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    json_path = path.with_suffix(".json")
    write_json(json_path, card.content)
    return json_path


#: Scores of the card's table, by their keys in a record, as a reader reads them.
SHOWN = {
    "balanced_accuracy_3": "balanced accuracy, 3 classes (%)",
    "accuracy": "accuracy (%)",
}


@styled
def curve_figure(card: Card) -> Figure:
    """Accuracy against eps under the worst case, with its interval."""
    points = [(0.0, card.clean["accuracy"])]
    points += [(255 * parse_eps(eps), scores["accuracy"]) for eps, scores in card.worst.items()]
    points.sort(key=lambda point: point[0])
    figure, axes = canvas(1, 1, (5.5, 3.4), "", card.model)
    panel = axes[0, 0]
    eps = np.array([point[0] for point in points])
    values = np.array([100 * (score.value or 0) for _, score in points])
    bounds = [score.bounds or (np.nan, np.nan) for _, score in points]
    low, high = 100 * np.array(bounds).T
    panel.errorbar(eps, values, yerr=[values - low, high - values], marker="o", capsize=3)
    panel.set(xlabel="eps (× 1/255)", ylabel="accuracy (%)", ylim=(0, 100))
    panel.set_title("Worst case over all attacks of the suite", fontsize=9, loc="left")
    return figure


def as_image(figure: Figure) -> str:
    """The figure as the `src` of an image, so that the page needs no other file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
