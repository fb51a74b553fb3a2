"""The leak audit's arrays → figures; no images needed, except for the montage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.drawing import BASE, COLORS, GREY, PROTOCOL_TITLES, canvas, styled
from utils.evaluation.schema import CleanScores, Record
from utils.utils_funcs import CLASSES, PROTOCOLS, UserError

#: Name of the file of small arrays in assets/Baselines/.
ARRAYS = "leak_audit.npz"

#: What the five counts in the arrays' `shared` are, in order.
SHARED = ("train", "test", "both", "test_images", "test_images_of_training_people")

#: Thresholds (T,) on the correlation at which groups are counted.
THRESHOLDS = np.round(np.arange(0.50, 0.9951, 0.005), 3)

SAME_PATIENT, OTHER_PATIENT, SYNTHETIC = "#0072B2", "#D55E00", "#CC79A7"
CLASS_COLORS = ("#56B4E9", "#009E73", "#E69F00", "#882255")
GAP_COLOR = "#f0f0f0"

CONTROL_NAMES = {
    "constant": "constant answer",
    "nearest_neighbour": "nearest neighbor",
    "nearest_neighbour_permuted": "nearest neighbor,\npatients' labels permuted",
    "linear_32": "linear, 32×32 pixels",
    "robust_linear_32": "robust linear, 32×32 pixels",
    "atrophy": "atrophy statistics, a slice",
    "atrophy_scan": "atrophy statistics, whole scan",
    "kernel_ridge_16": "kernel ridge, 16×16 pixels",
}


def _label(arrays: dict[str, np.ndarray]) -> str:
    patients = len(arrays["sizes"])
    images = int(arrays["sizes"][:, 1].sum())
    return f"data: {arrays['data']} · n = {images:,} real images of {patients} patients"


def _bin_centers(count: int) -> np.ndarray:
    """Centers (count,) of equal bins from 0 to 1."""
    return (np.arange(count) + 0.5) / count


# -- patients --------------------------------------------------------------------------------------


@styled
def patients_figure(arrays: dict[str, np.ndarray]) -> Figure:
    """Patients from pixels: each image's best correlations and the gap between them, the number of
    groups at each threshold, and how many slices each patient has."""
    figure, axes = canvas(1, 3, (11.5, 3.6), "People come out of the pixels", _label(arrays))
    correlations, groups, sizes = axes[0]
    _draw_best_correlations(correlations, arrays)
    _draw_groups(groups, arrays)
    _draw_sizes(sizes, arrays["sizes"])
    return figure


def _draw_best_correlations(panel: Axes, arrays: dict[str, np.ndarray]) -> None:
    low, high = arrays["links_gap"]
    for name, color, text in (
        ("own", SAME_PATIENT, "same patient"),
        ("other", OTHER_PATIENT, "anybody else"),
    ):
        counts = arrays[f"links_{name}"]
        centers = _bin_centers(len(counts))
        panel.bar(centers, counts, width=1 / len(counts), color=color, label=text)
    panel.axvspan(low, high, color=GAP_COLOR, zorder=0)
    panel.annotate(
        f"gap {low:.3f}–{high:.3f}",
        ((low + high) / 2, panel.get_ylim()[1] * 0.93),
        ha="center",
        fontsize=7.5,
        color=GREY,
    )
    panel.set(
        xlim=(0.4, 1),
        xlabel=f"best correlation of an image ({int(arrays['side'])} px)",
        ylabel="images",
        title="Nearest image, by whose it is",
    )
    panel.legend(loc="upper left")


def _draw_groups(panel: Axes, arrays: dict[str, np.ndarray]) -> None:
    patients = len(arrays["sizes"])
    panel.axvspan(*arrays["links_gap"], color=GAP_COLOR, zorder=0)
    panel.step(THRESHOLDS, arrays["links_groups"], where="post", color=BASE)
    panel.axhline(patients, color=SAME_PATIENT, linestyle=":", linewidth=1.1)
    panel.set(
        yscale="log",
        xlabel="threshold on the correlation",
        ylabel="groups (connected components)",
        title=f"{patients} groups at every threshold inside the gap",
    )


def _draw_sizes(panel: Axes, sizes: np.ndarray) -> None:
    """Bars of the patients' slices, from (P, 2) class and number of slices."""
    position = 0
    for k, name in enumerate(CLASSES):
        of_class = np.sort(sizes[sizes[:, 0] == k, 1])
        panel.bar(
            np.arange(position, position + len(of_class)),
            of_class,
            width=1,
            color=CLASS_COLORS[k],
            label=f"{name}: {len(of_class)} patients",
        )
        position += len(of_class)
    panel.set(
        xlabel="patients, by class",
        ylabel="slices",
        ylim=(0, sizes[:, 1].max() * 1.6),
        title="Slices of each patient",
    )
    panel.legend(loc="upper left", ncols=2)


