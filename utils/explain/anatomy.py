"""Which part of the head a map points at."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from utils.otsu import otsu_thresholds


def anatomy_masks(images: Tensor) -> dict[str, Tensor]:
    """Regions of brain-extracted axial slices (N, 1, H, W), from the pixels alone, each bool
    (N, H, W).

    `brain` is all inside the outline; `csf` the fluid in its central part, that is the ventricles
    and the cisterns next to them; `rim` a band along the outline, 3% of the width inside and 2%
    outside; `background` what is neither brain nor rim. Thresholds are Otsu's, per image. An image
    without a brain is all background, and its other masks are empty.
    """
    masks = [_masks_of(image) for image in images[:, 0].detach().cpu().numpy()]
    return {
        name: torch.from_numpy(np.stack([mask[name] for mask in masks])).to(images.device)
        for name in masks[0]
    }


def _masks_of(image: np.ndarray) -> dict[str, np.ndarray]:
    """The masks of one image (H, W)."""
    from scipy import ndimage

    empty = np.zeros(image.shape, dtype=bool)
    if image.max() <= image.min():
        return {"brain": empty, "csf": empty, "rim": empty, "background": ~empty}
    brain = _brain_of(image)
    inside, outside = ndimage.distance_transform_edt(brain), ndimage.distance_transform_edt(~brain)
    width = image.shape[1]
    rim = (inside <= 0.03 * width) & (outside <= 0.02 * width)
    tissue = image[inside > 0.03 * width]
    csf = empty
    if len(tissue) and np.ptp(tissue) > 1e-6:
        csf = _central_fluid(brain, brain & (image < otsu_thresholds(tissue, 2)[0]))
    return {"brain": brain, "csf": csf, "rim": rim, "background": ~(brain | rim)}


def _brain_of(image: np.ndarray) -> np.ndarray:
    """The largest bright piece with its gaps closed and holes filled, bool (H, W)."""
    from scipy import ndimage

    pieces, _ = ndimage.label(image > 0.5 * otsu_thresholds(image)[0])
    largest = pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()
    # Padded, because closing removes what touches the border of the image.
    closed = ndimage.binary_closing(np.pad(largest, 8), iterations=4)[8:-8, 8:-8]
    return ndimage.binary_fill_holes(closed)


def _central_fluid(brain: np.ndarray, fluid: np.ndarray) -> np.ndarray:
    """The fluid within an ellipse around the center of the brain, without specks: the sulci at the
    surface stay out."""
    from scipy import ndimage

    rows, columns = np.nonzero(brain)
    y, x = np.mgrid[: brain.shape[0], : brain.shape[1]]
    half_height, half_width = np.ptp(rows) / 2 + 1, np.ptp(columns) / 2 + 1
    up, across = (y - rows.min()) / half_height - 1, (x - columns.min()) / half_width - 1
    core = (up / 0.68) ** 2 + (across / 0.55) ** 2 <= 1
    pieces, count = ndimage.label(ndimage.binary_opening(fluid) & core)
    size = np.bincount(pieces.ravel(), minlength=count + 1)
    return (pieces > 0) & (size[pieces] >= 0.0007 * brain.size)


def anatomy_shares(maps: Tensor, masks: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """How much of each map (N, H, W) lies in each region (N, H, W), all float64 (N,).

    Returns:
        `<region>`: the share of the map's mass in it, NaN for a map of zeros; `<region>_area`: the
        region's share of the pixels, which is the share that an even map would have.
    """
    mass = maps.double().sum(dim=(1, 2))
    shares = {}
    for name, mask in masks.items():
        shares[name] = ((maps.double() * mask).sum(dim=(1, 2)) / mass).cpu().numpy()
        shares[f"{name}_area"] = mask.double().mean(dim=(1, 2)).cpu().numpy()
    return shares
