"""How alike two maps are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: Share of a map's pixels that count as its top: where a reader would look first.
TOP = 0.2


def map_similarity(first: Tensor, second: Tensor) -> dict[str, np.ndarray]:
    """How alike two sets of maps (N, H, W) in [0, 1] are, each measure float64 (N,): `ssim`,
    `rank_correlation` (Spearman) and `iou_top20` (intersection over union of the top 20% of the
    pixels; 0.11 by chance)."""
    # Two seeds: where a map has fewer positive pixels than that, equal zeros must not agree.
    a, b = top_pixels(first, 0), top_pixels(second, 1)
    iou = ((a & b).sum(dim=(1, 2)) / (a | b).sum(dim=(1, 2))).cpu().numpy().astype(np.float64)
    return {
        "ssim": structural_similarity(first, second),
        "rank_correlation": rank_correlation(first, second),
        "iou_top20": iou,
    }


def pixel_order(maps: Tensor, seed: int) -> Tensor:
    """Place of each pixel when a map is sorted from high to low, int64 (N, H, W) in 0..H·W - 1;
    equal values are in random order, the same for all maps."""
    generator = torch.Generator().manual_seed(seed)
    shuffle = torch.randperm(maps[0].numel(), generator=generator).to(maps.device)
    by_value = maps.flatten(1)[:, shuffle].argsort(dim=1, descending=True, stable=True)
    return shuffle[by_value].argsort(dim=1).view_as(maps)


def top_pixels(maps: Tensor, seed: int) -> Tensor:
    """Bool (N, H, W): the share `TOP` of each map's pixels with the highest values."""
    return pixel_order(maps, seed) < round(TOP * maps[0].numel())


def rank_correlation(first: Tensor, second: Tensor) -> np.ndarray:
    """Spearman's correlation of each pair of maps (N, H, W), float64 (N,); 0 where a map is
    constant and so ranks nothing."""
    from scipy.stats import rankdata

    a, b = (rankdata(maps.detach().flatten(1).cpu().numpy(), axis=1) for maps in (first, second))
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    scale = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.divide((a * b).sum(axis=1), scale, out=np.zeros(len(a)), where=scale > 0)


def structural_similarity(first: Tensor, second: Tensor) -> np.ndarray:
    """SSIM (Wang et al. 2004) of each pair of maps (N, H, W) in [0, 1], float64 (N,), with that
    paper's constants and its Gaussian window (sigma 1.5 px)."""
    # By hand: no package of the environment has it (scikit-image and torchmetrics are not in it).
    a, b = first[:, None].double(), second[:, None].double()
    mean_a, mean_b = blur(a, 1.5), blur(b, 1.5)
    variance_a, variance_b = blur(a * a, 1.5) - mean_a**2, blur(b * b, 1.5) - mean_b**2
    covariance = blur(a * b, 1.5) - mean_a * mean_b
    index = (
        (2 * mean_a * mean_b + 0.01**2)
        * (2 * covariance + 0.03**2)
        / ((mean_a**2 + mean_b**2 + 0.01**2) * (variance_a + variance_b + 0.03**2))
    )
    return index.mean(dim=(1, 2, 3)).cpu().numpy()


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of images (N, C, H, W), sigma in px, cut off at three sigma."""
    from torchvision.transforms.functional import gaussian_blur

    return gaussian_blur(images, kernel_size=2 * round(3 * sigma) + 1, sigma=sigma)
