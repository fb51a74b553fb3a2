"""README's first picture: one slice before and after an attack, beside what is left of each model
when patients are kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from utils.drawing import (
    BASE,
    COLORS,
    GREY,
    ResultFigure,
    constant_line,
    known_point,
    percent_point,
    sizes_of,
    styled,
)
from utils.evaluation.rows import TableRow, provenance
from utils.utils_funcs import CLASSES, MODELS, atomic_path

#: How many times its size the change is drawn.
ENLARGED = 20

#: The controls in the picture; it has no room for all of them.
SHOWN_CONTROLS = ("nearest_neighbour", "linear_32", "kernel_ridge_16")


@dataclass(frozen=True)
class Example:
    """One slice, clean and attacked, and what a model makes of both.

    Attributes:
        images, maps: uint8 (2, H, W), clean first: slices, and Grad-CAM of each, 255 the strongest.
        probabilities: float32 (2, 4).
        label: the true class; model: its name; eps: of the attack, as it is written.
    """

    images: np.ndarray
    maps: np.ndarray
    probabilities: np.ndarray
    label: int
    model: str
    eps: str


def example_path(root: Path | str) -> Path:
    """Where the example of a tree is kept."""
    return Path(root) / "assets" / "results" / "example.npz"


def write_example(example: Example, path: Path) -> None:
    """Writes an example; `read_example` reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            images=example.images,
            maps=example.maps,
            probabilities=example.probabilities,
            label=np.array(example.label),
            model=np.array(example.model),
            eps=np.array(example.eps),
        )


def read_example(path: Path) -> Example:
    """The example that `write_example` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return Example(
            file["images"],
            file["maps"],
            file["probabilities"],
            int(file["label"]),
            str(file["model"]),
            str(file["eps"]),
        )


@styled
def example_figure(example: Example, rows: Sequence[TableRow]) -> Figure:
    """The slice, the change and the attacked slice with their maps; beside them every network and
    some controls, under both protocols and under attack."""
    figure = ResultFigure(figsize=(12.5, 4.6), layout="constrained")
    halves = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.0, 1.05))
    _draw_slices(halves[0, 0], example)
    _draw_rows(halves[0, 1], [row for row in rows if _is_shown(row)], rows)
    return figure


def _is_shown(row: TableRow) -> bool:
    return row.model in MODELS or row.variant in SHOWN_CONTROLS


def _draw_slices(figure: SubFigure, example: Example) -> None:
    figure.suptitle(
        f"One gray level a pixel is enough: a {CLASSES[example.label]} slice, {example.model}, "
        f"PGD at {example.eps}",
        fontsize=10,
        fontweight="bold",
    )
    panels = figure.subplots(2, 3)
    before, after = example.images.astype(int)
    change = np.clip(128 + ENLARGED * (after - before), 0, 255)
    answers = [f"{CLASSES[int(one.argmax())]} {one.max():.0%}" for one in example.probabilities]
    titles = (f"the model says {answers[0]}", f"the change × {ENLARGED}", f"now {answers[1]}")
    for panel, image, title in zip(panels[0], (before, change, after), titles, strict=True):
        panel.imshow(image, cmap="gray", vmin=0, vmax=255)
        panel.set_title(title, fontsize=9, loc="center")
    for panel, image, heat in zip(panels[1, ::2], (before, after), example.maps, strict=True):
        panel.imshow(image, cmap="gray", vmin=0, vmax=255)
        panel.imshow(heat, cmap="inferno", vmin=0, vmax=255, alpha=0.5)
        panel.set_xlabel("Grad-CAM of that answer", fontsize=8)
    largest = int(np.abs(after - before).max())
    panels[1, 1].text(
        0.5,
        0.5,
        f"largest change:\n{largest} of 255\ngray levels",
        ha="center",
        va="center",
        fontsize=9,
        color=GREY,
    )
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
        panel.grid(False)
        for side in panel.spines.values():
            side.set_visible(False)


def _draw_rows(figure: SubFigure, shown: list[TableRow], rows: Sequence[TableRow]) -> None:
    panel = figure.subplots()
    panel.set_title("Balanced accuracy over three classes (%)", fontweight="bold")
    constant_line(panel, list(rows), "patient", vertical=True)
    for place, row in enumerate(shown):
        _draw_row(panel, place, row)
    panel.set_yticks(range(len(shown)), [row.name for row in shown])
    panel.set(xlim=(-3, 103), ylim=(len(shown) - 0.4, -0.6))
    panel.grid(axis="y", visible=False)
    marks = [
        Line2D([], [], color=GREY, marker="o", markerfacecolor="white", linestyle=""),
        Line2D([], [], color=GREY, marker="o", linestyle=""),
        Line2D([], [], color=GREY, marker="x", linestyle=""),
        Line2D([], [], color=BASE, linestyle=":"),
    ]
    eps = next(iter(shown[-1].records.values())).headline_eps
    names = (
        "published split: patients on both sides",
        "patients kept apart",
        f"kept apart, after every attack at {eps}",
        "always answering Non",
    )
    figure.legend(marks, names, loc="outside lower center", ncols=2, fontsize=8)
    panel.set_xlabel(
        provenance([record for row in shown for record in row.records.values()])
        + "\nkept apart: "
        + sizes_of([row.evaluations["patient"] for row in shown if row.trained], attacked=True),
        fontsize=7,
        color=GREY,
    )


def _draw_row(panel: Axes, place: int, row: TableRow) -> None:
    color = COLORS[row.model]
    points = {
        protocol: percent_point(evaluation.clean.slice["balanced_accuracy_3"])
        for protocol, evaluation in row.evaluations.items()
    }
    if (both := [points.get("slice"), points.get("patient")]) and None not in both:
        values = [point[0] for point in both if point is not None]
        panel.plot(values, [place, place], color=color, alpha=0.35, linewidth=1.2)
    for protocol, face in (("slice", "white"), ("patient", color)):
        if point := points.get(protocol):
            panel.plot(
                point[0], place, "o", color=color, markerfacecolor=face, markersize=7, zorder=3
            )
    if point := points.get("patient"):
        panel.plot(point[1:], [place, place], color=color, linewidth=2.4, zorder=2)
    worst = row.worst_case("patient") if "patient" in row.records else None
    if worst and row.trained:
        value = known_point(worst.scores["balanced_accuracy_3"])
        panel.plot(value[0], place, "x", color=color, markersize=7, markeredgewidth=2, zorder=3)
