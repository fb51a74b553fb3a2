"""What training minimizes, and the two scores that say how well it went."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.attacks.training import perturb_for_training
from utils.config import RunConfig
from utils.model_state import frozen
from utils.utils_funcs import CLASSES

#: Makes the context in which a forward pass runs: `torch.autocast` for bfloat16, or nothing.
Autocast = Callable[[], contextlib.AbstractContextManager]


def class_weights(labels: Tensor) -> Tensor:
    """Weights (4,) by inverse class frequency, with mean 1 over the images of `labels` (N,).

    A class without images weighs 0. Give labels of the training set only.
    """
    counts = torch.bincount(labels, minlength=len(CLASSES)).float()
    present = counts > 0
    return torch.where(present, len(labels) / (present.sum() * counts.clamp(min=1)), 0.0)


def macro_cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """Mean over the classes present of their mean cross-entropy: a constant answer scores badly."""
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    return float(torch.stack([losses[labels == label].mean() for label in labels.unique()]).mean())


def balanced_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Mean over the classes present of the share of their images that is classified correctly."""
    correct = (logits.argmax(1) == labels).float()
    return float(torch.stack([correct[labels == label].mean() for label in labels.unique()]).mean())


def ordinal_targets(labels: Tensor, sharpness: float = 2.0) -> Tensor:
    """Soft labels (N, 4): the softmax of −sharpness·distance between clinical ratings.

    To call a Mild case Moderate then costs less than to call it Non (Díaz and Marathe 2019, "Soft
    labels for ordinal regression").
    """
    ratings = torch.arange(len(CLASSES), device=labels.device)
    return (-sharpness * (labels[:, None] - ratings).abs().float()).softmax(1)


def classification_loss(
    logits: Tensor, labels: Tensor, config: RunConfig, weights: Tensor | None, whole: Tensor
) -> Tensor:
    """The share of these images in the weighted mean loss of a batch.

    Summed over the processes that share a batch this is the batch's mean loss.

    Args:
        logits, labels: (n, 4) and (n,), this process's part of the batch.
        weights: (4,), of the classes; None weighs all images alike.
        whole: (N,), labels of the whole batch, which decide what the sum is divided by.
    """
    total = len(whole) if weights is None else weights[whole].sum()
    if config.loss == "ordinal":
        losses = F.cross_entropy(
            logits.float(),
            ordinal_targets(labels),
            label_smoothing=config.label_smoothing,
            reduction="none",
        )
        if weights is not None:
            losses = losses * weights[labels]
        return losses.sum() / total
    summed = F.cross_entropy(
        logits.float(),
        labels,
        weight=weights,
        label_smoothing=config.label_smoothing,
        reduction="sum",
    )
    return summed / total


def loss_of_batch(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: RunConfig,
    eps: float,
    weights: Tensor | None,
    autocast: Autocast,
    *,
    whole: Tensor | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss to minimize on one batch, and the logits that training accuracy is counted on.

    A model that is not trained adversarially, or eps 0, gives the loss of the clean images. The
    others are attacked by `config.method`:

    - `pgd`: `clean_weight`·clean + (1 − `clean_weight`)·adversarial (Madry et al. 2018,
      arXiv:1706.06083);
    - `fast`: the same with one step of size 1.25·eps (Wong et al. 2020, arXiv:2001.03994);
    - `trades`: clean + `trades_beta`·KL(clean, adversarial) (Zhang et al. 2019, arXiv:1901.08573).

    The attack sees the model in evaluation mode: it must not move BatchNorm's statistics, and
    whoever attacks the trained model meets it in this mode.

    Args:
        images: float32 (n, 1, H, W) in [0, 1]; labels: (n,).
        weights: (4,), of the classes, or None.
        whole: labels (N,) of the whole batch, where these images are one process's part of it.
        forward: what the gradient passes through (a distributed wrapper around `model`); the
            attack asks `model` itself.
    """
    whole = labels if whole is None else whole
    forward = forward or model

    def cross_entropy(logits: Tensor) -> Tensor:
        return classification_loss(logits, labels, config, weights, whole)

    if not config.adversarial or eps == 0:
        with autocast():
            logits = forward(images)
        return cross_entropy(logits), logits

    adversarial_images = training_attack(model, images, labels, config, eps, autocast)
    if config.method != "trades" and config.clean_weight == 0:
        with autocast():
            logits = forward(adversarial_images)
        return cross_entropy(logits), logits

    with autocast():
        # One forward pass over both halves: BatchNorm then sees the mixture, as at test time.
        clean, adversarial = forward(torch.cat([images, adversarial_images])).chunk(2)
    if config.method == "trades":
        divergence = F.kl_div(
            F.log_softmax(adversarial.float(), 1),
            F.log_softmax(clean.float(), 1),
            log_target=True,
            reduction="sum",
        )
        loss = cross_entropy(clean) + config.trades_beta * divergence / len(whole)
    else:
        loss = config.clean_weight * cross_entropy(clean) + (
            1 - config.clean_weight
        ) * cross_entropy(adversarial)
    return loss, adversarial


def training_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: RunConfig,
    eps: float,
    autocast: Autocast,
) -> Tensor:
    """Adversarial images (n, 1, H, W) of one training step, by `config.method`."""
    single_step = config.method == "fast"
    steps = 1 if single_step else config.train_steps
    step_size = 1.25 * eps if single_step else None
    loss: Literal["kl", "ce"] = "kl" if config.method == "trades" else "ce"
    with frozen(model), autocast():
        return perturb_for_training(
            model, images, labels, eps, steps=steps, step_size=step_size, loss=loss
        )
