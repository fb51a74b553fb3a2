"""How good a model is on validation images, clean and attacked, and which epoch was the best."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn

from utils.attacks.training import perturb_for_training
from utils.config import RunConfig
from utils.data import ImageSet, every_nth, pixels
from utils.prediction import predict
from utils.training.losses import Autocast, balanced_accuracy, macro_cross_entropy
from utils.training.processes import Team

#: PGD steps of the adversarial validation score: more than training uses, so that it can notice a
#: masked gradient.
VALIDATION_STEPS = 5


def attacked_logits(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    device: torch.device | str,
    *,
    steps: int,
    step_size: float | None = None,
    autocast: Autocast = contextlib.nullcontext,
    batch_size: int = 64,
) -> Tensor:
    """Float32 logits (N, 4) on the CPU for images that PGD attacked.

    PGD starts at the clean image. It searches under `autocast`, but the logits are always computed
    in float32.

    Args:
        model: in evaluation mode.
        images: uint8 (N, 1, H, W); labels: (N,).
    """
    rows = []
    for chunk, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        with autocast():
            adversarial = perturb_for_training(
                model,
                pixels(chunk, device),
                truth.to(device),
                eps,
                steps=steps,
                step_size=step_size,
                random_start=False,
            )
        with torch.no_grad():
            rows.append(model(adversarial).float().cpu())
    return torch.cat(rows)


def validate(
    model: nn.Module,
    part: ImageSet,
    config: RunConfig,
    device: torch.device,
    team: Team | None = None,
    autocast: Autocast = contextlib.nullcontext,
) -> dict[str, float]:
    """Validation scores of a model in evaluation mode.

    `score`, lower is better, is the macro-averaged cross-entropy. That of an adversarially trained
    model is taken under PGD at the full `train_eps`, on every `slice_stride`-th slice of each
    patient. Several processes take each image exactly once.
    """
    team = team or Team(device)
    logits = team.gather(predict(model, part.images[team.share], device), len(part))
    scores = {
        "validation_loss": macro_cross_entropy(logits, part.labels),
        "validation_accuracy": float((logits.argmax(1) == part.labels).float().mean()),
        "validation_balanced_accuracy": balanced_accuracy(logits, part.labels),
        "validation_classes": len(logits.argmax(1).unique()),
        "validation_images": len(logits),
    }
    scores["score"] = scores["validation_loss"]
    if config.adversarial:
        few = part.pick(every_nth(part, config.slice_stride))
        attacked = attacked_logits(
            model,
            few.images[team.share],
            few.labels[team.share],
            config.train_eps,
            device,
            steps=VALIDATION_STEPS,
            autocast=autocast,
        )
        attacked = team.gather(attacked, len(few))
        loss = macro_cross_entropy(attacked, few.labels)
        scores["adversarial_validation_loss"] = scores["score"] = loss
        scores["adversarial_validation_balanced_accuracy"] = balanced_accuracy(attacked, few.labels)
    return scores


def best_epoch(history: list[dict]) -> tuple[int, bool]:
    """The number of the epoch with the lowest score, and whether no epoch can be called best.

    An epoch that answers a single class, whose score is not finite, or in which single-step
    training collapsed is never the best. Where all epochs are such, the last one is taken.
    """
    eligible = [
        epoch
        for epoch in history
        if epoch["validation_classes"] > 1
        and math.isfinite(epoch["score"])
        and not epoch.get("collapsed")
    ]
    if not eligible:
        return history[-1]["epoch"], True
    return min(eligible, key=lambda epoch: epoch["score"])["epoch"], False


def epoch_to_keep(history: list[dict], config: RunConfig) -> tuple[int, bool]:
    """The number of the epoch whose weights are the model, and whether it stands in for a best one
    that there is not."""
    if config.kept_epoch == "last":
        return history[-1]["epoch"], False
    return best_epoch(history)