@styled
def stability_figure(arrays: dict[str, np.ndarray]) -> Figure:
    """The gap and the patients found when the images or the method change."""
    names = arrays["stability_variant"]
    figure, axes = canvas(
        1, 1, (8, 0.27 * len(names) + 1.3), "The same patients, however one looks", _label(arrays)
    )
    panel = axes[0, 0]
    panel.grid(axis="y", visible=False)
    for row in range(len(names)):
        low, high = arrays["stability_low"][row], arrays["stability_high"][row]
        text = "no gap"
        if np.isfinite(low):
            same = bool(arrays["stability_same"][row])
            color = SAME_PATIENT if same else OTHER_PATIENT
            panel.barh(row, high - low, left=low, height=0.6, color=color)
            found = int(arrays["stability_people"][row])
            text = f"{found} patients" + (", the same" if same else ", others")
        panel.text(1.005, row, text, va="center", fontsize=7.5, color=BASE)
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.set(
        xlim=(0.65, 1),
        xlabel="correlation: from the best link of two patients to the weakest that joins a slice "
        "to its own",
    )
    return figure


# -- the split -------------------------------------------------------------------------------------


@styled
def split_figure(arrays: dict[str, np.ndarray]) -> Figure:
    """What the published split shares: patients, and how near the training slices of a test slice's
    patient are."""
    shared = dict(zip(SHARED, arrays["shared"].tolist(), strict=True))
    figure, axes = canvas(
        1, 2, (9, 3.2), "What the published split shares", _label(arrays), width_ratios=(1, 1.7)
    )
    bars, distance = axes[0]
    heights = [shared["train"], shared["test"], shared["both"]]
    bars.bar(["train", "test", "both"], heights, color=[GREY, GREY, OTHER_PATIENT])
    for place, height in enumerate(heights):
        bars.text(place, height, f"{height}", ha="center", va="bottom")
    bars.set(
        ylabel="patients",
        title=f"{shared['both']} of {shared['test']} test patients are in train",
        ylim=(0, max(heights) * 1.15),
    )
    known = arrays["distance"][arrays["distance"] > 0]
    values, counts = np.unique(known, return_counts=True)
    distance.bar(values, counts, color=OTHER_PATIENT)
    for value, count in zip(values, counts, strict=True):
        share = f"{count / max(1, len(known)):.0%}"
        distance.text(value, count, share, ha="center", va="bottom", fontsize=7.5)
    distance.set(
        xlabel="slices to the patient's nearest training slice (1: its neighbor)",
        ylabel="test slices",
        title=f"n = {len(known):,} test slices",
        xticks=values,
    )
    return figure


# -- synthetic images ------------------------------------------------------------------------------


@styled
def synthetic_figure(arrays: dict[str, np.ndarray]) -> Figure:
    """Synthetic images: how many by class, how similar to real ones, what their presence alone
    reveals of the class, and which split they resemble."""
    figure, axes = canvas(
        1, 3, (11.5, 3.4), "What the synthetic images are", f"data: {arrays['data']}"
    )
    counts, likeness, origin = axes[0]
    _draw_kinds(counts, arrays)
    _draw_likeness(likeness, arrays)
    _draw_origin(origin, arrays)
    return figure


