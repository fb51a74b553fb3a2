"""Records and predictions in, matplotlib figures out, in one visual style: no data, weights or GPU needed."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Collection
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from utils import metrics
from utils.config import parse_eps
from utils.records import (
    Entry,
    TableRow,
    attacks_of,
    clean_of,
    headline_eps,
    provenance,
    robust_decisions,
    table_rows,
    temperatures,
)
from utils.utils_funcs import BACKBONES, CLASSES, MODELS, PROTOCOLS, atomic_path

#: Pairs from the Okabe-Ito colour-blind-safe set: one hue a backbone, the darker one adversarially trained.
COLOURS = {
    "Dinov2": "#56B4E9",
    "Dinov2_atk": "#0072B2",
    "Efficientnet": "#E69F00",
    "Efficientnet_atk": "#D55E00",
    "Resnet": "#6FCFB0",
    "Resnet_atk": "#00785A",
    "Ensemble": "#CC79A7",
    "Sequence": "#882255",
    "Baselines": "#8C8C8C",
    "Constant answer": "#222222",
}
MARKERS = {name: "D" if name.endswith("_atk") else "o" for name in COLOURS} | {
    "Constant answer": "X",
    "Baselines": "s",
}
#: Ensembles share one hue, so each form has a shape of its own.
FORM_MARKERS = {
    "uniform clean": "v",
    "uniform robust": "^",
    "uniform mixed": "P",
    "weighted mixed": "<",
    "stacking mixed": ">",
    "blending mixed": "h",
}
PROTOCOL_TITLES = {
    "slice": "slice: published split, people on both sides",
    "patient": "patient: no person on both sides",
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


class ResultFigure(Figure):
    """A figure that notebooks show as it is, whichever backend is active."""

    def _repr_png_(self) -> bytes:
        from PIL import Image

        buffer, small = io.BytesIO(), io.BytesIO()
        self.savefig(buffer, format="png", dpi=96)
        with Image.open(
            buffer
        ) as image:  # a palette: a notebook of many figures stays under a megabyte
            image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
                small, format="png", optimize=True
            )
        return small.getvalue()


def save_figure(
    figure: Figure, path: Path | str, *, dpi: int = 150, colours: int | None = None
) -> Path:
    """Writes a PNG atomically and without the software's version, so that redrawing changes nothing. A figure full of
    images weighs a third with a palette of `colours`."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})
        if colours:
            from PIL import Image

            with Image.open(temporary) as image:
                reduced = image.convert("RGB").quantize(colours, dither=Image.Dither.FLOYDSTEINBERG)
            reduced.save(temporary, format="png", optimize=True)
    return Path(path)


def picture(path: Path | str, width: int = 900) -> "IPython.display.Image":  # noqa: F821
    """A saved figure that is full of images, for a notebook: as JPEG it weighs two thirds, and the notebook stays under 1 MB."""
    from IPython.display import Image as Shown
    from PIL import Image

    file = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(file, format="jpeg", quality=80, optimize=True)
    return Shown(data=file.getvalue(), format="jpeg", width=width)


def show(
    score: dict | None, style: str = "percent", *, brief: bool = False, signed: bool = False
) -> str:
    """`61.0 [55.2, 66.8]`; an en dash where the score is missing or undefined."""
    if not score or score["value"] is None:
        return MISSING
    scale, pattern = (100, ".1f") if style == "percent" else (1, ".3f")
    numbers = [
        f"{scale * x:{'+' if signed else ''}{pattern}}"
        for x in (score["value"], *(score["ci"] or ()))
    ]
    if len(numbers) == 1:  # known exactly: nothing was sampled
        return f"**{numbers[0]}**" if brief else numbers[0]
    value, low, high = numbers
    return f"**{value}**<br><sub>{low} to {high}</sub>" if brief else f"{value} [{low}, {high}]"


def canvas(
    rows: int, columns: int, size: tuple[float, float], title: str, label: str, **options
) -> tuple[ResultFigure, np.ndarray]:
    figure = ResultFigure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.32 / size[1], 1, 1 - 0.32 / size[1]), wspace=0.04)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.text(0.99, 0.1 / size[1], label, ha="right", va="bottom", fontsize=7.5, color=GREY)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def shared_legend(figure: Figure, panels: np.ndarray, place: str, **options) -> None:
    """One legend outside the panels for all that they show, each label once."""
    handles = {
        label: handle
        for panel in panels.flat
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc=f"outside {place}", **options)


def styled(draw):
    """Applies the one style while `draw` builds its figure."""

    def wrapped(*arguments, **options):
        with rc_context(STYLE):
            return draw(*arguments, **options)

    wrapped.__name__, wrapped.__doc__, wrapped.__wrapped__ = draw.__name__, draw.__doc__, draw
    return wrapped


def marker_of(row: TableRow) -> str:
    return FORM_MARKERS.get(row.variant, MARKERS[row.model])


def size_of(block: dict) -> str:
    """`n = 1,279 slices of 200 people`."""
    return f"n = {block['n_slices']:,} slices of {block['n_people']:,} people"


def _point(scores: dict | None, name: str) -> tuple[float, float, float] | None:
    """(value, low, high) in percent, or None where the score is missing or undefined."""
    found = (scores or {}).get(name)
    if not found or found["value"] is None:
        return None
    return tuple(100 * x for x in (found["value"], *(found["ci"] or [found["value"]] * 2)))


def _bars(point: tuple[float, float, float]) -> list[list[float]]:
    return [[point[0] - point[1]], [point[2] - point[0]]]


def _absent(axes: Axes, text: str = "no record yet") -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.grid(False)
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
    # Panels that share the axis have their tick labels here, where they would now be missing.
    for other in axes.get_shared_y_axes().get_siblings(axes):
        if other is not axes:
            other.tick_params(labelleft=True)


def _between(counts: Collection[int]) -> str:
    """`1,280`, or `1,280 to 2,560` where they differ."""
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))


