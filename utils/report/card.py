"""The result card: one evaluation of one model on one self-contained page, and as JSON."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from utils.config import parse_eps
from utils.drawing import canvas, show, styled
from utils.evaluation.records import Record
from utils.evaluation.sanity import verdict
from utils.report.rendering import TEMPLATES
from utils.utils_funcs import atomic_path, write_json


def write_card(
    path: Path,
    record: Record,
    notes: Sequence[str],
    example: Figure | None,
    *,
    patients_known: bool = True,
) -> Path:
    """Writes the page, and beside it the record as JSON; returns the latter's path.

    Args:
        path: of the page.
        notes: sentences on the images, the patients and what the model has seen.
        example: a picture of attacked images (None: none was made).
        patients_known: whether intervals are over patients, or each image counts as one.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined
    )
    evaluation = record.evaluation
    checks = [check.to_json() for check in record.sanity]
    page = environment.get_template("card.html.j2").render(
        record=record,
        notes=notes,
        clean={name: show(score, "percent") for name, score in evaluation.clean.slice.items()},
        n_slices=evaluation.clean.n_slices,
        n_patients=evaluation.clean.n_patients if patients_known else None,
        worst={
            eps: [show(worst.scores[name], "percent") for name in SHOWN]
            for eps, worst in evaluation.worst_case.items()
        },
        shown=SHOWN,
        checks=checks,
        verdict=verdict(checks),
        curve=as_image(curve_figure(record)),
        example=None if example is None else as_image(example),
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    json_path = path.with_suffix(".json")
    write_json(json_path, record.to_json())
    return json_path


#: Scores of the card's table, by their keys in a record, as a reader reads them.
SHOWN = {
    "balanced_accuracy_3": "balanced accuracy, 3 classes (%)",
    "accuracy": "accuracy (%)",
}


@styled
def curve_figure(record: Record) -> Figure:
    """Accuracy against eps under the worst case, with its interval."""
    evaluation = record.evaluation
    points = [(0.0, evaluation.clean.slice["accuracy"])]
    points += [
        (255 * parse_eps(eps), worst.scores["accuracy"])
        for eps, worst in evaluation.worst_case.items()
    ]
    points.sort(key=lambda point: point[0])
    figure, axes = canvas(1, 1, (5.5, 3.4), "", record.model)
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
