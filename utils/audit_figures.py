"""The leak audit's small arrays in, matplotlib figures out: no images needed (but for the montage)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from utils.figures import BASE, COLOURS, GREY, PROTOCOL_TITLES, canvas, styled
from utils.utils_funcs import CLASSES, PROTOCOLS, UserError

#: The small arrays' file in assets/Baselines/.
ARRAYS = "leak_audit.npz"

#: Order of the counts in the arrays' `shared`.
SHARED = ("train", "test", "both", "test_images", "test_images_of_training_people")
OWN, OTHER, MADE = "#0072B2", "#D55E00", "#CC79A7"
CLASS_COLOURS = ("#56B4E9", "#009E73", "#E69F00", "#882255")
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
    return f"data: {arrays['data']} · n = {int(arrays['sizes'][:, 1].sum()):,} real images of {patients} people"


def _centres(count: int) -> np.ndarray:
    return (np.arange(count) + 0.5) / count


@styled
def patients_figure(arrays: dict[str, np.ndarray]) -> Figure:
    """People from pixels: best correlations with their gap, number of groups against the threshold, sizes by class."""
    figure, axes = canvas(1, 3, (11.5, 3.6), "People come out of the pixels", _label(arrays))
    links, count, sizes = axes[0]
    low, high = arrays["links_gap"]
    for name, colour, text in (("own", OWN, "own person"), ("other", OTHER, "anybody else")):
        values = arrays[f"links_{name}"]
        links.bar(_centres(len(values)), values, width=1 / len(values), color=colour, label=text)
    links.axvspan(low, high, color="#f0f0f0", zorder=0)
    links.annotate(
        f"gap {low:.3f}–{high:.3f}",
        ((low + high) / 2, links.get_ylim()[1] * 0.93),
        ha="center",
        fontsize=7.5,
        color=GREY,
    )
    links.set(
        xlim=(0.4, 1),
        xlabel=f"best correlation of an image ({int(arrays['side'])} px)",
        ylabel="images",
        title="Nearest image, by whose it is",
    )
    links.legend(loc="upper left")
    thresholds = 0.5 + 0.005 * np.arange(len(arrays["links_groups"]))
    count.axvspan(low, high, color="#f0f0f0", zorder=0)
    count.step(thresholds, arrays["links_groups"], where="post", color=BASE)
    patients = len(arrays["sizes"])
    count.axhline(patients, color=OWN, linestyle=":", linewidth=1.1)
    count.set(
        yscale="log",
        xlabel="threshold on the correlation",
        ylabel="groups (connected components)",
        title=f"{patients} groups at every threshold inside the gap",
    )
    position = 0
    for k, name in enumerate(CLASSES):
        own = np.sort(arrays["sizes"][arrays["sizes"][:, 0] == k, 1])
        sizes.bar(
            np.arange(position, position + len(own)),
            own,
            width=1,
            color=CLASS_COLOURS[k],
            label=f"{name}: {len(own)} people",
        )
        position += len(own)
    sizes.set(
        xlabel="people, by class",
        ylabel="slices",
        ylim=(0, arrays["sizes"][:, 1].max() * 1.6),
        title="Slices of each person",
    )
    sizes.legend(loc="upper left", ncols=2)
    return figure


@styled
def stability_figure(arrays: dict[str, np.ndarray]) -> Figure:
    """The gap and the people found when the images or the method change."""
    names = arrays["stability_variant"]
    figure, axes = canvas(
        1, 1, (8, 0.27 * len(names) + 1.3), "The same people, however one looks", _label(arrays)
    )
    panel = axes[0, 0]
    panel.grid(axis="y", visible=False)
    for row, name in enumerate(names):
        low, high = arrays["stability_low"][row], arrays["stability_high"][row]
        same = bool(arrays["stability_same"][row])
        if np.isfinite(low):
            panel.barh(row, high - low, left=low, height=0.6, color=OWN if same else OTHER)
        text = (
            f"{int(arrays['stability_people'][row])} people"
            + (", the same" if same else ", others")
            if np.isfinite(low)
            else "no gap"
        )
        panel.text(1.005, row, text, va="center", fontsize=7.5, color=BASE)
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.set(
        xlim=(0.65, 1),
        xlabel="correlation: from the best link of two people to the weakest that joins a slice to its own",
    )
    return figure


@styled
def split_figure(arrays: dict[str, np.ndarray]) -> Figure:
    """What the published split shares: people, and how near a test slice's own training slices are."""
    shared = dict(zip(SHARED, arrays["shared"].tolist(), strict=True))
    figure, axes = canvas(
        1, 2, (9, 3.2), "What the published split shares", _label(arrays), width_ratios=(1, 1.7)
    )
    bars, distance = axes[0]
    heights = [shared["train"], shared["test"], shared["both"]]
    bars.bar(["train", "test", "both"], heights, color=[GREY, GREY, OTHER])
    for place, height in enumerate(heights):
        bars.text(place, height, f"{height}", ha="center", va="bottom")
    bars.set(
        ylabel="people",
        title=f"{shared['both']} of {shared['test']} test people are in train",
        ylim=(0, max(heights) * 1.15),
    )
    known = arrays["distance"][arrays["distance"] > 0]
    values, counts = np.unique(known, return_counts=True)
    distance.bar(values, counts, color=OTHER)
    for value, height in zip(values, counts):
        distance.text(
            value,
            height,
            f"{height / max(1, len(known)):.0%}",
            ha="center",
            va="bottom",
            fontsize=7.5,
        )
    distance.set(
        xlabel="slices to the person's nearest training slice (1: its neighbour)",
        ylabel="test slices",
        title=f"n = {len(known):,} test slices",
        xticks=values,
    )
    return figure


