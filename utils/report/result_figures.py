"""Figures that compare all models, from their records."""

from __future__ import annotations

import itertools
import re

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from utils import metrics
from utils.drawing import (
    BASE,
    COLORS,
    GREY,
    PROTOCOL_TITLES,
    Point,
    absent,
    between,
    canvas,
    constant_line,
    interval_bars,
    known_point,
    marker_of,
    percent_point,
    shared_legend,
    size_of,
    sizes_of,
    styled,
)
from utils.evaluation.records import robust_decisions, temperatures
from utils.evaluation.rows import TableRow, provenance
from utils.evaluation.schema import (
    AttackScores,
    Evaluation,
    Record,
    Rows,
    Score,
    attacks_of,
    clean_of,
)
from utils.report.model_figures import confusion, eps_axis, worst_case_curve
from utils.utils_funcs import BACKBONES, CLASSES, MODELS, PROTOCOLS


def _protocols(rows: list[TableRow]) -> list[str]:
    return [protocol for protocol in PROTOCOLS if protocol in rows[0].evaluations]


@styled
def headline_figure(rows: list[TableRow], records: list[Record]) -> Figure:
    """Every row of the table under both protocols: clean (filled) and worst case at the headline
    eps (open)."""
    eps = records[-1].headline_eps
    figure, axes = canvas(
        1,
        2,
        (10, 1.75 + 0.36 * len(rows)),
        f"Patients on both sides against patients kept apart, clean and under attack (eps {eps})",
        provenance(records),
        sharey=True,
    )
    for panel, protocol in zip(axes[0], PROTOCOLS, strict=True):
        panel.set_title(PROTOCOL_TITLES[protocol])
        if protocol not in rows[0].evaluations:
            absent(panel)
            continue
        constant_line(panel, rows, protocol, vertical=True)
        for row in rows:
            if protocol in row.evaluations:
                whole = rows[0].evaluations[protocol].clean.n_slices
                _headline_marks(panel, row, row.evaluations[protocol], eps, whole)
        panel.set(xlim=(-3, 103), xlabel="balanced accuracy, 3 classes (%)")
        panel.grid(axis="y", visible=False)
        panel.set_title(
            f"{PROTOCOL_TITLES[protocol]}\n{size_of(rows[0].evaluations[protocol].clean)}"
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
        Line2D([], [], color=GREY, linewidth=1.4, label="95 % interval over patients"),
        Line2D([], [], color=BASE, linestyle=":", linewidth=1.1, label="constant answer"),
    ]
    figure.legend(handles=marks, loc="outside lower left", ncols=4)
    return figure


def _headline_marks(
    panel: Axes, row: TableRow, evaluation: Evaluation, eps: str, whole: int
) -> None:
    """One row of the figure. `whole`: the n of the panel's title; a row of another n gives its
    n."""
    clean_scores = evaluation.clean
    if clean_scores.n_slices != whole:
        panel.text(
            102.5,
            row.number + 0.42,
            f"n = {clean_scores.n_slices:,} / {clean_scores.n_patients:,}",
            ha="right",
            fontsize=6.5,
            color=GREY,
        )
    color, marker = COLORS[row.model], marker_of(row)
    clean = percent_point(clean_scores.slice["balanced_accuracy_3"])
    worst = _worst_point(evaluation, eps) if row.trained else None
    apart = 0.13 if worst else 0.0  # the two intervals one above the other, where they overlap
    if worst and clean:
        panel.plot(
            [worst[0], clean[0]],
            [row.number + apart, row.number - apart],
            color=color,
            alpha=0.35,
            linewidth=1,
        )
        panel.errorbar(
            worst[0],
            row.number + apart,
            xerr=interval_bars(worst),
            color=color,
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
            xerr=interval_bars(clean),
            color=color,
            marker=marker,
            markersize=6,
            elinewidth=1.4,
            zorder=4,
        )


