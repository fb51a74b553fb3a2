"""Figures of one model, from its records."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from utils import metrics
from utils.config import parse_eps
from utils.drawing import (
    BASE,
    COLORS,
    GREY,
    PROTOCOL_TITLES,
    Point,
    absent,
    canvas,
    constant_line,
    interval_bars,
    known_point,
    percent_point,
    shared_legend,
    size_of,
    sizes_of,
    styled,
)
from utils.evaluation.rows import provenance, table_rows
from utils.evaluation.schema import AttackScores, Evaluation, Record, Rows, Score
from utils.utils_funcs import CLASSES, PROTOCOLS


@styled
def confusion_figure(model: str, records: dict[str, Record]) -> Figure:
    """True class against decision on clean images, in percent of the true class and in slices.

    Args:
        records: protocol → record, here as in every figure of this file.
    """
    figure, axes = canvas(
        1, 2, (9, 4.5), f"{model}: confusion matrix, clean images", provenance([*records.values()])
    )
    for panel, protocol in zip(axes[0], PROTOCOLS, strict=True):
        if protocol not in records:
            panel.set_title(PROTOCOL_TITLES[protocol])
            absent(panel)
            continue
        record = records[protocol]
        confusion(panel, record, 8.5)
        patients = [
            len(np.unique(record.rows.patients[record.rows.labels == label])) for label in range(4)
        ]
        panel.set(
            xlabel="decision",
            ylabel="true class",
            yticklabels=[
                f"{name}\n{n} {'patient' if n == 1 else 'patients'}"
                for name, n in zip(CLASSES, patients, strict=True)
            ],
        )
        panel.set_title(f"{PROTOCOL_TITLES[protocol]}\n{size_of(record.evaluation.clean)}")
    return figure


def confusion(panel: Axes, record: Record, size: float) -> None:
    """One confusion matrix of clean images: true classes downwards, decisions to the right, text of
    `size` points."""
    counts = metrics.confusion_matrix(record.predictions["clean"], record.rows.labels)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shades = LinearSegmentedColormap.from_list(record.model, ["#ffffff", COLORS[record.model]])
    panel.imshow(share, cmap=shades, vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(share):
        panel.text(
            column,
            row,
            f"{value:.0%}\n{counts[row, column]:,}",
            ha="center",
            va="center",
            fontsize=size,
            color="white" if value > 0.6 and record.model.endswith("_atk") else BASE,
        )
    panel.set(xticks=range(4), xticklabels=CLASSES, yticks=range(4), yticklabels=CLASSES)
    panel.grid(False)
    panel.spines[["left", "bottom"]].set_visible(False)
    panel.tick_params(length=0)


def _history_figure(
    model: str,
    records: dict[str, Record],
    title: str,
    y_label: str,
    curves: dict[str, tuple[str, str]],
    scale: float,
) -> Figure:
    """Training curves. Thin lines are folds and seeds, the thick one their mean.

    Args:
        curves: key of an epoch's history → (label, line style). scale: of its values.
    """
    figure, axes = canvas(1, 2, (9, 3.8), title, provenance([*records.values()]), sharey=True)
    for panel, protocol in zip(axes[0], PROTOCOLS, strict=True):
        panel.set_title(PROTOCOL_TITLES[protocol])
        runs = records[protocol].runs if protocol in records else []
        runs = [run for run in runs if run.history]
        if not runs:
            absent(panel)
            continue
        plural = "s" * (len(runs) != 1)
        panel.set_title(f"{PROTOCOL_TITLES[protocol]}\n{len(runs)} run{plural}")
        for number, (key, (label, dashes)) in enumerate(curves.items()):
            histories = [
                np.array(
                    [
                        (epoch["epoch"], scale * epoch[key])
                        for epoch in run.history or ()
                        if epoch.get(key) is not None
                    ]
                )
                for run in runs
            ]
            histories = [values for values in histories if len(values)]
            if not histories:
                continue
            color = (GREY, COLORS[model], "#CC79A7")[number]
            for values in histories:
                panel.plot(*values.T, color=color, alpha=0.35, linewidth=0.7, linestyle=dashes)
            shared = min(map(len, histories))
            mean = np.mean([values[:shared] for values in histories], axis=0)
            panel.plot(
                *mean.T,
                color=color,
                linestyle=dashes,
                linewidth=2,
                label=label,
                marker="." if shared < 4 else "",
            )
        for run in runs:
            if run.best_epoch is not None:
                panel.axvline(run.best_epoch, color=BASE, alpha=0.3, linewidth=0.8, linestyle=":")
        best = {"color": BASE, "alpha": 0.5, "linestyle": ":", "linewidth": 0.9}
        panel.plot([], [], label="best epoch (validation)", **best)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_xlabel("epoch")
    # Below the panels: five folds leave no free corner inside.
    shared_legend(figure, axes[0], "lower left", ncols=4)
    axes[0, 0].set_ylabel(y_label)
    return figure


@styled
def loss_figure(model: str, records: dict[str, Record]) -> Figure:
    """Cross-entropy by epoch: training, validation, and validation under attack for adversarially
    trained models."""
    return _history_figure(
        model,
        records,
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
def accuracy_figure(model: str, records: dict[str, Record]) -> Figure:
    """Accuracy by epoch: training (running mean of the epoch), validation, and validation balanced
    over classes."""
    return _history_figure(
        model,
        records,
        f"{model}: accuracy",
        "accuracy (%)",
        {
            "train_accuracy": ("training", "-"),
            "validation_accuracy": ("validation", "-"),
            "validation_balanced_accuracy": ("validation, balanced over 4 classes", "--"),
        },
        100,
    )


def eps_axis(panel: Axes, eps: list[str]) -> None:
    """Makes the horizontal axis of a panel one of these eps, in units of 1/255."""
    values = sorted({255 * parse_eps(text) for text in eps})
    round_ones = [value for value in values if value in (0.5, 1, 2, 4, 8, 16, 32)]
    # 0.005 is 1.275/255: a tick of its own, except close to another's, where the labels would run
    # into each other.
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
def model_robustness_figure(model: str, records: dict[str, Record]) -> Figure:
    """Balanced accuracy over three classes against eps: the attacks of the sweep and the worst case
    over all of them; and, where more attacks ran at one eps alone, every attack at that eps."""
    attacked = {
        protocol: records[protocol]
        for protocol in PROTOCOLS
        if protocol in records and records[protocol].worst_case
    }
    at_one_eps = {protocol: _at_one_eps(record) for protocol, record in attacked.items()}
    names = list(dict.fromkeys(name for found in at_one_eps.values() for name in found))
    height = 3.9 + bool(names) * (0.9 + 0.165 * len(names))
    figure, axes = canvas(
        1 + bool(names),
        2,
        (12, height),
        f"{model}: every attack, and the worst case over them",
        provenance([*records.values()]),
        sharey="row",
        height_ratios=(3.5, height - 4)[: 1 + bool(names)],
    )
    styles = _attack_styles([*attacked.values()])
    for column, protocol in enumerate(PROTOCOLS):
        panel = axes[0, column]
        panel.set_title(PROTOCOL_TITLES[protocol])
        if protocol not in attacked:
            for empty in axes[:, column]:
                absent(empty)
            continue
        record = attacked[protocol]
        evaluation = record.evaluation
        for name, sweep in _by_attack(evaluation).items():
            if len(sweep) > 1 or not names:
                points = [
                    known_point(block.scores["balanced_accuracy_3"]) for block in sweep.values()
                ]
                panel.plot(
                    [255 * parse_eps(eps) for eps in sweep],
                    [value for value, _, _ in points],
                    **styles[name],
                )
        worst_case_curve(panel, evaluation, COLORS[model], "-", "worst case, 95 % interval")
        constant_line(panel, table_rows({(model, protocol): record}), protocol)
        panel.plot([], [], color=BASE, linestyle=":", linewidth=1.1, label="constant answer")
        eps_axis(panel, list(evaluation.attacks))
        panel.set_ylim(0, 102)
        panel.set_title(f"{PROTOCOL_TITLES[protocol]}\n{sizes_of([evaluation], attacked=True)}")
        if names:
            _one_eps_panel(axes[1, column], record, at_one_eps[protocol], names)
    axes[0, 0].set_ylabel("balanced accuracy, 3 classes (%)")
    if names:
        # One set of rows for both panels, which share this axis.
        labels = [
            f"{name} (n = {' | '.join(_count(found.get(name)) for found in at_one_eps.values())})"
            for name in names
        ]
        first = axes[1, PROTOCOLS.index(next(iter(attacked)))]
        first.set_yticks(range(len(names)), labels, fontsize=7)
        first.set_ylim(len(names) - 0.4, -0.6)
    shared_legend(figure, axes[0], "right upper")
    return figure


def _count(block: AttackScores | None) -> str:
    return f"{block.n_slices:,}" if block else "–"


def _at_one_eps(record: Record) -> dict[str, AttackScores]:
    """Every attack at the headline eps, if some of them ran at no other; else nothing."""
    attacks, eps = _by_attack(record.evaluation), record.headline_eps
    if len(record.evaluation.attacks) == 1 or all(len(sweep) > 1 for sweep in attacks.values()):
        return {}
    return {name: sweep[eps] for name, sweep in attacks.items() if eps in sweep}


#: View of an attack → the score that it tries to lower.
AIMED_AT = {"four": "balanced_accuracy", "three": "balanced_accuracy_3", "binary": "auroc"}


def _one_eps_panel(
    panel: Axes, record: Record, found: dict[str, AttackScores], names: list[str]
) -> None:
    """Each attack of `found` in the row that `names` gives it."""
    if not found:
        absent(panel, "no attack beyond the sweep")
        return
    eps, color = record.headline_eps, COLORS[record.model]
    worst = known_point(record.evaluation.worst_case[eps].scores["balanced_accuracy_3"])
    panel.axvspan(worst[1], worst[2], color=color, alpha=0.13, linewidth=0)
    panel.axvline(worst[0], color=color, linewidth=2)  # the worst case of the panel above
    for name, block in found.items():
        point = percent_point(block.scores.get(AIMED_AT[block.view]))
        if point is not None:
            panel.errorbar(
                point[0],
                names.index(name),
                xerr=interval_bars(point),
                fmt="o",
                color=GREY,
                markersize=3.5,
                linewidth=1,
            )
    panel.set(
        xlim=(-2, 102),
        xlabel=f"the score that the attack aims at, at eps {eps} (%):\n"
        "balanced accuracy of 4 classes\n(_merged: of 3; _binary: AUROC)",
    )


def _by_attack(evaluation: Evaluation) -> dict[str, dict[str, AttackScores]]:
    """attack → eps → its scores, where balanced accuracy is defined."""
    found: dict[str, dict[str, AttackScores]] = {}
    for eps, attacks in evaluation.attacks.items():
        for name, block in attacks.items():
            if block.scores["balanced_accuracy_3"].value is not None:
                found.setdefault(name, {})[eps] = block
    return found


def _attack_styles(records: list[Record]) -> dict[str, dict]:
    """Gray tone, marker and label of each attack; the label of one that ran on a sample gives the
    sample's sizes."""
    sizes: dict[str, list[tuple[int, int]]] = {}
    for evaluation in (record.evaluation for record in records):
        for name, sweep in _by_attack(evaluation).items():
            pairs = [(block.n_slices, evaluation.clean.n_slices) for block in sweep.values()]
            sizes.setdefault(name, []).extend(pairs)
    tones = LinearSegmentedColormap.from_list("attacks", ["#c9c9c9", "#4d4d4d"])(
        np.linspace(0, 1, max(len(sizes), 2))
    )
    styles = {}
    for number, (name, pairs) in enumerate(sizes.items()):
        label = f"{name}, aims at 4 classes" if f"{name}_merged" in sizes else name
        if any(n != whole for n, whole in pairs):
            label += f" (n = {' | '.join(dict.fromkeys(f'{n:,}' for n, _ in pairs))})"
        styles[name] = {
            "color": tones[number],
            "label": label,
            "linewidth": 1,
            "marker": "osD^vP*Xd<>hp"[number % 13],
            "markersize": 4,
            "markeredgewidth": 0,
        }
    return styles