def _sizes(counts: Collection[tuple[int, int]]) -> str:
    """(slices, people) of every model shown: `n = 1,280 to 2,560 slices of 40 to 80 people a model`."""
    slices, patients = zip(*counts, strict=True)
    return f"n = {_between(slices)} slices of {_between(patients)} people{' a model' if len(set(counts)) > 1 else ''}"


def _sizes_of(blocks: list[dict], attacked: bool = False) -> str:
    """The same of the blocks' clean scores; with `attacked` also how many slices were attacked, where not all were."""
    text = _sizes([(block["clean"]["n_slices"], block["clean"]["n_people"]) for block in blocks])
    counts = [
        max((worst["n_slices"] for worst in block["worst_case"].values()), default=0)
        for block in blocks
    ]
    fewer = attacked and any(
        0 < count < block["clean"]["n_slices"] for count, block in zip(counts, blocks, strict=True)
    )
    return text + (f" ({_between(counts)} attacked)" if fewer else "")


def _constant_line(axes: Axes, rows: list[TableRow], protocol: str, vertical: bool = False) -> None:
    point = _point(rows[0].blocks[protocol]["clean"]["slice"], "balanced_accuracy_3")
    (axes.axvline if vertical else axes.axhline)(
        point[0], color=BASE, linestyle=":", linewidth=1.1, zorder=1
    )


def _protocols(rows: list[TableRow]) -> list[str]:
    return [protocol for protocol in PROTOCOLS if protocol in rows[0].blocks]


@styled
def image_grid(
    images: list[np.ndarray], titles: list[str], columns: int, *, label: str, title: str = ""
) -> Figure:
    """Grey images (H, W) in rows of `columns`, all on one grey scale from 0 to 255."""
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


# --------------------------------------------------------------------------------------------- one model's figures


@styled
def confusion_figure(model: str, entries: dict[str, Entry]) -> Figure:
    """True class against decision, in percent of the true class and in slices. `entries`: protocol → entry."""
    figure, axes = canvas(
        1, 2, (9, 4.5), f"{model}: confusion matrix, clean images", provenance([*entries.values()])
    )
    for panel, protocol in zip(axes[0], PROTOCOLS, strict=True):
        if protocol not in entries:
            panel.set_title(PROTOCOL_TITLES[protocol])
            _absent(panel)
            continue
        _confusion(panel, entries[protocol], 8.5)
        patients = [
            len(np.unique(entries[protocol].rows.patients[entries[protocol].rows.labels == label]))
            for label in range(4)
        ]
        panel.set(
            xlabel="decision",
            ylabel="true class",
            yticklabels=[
                f"{name}\n{n} {'person' if n == 1 else 'people'}"
                for name, n in zip(CLASSES, patients, strict=True)
            ],
        )
        panel.set_title(
            f"{PROTOCOL_TITLES[protocol]}\n{size_of(entries[protocol].record['clean'])}"
        )
    return figure


def _confusion(panel: Axes, entry: Entry, size: float) -> None:
    """One confusion matrix of clean images: true classes downwards, decisions to the right, text of `size` points."""
    counts = metrics.confusion_matrix(entry.predictions["clean"], entry.rows.labels)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    panel.imshow(
        share,
        cmap=LinearSegmentedColormap.from_list(entry.model, ["#ffffff", COLOURS[entry.model]]),
        vmin=0,
        vmax=1,
    )
    for (row, column), value in np.ndenumerate(share):
        panel.text(
            column,
            row,
            f"{value:.0%}\n{counts[row, column]:,}",
            ha="center",
            va="center",
            fontsize=size,
            color="white" if value > 0.6 and entry.model.endswith("_atk") else BASE,
        )
    panel.set(xticks=range(4), xticklabels=CLASSES, yticks=range(4), yticklabels=CLASSES)
    panel.grid(False)
    panel.spines[["left", "bottom"]].set_visible(False)
    panel.tick_params(length=0)


def _history_figure(
    model: str,
    entries: dict[str, Entry],
    title: str,
    y_label: str,
    curves: dict[str, tuple[str, str]],
    scale: float,
) -> Figure:
    """`curves`: history key → (label, line style). Thin lines are folds and seeds, the thick one their mean."""
    figure, axes = canvas(1, 2, (9, 3.8), title, provenance([*entries.values()]), sharey=True)
    for panel, protocol in zip(axes[0], PROTOCOLS, strict=True):
        runs = (
            [run for run in entries[protocol].record["units"] if run.get("history")]
            if protocol in entries
            else []
        )
        panel.set_title(
            PROTOCOL_TITLES[protocol]
            + (f"\n{len(runs)} run{'s' * (len(runs) != 1)}" if runs else "")
        )
        if not runs:
            _absent(panel)
            continue
        for number, (key, (label, dashes)) in enumerate(curves.items()):
            histories = [
                np.array(
                    [(e["epoch"], scale * e[key]) for e in run["history"] if e.get(key) is not None]
                )
                for run in runs
            ]
            histories = [values for values in histories if len(values)]
            if not histories:
                continue
            colour = (GREY, COLOURS[model], "#CC79A7")[number]
            for values in histories:
                panel.plot(*values.T, color=colour, alpha=0.35, linewidth=0.7, linestyle=dashes)
            shared = min(map(len, histories))
            mean = np.mean([values[:shared] for values in histories], axis=0)
            panel.plot(
                *mean.T,
                color=colour,
                linestyle=dashes,
                linewidth=2,
                label=label,
                marker="." if shared < 4 else "",
            )
        for run in runs:
            if run.get("best_epoch") is not None:
                panel.axvline(
                    run["best_epoch"], color=BASE, alpha=0.3, linewidth=0.8, linestyle=":"
                )
        panel.plot(
            [],
            [],
            color=BASE,
            alpha=0.5,
            linestyle=":",
            linewidth=0.9,
            label="best epoch (validation)",
        )
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_xlabel("epoch")
    # Below the panels: five folds leave no free corner inside.
    shared_legend(figure, axes[0], "lower left", ncols=4)
    axes[0, 0].set_ylabel(y_label)
    return figure


