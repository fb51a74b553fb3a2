"""Images whose evidence is known, models that learned it, and how much of a map lies on it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import grad_cam
from utils.backbones import PixelClassifier, build_model

#: Side of the training images in px; the patch is half as wide, a quarter of the area, and lies on the 32 px grid of a
#: ResNet's or EfficientNet's cells.
SIDE = 256
#: The side at which EfficientNet is held to `LIMIT`: 16 × 16 cells (ResNet keeps it at `SIDE`). A cell next to the patch sees
#: into it and also names the class by itself, so evidence *is* there, and a coarse grid is mostly border: 0.56 of
#: EfficientNet's maps lie in a patch of 4 × 4 cells, 0.75 in one of 8 × 8 (`assets/planted_evidence.json`).
EXPLAINED_SIDE = 512
LIMIT = 0.7
#: What each backbone takes to learn the task from random weights in one pass over fresh images. DINOv2's stripes lie on plain
#: grey, not in noise.
BUDGETS: dict[str, dict] = {
    "Resnet": dict(count=960, lr=1e-3, half=True, noise=True, input_size=None),
    "Efficientnet": dict(count=1600, lr=2e-3, half=False, noise=True, input_size=None),
    "Dinov2": dict(count=1280, lr=3e-4, half=False, noise=False, input_size=112)}  # 8 × 8 tokens


def stripes_in_patch(count: int, seed: int, *, side: int = SIDE, noise: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 1, side, side) in [0, 1], labels (N,) and the patch (N, side, side): stripes that fade in towards the
    middle of a patch anywhere on the grid, and whose orientation is the class; around it noise of the stripes' own frequency
    or plain grey.

    The patch moves, because a network that may know its place by the image's border spreads its evidence at no cost; it
    has no edge, because an edge is evidence and reaches into every cell beside it.
    """
    generator = torch.Generator().manual_seed(seed)
    labels, half = torch.arange(count) % 4, side // 2
    y, x = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
    angle = (labels * np.pi / 4)[:, None, None]
    phase = 2 * np.pi * torch.rand(count, 1, 1, generator=generator)
    stripes = 2**0.5 * torch.sin(2 * np.pi / 12 * (torch.cos(angle) * x + torch.sin(angle) * y) + phase)
    fade = torch.sin(np.pi * (torch.arange(half) + 0.5) / half)
    share, patch = torch.zeros(count, side, side), torch.zeros(count, side, side, dtype=torch.bool)
    around = _noise(count, side, generator) if noise else torch.zeros(1)
    for i, (top, left) in enumerate((32 * torch.randint(half // 32 + 1, (count, 2), generator=generator)).tolist()):
        share[i, top:top + half, left:left + half] = fade[:, None] * fade
        patch[i, top:top + half, left:left + half] = True
    images = 0.5 + 0.2 * (share * stripes + (1 - share**2).sqrt() * around)
    return images.clamp(0, 1)[:, None], labels, patch


def _noise(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Unit noise (N, side, side) in a ring of frequencies around the stripes'."""
    frequency = torch.fft.fftfreq(side)
    ring = torch.exp(-((12 * (frequency[:, None]**2 + frequency**2).sqrt() - 1) / 0.15)**2 / 2)
    noise = torch.fft.ifft2(torch.fft.fft2(torch.randn(count, side, side, generator=generator)) * ring).real
    return noise / noise.std(dim=(1, 2), keepdim=True)


def fit(model: nn.Module, *, count: int, epochs: int, lr: float, phantom: Callable, batch: int = 32, half: bool = False) -> nn.Module:
    """The model after `epochs` passes over `count` phantom images (AdamW, one-cycle), in eval mode."""
    images, labels = phantom(count, seed=0)[:2]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * (count // batch))
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(count)[: count // batch * batch].split(batch):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):  # a step each: it keeps cast weights until it is left
                loss = F.cross_entropy(model(images[rows]).float(), labels[rows])
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def trained_backbone(name: str) -> PixelClassifier:
    """A backbone that learned the stripes from random weights, as `BUDGETS` says."""
    budget = BUDGETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(name, pretrained=False, input_size=budget["input_size"])
        return fit(model, count=budget["count"], epochs=1, lr=budget["lr"], batch=8, half=budget["half"],
                   phantom=lambda count, seed: stripes_in_patch(count, seed, noise=budget["noise"]))


def energy(model: nn.Module, images: Tensor, labels: Tensor, patch: Tensor, method: str) -> float:
    """Mean share of a map that lies inside the patch, over the images whose map is not all zero."""
    maps = grad_cam.explain(model, images, labels, method=method, batch_size=8)
    return float(np.nanmean(grad_cam.anatomy_shares(maps, {"patch": patch})["patch"]))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((grad_cam._predict(model, images, 8).argmax(1) == labels).float().mean())