def _draw_kinds(panel: Axes, arrays: dict[str, np.ndarray]) -> None:
    bottom = np.zeros(len(CLASSES))
    for column, (name, color) in enumerate(
        (("real", SAME_PATIENT), ("synthetic", SYNTHETIC), ("duplicate", GREY))
    ):
        heights = arrays["synthetic_kinds"][:, column]
        panel.bar(CLASSES, heights, bottom=bottom, color=color, label=name)
        bottom += heights
    knows, constant = arrays["synthetic_shortcut"]
    panel.set(
        ylabel="images of the train folder",
        ylim=(0, bottom.max() * 1.35),
        title=f"“real or synthetic?” alone: {knows:.0%} right\n"
        f"(most frequent class: {constant:.0%})",
    )
    panel.legend(ncols=3, loc="upper center")


def _draw_likeness(panel: Axes, arrays: dict[str, np.ndarray]) -> None:
    for name, color, text in (
        ("likeness_real", SAME_PATIENT, "real image, nearest other"),
        ("likeness", SYNTHETIC, "synthetic image, nearest real"),
    ):
        counts = arrays[f"synthetic_{name}"]
        density = counts / max(1, counts.sum()) * len(counts)
        panel.step(_bin_centers(len(counts)), density, where="mid", color=color, label=text)
    panel.set(
        xlim=(0.5, 1),
        xlabel="correlation with the nearest real image",
        ylabel="density",
        title="Some are nearly copies",
    )
    panel.legend(loc="upper left")


def _draw_origin(panel: Axes, arrays: dict[str, np.ndarray]) -> None:
    totals, of_test = arrays["synthetic_from_test"].T
    share = 100 * of_test / np.maximum(1, totals)
    chance = 100 * arrays["synthetic_test_share"]
    places = np.arange(len(CLASSES))
    panel.bar(CLASSES, share, color=SYNTHETIC)
    panel.hlines(
        chance,
        places - 0.4,
        places + 0.4,
        color=BASE,
        linestyle=":",
        label="share of test slices among real ones",
    )
    panel.legend(loc="upper left")
    for place, (value, total) in enumerate(zip(share, totals, strict=True)):
        text = f"{value:.0f}%\nn = {total:,}" if total else "none"
        panel.text(place, value / 2, text, ha="center", va="center", fontsize=7.5)
    panel.set(
        ylabel="nearest real image is a test slice (%)",
        ylim=(0, max(5, share.max() * 1.6, chance.max() * 1.6)),
        title="Training images made after test patients?",
    )


# -- controls --------------------------------------------------------------------------------------


@styled
def controls_figure(found: dict[str, Record]) -> Figure:
    """The controls under both protocols.

    Args:
        found: protocol → record of `Baselines`.
    """
    protocols = [protocol for protocol in PROTOCOLS if protocol in found]
    figure, axes = canvas(
        1,
        len(protocols),
        (5.2 * len(protocols), 4.2),
        "What simple rules and small models score",
        f"data: {found[protocols[0]].data} · bars: 95% intervals over patients",
        sharey=True,
    )
    for panel, protocol in zip(axes[0], protocols, strict=True):
        _draw_controls(panel, found[protocol])
    axes[0, 0].invert_yaxis()
    return figure