@styled
def loss_figure(model: str, entries: dict[str, Entry]) -> Figure:
    """Cross-entropy by epoch: training, validation, and validation under attack for adversarially trained models."""
    return _history_figure(
        model,
        entries,
        f"{model}: loss",
        "cross-entropy (nats)",
        {
            "train_loss": ("training", "-"),
            "validation_loss": ("validation, clean", "-"),
            "adversarial_validation_loss": ("validation, attacked", "--"),
        },
        1,
    )


@styled
def accuracy_figure(model: str, entries: dict[str, Entry]) -> Figure:
    """Accuracy by epoch: training (running mean of the epoch), validation, and validation balanced over classes."""
    return _history_figure(
        model,
        entries,
        f"{model}: accuracy",
        "accuracy (%)",
        {
            "train_accuracy": ("training", "-"),
            "validation_accuracy": ("validation", "-"),
            "validation_balanced_accuracy": ("validation, balanced over 4 classes", "--"),
        },
        100,
    )


def _eps_axis(panel: Axes, eps: list[str]) -> None:
    values = sorted({255 * parse_eps(text) for text in eps})
    round_ones = [value for value in values if value in (0.5, 1, 2, 4, 8, 16, 32)]
    # 0.005 is 1.275/255: a tick of its own, except close to another's, where the labels would run into each other.
    ticks = [
        value
        for value in values
        if value in round_ones or all(not 0.7 < value / other < 1.4 for other in round_ones)
    ]
    panel.set_xscale("symlog", base=2, linthresh=0.5, linscale=0.6)
    panel.set_xticks([0, *ticks], ["0", *(f"{value:g}" for value in ticks)])
    panel.set_xticks([], minor=True)
    panel.set_xlim(-0.05, 1.12 * values[-1])
    panel.set_xlabel("eps of the L∞ attack (1/255; 0: clean)")


@styled
def model_robustness_figure(model: str, entries: dict[str, Entry]) -> Figure:
    """Balanced accuracy over three classes against eps: the attacks of the sweep and the worst case over all of them; and,
    where more attacks ran at one eps alone, every attack at that eps."""
    records = {
        protocol: entries[protocol].record
        for protocol in PROTOCOLS
        if protocol in entries and entries[protocol].record["worst_case"]
    }
    found = {protocol: _at_one_eps(record) for protocol, record in records.items()}
    names = list(dict.fromkeys(name for blocks in found.values() for name in blocks))
    alone = len(names)
    height = 3.9 + bool(alone) * (0.9 + 0.165 * alone)
    figure, axes = canvas(
        1 + bool(alone),
        2,
        (12, height),
        f"{model}: every attack, and the worst case over them",
        provenance([*entries.values()]),
        sharey="row",
        height_ratios=(3.5, height - 4)[: 1 + bool(alone)],
    )
    looks = _attack_looks([*records.values()])
    for column, protocol in enumerate(PROTOCOLS):
        panel = axes[0, column]
        panel.set_title(PROTOCOL_TITLES[protocol])
        if protocol not in records:
            for empty in axes[:, column]:
                _absent(empty)
            continue
        record, rows = records[protocol], table_rows({(model, protocol): entries[protocol]})
        for name, attacks in _by_attack(record).items():
            if len(attacks) > 1 or not alone:
                panel.plot(
                    [255 * parse_eps(eps) for eps in attacks],
                    [100 * block["balanced_accuracy_3"]["value"] for block in attacks.values()],
                    **looks[name],
                )
        _worst_case_curve(panel, record, COLOURS[model], "-", "worst case, 95 % interval")
        _constant_line(panel, rows, protocol)
        panel.plot([], [], color=BASE, linestyle=":", linewidth=1.1, label="constant answer")
        _eps_axis(panel, list(record["attacks"]))
        panel.set_ylim(0, 102)
        panel.set_title(f"{PROTOCOL_TITLES[protocol]}\n{_sizes_of([record], attacked=True)}")
        if alone:
            _one_eps_panel(axes[1, column], model, record, found[protocol], names)
    axes[0, 0].set_ylabel("balanced accuracy, 3 classes (%)")
    if alone:  # one set of rows for both panels, which share this axis
        labels = [
            f"{name} (n = {' | '.join(_count(blocks.get(name)) for blocks in found.values())})"
            for name in names
        ]
        first = axes[1, PROTOCOLS.index(next(iter(records)))]
        first.set_yticks(range(alone), labels, fontsize=7)
        first.set_ylim(alone - 0.4, -0.6)
    shared_legend(figure, axes[0], "right upper")
    return figure


def _count(block: dict | None) -> str:
    return f"{block['n_slices']:,}" if block else "–"


def _at_one_eps(record: dict) -> dict[str, dict]:
    """Every attack at the headline eps → its block, if some of them ran at no other; else nothing."""
    attacks, eps = _by_attack(record), headline_eps(record)
    if len(record["attacks"]) == 1 or all(len(own) > 1 for own in attacks.values()):
        return {}
    return {name: own[eps] for name, own in attacks.items() if eps in own}


#: View of an attack → the score that it tries to lower.
AIMED_AT = {"four": "balanced_accuracy", "three": "balanced_accuracy_3", "binary": "auroc"}


def _one_eps_panel(
    panel: Axes, model: str, record: dict, found: dict[str, dict], names: list[str]
) -> None:
    """Each attack of `found` in the row that `names` gives it."""
    if not found:
        return _absent(panel, "no attack beyond the sweep")
    eps = headline_eps(record)
    worst = _point(record["worst_case"][eps], "balanced_accuracy_3")
    panel.axvspan(worst[1], worst[2], color=COLOURS[model], alpha=0.13, linewidth=0)
    panel.axvline(worst[0], color=COLOURS[model], linewidth=2)  # the worst case of the panel above
    for name, block in found.items():
        value = _point(block, AIMED_AT[block.get("view", "four")])
        if value is not None:
            panel.errorbar(
                value[0],
                names.index(name),
                xerr=_bars(value),
                fmt="o",
                color=GREY,
                markersize=3.5,
                linewidth=1,
            )
    panel.set(
        xlim=(-2, 102),
        xlabel=f"left of what the attack aims at, at eps {eps} (%):\nbalanced accuracy of 4 classes\n"
        "(_merged: of 3; _binary: AUROC)",
    )


