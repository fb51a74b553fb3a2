"""The visual style of every figure: colors, canvas, saving; no data, weights or GPU needed."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Collection, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, cast

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from utils.evaluation.rows import TableRow
from utils.evaluation.schema import Evaluation, Score
from utils.utils_funcs import BACKBONES, atomic_path

if TYPE_CHECKING:
    from IPython.display import Image as ShownImage

#: A hue for each backbone in turn, lighter and darker, which is for adversarial training; the first
#: three are of the Okabe-Ito color-blind-safe set.
HUES = (
    ("#56B4E9", "#0072B2"),
    ("#E69F00", "#D55E00"),
    ("#6FCFB0", "#00785A"),
    ("#B8A1E3", "#5E3C99"),
    ("#D8C26A", "#8A7A1F"),
)


COLORS = {
    f"{backbone}{regime}": color
    for backbone, hues in zip(BACKBONES, itertools.cycle(HUES), strict=False)
    for regime, color in zip(("", "_atk"), hues, strict=True)
} | {
    "Ensemble": "#CC79A7",
    "Sequence": "#882255",
    "Baselines": "#8C8C8C",
    "Constant answer": "#222222",
}


MARKERS = {name: "D" if name.endswith("_atk") else "o" for name in COLORS} | {
    "Constant answer": "X",
    "Baselines": "s",
}


#: Ensembles share one hue, so each form has another shape.
FORM_MARKERS = {
    "uniform clean": "v",
    "uniform robust": "^",
    "uniform mixed": "P",
    "weighted mixed": "<",
    "stacking mixed": ">",
    "blending mixed": "h",
}


PROTOCOL_TITLES = {
    "slice": "slice: published split, patients on both sides",
    "patient": "patient: no patient on both sides",
}


GREY, BASE = "#6b6b6b", "#222222"


MISSING = "–"


STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": GREY,
    "axes.labelcolor": BASE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": BASE,
    "ytick.labelcolor": BASE,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
    "text.color": BASE,
}


Arguments = ParamSpec("Arguments")

#: (value, low, high) in percent.
Point = tuple[float, float, float]


class Counted(Protocol):
    """What was counted on so many slices of so many patients: scores, an attack, a part of a
    record."""

    @property
    def n_slices(self) -> int:
        """The number of slices."""

    @property
    def n_patients(self) -> int:
        """The number of different patients."""


class ResultFigure(Figure):
    """A figure that notebooks show as it is, whichever backend is active."""

    def _repr_png_(self) -> bytes:
        from PIL import Image

        buffer, small = io.BytesIO(), io.BytesIO()
        self.savefig(buffer, format="png", dpi=96)
        # A palette, so that a notebook of many figures stays under a megabyte.
        with Image.open(buffer) as image:
            image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
                small, format="png", optimize=True
            )
        return small.getvalue()


def save_figure(
    figure: Figure, path: Path | str, *, dpi: int = 150, colors: int | None = None
) -> Path:
    """Writes a PNG atomically and without the software's version, so that redrawing changes
    nothing.

    Args:
        colors: size of a palette, with which a figure full of images takes a third of the space;
            None: none.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})
        if colors:
            from PIL import Image

            with Image.open(temporary) as image:
                reduced = image.convert("RGB").quantize(colors, dither=Image.Dither.FLOYDSTEINBERG)
            reduced.save(temporary, format="png", optimize=True)
    # The places found for the panels hold at any size: a notebook shows the figure sooner.
    figure.set_layout_engine("none")
    return Path(path)


def picture(path: Path | str, width: int = 900) -> ShownImage:
    """A saved figure that is full of images, for a notebook: as JPEG it takes two thirds of the
    space, and the notebook stays under 1 MB."""
    from IPython.display import Image as Shown
    from PIL import Image

    file = io.BytesIO()
    with Image.open(path) as image:
        shown = image.convert("RGB")
        shown.thumbnail((width, 10 * width))
        shown.save(file, format="jpeg", quality=70, optimize=True)
    return Shown(data=file.getvalue(), format="jpeg", width=width)


def show(
    score: Score | None, style: str = "percent", *, brief: bool = False, signed: bool = False
) -> str:
    """`61.0 [55.2, 66.8]`; an en dash where the score is missing or undefined.

    Args:
        style: `percent`, with one decimal, or `decimal`, with three.
        brief: for a Markdown table: the value in bold over its interval.
        signed: with a plus where positive.
    """
    if score is None or score.value is None:
        return MISSING
    scale, pattern = (100, ".1f") if style == "percent" else (1, ".3f")
    numbers = [
        f"{scale * x:{'+' if signed else ''}{pattern}}" for x in (score.value, *(score.ci or ()))
    ]
    if len(numbers) == 1:  # known without sampling
        return f"**{numbers[0]}**" if brief else numbers[0]
    value, low, high = numbers
    return f"**{value}**<br><sub>{low} to {high}</sub>" if brief else f"{value} [{low}, {high}]"