@styled
def synthetic_figure(arrays: dict[str, np.ndarray]) -> Figure:
    """Synthetic images: how many by class, how like real ones, and what their mere presence gives away."""
    kinds, from_test = arrays["synthetic_kinds"], arrays["synthetic_from_test"]
    figure, axes = canvas(
        1, 3, (11.5, 3.4), "What the synthetic images are", f"data: {arrays['data']}"
    )
    counts, likeness, origin = axes[0]
    bottom = np.zeros(len(CLASSES))
    for column, (name, colour) in enumerate(
        (("real", OWN), ("synthetic", MADE), ("duplicate", GREY))
    ):
        counts.bar(CLASSES, kinds[:, column], bottom=bottom, color=colour, label=name)
        bottom += kinds[:, column]
    knows, constant = arrays["synthetic_shortcut"]
    counts.set(
        ylabel="images of the train folder",
        ylim=(0, bottom.max() * 1.35),
        title=f"“real or synthetic?” alone: {knows:.0%} right\n(most frequent class: {constant:.0%})",
    )
    counts.legend(ncols=3, loc="upper center")
    for name, colour, text in (
        ("likeness_real", OWN, "real image, nearest other"),
        ("likeness", MADE, "synthetic image, nearest real"),
    ):
        values = arrays[f"synthetic_{name}"]
        likeness.step(
            _centres(len(values)),
            values / max(1, values.sum()) * len(values),
            where="mid",
            color=colour,
            label=text,
        )
    likeness.set(
        xlim=(0.5, 1),
        xlabel="correlation with the nearest real image",
        ylabel="density",
        title="Some are nearly copies",
    )
    likeness.legend(loc="upper left")
    share = 100 * from_test[:, 1] / np.maximum(1, from_test[:, 0])
    origin.bar(CLASSES, share, color=MADE)
    chance = 100 * arrays["synthetic_test_share"]
    origin.hlines(
        chance,
        np.arange(len(CLASSES)) - 0.4,
        np.arange(len(CLASSES)) + 0.4,
        color=BASE,
        linestyle=":",
        label="share of test slices among real ones",
    )
    origin.legend(loc="upper left")
    for place, (value, (total, _)) in enumerate(zip(share, from_test)):
        origin.text(
            place,
            value / 2,
            f"{value:.0f}%\nn = {total:,}" if total else "none",
            ha="center",
            va="center",
            fontsize=7.5,
        )
    origin.set(
        ylabel="nearest real image is a test slice (%)",
        ylim=(0, max(5, share.max() * 1.6, chance.max() * 1.6)),
        title="Training images made after test people?",
    )
    return figure