def _by_attack(record: dict) -> dict[str, dict[str, dict]]:
    """attack → eps → its block, where its score is defined."""
    found: dict[str, dict[str, dict]] = {}
    for eps, attacks in record["attacks"].items():
        for name, block in attacks.items():
            if block["balanced_accuracy_3"]["value"] is not None:
                found.setdefault(name, {})[eps] = block
    return found


def _attack_looks(records: list[dict]) -> dict[str, dict]:
    """Grey tone, marker and label of each attack; the label of one that ran on a sample gives the sample's sizes."""
    sizes: dict[str, list[tuple[int, int]]] = {}
    for record in records:
        for name, attacks in _by_attack(record).items():
            sizes.setdefault(name, []).extend(
                (block["n_slices"], record["clean"]["n_slices"]) for block in attacks.values()
            )
    tones = LinearSegmentedColormap.from_list("attacks", ["#c9c9c9", "#4d4d4d"])(
        np.linspace(0, 1, max(len(sizes), 2))
    )
    looks = {}
    for number, (name, pairs) in enumerate(sizes.items()):
        part = any(n != whole for n, whole in pairs)
        aim = ", aims at 4 classes" if f"{name}_merged" in sizes else ""
        label = (
            f"{name}{aim} (n = {' | '.join(dict.fromkeys(f'{n:,}' for n, _ in pairs))})"
            if part
            else f"{name}{aim}"
        )
        looks[name] = {
            "color": tones[number],
            "label": label,
            "linewidth": 1,
            "marker": "osD^vP*Xd<>hp"[number % 13],
            "markersize": 4,
            "markeredgewidth": 0,
        }
    return looks


def _worst_case_curve(
    panel: Axes, block: dict, colour: str, dashes: str, label: str, marker: str = "o"
) -> None:
    """The union over this and smaller eps, which cannot rise, with its interval as a band."""
    points = [(0.0, *_point(block["clean"]["slice"], "balanced_accuracy_3"))]
    points += [
        (255 * parse_eps(eps), *_point(worst["union"], "balanced_accuracy_3"))
        for eps, worst in block["worst_case"].items()
        if "union" in worst
    ]
    x, value, low, high = np.array(points).T
    panel.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
    panel.plot(
        x,
        value,
        color=colour,
        linestyle=dashes,
        linewidth=2,
        marker=marker,
        markersize=4.5,
        label=label,
        zorder=3,
        markeredgecolor="white",
        markeredgewidth=0.5,
    )


@styled
def measures_figure(model: str, entries: dict[str, Entry]) -> Figure:
    """On each record's fixed sample: how small a perturbation suffices, in which direction an answer can be moved, and
    whether PGD has converged. One row a protocol; four classes; intervals over people."""
    shown = {
        protocol: entries[protocol]
        for protocol in PROTOCOLS
        if protocol in entries and _pooled_measures(entries[protocol])
    }
    figure, axes = canvas(
        len(shown),
        3,
        (11, 0.6 + 3.3 * len(shown)),
        f"{model}: how far, which way, and has PGD converged",
        provenance([*shown.values()]),
    )
    for (protocol, entry), panels in zip(shown.items(), axes, strict=True):
        pooled = _pooled_measures(entry)
        _minimal_panel(panels[0], model, pooled)
        _direction_panel(panels[1], model, pooled)
        _convergence_panel(panels[2], model, pooled)
        panels[0].set_title(
            f"{protocol}: n = {len(pooled['labels']):,} slices of {len(np.unique(pooled['people'])):,} people"
        )
    return figure


def _pooled_measures(entry: Entry) -> dict:
    """The sample measures of all units of a record in one: labels, people and each measure (N,); {} where there are none."""
    runs = [run for run in entry.record["units"] if run.get("measures")]
    if not runs:
        return {}
    rows, pooled = entry.predictions, {}
    for run in runs:
        own = np.flatnonzero((rows["fold"] == run["fold"]) & (rows["seed"] == run["seed"]))[
            run["measures"]["rows"]
        ]
        columns = {
            "labels": rows["labels"][own].astype(np.int64),
            "people": rows["patient_id"][own].astype(np.int64),
        }
        columns |= {
            name: np.array(run["measures"][name], dtype=float)
            for name in ("minimal_linf", "healthier", "sicker")
        }
        columns |= {
            (part["kind"], part["count"]): np.array(part["standing"], dtype=bool)
            for part in run["measures"]["convergence"]
        }
        for name, values in columns.items():
            pooled.setdefault(name, []).append(values)
    return {
        "eps": runs[0]["measures"]["eps"],
        "steps": runs[0]["measures"]["pgd_steps"],
        **{name: np.concatenate(parts) for name, parts in pooled.items()},
    }


def _share(
    flags: np.ndarray, pooled: dict, rows: np.ndarray | None = None
) -> tuple[float, float, float]:
    """(value, low, high) in percent of the images for which a flag is true."""
    rows = np.ones(len(flags), bool) if rows is None else rows
    found = metrics.score_robust(
        flags[rows], flags[rows], pooled["labels"][rows], pooled["people"][rows], n_boot=1000
    )["accuracy"]
    return tuple(100 * x for x in (found["value"], *found["ci"]))


def _minimal_panel(panel: Axes, model: str, pooled: dict) -> None:
    """Share of images that some perturbation of at most x fells (FAB-T; an upper bound of the true size)."""
    sizes = 255 * np.nan_to_num(pooled["minimal_linf"], nan=np.inf)
    grid = np.unique(np.concatenate([[0.0], np.geomspace(0.05, 64, 60)]))
    value, low, high = np.array([_share(sizes <= x, pooled) for x in grid]).T
    panel.fill_between(grid, low, high, color=COLOURS[model], alpha=0.15, linewidth=0, step="post")
    panel.step(grid, value, color=COLOURS[model], where="post")
    panel.axvline(255 * parse_eps(pooled["eps"]), color=BASE, linestyle=":", linewidth=1.1)
    panel.set_xscale("symlog", base=2, linthresh=0.25)
    panel.set_xticks([0, 0.25, 1, 4, 16, 64], ["0", "¼", "1", "4", "16", "64"])
    panel.set_xticks([], minor=True)
    panel.set(
        xlim=(0, 64),
        ylim=(0, 102),
        ylabel="images felled (%)",
        xlabel="smallest perturbation found (1/255, L∞; 0: clean error)",
    )


