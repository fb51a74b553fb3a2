"""A linear model on block means whose robust accuracy under L-infinity is exact."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import metrics
from utils.attacks.base import group_labels
from utils.class_groups import Groups
from utils.controls.images import block_means

# -- four logits from three ------------------------------------------------------------------------


def moderate_share(labels: np.ndarray) -> float:
    """The share of Moderate among Mild and Moderate training slices, kept below one half: all that
    a three-class model knows of the two. Moderate is two patients."""
    late = labels[labels >= 2]
    return float(np.clip((late == 3).mean() if len(late) else 0.0, 1e-4, 0.49))


def four_logits(three: np.ndarray, share: float) -> np.ndarray:
    """Logits (N, 4) of a three-class model (N, 3). Mild and Moderate differ by a constant and add
    up to their sum, so merging them again gives exactly the three-class probabilities."""
    return np.column_stack(
        [three[:, :2], three[:, 2] + np.log(1 - share), three[:, 2] + np.log(share)]
    )


class PooledLinear(nn.Module):
    """Block means, one linear layer over three classes, four logits: float32 pixels (N, 1, H, W) in
    [0, 1] → (N, 4).

    Args:
        weight: (3, side·side); bias: (3,).
        share: of Moderate in the merged class (`moderate_share`).
    """

    def __init__(self, weight: Tensor, bias: Tensor, share: float) -> None:
        super().__init__()
        self.side = round(weight.shape[1] ** 0.5)
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        split = [0.0, 0.0, np.log(1 - share), np.log(share)]
        self.split: Tensor
        self.register_buffer("split", torch.tensor(split, dtype=weight.dtype))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 4)."""
        three = F.adaptive_avg_pool2d(images, self.side).flatten(1) @ self.weight.T + self.bias
        return three[:, [0, 1, 2, 2]] + self.split


# -- training on the exact worst case --------------------------------------------------------------


def slack(images: np.ndarray, eps: float, side: int) -> tuple[Tensor, Tensor]:
    """By how much each block mean of uint8 images (N, H, W) can be lowered and raised by pixels
    that move at most eps and stay in [0, 1]: two (N, side·side)."""
    lower, upper = [], []
    for part in torch.from_numpy(np.ascontiguousarray(images))[:, None].split(1024):
        pixels = part.float() / 255
        lower.append(F.adaptive_avg_pool2d(pixels.clamp(max=eps), side).flatten(1))
        upper.append(F.adaptive_avg_pool2d((1 - pixels).clamp(max=eps), side).flatten(1))
    return torch.cat(lower), torch.cat(upper)


def worst_logits(
    weight: Tensor, bias: Tensor, means: Tensor, lower: Tensor, upper: Tensor, labels: Tensor
) -> Tensor:
    """Logits (N, 3) of each other class at the image that serves it best against the label, the
    label's logit at 0.

    For an attacker who wants class k instead of y, the best image moves every block against the
    sign of w_y − w_k as far as it can go: the margin shrinks by the L1 norm of w_y − w_k, weighted
    with the slack. Each class is reached by an image of its own; a decision is robust where every
    other logit stays below 0.

    Args:
        weight: (3, D); bias: (3,); means: block means (N, D); lower, upper: their `slack`.
        labels: int64 (N,) in 0..2.
    """
    classes = len(weight)
    logits = means @ weight.T + bias
    difference = (weight[:, None] - weight[None]).flatten(0, 1)
    # For every pair of classes at once: each block is read once, and no row is copied.
    drop = lower @ difference.clamp_min(0).T + upper @ (-difference).clamp_min(0).T
    label = labels[:, None]
    from_label = label[..., None].expand(-1, 1, classes)
    drop_of_label = drop.view(-1, classes, classes).gather(1, from_label).squeeze(1)
    return logits - logits.gather(1, label) + drop_of_label


