"""Attacks on a part of the image: inside the brain, or inside a given mask."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from utils.attacks.ascent import with_restarts
from utils.attacks.base import register
from utils.otsu import BINS, otsu_thresholds


@register("kryptonite", gray=True)
def kryptonite(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    mask: Tensor | None = None,
    steps: int = 20,
    restarts: int = 1,
) -> Tensor:
    """Perturbation confined to the region of interest (Kulkarni and Bhambani 2021, "Kryptonite: an
    adversarial attack using regional focus"): PGD inside `mask`.

    Args:
        mask: 1 inside the region, (N, 1, H, W) or (1, 1, H, W), e.g. where Grad-CAM is high; None
            takes the brain.
    """
    mask = brain_mask(images) if mask is None else mask.to(images)
    return with_restarts(
        model,
        images,
        labels,
        eps,
        steps=steps,
        seed=seed,
        targets=targets,
        attempts=restarts,
        loss="margin",
        mask=mask,
    )


def brain_mask(images: Tensor) -> Tensor:
    """1 where the brain is, float (N, 1, H, W), from the images (N, 1, H, W) in [0, 1] alone: above
    half of Otsu's threshold, the largest connected piece, holes filled. All 1 in an image that has
    no such piece."""
    from scipy import ndimage

    masks = np.ones(images.shape, np.float32)
    for index, image in enumerate(images[:, 0].cpu().numpy()):
        edge = otsu_thresholds(image, value_range=(0.0, 1.0))[0]
        # Half of the center of the bin below the edge.
        pieces, count = ndimage.label(image > (edge - 1 / (2 * BINS)) / 2)
        if count:
            sizes = ndimage.sum_labels(np.ones_like(image), pieces, range(1, count + 1))
            largest = 1 + np.argmax(sizes)
            masks[index, 0] = ndimage.binary_fill_holes(pieces == largest)
    return torch.as_tensor(masks).to(images)