@styled
def controls_figure(found: dict[str, dict]) -> Figure:
    """The controls under both protocols; `found` maps protocol → record of `Baselines`."""
    protocols = [protocol for protocol in PROTOCOLS if protocol in found]
    first = found[protocols[0]]
    figure, axes = canvas(
        1,
        len(protocols),
        (5.2 * len(protocols), 4.2),
        "What simple rules and small models score",
        f"data: {first['data']} · bars: 95% intervals over patients",
        sharey=True,
    )
    for panel, protocol in zip(axes[0], protocols):
        blocks = {
            "constant": found[protocol]["constant_answer"],
            **{name: block["clean"] for name, block in found[protocol]["variants"].items()},
        }
        for row, name in enumerate(CONTROL_NAMES):
            if name not in blocks:
                panel.text(1.5, row, "the split divides scans", va="center", fontsize=8, color=GREY)
                continue
            block = blocks[name]["slice"]["balanced_accuracy_3"]
            value, low, high = (
                100 * x for x in (block["value"], *(block["ci"] or [block["value"]] * 2))
            )
            panel.barh(
                row, value, color=OTHER if "permuted" in name else COLOURS["Baselines"], height=0.6
            )
            panel.plot((low, high), (row, row), color=BASE, linewidth=1.4)
            panel.text(max(value, high) + 1.5, row, f"{value:.1f}%", va="center", fontsize=8)
        clean = blocks["constant"]
        panel.axvline(100 / 3, color=BASE, linestyle=":", linewidth=1.1)
        panel.set_yticks(range(len(CONTROL_NAMES)), CONTROL_NAMES.values())
        panel.set(
            xlim=(0, 112),
            xlabel="balanced accuracy, three classes (%)",
            title=f"{PROTOCOL_TITLES[protocol]}\nn = {clean['n_slices']:,} slices of {clean['n_people']} people",
        )
    axes[0, 0].invert_yaxis()
    return figure


@styled
def links_figure(links: np.ndarray, gap: tuple[float, float] | None, *, label: str) -> Figure:
    """The tree of strongest links of any set: where they thin out, there are people."""
    figure, axes = canvas(1, 2, (9.5, 3.2), "Links between images", label)
    histogram, count = axes[0]
    histogram.hist(links, bins=np.linspace(max(-0.2, links.min() - 0.02), 1, 100), color=OWN)
    histogram.set(
        xlabel="correlation of a link of the tree",
        ylabel="links",
        yscale="log",
        title="Strongest links that join all images",
    )
    ordered = np.sort(links)[::-1]
    count.step(ordered, len(links) + 1 - np.arange(1, len(links) + 1), where="post", color=BASE)
    count.set(
        xlabel="threshold on the correlation",
        ylabel="groups (connected components)",
        yscale="log",
        title="No gap" if gap is None else f"Gap from {gap[0]:.3f} to {gap[1]:.3f}",
    )
    for panel in axes[0]:
        if gap is not None:
            panel.axvspan(*gap, color="#f0f0f0", zorder=0)
    return figure


@styled
def stack_figure(
    ordered: Sequence[np.ndarray], drawn: Sequence[np.ndarray], *, label: str, columns: int = 16
) -> Figure:
    """One recovered person's slices in order above as many images drawn at random."""
    rows = -(-len(ordered) // columns)
    figure, axes = canvas(
        2 * rows,
        columns,
        (0.72 * columns, 1.6 * rows + 1.0),
        "One recovered person in order, and a random draw",
        label,
    )
    for panel in axes.flat:
        panel.axis("off")
    for first, images, name in ((0, ordered, "one person"), (rows, drawn, "random draw")):
        for panel, image in zip(axes[first : first + rows].flat, images):
            panel.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes[first, 0].set_title(name, fontsize=8, loc="left")
    return figure


#: File name in assets/Baselines/ → figure, drawn from the committed arrays alone.
AUDIT_FIGURES = {
    "people": patients_figure,
    "stability": stability_figure,
    "split": split_figure,
    "synthetic": synthetic_figure,
}


def read_arrays(folder: Path | str) -> dict[str, np.ndarray]:
    """The audit's arrays in `assets/Baselines`."""
    path = Path(folder) / ARRAYS
    if not path.is_file():
        raise UserError(
            f"There is no leak audit at {path}: run dataset/leak_audit.ipynb, which writes it."
        )
    with np.load(path) as file:
        return dict(file)


def audit_figures(arrays: dict[str, np.ndarray], found: dict[str, dict]) -> dict[str, Figure]:
    """Every figure of the audit, by file name, from its arrays and the records of `Baselines` (protocol → record).
    What was not measured (stability, at profile `demo`) has none."""
    drawn = {
        name: draw(arrays)
        for name, draw in AUDIT_FIGURES.items()
        if name != "stability" or "stability_variant" in arrays
    }
    return drawn | ({"controls": controls_figure(found)} if found else {})