@styled
def robustness_figure(rows: list[TableRow], records: list[Record]) -> Figure:
    """Worst case against eps, one curve a trained row: models under both protocols, then ensembles,
    which share a hue."""
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
        provenance(records),
        sharey=True,
    )
    for panel, (group, protocol) in zip(
        axes.flat, itertools.product(groups, PROTOCOLS), strict=True
    ):
        shown = [
            row
            for row in group
            if protocol in row.evaluations and row.evaluations[protocol].worst_case
        ]
        title = (
            f"ensembles, {protocol}"
            if any(row.variant for row in group)
            else PROTOCOL_TITLES[protocol]
        )
        if not shown and group is not groups[0]:
            panel.set_axis_off()
            continue
        panel.set_title(title)
        if not shown:
            absent(panel)
            continue
        panel.tick_params(labelleft=True)
        panel.set_ylabel("balanced accuracy, 3 classes (%)")
        for row in shown:
            worst_case_curve(
                panel,
                row.evaluations[protocol],
                COLORS[row.model],
                "-" if row.model.endswith("_atk") or row.variant == "uniform robust" else "--",
                row.name,
                marker_of(row),
            )
        constant_line(panel, rows, protocol)
        panel.plot([], [], color=BASE, linestyle=":", linewidth=1.1, label="Constant answer")
        eps_axis(panel, [eps for row in shown for eps in row.evaluations[protocol].worst_case])
        panel.set_ylim(0, 102)
        sizes = sizes_of([row.evaluations[protocol] for row in shown], attacked=True)
        sizes = sizes.replace(" (", "\n(")
        panel.set_title(f"{title}\n{sizes}; bands: 95 % intervals")
    shared_legend(figure, axes, "right center")
    return figure


@styled
def trade_off_figure(rows: list[TableRow], records: list[Record]) -> Figure:
    """Clean against worst-case balanced accuracy; an arrow leads from each clean model to its
    adversarially trained counterpart."""
    eps = records[-1].headline_eps
    figure, axes = canvas(
        1, 2, (10, 4.9), "What adversarial training costs and buys", provenance(records)
    )
    for panel, protocol in zip(axes[0], PROTOCOLS, strict=True):
        panel.set_title(PROTOCOL_TITLES[protocol])
        places, placed = {}, []
        for row in rows:
            evaluation = row.evaluations.get(protocol)
            if evaluation is None or row.model == "Baselines":
                continue
            if worst := _worst_point(evaluation, eps):
                clean = known_point(evaluation.clean.slice["balanced_accuracy_3"])
                places[row.name] = (clean[0], worst[0])
                placed.append(evaluation)
                panel.errorbar(
                    clean[0],
                    worst[0],
                    xerr=interval_bars(clean),
                    yerr=interval_bars(worst),
                    color=COLORS[row.model],
                    marker=marker_of(row),
                    markersize=7,
                    elinewidth=1,
                    linestyle="",
                    label=row.name,
                    zorder=3,
                )
        if not places:
            absent(panel)
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
        panel.set_title(f"{PROTOCOL_TITLES[protocol]}\n{sizes_of(placed)}")
    axes[0, 0].set_ylabel(f"worst case at eps {eps} (%)")
    shared_legend(figure, axes[0], "right center")
    return figure


@styled
def per_class_figure(rows: list[TableRow], records: list[Record]) -> Figure:
    """Share of each class that is right on clean images (filled) and robust to every attack
    (open)."""
    eps, protocols = records[-1].headline_eps, _protocols(rows)
    shown = [row for row in rows if row.trained]
    figure, axes = canvas(
        len(protocols),
        1,
        (9.5, 0.9 + 2.7 * len(protocols)),
        f"Class by class: clean (filled) and worst case at {eps} (open)",
        provenance(records),
        sharey=True,
    )
    offsets = np.linspace(-0.32, 0.32, len(shown)) if len(shown) > 1 else [0.0]
    for panel, protocol in zip(axes[:, 0], protocols, strict=True):
        counted: list[set[tuple[int, int]]] = [set() for _ in CLASSES]
        for row, offset in zip(shown, offsets, strict=True):
            if protocol not in row.evaluations:
                continue
            clean, worst = _class_shares(row, protocol, eps)
            for counts, share in zip(counted, clean, strict=True):
                counts.add((share.n_slices or 0, share.n_patients or 0))
            for shares, face in ((worst, "white"), (clean, COLORS[row.model])):
                for label, share in enumerate(shares):
                    point = percent_point(share)
                    if point:
                        panel.errorbar(
                            label + offset,
                            point[0],
                            yerr=interval_bars(point),
                            color=COLORS[row.model],
                            elinewidth=1,
                            marker=marker_of(row),
                            markersize=5.5,
                            markerfacecolor=face,
                            linestyle="",
                        )
        panel.set_xticks(
            range(4),
            [f"{name}\n{of_class(counts)}" for name, counts in zip(CLASSES, counted, strict=True)],
        )
        panel.set(xlim=(-0.5, 3.5), ylim=(-3, 103), ylabel="right (%)")
        panel.grid(axis="x", visible=False)
        panel.set_title(
            PROTOCOL_TITLES[protocol]
            + ("   (Moderate: too few patients for any claim)" if protocol == "patient" else "")
        )
    handles = [
        Line2D([], [], color=COLORS[row.model], marker=marker_of(row), linestyle="", label=row.name)
        for row in shown
    ]
    figure.legend(handles=handles, loc="outside right center")
    return figure