def _draw_controls(panel: Axes, record: Record) -> None:
    scores: dict[str, CleanScores] = {"constant": record.constant_answer}
    scores |= {name: part.clean for name, part in record.variants.items()}
    for row, name in enumerate(CONTROL_NAMES):
        if name not in scores:
            panel.text(1.5, row, "the split divides scans", va="center", fontsize=8, color=GREY)
            continue
        score = scores[name].slice["balanced_accuracy_3"]
        if score.value is None or score.bounds is None:
            continue
        value, low, high = (100 * x for x in (score.value, *score.bounds))
        color = OTHER_PATIENT if "permuted" in name else COLORS["Baselines"]
        panel.barh(row, value, color=color, height=0.6)
        panel.plot((low, high), (row, row), color=BASE, linewidth=1.4)
        panel.text(max(value, high) + 1.5, row, f"{value:.1f}%", va="center", fontsize=8)
    clean = record.constant_answer
    panel.axvline(100 / 3, color=BASE, linestyle=":", linewidth=1.1)
    panel.set_yticks(range(len(CONTROL_NAMES)), list(CONTROL_NAMES.values()))
    panel.set(
        xlim=(0, 112),
        xlabel="balanced accuracy, three classes (%)",
        title=f"{PROTOCOL_TITLES[record.protocol]}\n"
        f"n = {clean.n_slices:,} slices of {clean.n_patients} patients",
    )


# -- any set ---------------------------------------------------------------------------------------


@styled
def links_figure(links: np.ndarray, gap: tuple[float, float] | None, *, label: str) -> Figure:
    """The tree of strongest links of any set: an empty range of correlations separates patients.

    Args:
        links: correlations (M,).
        gap: correlations between which no link lies, where there is a gap.
    """
    figure, axes = canvas(1, 2, (9.5, 3.2), "Links between images", label)
    histogram, groups = axes[0]
    bins = np.linspace(max(-0.2, links.min() - 0.02), 1, 100)
    histogram.hist(links, bins=bins, color=SAME_PATIENT)
    histogram.set(
        xlabel="correlation of a link of the tree",
        ylabel="links",
        yscale="log",
        title="Strongest links that join all images",
    )
    # Each link that is added joins two groups to one.
    left = len(links) - np.arange(len(links))
    groups.step(np.sort(links)[::-1], left, where="post", color=BASE)
    groups.set(
        xlabel="threshold on the correlation",
        ylabel="groups (connected components)",
        yscale="log",
        title="No gap" if gap is None else f"Gap from {gap[0]:.3f} to {gap[1]:.3f}",
    )
    for panel in axes[0]:
        if gap is not None:
            panel.axvspan(*gap, color=GAP_COLOR, zorder=0)
    return figure


@styled
def stack_figure(
    ordered: Sequence[np.ndarray], drawn: Sequence[np.ndarray], *, label: str, columns: int = 16
) -> Figure:
    """One recovered patient's slices in order above as many images drawn at random."""
    rows = -(-len(ordered) // columns)
    figure, axes = canvas(
        2 * rows,
        columns,
        (0.72 * columns, 1.6 * rows + 1.0),
        "One recovered patient in order, and a random draw",
        label,
    )
    for panel in axes.flat:
        panel.axis("off")
    for first, images, name in ((0, ordered, "one patient"), (rows, drawn, "random draw")):
        for panel, image in zip(axes[first : first + rows].flat, images, strict=False):
            panel.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes[first, 0].set_title(name, fontsize=8, loc="left")
    return figure


# -- from files ------------------------------------------------------------------------------------


def read_arrays(folder: Path | str) -> dict[str, np.ndarray]:
    """The audit's arrays in `assets/Baselines`.

    Raises:
        UserError: there are none.
    """
    path = Path(folder) / ARRAYS
    if not path.is_file():
        raise UserError(
            f"There is no leak audit at {path}: run dataset/leak_audit.ipynb, which writes it."
        )
    with np.load(path) as file:
        return dict(file)


def audit_figures(arrays: dict[str, np.ndarray], found: dict[str, Record]) -> dict[str, Figure]:
    """Every figure of the audit, by its file name.

    Args:
        arrays: of `read_arrays`. At profile `demo` stability is not measured, and has no figure.
        found: protocol → record of `Baselines`; none: no figure of the controls.
    """
    figures = {"people": patients_figure(arrays)}
    if "stability_variant" in arrays:
        figures["stability"] = stability_figure(arrays)
    figures["split"] = split_figure(arrays)
    figures["synthetic"] = synthetic_figure(arrays)
    if found:
        figures["controls"] = controls_figure(found)
    return figures