def _direction_panel(panel: Axes, model: str, pooled: dict) -> None:
    """Share of each class whose answer targeted PGD moves below and above the truth; clean errors count with their side."""
    for offset, (direction, face) in enumerate(
        (("healthier", "white"), ("sicker", COLOURS[model]))
    ):
        for label in range(4):
            rows = (pooled["labels"] == label) & ~np.isnan(pooled[direction])
            if not rows.any():
                continue
            point = _share(pooled[direction] == 1, pooled, rows)
            panel.bar(
                label + 0.38 * (offset - 0.5),
                point[0],
                0.34,
                color=face,
                edgecolor=COLOURS[model],
                zorder=2,
                label=f"called {direction}" if label == 1 else None,
            )
            panel.errorbar(
                label + 0.38 * (offset - 0.5),
                point[0],
                yerr=_bars(point),
                color=BASE,
                elinewidth=0.9,
                zorder=3,
            )
    counts = [(pooled["labels"] == label).sum() for label in range(4)]
    panel.set_xticks(
        range(4), [f"{name}\nn = {count}" for name, count in zip(CLASSES, counts, strict=True)]
    )
    panel.set(
        ylim=(0, 118),
        ylabel="images moved (%)",
        xlabel=f"true class (targeted PGD-{pooled['steps']}, eps {pooled['eps']})",
    )
    panel.legend(ncols=2, loc="upper center")


def _convergence_panel(panel: Axes, model: str, pooled: dict) -> None:
    """Share standing against the gradient steps spent, once in one long run and once in restarts."""
    for kind, dashes, label in (
        ("steps", "-", "one run"),
        ("restarts", "--", f"restarts of {pooled['steps']} steps"),
    ):
        counts = sorted(key[1] for key in pooled if isinstance(key, tuple) and key[0] == kind)
        spent = [count * (pooled["steps"] if kind == "restarts" else 1) for count in counts]
        value, low, high = np.array([_share(pooled[kind, count], pooled) for count in counts]).T
        panel.errorbar(
            spent,
            value,
            yerr=[value - low, high - value],
            color=COLOURS[model],
            linestyle=dashes,
            marker="o",
            markersize=4,
            elinewidth=0.8,
            markerfacecolor=COLOURS[model] if kind == "steps" else "white",
            label=label,
        )
    panel.set_xscale("log")
    panel.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    panel.set_xticks([], minor=True)
    panel.set(
        ylim=(0, 102),
        ylabel="images standing (%)",
        xlabel=f"gradient steps of PGD (eps {pooled['eps']})",
    )
    panel.legend()


@styled
def attacked_images_figure(
    clean: np.ndarray, attacked: dict[str, tuple[np.ndarray, str]], *, title: str, label: str
) -> Figure:
    """What each attack does to one image: the perturbation, 20 times, above the image that the model sees.

    Args:
        clean: float (H, W) in [0, 1]. attacked: attack → (image (H, W), caption).
    """
    figure, axes = canvas(2, len(attacked), (1.5 * len(attacked), 4.1), title, label)
    for panels, (name, (image, caption)) in zip(axes.T, attacked.items(), strict=True):
        panels[0].imshow(0.5 + 20 * (image - clean), cmap="gray", vmin=0, vmax=1)
        panels[1].imshow(image, cmap="gray", vmin=0, vmax=1)
        panels[0].set_title(name, fontsize=8, loc="center")
        panels[1].set_title(caption, fontsize=7.5, loc="center")
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
        panel.grid(False)
        panel.spines[:].set_visible(False)
    axes[0, 0].set_ylabel("change ×20")
    axes[1, 0].set_ylabel("image attacked")
    return figure


# ------------------------------------------------------------------------------------------------- all models


@styled
def headline_figure(rows: list[TableRow], entries: list[Entry]) -> Figure:
    """Every row of the table under both protocols: clean (filled) and worst case at the headline eps (open)."""
    eps = headline_eps(entries[-1].record)
    figure, axes = canvas(
        1,
        2,
        (10, 1.75 + 0.36 * len(rows)),
        f"People on both sides against people kept apart, clean and under attack (eps {eps})",
        provenance(entries),
        sharey=True,
    )
    for panel, protocol in zip(axes[0], PROTOCOLS, strict=True):
        panel.set_title(PROTOCOL_TITLES[protocol])
        if protocol not in rows[0].blocks:
            _absent(panel)
            continue
        _constant_line(panel, rows, protocol, vertical=True)
        for row in rows:
            if protocol in row.blocks:
                _headline_marks(
                    panel,
                    row,
                    row.blocks[protocol],
                    eps,
                    rows[0].blocks[protocol]["clean"]["n_slices"],
                )
        panel.set(xlim=(-3, 103), xlabel="balanced accuracy, 3 classes (%)")
        panel.grid(axis="y", visible=False)
        panel.set_title(
            f"{PROTOCOL_TITLES[protocol]}\n{size_of(rows[0].blocks[protocol]['clean'])}"
        )
    axes[0, 0].set_yticks(
        [row.number for row in rows], [f"{row.number}  {row.name}" for row in rows]
    )
    axes[0, 0].set_ylim(len(rows) + 0.6, 0.4)
    marks = [
        Line2D([], [], color=GREY, marker="o", linestyle="", label="clean"),
        Line2D(
            [],
            [],
            color=GREY,
            marker="o",
            markerfacecolor="white",
            linestyle="",
            label=f"worst case at {eps}",
        ),
        Line2D([], [], color=GREY, linewidth=1.4, label="95 % interval over people"),
        Line2D([], [], color=BASE, linestyle=":", linewidth=1.1, label="constant answer"),
    ]
    figure.legend(handles=marks, loc="outside lower left", ncols=4)
    return figure