def worst_case_curve(
    panel: Axes, evaluation: Evaluation, color: str, dashes: str, label: str, marker: str = "o"
) -> None:
    """The worst case over the attacks of this and smaller eps, which cannot rise, with its interval
    as a band."""
    points = [(0.0, *known_point(evaluation.clean.slice["balanced_accuracy_3"]))]
    points += [
        (255 * parse_eps(eps), *known_point(worst.union["balanced_accuracy_3"]))
        for eps, worst in evaluation.worst_case.items()
        if worst.union
    ]
    x, value, low, high = np.array(points).T
    panel.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0)
    panel.plot(
        x,
        value,
        color=color,
        linestyle=dashes,
        linewidth=2,
        marker=marker,
        markersize=4.5,
        label=label,
        zorder=3,
        markeredgecolor="white",
        markeredgewidth=0.5,
    )


@dataclass(frozen=True)
class PooledMeasures:
    """The measures on fixed samples of all runs of a record: one row an image, arrays of (N,).

    eps, steps: of PGD. minimal_linf: the smallest perturbation found, NaN where none was.
    healthier, sicker: 1 where targeted PGD moves the answer so, 0 where it does not, NaN where
        there is no such class.
    convergence: (`steps` or `restarts`, how many) → whether the image is robust to PGD of that
        budget.
    """

    eps: str
    steps: int
    rows: Rows
    minimal_linf: np.ndarray
    healthier: np.ndarray
    sicker: np.ndarray
    convergence: dict[tuple[str, int], np.ndarray]


