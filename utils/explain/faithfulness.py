"""Does the prediction depend on the pixels that a map marks? Deletion, insertion and ROAD."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.explain.maps import unit_range
from utils.explain.similarity import blur, pixel_order
from utils.model_state import frozen
from utils.pixel_range import any_pixels
from utils.prediction import predict

#: Ends the names of measures of the control, in a record too: "road" and "road of random maps".
CONTROL = " of random maps"


def faithfulness(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: Tensor,
    cells: int,
    batch_size: int,
    seed: int,
    steps: int = 16,
) -> dict[str, np.ndarray]:
    """Means of the deletion and insertion curves and ROAD, for the maps and for `random_maps` on
    `cells` × `cells`: `deletion`, `insertion`, `road`, and each with `CONTROL` behind, all (N,)."""
    result: dict[str, np.ndarray] = {}
    for suffix, judged in (("", maps), (CONTROL, random_maps(maps, cells, seed))):
        curves = deletion_insertion(
            model, images, judged, targets, steps=steps, batch_size=batch_size, seed=seed
        )
        result |= {f"{name}{suffix}": curve.mean(axis=1) for name, curve in curves.items()}
        batches = zip(
            *(tensor.split(batch_size) for tensor in (images, judged, targets)), strict=True
        )
        result[f"road{suffix}"] = np.concatenate(
            [road(model, *part, seed=seed) for part in batches]
        )
    return result


def random_maps(like: Tensor, cells: int, seed: int = 0) -> Tensor:
    """The control: maps (N, H, W) of uniform noise on a `cells` × `cells` grid, of the shape of
    `like`. They are as coarse as real maps because any smooth map would beat pixel noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(len(like), 1, cells, cells, generator=generator)
    fine = F.interpolate(coarse, size=like.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    return unit_range(fine).to(like.device)


def deletion_insertion(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: Tensor,
    *,
    steps: int = 16,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Probability of the target class while pixels are blurred away, or brought back, in the order
    of the map (Petsiuk et al. 2018, arXiv:1806.07421).

    The blur (sigma one twelfth of the width) stands for "removed" in both: black would draw new
    edges. A faithful map has a low mean deletion and a high mean insertion.

    Args:
        images: (N, 1, H, W) in [0, 1]; maps: (N, H, W); targets: int64 (N,).

    Returns:
        `deletion` and `insertion`, each float32 (N, steps + 1), after shares 0, 1/steps … 1 of the
        pixels.
    """
    order = pixel_order(maps, seed)[:, None]
    blurred = blur(images, images.shape[-1] / 12)

    def probability(mixed: Tensor) -> np.ndarray:
        probabilities = predict(model, mixed, batch_size=batch_size).softmax(1)
        return probabilities.gather(1, targets[:, None].cpu())[:, 0].numpy()

    deletion, insertion = [], []
    for step in range(steps + 1):
        first = order < step * order[0].numel() / steps
        deletion.append(probability(torch.where(first, blurred, images)))
        insertion.append(probability(torch.where(first, images, blurred)))
    return {"deletion": np.stack(deletion, axis=1), "insertion": np.stack(insertion, axis=1)}


def road(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: Tensor,
    *,
    percentiles: Sequence[int] = (20, 50, 80),
    seed: int = 0,
) -> np.ndarray:
    """ROAD (Rong et al. 2022, arXiv:2202.00449) by `grad-cam`: half of how much more of the
    target's probability is lost when the most relevant pixels are imputed than when the least
    relevant are. Float32 (N,), higher is better.

    The maps are passed as ranks, ties broken at random, so that a map with many zeros has as many
    pixels removed as any other.
    """
    from pytorch_grad_cam.metrics.road import ROADCombined
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    ranks = 1 - pixel_order(maps, seed).double() / maps[0].numel()
    goals = [ClassifierOutputSoftmaxTarget(target) for target in targets.tolist()]
    # The imputation draws its noise from the global state.
    with frozen(model), any_pixels(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scores = ROADCombined(list(percentiles))(images, ranks.cpu().numpy(), goals, model)
    return np.asarray(scores, dtype=np.float32)