def _headline_marks(panel: Axes, row: TableRow, block: dict, eps: str, whole: int) -> None:
    """`whole`: the n of the panel's title; a row of another n says its own."""
    if block["clean"]["n_slices"] != whole:
        panel.text(
            102.5,
            row.number + 0.42,
            f"n = {block['clean']['n_slices']:,} / {block['clean']['n_people']:,}",
            ha="right",
            fontsize=6.5,
            color=GREY,
        )
    colour, marker = COLOURS[row.model], marker_of(row)
    clean = _point(block["clean"]["slice"], "balanced_accuracy_3")
    worst = (
        _point(block["worst_case"].get(eps), "balanced_accuracy_3")
        if row.trained and clean
        else None
    )
    apart = 0.13 if worst else 0.0  # the two intervals side by side, where they overlap
    if worst:
        panel.plot(
            [worst[0], clean[0]],
            [row.number + apart, row.number - apart],
            color=colour,
            alpha=0.35,
            linewidth=1,
        )
        panel.errorbar(
            worst[0],
            row.number + apart,
            xerr=_bars(worst),
            color=colour,
            marker=marker,
            markersize=6,
            markerfacecolor="white",
            elinewidth=1.4,
            zorder=3,
        )
    if clean:
        panel.errorbar(
            clean[0],
            row.number - apart,
            xerr=_bars(clean),
            color=colour,
            marker=marker,
            markersize=6,
            elinewidth=1.4,
            zorder=4,
        )


@styled
def robustness_figure(rows: list[TableRow], entries: list[Entry]) -> Figure:
    """Worst case against eps, one curve a trained row: models under both protocols, then ensembles, which share a hue."""
    groups = [
        [row for row in rows if row.trained and (row.variant is not None) == ensembles]
        for ensembles in (False, True)
    ]
    groups = [group for group in groups if group] or [[]]
    figure, axes = canvas(
        len(groups),
        2,
        (10, 0.6 + 3.9 * len(groups)),
        "Worst case over all L∞ attacks",
        provenance(entries),
        sharey=True,
    )
    for panel, (group, protocol) in zip(
        axes.flat, itertools.product(groups, PROTOCOLS), strict=True
    ):
        own = [row for row in group if row.blocks.get(protocol, {}).get("worst_case")]
        title = (
            f"ensembles, {protocol}"
            if any(row.variant for row in group)
            else PROTOCOL_TITLES[protocol]
        )
        if not own and group is not groups[0]:
            panel.set_axis_off()
            continue
        panel.set_title(title)
        if not own:
            _absent(panel)
            continue
        panel.tick_params(labelleft=True)
        panel.set_ylabel("balanced accuracy, 3 classes (%)")
        for row in own:
            _worst_case_curve(
                panel,
                row.blocks[protocol],
                COLOURS[row.model],
                "-" if row.model.endswith("_atk") or row.variant == "uniform robust" else "--",
                row.name,
                marker_of(row),
            )
        _constant_line(panel, rows, protocol)
        panel.plot([], [], color=BASE, linestyle=":", linewidth=1.1, label="Constant answer")
        _eps_axis(panel, [eps for row in own for eps in row.blocks[protocol]["worst_case"]])
        panel.set_ylim(0, 102)
        sizes = _sizes_of([row.blocks[protocol] for row in own], attacked=True).replace(" (", "\n(")
        panel.set_title(f"{title}\n{sizes}; bands: 95 % intervals")
    shared_legend(figure, axes, "right center")
    return figure


@styled
def trade_off_figure(rows: list[TableRow], entries: list[Entry]) -> Figure:
    """Clean against worst-case balanced accuracy; an arrow leads from each clean model to its adversarial twin."""
    eps = headline_eps(entries[-1].record)
    figure, axes = canvas(
        1, 2, (10, 4.9), "What adversarial training costs and buys", provenance(entries)
    )
    for panel, protocol in zip(axes[0], PROTOCOLS, strict=True):
        panel.set_title(PROTOCOL_TITLES[protocol])
        places, placed = {}, []
        for row in rows:
            block = row.blocks.get(protocol)
            worst = _point(block["worst_case"].get(eps), "balanced_accuracy_3") if block else None
            if worst and row.model != "Baselines":
                clean = _point(block["clean"]["slice"], "balanced_accuracy_3")
                places[row.name] = (clean[0], worst[0])
                placed.append(block)
                panel.errorbar(
                    clean[0],
                    worst[0],
                    xerr=_bars(clean),
                    yerr=_bars(worst),
                    color=COLOURS[row.model],
                    marker=marker_of(row),
                    markersize=7,
                    elinewidth=1,
                    linestyle="",
                    label=row.name,
                    zorder=3,
                )
        if not places:
            _absent(panel)
            continue
        for name in MODELS:
            if f"{name}_atk" in places and name in places:
                panel.annotate(
                    "",
                    places[f"{name}_atk"],
                    places[name],
                    zorder=2,
                    arrowprops={
                        "arrowstyle": "-|>",
                        "color": GREY,
                        "alpha": 0.6,
                        "shrinkA": 6,
                        "shrinkB": 6,
                        "linewidth": 0.9,
                    },
                )
        panel.plot([0, 100], [0, 100], color=GREY, linewidth=0.8, linestyle="--", zorder=1)
        panel.text(
            97,
            97,
            "nothing lost to the attack ",
            rotation=45,
            rotation_mode="anchor",
            ha="right",
            va="bottom",
            fontsize=7.5,
            color=GREY,
        )
        panel.set(
            xlim=(0, 102),
            ylim=(-2, 102),
            aspect="equal",
            xlabel="clean balanced accuracy, 3 classes (%)",
        )
        panel.set_title(f"{PROTOCOL_TITLES[protocol]}\n{_sizes_of(placed)}")
    axes[0, 0].set_ylabel(f"worst case at eps {eps} (%)")
    shared_legend(figure, axes[0], "right center")
    return figure