@styled
def confusion_matrices_figure(rows: list[TableRow], records: list[Record]) -> Figure:
    """Every model's confusion matrix on clean images: a backbone a line, under each protocol the
    clean model and its adversarially trained counterpart."""
    found = {(one.model, one.protocol): one for one in records if one.model in MODELS}
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
            record = found.get((backbone + counterpart, protocol))
            title = f"{backbone}{counterpart}, {protocol}"
            if record is None:
                panel.set_title(title, fontsize=8.5)
                absent(panel)
                continue
            panel.set_title(f"{title}\n{size_of(record.evaluation.clean)}", fontsize=8.5)
            confusion(panel, record, 7.5)
            panel.tick_params(labelsize=7.5, labelleft=panel is line[0])
    return figure


def of_class(counts: set[tuple[int, int]]) -> str:
    """(slices, patients) of one class in every model shown: `20 to 100 patients,` and `640 to 3,200
    slices`."""
    if not counts:
        return "?"
    slices, patients = zip(*counts, strict=True)
    noun = "patient" if set(patients) == {1} else "patients"
    return f"{between(patients)} {noun},\n{between(slices)} slices"


def _worst_point(evaluation: Evaluation, eps: str) -> Point | None:
    worst = evaluation.worst_case.get(eps)
    return None if worst is None else percent_point(worst.scores["balanced_accuracy_3"])


def _class_shares(row: TableRow, protocol: str, eps: str) -> tuple[list[Score], list[Score]]:
    """Share of each of four classes that is right on clean images, and that is robust at eps (empty
    without attacks)."""
    record, evaluation = row.records[protocol], row.evaluations[protocol]
    clean, labels = clean_of(record.predictions, row.variant), record.rows.labels
    attacks = attacks_of(record.predictions, row.variant).get(eps, {})
    linf = [attacks[name] for name in evaluation.attacks.get(eps, {})]
    right, _ = metrics.correct(clean, labels)
    robust, _, covered = robust_decisions(clean, linf, labels)

    def shares(flags: np.ndarray, among: np.ndarray) -> list[Score]:
        part = record.rows.take(among)
        found = metrics.share_by_class(flags[among], part.labels, part.patients)
        return [Score.from_json(share, "share") for share in found]

    return shares(right, metrics.scored(clean)), shares(robust, covered) if covered.any() else []


@styled
def reliability_figure(rows: list[TableRow], records: list[Record]) -> Figure:
    """Confidence against accuracy on clean images; open marks after temperature scaling on
    validation."""
    shown = [
        (protocol, row)
        for protocol in _protocols(rows)
        for row in rows
        if row.trained and protocol in row.evaluations
    ]
    columns = min(len(shown), 6)
    lines = -(-len(shown) // columns)
    figure, axes = canvas(
        lines,
        columns,
        (max(4.0, 1.85 * columns + 0.6), 0.9 + 2.3 * lines),
        "Does confidence mean accuracy?",
        provenance(records),
        sharex=True,
        sharey=True,
    )
    for panel in axes.flat[len(shown) :]:
        panel.set_axis_off()
    for place, (panel, (protocol, row)) in enumerate(zip(axes.flat, shown, strict=False)):
        panel.plot([0, 100], [0, 100], color=GREY, linewidth=0.8, linestyle="--")
        panel.set(xlim=(20, 102), ylim=(0, 102), xticks=[25, 50, 75, 100])
        clean = row.evaluations[protocol].clean
        errors = _reliability_curves(panel, row, protocol)
        text = f"n = {clean.n_slices:,} / {clean.n_patients:,}\n{errors}"
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
        "n slices / patients; bars: 95 % intervals",
        fontsize=7.5,
        color=GREY,
        va="bottom",
    )
    return figure