def fit_robust_linear(
    images: np.ndarray,
    labels: np.ndarray,
    eps: float,
    *,
    side: int = 32,
    weight_decay: float = 1e-3,
    steps: int = 200,
    lr: float = 0.05,
) -> PooledLinear:
    """Multinomial regression over three classes trained on its exact worst case at eps: full-batch
    Adam on the class-balanced cross-entropy of `worst_logits`. With eps 0 it is ordinary
    regression.

    Args:
        images: uint8 (N, H, W); labels: (N,) in 0..3.
        eps: L-infinity, in units of the [0, 1] pixel range.
    """
    three = torch.from_numpy(metrics.THREE[labels])
    means = torch.from_numpy(block_means(images, side))
    lower, upper = slack(images, eps, side)
    center = means.mean(0)
    centered = means - center
    counts = torch.bincount(three, minlength=3).clamp_min(1)
    balance = len(three) / (3 * counts.float())
    weight = torch.zeros(3, means.shape[1], requires_grad=True)
    bias = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = worst_logits(weight, bias, centered, lower, upper, three)
        loss = F.cross_entropy(logits, three, weight=balance) + weight_decay * weight.square().sum()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return PooledLinear(weight, bias - weight @ center, moderate_share(labels)).eval()


# -- the exact worst case --------------------------------------------------------------------------


def affine_map(
    model: nn.Module, shape: Sequence[int], groups: Groups | None = None
) -> tuple[Tensor, Tensor]:
    """Weights (C, H·W) and biases (C,) of a model that is affine in its pixels, in float64, from
    its gradient. With `groups`, those of the log-probabilities that the classes of a group add up
    to, but for a term that all groups share.

    Args:
        shape: height and width of an image.

    Raises:
        ValueError: classes of a group differ by more than a constant, so that their sum is not
            affine.
    """
    double = copy.deepcopy(model).double()
    zero = torch.zeros(1, 1, *shape, dtype=torch.float64)
    weights = torch.autograd.functional.jacobian(lambda image: double(image)[0], zero)
    bias = double(zero)[0].detach()
    weights = weights.reshape(len(bias), -1)
    if groups is None:
        return weights, bias
    for group in groups:
        if (weights[list(group)] - weights[group[0]]).abs().max() > 1e-9:
            raise ValueError(
                f"classes {group} differ by more than a constant: "
                "their merged probability is not affine"
            )
    bias = torch.stack([bias[list(group)].logsumexp(0) for group in groups])
    return weights[[group[0] for group in groups]], bias


def exact_worst_images(
    model: nn.Module, pixels: Tensor, labels: Tensor, eps: float, groups: Groups | None = None
) -> Tensor:
    """For a model that is affine in its pixels, the image within eps and [0, 1] at which the
    label's logit leads the others by least: float32 (N, 1, H, W). Where the model is right there,
    no image of the ball changes its answer.

    A class that differs from the label's by a constant alone (Mild and Moderate of `PooledLinear`)
    cannot be reached by moving pixels and is not aimed at.

    Args:
        pixels: float32 (N, 1, H, W) in [0, 1]; labels: int64 (N,).
        groups: merged classes whose decision is attacked, as in `affine_map`; None attacks the
            decision among the classes themselves.
    """
    weights, bias = affine_map(model, pixels.shape[-2:], groups)
    truth = labels if groups is None else group_labels(labels, groups)
    flat, worst = pixels.flatten(1).double(), pixels.clone()
    for label in truth.unique().tolist():
        difference = weights[label] - weights
        reachable = (difference.abs().sum(1) > 1e-12).nonzero().squeeze(1)
        for rows in (truth == label).nonzero().squeeze(1).split(512):
            images = flat[rows]
            lowered = images.clamp(max=eps) @ difference.clamp_min(0).T
            raised = (1 - images).clamp(max=eps) @ (-difference).clamp_min(0).T
            margin = images @ difference.T + (bias[label] - bias) - lowered - raised
            aim = difference[reachable[margin[:, reachable].argmin(1)]]
            moved = (images - eps * aim.sign()).clamp(0, 1)
            worst[rows] = moved.float().view_as(worst[rows])
    return worst