@styled
def per_class_figure(rows: list[TableRow], entries: list[Entry]) -> Figure:
    """Share of each class that is right on clean images (filled) and stands in the worst case (open)."""
    eps, protocols = headline_eps(entries[-1].record), _protocols(rows)
    shown = [row for row in rows if row.trained]
    figure, axes = canvas(
        len(protocols),
        1,
        (9.5, 0.9 + 2.7 * len(protocols)),
        f"Class by class: clean (filled) and worst case at {eps} (open)",
        provenance(entries),
        sharey=True,
    )
    offsets = np.linspace(-0.32, 0.32, len(shown)) if len(shown) > 1 else [0.0]
    for panel, protocol in zip(axes[:, 0], protocols, strict=True):
        counted: list[set[tuple[int, int]]] = [set() for _ in CLASSES]
        for row, offset in zip(shown, offsets, strict=True):
            if protocol not in row.blocks:
                continue
            clean, worst = _class_shares(row, protocol, eps)
            for counts, share in zip(counted, clean, strict=True):
                counts.add((share["n_slices"], share["n_people"]))
            for shares, face in ((worst, "white"), (clean, COLOURS[row.model])):
                for label, share in enumerate(shares):
                    point = _point({"share": share}, "share")
                    if point:
                        panel.errorbar(
                            label + offset,
                            point[0],
                            yerr=_bars(point),
                            color=COLOURS[row.model],
                            elinewidth=1,
                            marker=marker_of(row),
                            markersize=5.5,
                            markerfacecolor=face,
                            linestyle="",
                        )
        panel.set_xticks(
            range(4),
            [f"{name}\n{_of_class(counts)}" for name, counts in zip(CLASSES, counted, strict=True)],
        )
        panel.set(xlim=(-0.5, 3.5), ylim=(-3, 103), ylabel="right (%)")
        panel.grid(axis="x", visible=False)
        panel.set_title(
            PROTOCOL_TITLES[protocol]
            + ("   (Moderate: too few people for any claim)" if protocol == "patient" else "")
        )
    handles = [
        Line2D(
            [], [], color=COLOURS[row.model], marker=marker_of(row), linestyle="", label=row.name
        )
        for row in shown
    ]
    figure.legend(handles=handles, loc="outside right center")
    return figure


@styled
def confusion_matrices_figure(rows: list[TableRow], entries: list[Entry]) -> Figure:
    """Every model's confusion matrix on clean images: a backbone a line, under each protocol the clean model beside its twin."""
    found = {(entry.model, entry.protocol): entry for entry in entries if entry.model in MODELS}
    backbones = [
        name for name in BACKBONES if any(model.removesuffix("_atk") == name for model, _ in found)
    ]
    columns = [
        (protocol, counterpart) for protocol in _protocols(rows) for counterpart in ("", "_atk")
    ]
    figure, axes = canvas(
        len(backbones),
        len(columns),
        (3 * len(columns), 0.9 + 2.9 * len(backbones)),
        "Confusion matrices, clean images: true class downwards, decision to the right",
        provenance([*found.values()]),
    )
    for backbone, line in zip(backbones, axes, strict=True):
        for (protocol, counterpart), panel in zip(columns, line, strict=True):
            entry = found.get((backbone + counterpart, protocol))
            panel.set_title(
                f"{backbone}{counterpart}, {protocol}"
                + (f"\n{size_of(entry.record['clean'])}" if entry else ""),
                fontsize=8.5,
            )
            if entry is None:
                _absent(panel)
                continue
            _confusion(panel, entry, 7.5)
            panel.tick_params(labelsize=7.5, labelleft=panel is line[0])
    return figure


def _of_class(counts: set[tuple[int, int]]) -> str:
    """(slices, people) of one class in every model shown: `20 to 100 people,` and `640 to 3,200 slices`."""
    if not counts:
        return "?"
    slices, patients = zip(*counts, strict=True)
    return f"{_between(patients)} {'person' if set(patients) == {1} else 'people'},\n{_between(slices)} slices"


def _class_shares(row: TableRow, protocol: str, eps: str) -> tuple[list[dict], list[dict]]:
    entry, block = row.entries[protocol], row.blocks[protocol]
    clean, who = clean_of(entry.predictions, row.variant), entry.rows
    declared = metrics.scored(clean)
    right, _ = metrics.correct(clean, who.labels)
    shares = metrics.share_by_class(right[declared], who.labels[declared], who.patients[declared])
    attacks = attacks_of(entry.predictions, row.variant).get(eps, {})
    within = [attacks[name] for name in block["attacks"].get(eps, {}) if name in attacks]
    four, _, covered = robust_decisions(clean, within, who.labels)
    if not covered.any():
        return shares, []
    return shares, metrics.share_by_class(four[covered], who.labels[covered], who.patients[covered])