def _reliability_curves(panel: Axes, row: TableRow, protocol: str) -> str:
    """Draws a row's calibration and returns its expected calibration error as text."""
    record, color = row.records[protocol], COLORS[row.model]
    logits = clean_of(record.predictions, row.variant).astype(np.float64)
    text = f"ECE {known_point(row.evaluations[protocol].clean.slice['ece'])[0]:.1f} %"
    scale = temperatures(record.predictions, record.runs) if row.variant is None else None
    if scale is not None and record.clean_calibrated is not None:
        _reliability_marks(panel, logits / scale[:, None], record.rows, color, "white")
        text += f"\nscaled {known_point(record.clean_calibrated.ece)[0]:.1f} %"
    _reliability_marks(panel, logits, record.rows, color, color)
    return text


def _reliability_marks(panel: Axes, logits: np.ndarray, rows: Rows, color: str, face: str) -> None:
    curve = metrics.calibration_curve(logits, rows.labels, rows.patients, bins=8)
    points = [
        (100 * b["confidence"], tuple(100 * x for x in (b["accuracy"], *b["ci"]))) for b in curve
    ]
    panel.plot(
        [x for x, _ in points],
        [y[0] for _, y in points],
        color=color,
        linewidth=1,
        linestyle="-" if face == color else ":",
    )
    for x, y in points:
        panel.errorbar(
            x,
            y[0],
            yerr=interval_bars(y),
            color=color,
            marker="o",
            markersize=4,
            markerfacecolor=face,
            elinewidth=0.9,
        )


def transfer_cells(records: list[Record], protocol: str) -> dict[tuple[str, str], AttackScores]:
    """(source, target) → scores of the target on images made on the source, at the headline eps;
    (model, model) is PGD on the model itself. Empty where no images were transferred."""
    cells = {}
    for record in records:
        evaluation = record.evaluations.get(None)
        if record.protocol != protocol or evaluation is None:
            continue
        for name, block in evaluation.attacks.get(record.headline_eps, {}).items():
            if name.startswith("transfer_"):
                cells[name.removeprefix("transfer_"), record.model] = block
            elif re.fullmatch(r"pgd\d+", name):
                cells[record.model, record.model] = block
    return cells if any(source != target for source, target in cells) else {}


@styled
def transfer_figure(rows: list[TableRow], records: list[Record]) -> Figure:
    """Balanced accuracy of each model (column) on images made on each other one (row); the diagonal
    is PGD on itself."""
    shown = [protocol for protocol in PROTOCOLS if transfer_cells(records, protocol)]
    names = {
        protocol: [
            model
            for model in MODELS
            if any(model in pair for pair in transfer_cells(records, protocol))
        ]
        for protocol in shown
    }
    widest = max(map(len, names.values()))
    figure, axes = canvas(
        1,
        len(shown),
        (2.2 + len(shown) * max(1.15 * widest, 3.2), 1.5 + 0.75 * max(widest, 2)),
        f"Images made on one model, shown to another (eps {records[-1].headline_eps})",
        provenance(records),
    )
    for panel, protocol in zip(axes[0], shown, strict=True):
        cells, models = transfer_cells(records, protocol), names[protocol]
        shares = np.full((len(models), len(models)), np.nan)
        for (source, target), block in cells.items():
            point = percent_point(block.scores["balanced_accuracy_3"])
            place = models.index(source), models.index(target)
            if point is not None:
                shares[place] = point[0]
                panel.text(
                    place[1],
                    place[0],
                    f"{point[0]:.0f}\n[{point[1]:.0f}, {point[2]:.0f}]\nn = {block.n_slices:,}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="white" if point[0] > 60 else BASE,
                )
        panel.imshow(
            shares,
            cmap=LinearSegmentedColormap.from_list("robust", ["#ffffff", "#00785A"]),
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


#: What `python -m utils.report figures` writes: file name → function of (rows, records).
RESULT_FIGURES = {
    "headline": headline_figure,
    "robustness": robustness_figure,
    "trade_off": trade_off_figure,
    "per_class": per_class_figure,
    "confusion_matrices": confusion_matrices_figure,
    "reliability": reliability_figure,
    "transfer": transfer_figure,
}
