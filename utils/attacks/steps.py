"""One step of a gradient attack: what it ascends, in which direction, within which ball."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from utils.attacks.base import (
    Loss,
    Norm,
    count_classes,
    image_axes,
    margin,
    succeeded,
    unsaturated_cross_entropy,
)

# -- what is ascended ------------------------------------------------------------------------------


def attack_objective(logits: Tensor, labels: Tensor, targets: Tensor | None, loss: Loss) -> Tensor:
    """What an attack ascends (N,): away from the labels, or towards `targets`."""
    if targets is None:
        if loss == "margin":
            return -margin(logits, labels)
        return unsaturated_cross_entropy(logits, labels)
    if loss == "margin":
        # The two classes alone: the same direction whichever third class is ahead.
        return (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)
    return -unsaturated_cross_entropy(logits, targets)


def pixel_gradient(
    model: nn.Module, images: Tensor, objective: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradient of the summed objective of the logits with respect to the pixels (N, C, H, W), and
    the logits (N, classes). A gradient that is not finite counts as 0."""
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        logits = model(images)
        gradient = gradient_or_zero(objective(logits.float()).sum(), images)
    return gradient, logits.detach().float()


def gradient_or_zero(value: Tensor, images: Tensor, *, keep_graph: bool = False) -> Tensor:
    """Gradient of a number with respect to `images`, detached; 0 where it is not finite, and
    everywhere if the number does not depend on them: the evaluation then reports it as missing."""
    gradient = None
    if value.requires_grad:
        gradient = torch.autograd.grad(value, images, retain_graph=keep_graph, allow_unused=True)[0]
    if gradient is None:
        return torch.zeros_like(images).detach()
    return gradient.nan_to_num(0.0, 0.0, 0.0).detach()


# -- directions and the eps ball -------------------------------------------------------------------


def steepest_ascent(gradient: Tensor, norm: Norm) -> Tensor:
    """The direction in the norm's unit ball in which the objective rises most."""
    if norm == "linf":
        return gradient.sign()
    return gradient / image_axes(gradient.flatten(1).norm(dim=1).clamp_min(1e-20))


def project(adversarial: Tensor, images: Tensor, eps: float, norm: Norm) -> Tensor:
    """Into the eps ball around `images`, then into [0, 1], which does not leave the ball."""
    if norm == "linf":
        adversarial = torch.minimum(torch.maximum(adversarial, images - eps), images + eps)
    else:
        delta = adversarial - images
        length = delta.flatten(1).norm(dim=1).clamp_min(1e-12)
        adversarial = images + delta * image_axes((eps / length).clamp_max(1.0))
    return adversarial.clamp(0.0, 1.0)


def start_at_random(images: Tensor, eps: float, norm: Norm, seed: int) -> Tensor:
    """A random point of the eps ball around each image.

    Drawn on the CPU from a new generator: the same on every device, and no global random state
    changes.
    """
    generator = torch.Generator().manual_seed(seed)
    if norm == "linf":
        noise = torch.empty(images.shape).uniform_(-eps, eps, generator=generator)
    else:
        noise = torch.empty(images.shape).normal_(generator=generator)
        radius = eps * torch.rand(len(images), generator=generator)
        noise *= image_axes(radius / noise.flatten(1).norm(dim=1))
    return (images + noise.to(images)).clamp(0.0, 1.0)


def noise_where_unchanged(
    adversarial: Tensor, model: nn.Module, images: Tensor, labels: Tensor, eps: float, seed: int
) -> Tensor:
    """`adversarial`, but a random point of the L-infinity ball in place of each image that came
    back unchanged though the model classifies it correctly.

    The code of other packages returns the clean image where it found nothing. With those replaced,
    an image that comes back unchanged from any attack means that the attack did not run.
    """
    unchanged = (adversarial == images).flatten(1).all(1)
    nothing_found = unchanged & ~succeeded(model, images, labels)[1]
    at_random = start_at_random(images, eps, "linf", seed)
    return torch.where(image_axes(nothing_found), at_random, adversarial)


# -- which class to ascend towards -----------------------------------------------------------------


def nearest_classes(
    model: nn.Module, images: Tensor, labels: Tensor, norm: Norm = "linf"
) -> tuple[Tensor, Tensor]:
    """Every class but the label, the nearest first, `int64` (N, C − 1), and the logits (N, C).

    Nearest in pixels, not in logits: the gap divided by its gradient's dual norm, which is the
    distance to that class's boundary if the model were linear (Moosavi-Dezfooli et al. 2016,
    arXiv:1511.04599).
    """
    if count_classes(model, images) == 2:
        with torch.no_grad():
            return (1 - labels)[:, None], model(images).float()
    classes, gaps, slopes, logits = class_gaps(model, images, labels)
    steepness = slopes.flatten(2).norm(1 if norm == "linf" else 2, dim=2).clamp_min(1e-12)
    return classes.gather(1, (gaps / steepness).nan_to_num(torch.inf).argsort(1)), logits


def class_gaps(
    model: nn.Module, images: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How far the label's logit is ahead of each other class.

    Returns:
        The other classes, the likeliest first, `int64` (N, C − 1); the gaps to their logits
        (N, C − 1); the gaps' pixel gradients (N, C − 1, 1, H, W); and the logits (N, C).
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        logits = model(images).float()
        others = logits.detach().scatter(1, labels[:, None], -torch.inf)
        classes = others.argsort(1, descending=True)[:, :-1]
        gaps = logits.gather(1, labels[:, None]) - logits.gather(1, classes)
        slopes = [gradient_or_zero(gap.sum(), images, keep_graph=True) for gap in gaps.unbind(1)]
    return classes, gaps.detach(), torch.stack(slopes, 1), logits.detach()