@styled
def reliability_figure(rows: list[TableRow], entries: list[Entry]) -> Figure:
    """Confidence against accuracy on clean images; open marks after temperature scaling on validation."""
    shown = [
        (protocol, row)
        for protocol in _protocols(rows)
        for row in rows
        if row.trained and protocol in row.blocks
    ]
    columns = min(len(shown), 6)
    lines = -(-len(shown) // columns)
    figure, axes = canvas(
        lines,
        columns,
        (max(4.0, 1.85 * columns + 0.6), 0.9 + 2.3 * lines),
        "Does confidence mean accuracy?",
        provenance(entries),
        sharex=True,
        sharey=True,
    )
    for panel in axes.flat[len(shown) :]:
        panel.set_axis_off()
    for place, (panel, (protocol, row)) in enumerate(zip(axes.flat, shown, strict=False)):
        panel.plot([0, 100], [0, 100], color=GREY, linewidth=0.8, linestyle="--")
        panel.set(xlim=(20, 102), ylim=(0, 102), xticks=[25, 50, 75, 100])
        clean = row.blocks[protocol]["clean"]
        text = f"n = {clean['n_slices']:,} / {clean['n_people']:,}\n{_reliability_curves(panel, row, protocol)}"
        panel.text(
            0.97, 0.04, text, transform=panel.transAxes, ha="right", va="bottom", fontsize=7.5
        )
        panel.set_title(f"{row.name}\n{protocol}", fontsize=8.5)
        if place % columns == 0:
            panel.set_ylabel("accuracy (%)")
        if place + columns >= len(shown):
            panel.set_xlabel("confidence (%)")
            panel.tick_params(labelbottom=True)
    figure.text(
        0.01,
        0.1 / figure.get_figheight(),
        "n slices / people; bars: 95 % intervals",
        fontsize=7.5,
        color=GREY,
        va="bottom",
    )
    return figure


def _reliability_curves(panel: Axes, row: TableRow, protocol: str) -> str:
    entry, who = row.entries[protocol], row.entries[protocol].rows
    logits = clean_of(entry.predictions, row.variant).astype(np.float64)
    text = f"ECE {100 * row.blocks[protocol]['clean']['slice']['ece']['value']:.1f} %"
    scale = temperatures(entry.predictions, entry.record["units"]) if row.variant is None else None
    if scale is not None:
        _reliability_marks(panel, logits / scale[:, None], who, COLOURS[row.model], "white")
        text += f"\nscaled {100 * entry.record['clean_calibrated']['ece']['value']:.1f} %"
    _reliability_marks(panel, logits, who, COLOURS[row.model], COLOURS[row.model])
    return text


def _reliability_marks(panel: Axes, logits: np.ndarray, who, colour: str, face: str) -> None:
    curve = metrics.calibration_curve(logits, who.labels, who.patients, bins=8)
    points = [
        (100 * b["confidence"], tuple(100 * x for x in (b["accuracy"], *b["ci"]))) for b in curve
    ]
    panel.plot(
        [x for x, _ in points],
        [y[0] for _, y in points],
        color=colour,
        linewidth=1,
        linestyle="-" if face == colour else ":",
    )
    for x, y in points:
        panel.errorbar(
            x,
            y[0],
            yerr=_bars(y),
            color=colour,
            marker="o",
            markersize=4,
            markerfacecolor=face,
            elinewidth=0.9,
        )


def transfer_cells(entries: list[Entry], protocol: str) -> dict[tuple[str, str], dict]:
    """(source, target) → score block of the images made on the source, at the headline eps; (model, model) is PGD on itself."""
    cells = {}
    for entry in entries:
        if entry.protocol == protocol and "clean" in entry.record:
            for name, block in entry.record["attacks"].get(headline_eps(entry.record), {}).items():
                if name.startswith("transfer_"):
                    cells[name.removeprefix("transfer_"), entry.model] = block
                elif re.fullmatch(r"pgd\d+", name):
                    cells[entry.model, entry.model] = block
    return cells if any(source != target for source, target in cells) else {}


@styled
def transfer_figure(rows: list[TableRow], entries: list[Entry]) -> Figure:
    """Balanced accuracy of each model (column) on images made on each other one (row); the diagonal is PGD on itself."""
    shown = [protocol for protocol in PROTOCOLS if transfer_cells(entries, protocol)]
    names = {
        protocol: [
            model
            for model in MODELS
            if any(model in pair for pair in transfer_cells(entries, protocol))
        ]
        for protocol in shown
    }
    widest = max(map(len, names.values()))
    figure, axes = canvas(
        1,
        len(shown),
        (2.2 + len(shown) * max(1.15 * widest, 3.2), 1.5 + 0.75 * max(widest, 2)),
        f"Images made on one model, shown to another (eps {headline_eps(entries[-1].record)})",
        provenance(entries),
    )
    for panel, protocol in zip(axes[0], shown, strict=True):
        cells, models = transfer_cells(entries, protocol), names[protocol]
        shares = np.full((len(models), len(models)), np.nan)
        for (source, target), block in cells.items():
            point = _point(block, "balanced_accuracy_3")
            place = models.index(source), models.index(target)
            if point is not None:
                shares[place] = point[0]
                panel.text(
                    place[1],
                    place[0],
                    f"{point[0]:.0f}\n[{point[1]:.0f}, {point[2]:.0f}]\nn = {block['n_slices']:,}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="white" if point[0] > 60 else BASE,
                )
        panel.imshow(
            shares,
            cmap=LinearSegmentedColormap.from_list("standing", ["#ffffff", "#00785A"]),
            vmin=0,
            vmax=100,
        )
        panel.grid(False)
        panel.set(
            xticks=range(len(models)),
            yticks=range(len(models)),
            xlabel="shown to",
            ylabel="made on",
        )
        panel.set_xticklabels(models, rotation=20, ha="right")
        panel.set_yticklabels(models)
        panel.set_title(PROTOCOL_TITLES[protocol] + "\nbalanced accuracy, 3 classes (%)")
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
    return figure


#: What `python -m utils.report figures` writes: file name → function of (rows, entries) or of (model, its entries).
RESULT_FIGURES = {
    "headline": headline_figure,
    "robustness": robustness_figure,
    "trade_off": trade_off_figure,
    "per_class": per_class_figure,
    "confusion_matrices": confusion_matrices_figure,
    "reliability": reliability_figure,
    "transfer": transfer_figure,
}
MODEL_FIGURES = {
    "confusion_matrix": confusion_figure,
    "loss_curve": loss_figure,
    "accuracy_curve": accuracy_figure,
    "robustness": model_robustness_figure,
    "measures": measures_figure,
}


def has_content(name: str, entries: dict[str, Entry]) -> bool:
    """Whether the model figure of that name would show anything: curves need a history, the others attacks."""
    records = [entry.record for entry in entries.values()]
    if name in ("loss_curve", "accuracy_curve"):
        return any(run.get("history") for record in records for run in record["units"])
    if name == "measures":
        return any(run.get("measures") for record in records for run in record["units"])
    return (
        any(record["worst_case"] for record in records) if name == "robustness" else bool(records)
    )
