"""An attack on the map: the prediction stays, the explanation moves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.backbones import DinoClassifier
from utils.explain.cells import target_layer, upsampler
from utils.explain.similarity import top_pixels
from utils.explain.tokens import above_mean, eager_attention, map_from_tokens
from utils.model_state import frozen


def explanation_attack(
    model: nn.Module,
    images: Tensor,
    eps: float,
    *,
    steps: int = 40,
    shift: float = 0.1,
    batch_size: int = 64,
    seed: int = 0,
) -> Tensor:
    """Imperceptible changes that keep the prediction and move the Grad-CAM map away from where it
    lay: the top-k attack of Ghorbani et al. (2019, arXiv:1710.10547), with the output held as in
    Dombrowski et al. (2019, arXiv:1906.07983).

    Signed-gradient descent in the L-infinity ball, on the share of the map in its former top 20%
    plus the divergence of the prediction. Of all iterates that keep the class, and its probability
    within `shift`, the one with the smallest share is returned; the clean image is the first of
    them. The softplus of Dombrowski et al. is not needed: no ReLU lies between `target_layer` and
    the logits, so the map's gradient does not vanish.

    Args:
        images: float32 (N, 1, H, W) in [0, 1].
        eps: radius of the ball, in units of the [0, 1] pixel range.
        shift: how far the probability of the predicted class may move.

    Returns:
        float32 (N, 1, H, W) in [0, 1], within `eps` of `images`.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = (2 * torch.rand(images.shape, generator=generator) - 1).to(images.device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for module in model.modules():
            if isinstance(module, DinoClassifier):
                stack.enter_context(eager_attention(module))
        upsample = upsampler(model, target_layer(model), images[:1].detach().clone())
        parts = [
            _move_maps(model, batch.detach().clone(), start, eps, steps, shift, upsample)
            for batch, start in zip(images.split(batch_size), noise.split(batch_size), strict=True)
        ]
    return torch.cat(parts)


def _move_maps(
    model: nn.Module,
    images: Tensor,
    noise: Tensor,
    eps: float,
    steps: int,
    shift: float,
    upsample: Callable[[Tensor], Tensor],
) -> Tensor:
    """The attack on one batch; `noise` in [-1, 1] gives the start, within a tenth of eps."""
    logits, cam = cam_graph(model, images, None, upsample)
    targets, clean = logits.argmax(1), logits.softmax(1).detach()
    top = top_pixels(cam.detach(), 0)
    best, least = images.clone(), mass_in_region(cam.detach(), top)
    moved = (images + 0.1 * eps * noise).clamp(0, 1)
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        logits, cam = cam_graph(model, moved, targets, upsample)
        share, probability = mass_in_region(cam, top), logits.softmax(1)
        with torch.no_grad():
            change = (probability - clean).gather(1, targets[:, None])[:, 0].abs()
            better = (logits.argmax(1) == targets) & (change <= shift) & (share < least)
            best[better], least[better] = moved[better], share[better]
        divergence = F.kl_div(logits.log_softmax(1), clean, reduction="none").sum(1)
        (gradient,) = torch.autograd.grad((share + divergence).sum(), moved)
        step = moved.detach() - 2.5 * eps / steps * gradient.sign()
        moved = (images + (step - images).clamp(-eps, eps)).clamp(0, 1)
    return best.detach()


def cam_graph(
    model: nn.Module, images: Tensor, targets: Tensor | None, upsample: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Grad-CAM that can be differentiated with respect to the pixels, which the `grad-cam` package
    does not offer.

    Args:
        images: (N, 1, H, W); targets: int64 (N,), None takes the predicted classes.
        upsample: as made by `upsampler`.

    Returns:
        (logits (N, classes), maps (N, H, W) before scaling).
    """
    kept: list[Tensor] = []
    if not images.requires_grad:
        images = images.detach().requires_grad_()
    hook = target_layer(model).register_forward_hook(
        lambda _module, _inputs, output: kept.append(output)
    )
    try:
        logits = model(images)
    finally:
        hook.remove()
    (features,) = kept
    targets = logits.argmax(1) if targets is None else targets
    score = logits.gather(1, targets[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, features, create_graph=True)
    if reshape := map_from_tokens(model):
        features, gradient = above_mean(reshape(features)), reshape(gradient)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    return logits, upsample(F.relu((weights * features).sum(dim=1)))


def mass_in_region(cam: Tensor, region: Tensor) -> Tensor:
    """Share of each map's mass in its region, (N,); 0 for a map of zeros. Differentiable.

    Args:
        cam: non-negative maps (N, H, W); region: bool (N, H, W).
    """
    mass = cam.sum(dim=(1, 2)).clamp_min(torch.finfo(cam.dtype).tiny)
    return (cam * region).sum(dim=(1, 2)) / mass