def canvas(
    rows: int, columns: int, size: tuple[float, float], title: str, label: str, **options: Any
) -> tuple[ResultFigure, np.ndarray]:
    """A figure and its panels (rows, columns).

    Args:
        size: inches. label: provenance, in the lower right corner. options: of `Figure.subplots`.
    """
    figure = ResultFigure(figsize=size, layout="constrained")
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(rect=(0, 0.32 / size[1], 1, 1 - 0.32 / size[1]), wspace=0.04)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.text(0.99, 0.1 / size[1], label, ha="right", va="bottom", fontsize=7.5, color=GREY)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def shared_legend(figure: Figure, panels: np.ndarray, place: str, **options: Any) -> None:
    """One legend outside the panels for all that they show, each label once."""
    handles: dict[str, Any] = {
        label: handle
        for panel in panels.flat
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend([*handles.values()], [*handles], loc=cast(Any, f"outside {place}"), **options)


def styled(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """Applies the one style while `draw` builds its figure."""

    @wraps(draw)
    def wrapped(*arguments: Arguments.args, **options: Arguments.kwargs) -> Figure:
        with rc_context(cast(Any, STYLE)):
            return draw(*arguments, **options)

    return wrapped


def marker_of(row: TableRow) -> str:
    """The marker of a row in every figure."""
    return FORM_MARKERS.get(row.variant or "", MARKERS[row.model])


def size_of(counted: Counted) -> str:
    """`n = 1,279 slices of 200 patients`."""
    return f"n = {counted.n_slices:,} slices of {counted.n_patients:,} patients"


def percent_point(score: Score | None) -> Point | None:
    """A score as a point in percent; None where it is missing or undefined."""
    return None if score is None or score.value is None else known_point(score)


def known_point(score: Score) -> Point:
    """A score that is always defined, such as a share, as a point in percent.

    Raises:
        ValueError: it is undefined.
    """
    if score.value is None or score.bounds is None:
        raise ValueError("An undefined score has no place in a figure.")
    low, high = score.bounds
    return 100 * score.value, 100 * low, 100 * high


def interval_bars(point: Point) -> list[list[float]]:
    """The interval of a point as `Axes.errorbar` takes it: lengths below and above the value."""
    return [[point[0] - point[1]], [point[2] - point[0]]]


def absent(axes: Axes, text: str = "no record yet") -> None:
    """Says in an empty panel that it has nothing to show."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.grid(False)
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
    # Panels that share the axis have their tick labels here, where they would now be missing.
    for other in axes.get_shared_y_axes().get_siblings(axes):
        if other is not axes:
            other.tick_params(labelleft=True)


def between(counts: Collection[int]) -> str:
    """`1,280`, or `1,280 to 2,560` where they differ."""
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))


def sizes_text(counts: Collection[tuple[int, int]]) -> str:
    """(slices, patients) of every model shown: `n = 1,280 to 2,560 slices of 40 to 80 patients a
    model`."""
    slices, patients = zip(*counts, strict=True)
    text = f"n = {between(slices)} slices of {between(patients)} patients"
    return text + (" a model" if len(set(counts)) > 1 else "")


def sizes_of(shown: Sequence[Evaluation], attacked: bool = False) -> str:
    """The same of clean scores; with `attacked` also how many slices were attacked, where not all
    were."""
    text = sizes_text([(one.clean.n_slices, one.clean.n_patients) for one in shown])
    counts = [
        max((worst.n_slices for worst in one.worst_case.values()), default=0) for one in shown
    ]
    fewer = attacked and any(
        0 < count < one.clean.n_slices for count, one in zip(counts, shown, strict=True)
    )
    return text + (f" ({between(counts)} attacked)" if fewer else "")


def constant_line(axes: Axes, rows: list[TableRow], protocol: str, vertical: bool = False) -> None:
    """The balanced accuracy of the constant answer, which is the first of the rows."""
    point = known_point(rows[0].evaluations[protocol].clean.slice["balanced_accuracy_3"])
    (axes.axvline if vertical else axes.axhline)(
        point[0], color=BASE, linestyle=":", linewidth=1.1, zorder=1
    )


@styled
def image_grid(
    images: list[np.ndarray], titles: list[str], columns: int, *, label: str, title: str = ""
) -> Figure:
    """Gray images (H, W) in rows of `columns`, all on one gray scale from 0 to 255."""
    rows = -(-len(images) // columns)
    figure, axes = canvas(
        rows, columns, (1.25 * columns, 1.45 * rows + 0.35 + 0.3 * bool(title)), title, label
    )
    for panel in axes.flat:
        panel.axis("off")
    for panel, image, name in zip(axes.flat, images, titles, strict=False):
        panel.imshow(image, cmap="gray", vmin=0, vmax=255)
        panel.set_title(name, fontsize=7, loc="center")
    return figure
