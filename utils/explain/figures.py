"""Maps drawn over slices: grids, strips, animations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure, FigureBase
from torch import Tensor

from utils.utils_funcs import CLASSES, atomic_path

MAP_COLORS = "magma"
#: Of the four classes, safe for color-blind readers (Okabe and Ito).
CLASS_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")


def overlay_figure(
    images: Tensor,
    maps: Tensor,
    predictions: Tensor | np.ndarray,
    labels: Sequence[int] | Tensor,
    *,
    title: str = "",
    map_name: str = "Grad-CAM",
) -> Figure:
    """One column a slice; rows: image, map, overlay. Above each column the true class and the
    predicted one with its probability.

    Args:
        images: (N, 1, H, W); maps: (N, H, W), both in [0, 1].
        predictions: class probabilities (N, 4).
    """
    count = len(images)
    figure = Figure(figsize=(1.75 * count + 0.9, 6.2 if title else 5.9), layout="constrained")
    axes = figure.subplots(3, count, squeeze=False)
    for column, (image, heat) in enumerate(zip(_array(images[:, 0]), _array(maps), strict=True)):
        _draw_three(axes[:, column], image, heat)
        caption = _caption(labels[column], predictions[column], separator="\n")
        axes[0, column].set_title(caption, fontsize=9)
    for row, name in enumerate(("image", map_name, "overlay")):
        axes[row, 0].set_ylabel(name, fontsize=10)
    _color_bar(figure, axes)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def comparison_figure(
    rows: Mapping[str, tuple[Tensor, Tensor, Tensor | np.ndarray]],
    labels: Sequence[int] | Tensor,
    *,
    title: str = "",
) -> Figure:
    """The same slices for several models: one row a model, and for each slice three panels, the
    image, its map and the overlay.

    Args:
        rows: row name, such as "Resnet_atk", → images (N, 1, H, W), maps (N, H, W), class
            probabilities (N, 4).
    """
    count = len(labels)
    figure = Figure(figsize=(1.15 * 3 * count + 1.6, 1.45 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), 3 * count, squeeze=False)
    for line, (name, (images, maps, predictions)) in zip(axes, rows.items(), strict=True):
        for number, (image, heat) in enumerate(
            zip(_array(images[:, 0]), _array(maps), strict=True)
        ):
            panels = line[3 * number : 3 * number + 3]
            _draw_three(panels, image, heat)
            caption = _caption(labels[number], predictions[number], separator=", ")
            panels[1].set_title(caption, fontsize=8)
        line[0].set_ylabel(name, fontsize=9)
    _color_bar(figure, axes)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def patient_strip(
    images: Tensor,
    maps: Tensor,
    predictions: Tensor | np.ndarray,
    label: int,
    *,
    columns: int = 8,
    title: str = "",
) -> Figure:
    """Overlays of one patient's slices, above a plot of each class's probability by slice.

    Args:
        images: (N, 1, H, W) in body order, 0 the most superior; maps: (N, H, W), both in [0, 1].
        predictions: class probabilities (N, 4).
        label: the patient's true class.
    """
    count, height = len(images), -(-len(images) // columns)
    figure = Figure(figsize=(1.2 * columns + 1, 1.2 * height + 2.3), layout="constrained")
    heights = [1.2 * height + 0.3, 2]
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    axes = above.subplots(height, columns, squeeze=False)
    for place, axis in enumerate(axes.flat):
        axis.axis("off")
        if place < count:
            axis.imshow(_blend(_array(images[place, 0]), _array(maps[place])), vmin=0, vmax=1)
            corner = {"va": "top", "transform": axis.transAxes}
            axis.text(0.04, 0.96, str(place), color="white", fontsize=8, **corner)
    _color_bar(above, axes)
    curves = below.subplots()
    for number, (name, color) in enumerate(zip(CLASSES, CLASS_COLORS, strict=True)):
        true = number == label
        curves.plot(
            _array(predictions)[:, number],
            color=color,
            marker=".",
            linewidth=2.2 if true else 1.0,
            label=f"{name} (true)" if true else name,
        )
    curves.set(xlabel="slice, from superior to inferior", ylabel="probability")
    curves.set(xlim=(-0.5, count - 0.5), ylim=(-0.02, 1.02))
    curves.spines[["top", "right"]].set_visible(False)
    curves.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def patient_gif(
    images: Tensor,
    maps: Tensor,
    path: Path | str,
    *,
    side: int = 160,
    colors: int = 64,
    seconds: float = 0.18,
) -> Path:
    """Writes a looping GIF of one patient's slices in body order, left the image, right the
    overlay.

    Args:
        images: (N, 1, H, W); maps: (N, H, W), both in [0, 1].
        side: of each half, in pixels; colors: of the palette; seconds: per slice.
    """
    from PIL import Image

    frames = []
    for image, heat in zip(_array(images[:, 0]), _array(maps), strict=True):
        pair = np.hstack([np.repeat(image[..., None], 3, axis=2), _blend(image, heat)])
        frame = Image.fromarray((pair * 255).round().astype(np.uint8))
        frames.append(frame.resize((2 * side, side), Image.Resampling.BICUBIC))
    # One palette for all frames: a palette for each would flicker and cost more bytes.
    together = Image.new("RGB", (2 * side, side * len(frames)))
    for place, frame in enumerate(frames):
        together.paste(frame, (0, side * place))
    palette = together.quantize(colors, dither=Image.Dither.NONE)
    indexed = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    with atomic_path(path) as temporary:
        indexed[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=indexed[1:],
            duration=round(1000 * seconds),
            loop=0,
            optimize=True,
        )
    return Path(path)


def _draw_three(panels: np.ndarray, image: np.ndarray, heat: np.ndarray) -> None:
    """Image, map and overlay on three axes without ticks or frames."""
    _draw(panels[0], image, "gray")
    _draw(panels[1], heat, MAP_COLORS)
    _draw(panels[2], _blend(image, heat), "gray")


def _draw(axis: Axes, picture: np.ndarray, color_map: str) -> None:
    axis.imshow(picture, cmap=color_map, vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _blend(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """The map (H, W) over the image (H, W), RGB in [0, 1]: opaque where the map is high, so that
    anatomy stays visible elsewhere."""
    opacity = 0.65 * heat[..., None]
    colored = colormaps[MAP_COLORS](heat)[..., :3]
    return ((1 - opacity) * image[..., None] + opacity * colored).clip(0, 1)


def _caption(label: int | Tensor, probabilities: Tensor | np.ndarray, separator: str) -> str:
    chosen = int(_array(probabilities).argmax())
    mark = "✓" if chosen == int(label) else "✗"
    predicted = f"{mark} {CLASSES[chosen]} {float(probabilities[chosen]):.2f}"
    return f"true {CLASSES[int(label)]}{separator}{predicted}"


def _color_bar(figure: FigureBase, axes: np.ndarray) -> None:
    colored = ScalarMappable(cmap=MAP_COLORS)
    bar = figure.colorbar(colored, ax=axes, fraction=0.02, pad=0.01, aspect=35)
    bar.set_label("evidence for the explained class\n(share of the map's maximum)", fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _array(values: Tensor | np.ndarray) -> np.ndarray:
    if isinstance(values, Tensor):
        return values.detach().float().cpu().numpy()
    return np.asarray(values, dtype=np.float32)