def pooled_measures(record: Record) -> PooledMeasures | None:
    """The sample measures of all runs of a record in one; None where no run has any."""
    measured = [(run, run.measures) for run in record.runs if run.measures]
    if not measured:
        return None
    predictions = record.predictions
    sampled = [
        np.flatnonzero((predictions["fold"] == run.fold) & (predictions["seed"] == run.seed))[
            measures["rows"]
        ]
        for run, measures in measured
    ]
    robust: dict[tuple[str, int], list[list[bool]]] = {}
    for _, measures in measured:
        for part in measures["convergence"]:
            robust.setdefault((part["kind"], part["count"]), []).append(part["standing"])
    numbers = {
        name: np.concatenate([np.asarray(measures[name], np.float64) for _, measures in measured])
        for name in ("minimal_linf", "healthier", "sicker")
    }
    return PooledMeasures(
        measured[0][1]["eps"],
        measured[0][1]["pgd_steps"],
        record.rows.take(np.concatenate(sampled)),
        **numbers,
        convergence={
            budget: np.concatenate(parts).astype(bool) for budget, parts in robust.items()
        },
    )


@styled
def measures_figure(model: str, records: dict[str, Record]) -> Figure:
    """On each record's fixed sample: how small a perturbation suffices, in which direction an
    answer can be moved, and whether PGD has converged. One row a protocol; four classes; intervals
    over patients."""
    pooled = {
        protocol: found
        for protocol in PROTOCOLS
        if protocol in records and (found := pooled_measures(records[protocol]))
    }
    figure, axes = canvas(
        len(pooled),
        3,
        (11, 0.6 + 3.3 * len(pooled)),
        f"{model}: how far, which way, and has PGD converged",
        provenance([records[protocol] for protocol in pooled]),
    )
    for (protocol, found), panels in zip(pooled.items(), axes, strict=True):
        _minimal_panel(panels[0], COLORS[model], found)
        _direction_panel(panels[1], COLORS[model], found)
        _convergence_panel(panels[2], COLORS[model], found)
        panels[0].set_title(f"{protocol}: {size_of(found.rows)}")
    return figure


def percent_true(flags: np.ndarray, rows: Rows) -> Point:
    """The share of true flags (N,) among rows, in percent, with its interval over patients."""
    share = metrics.share(flags, rows.labels, rows.patients, n_boot=1000)
    return known_point(Score.from_json(share, "share"))


def _minimal_panel(panel: Axes, color: str, found: PooledMeasures) -> None:
    """Share of images that some perturbation of at most x misclassifies (FAB-T; an upper bound of
    the true size)."""
    sizes = 255 * np.nan_to_num(found.minimal_linf, nan=np.inf)
    grid = np.unique(np.concatenate([[0.0], np.geomspace(0.05, 64, 60)]))
    value, low, high = np.array([percent_true(sizes <= x, found.rows) for x in grid]).T
    panel.fill_between(grid, low, high, color=color, alpha=0.15, linewidth=0, step="post")
    panel.step(grid, value, color=color, where="post")
    panel.axvline(255 * parse_eps(found.eps), color=BASE, linestyle=":", linewidth=1.1)
    panel.set_xscale("symlog", base=2, linthresh=0.25)
    panel.set_xticks([0, 0.25, 1, 4, 16, 64], ["0", "¼", "1", "4", "16", "64"])
    panel.set_xticks([], minor=True)
    panel.set(
        xlim=(0, 64),
        ylim=(0, 102),
        ylabel="images misclassified (%)",
        xlabel="smallest perturbation found (1/255, L∞; 0: clean error)",
    )


def _direction_panel(panel: Axes, color: str, found: PooledMeasures) -> None:
    """Share of each class whose answer targeted PGD moves below and above the truth; clean errors
    count with their side."""
    labels = found.rows.labels
    sides = (("healthier", found.healthier, "white"), ("sicker", found.sicker, color))
    for offset, (direction, moved, face) in enumerate(sides):
        for label in range(4):
            rows = (labels == label) & ~np.isnan(moved)
            if not rows.any():
                continue
            point = percent_true(moved[rows] == 1, found.rows.take(rows))
            place = label + 0.38 * (offset - 0.5)
            panel.bar(
                place,
                point[0],
                0.34,
                color=face,
                edgecolor=color,
                zorder=2,
                label=f"called {direction}" if label == 1 else None,
            )
            bars = interval_bars(point)
            panel.errorbar(place, point[0], yerr=bars, color=BASE, elinewidth=0.9, zorder=3)
    panel.set_xticks(
        range(4), [f"{name}\nn = {(labels == label).sum()}" for label, name in enumerate(CLASSES)]
    )
    panel.set(
        ylim=(0, 118),
        ylabel="images moved (%)",
        xlabel=f"true class (targeted PGD-{found.steps}, eps {found.eps})",
    )
    panel.legend(ncols=2, loc="upper center")


def _convergence_panel(panel: Axes, color: str, found: PooledMeasures) -> None:
    """Share of robust images against the gradient steps spent, in one long attack and in
    restarts."""
    for kind, dashes, label, steps, face in (
        ("steps", "-", "one run", 1, color),
        ("restarts", "--", f"restarts of {found.steps} steps", found.steps, "white"),
    ):
        counts = sorted(count for of, count in found.convergence if of == kind)
        points = [percent_true(found.convergence[kind, count], found.rows) for count in counts]
        value, low, high = np.array(points).T
        panel.errorbar(
            [count * steps for count in counts],
            value,
            yerr=[value - low, high - value],
            color=color,
            linestyle=dashes,
            marker="o",
            markersize=4,
            elinewidth=0.8,
            markerfacecolor=face,
            label=label,
        )
    panel.set_xscale("log")
    panel.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    panel.set_xticks([], minor=True)
    panel.set(
        ylim=(0, 102),
        ylabel="images robust (%)",
        xlabel=f"gradient steps of PGD (eps {found.eps})",
    )
    panel.legend()


@styled
def attacked_images_figure(
    clean: np.ndarray, attacked: dict[str, tuple[np.ndarray, str]], *, title: str, label: str
) -> Figure:
    """What each attack does to one image: the perturbation, 20 times, above the image that the
    model sees.

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


MODEL_FIGURES = {
    "confusion_matrix": confusion_figure,
    "loss_curve": loss_figure,
    "accuracy_curve": accuracy_figure,
    "robustness": model_robustness_figure,
    "measures": measures_figure,
}


def has_content(name: str, records: dict[str, Record]) -> bool:
    """Whether the model figure of that name would show anything: curves need a history, the others
    attacks."""
    found = records.values()
    if name in ("loss_curve", "accuracy_curve"):
        return any(run.history for record in found for run in record.runs)
    if name == "measures":
        return any(run.measures for record in found for run in record.runs)
    return any(record.worst_case for record in found) if name == "robustness" else bool(records)
