"""Images whose evidence is known, models that learned it, and how much of a map lies on it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import grad_cam
from utils.backbones import PixelClassifier, build_model
from utils.prediction import predict

#: Side of the training images in px. The patch is half as wide, a quarter of the area, and lies on
#: the 32 px grid of the cells of a ResNet or EfficientNet.
SIDE = 256
#: The side at which EfficientNet must keep `LIMIT`: 16 × 16 cells (ResNet keeps it at `SIDE`). A
#: cell next to the patch sees into it and also names the class by itself, so evidence *is* there,
#: and a coarse grid is mostly border: 0.56 of EfficientNet's maps lie in a patch of 4 × 4 cells,
#: 0.75 in one of 8 × 8 (`assets/planted_evidence.json`).
EXPLAINED_SIDE = 512
#: The least share of a map that must lie in the patch.
LIMIT = 0.7
#: What each backbone takes to learn the task from random weights in one pass over fresh images.
#: `whole` learns everything from the class. `tokens first` is nearer to how DINOv2 is made:
#: on so many more images, patch tokens learn what lies under them; then the last block starts anew
#: and learns the class with the head. DINOv2's stripes lie on plain gray, not in noise.
BUDGETS: dict[tuple[str, str], dict] = {
    ("Resnet", "whole"): {
        "count": 960,
        "lr": 1e-3,
        "half": True,
        "noise": True,
        "input_size": None,
    },
    ("Efficientnet", "whole"): {
        "count": 1600,
        "lr": 2e-3,
        "half": False,
        "noise": True,
        "input_size": None,
    },
    ("Dinov2", "whole"): {
        "count": 1280,
        "lr": 3e-4,
        "half": False,
        "noise": False,
        "input_size": 112,
    },  # 8 × 8 tokens
    ("Dinov2", "tokens first"): {
        "count": 640,
        "lr": 1e-4,
        "half": True,
        "noise": False,
        "input_size": 112,
        "tokens": 1920,
        "token_lr": 6e-4,
    },
}


def stripes_in_patch(
    count: int, seed: int, *, side: int = SIDE, noise: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Images whose class is the orientation of the stripes in a patch. The stripes fade in toward
    the middle of the patch; around it is noise of their own frequency, or plain gray.

    The patch lies anywhere on the grid, because a network that can know its place by the image's
    border spreads its evidence at no cost. It has no edge, because an edge is evidence and reaches
    into every cell next to it.

    Returns:
        (images (N, 1, side, side) in [0, 1], labels (N,), patch bool (N, side, side)).
    """
    images, labels, share = _stripes(count, seed, side, noise)
    return images, labels, share > 0


def stripes_by_token(
    count: int, seed: int, *, side: int = SIDE, noise: bool = True, cells: int = 8, part: int = 640
) -> tuple[Tensor, Tensor]:
    """Images, and what lies under each of cells × cells tokens (N, cells, cells): the class of its
    stripes, or 4 where they are too faint to be read (the patch's four corners) or absent.

    Args:
        part: images drawn at once, which bounds the memory.
    """
    images, targets = [], []
    for start in range(0, count, part):
        some, labels, share = _stripes(
            min(part, count - start), 1000 * (1 + seed) + start // part, side, noise
        )
        seen = F.adaptive_avg_pool2d(share[:, None], cells)[:, 0] > 0.3
        images.append(some)
        targets.append(torch.where(seen, labels[:, None, None], 4))
    return torch.cat(images), torch.cat(targets)


def _stripes(count: int, seed: int, side: int, noise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels, and the share of stripes in every pixel (N, side, side): 0 outside the patch
    and nowhere else."""
    generator = torch.Generator().manual_seed(seed)
    labels, half = torch.arange(count) % 4, side // 2
    y, x = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
    angle = (labels * np.pi / 4)[:, None, None]
    phase = 2 * np.pi * torch.rand(count, 1, 1, generator=generator)
    stripes = 2**0.5 * torch.sin(
        2 * np.pi / 12 * (torch.cos(angle) * x + torch.sin(angle) * y) + phase
    )
    fade = torch.sin(np.pi * (torch.arange(half) + 0.5) / half)
    share = torch.zeros(count, side, side)
    around = _noise(count, side, generator) if noise else torch.zeros(1)
    for i, (top, left) in enumerate(
        (32 * torch.randint(half // 32 + 1, (count, 2), generator=generator)).tolist()
    ):
        share[i, top : top + half, left : left + half] = fade[:, None] * fade
    images = 0.5 + 0.2 * (share * stripes + (1 - share**2).sqrt() * around)
    return images.clamp(0, 1)[:, None], labels, share


def _noise(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Unit noise (N, side, side) in a ring of frequencies around the stripes'."""
    frequency = torch.fft.fftfreq(side)
    ring = torch.exp(
        -(((12 * (frequency[:, None] ** 2 + frequency**2).sqrt() - 1) / 0.15) ** 2) / 2
    )
    noise = torch.fft.ifft2(
        torch.fft.fft2(torch.randn(count, side, side, generator=generator)) * ring
    ).real
    return noise / noise.std(dim=(1, 2), keepdim=True)


def fit(
    model: nn.Module,
    *,
    count: int,
    epochs: int,
    lr: float,
    phantom: Callable,
    batch: int = 32,
    half: bool = False,
) -> nn.Module:
    """The model after `epochs` passes over `count` phantom images (AdamW, one-cycle learning rate),
    in eval mode.

    Args:
        phantom: (count, seed=) → images and targets first.
        half: bfloat16 autocast.
    """
    images, labels = phantom(count, seed=0)[:2]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=epochs * (count // batch)
    )
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(count)[: count // batch * batch].split(batch):
            optimizer.zero_grad()
            # A context for each step: until it is left, it keeps cast copies of the weights.
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                loss = F.cross_entropy(model(images[rows]).float(), labels[rows])
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


class TokenReader(nn.Module):
    """Five logits for each patch token of a DINOv2 (N, 5, h, w): one linear layer on its last
    tokens."""

    def __init__(self, model: PixelClassifier) -> None:
        super().__init__()
        self.model, self.head = model, nn.Linear(model.body.backbone.config.hidden_size, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.model.body.backbone(
            pixel_values=self.model.pixels_to_input(images)
        ).last_hidden_state
        return grad_cam.map_from_tokens(self.model)(self.head(tokens))


def trained_backbone(name: str, training: str = "whole") -> PixelClassifier:
    """A backbone that learned the stripes from random weights, as `BUDGETS` says."""
    budget = BUDGETS[name, training]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(name, pretrained=False, input_size=budget["input_size"])
        if training == "tokens first":
            last = model.body.backbone.encoder.layer[-1]
            fresh = copy.deepcopy(last.state_dict())
            fit(
                TokenReader(model),
                count=budget["tokens"],
                epochs=1,
                lr=budget["token_lr"],
                batch=8,
                half=budget["half"],
                phantom=partial(stripes_by_token, noise=budget["noise"]),
            )
            last.load_state_dict(fresh)
            model.requires_grad_(False)
            last.requires_grad_(True)
            model.body.head.requires_grad_(True)
        fit(
            model,
            count=budget["count"],
            epochs=1,
            lr=budget["lr"],
            batch=8,
            half=budget["half"],
            phantom=partial(stripes_in_patch, noise=budget["noise"]),
        )
        return model.requires_grad_(True)


def inside(
    model: nn.Module, images: Tensor, labels: Tensor, patch: Tensor, method: str
) -> np.ndarray:
    """Share of each map that lies inside the patch, (N,); NaN for a map that is all zero."""
    maps = grad_cam.explain(model, images, labels, method=method, batch_size=8)
    return grad_cam.anatomy_shares(maps, {"patch": patch})["patch"]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images (N, 1, H, W) whose class is predicted right."""
    return float((predict(model, images, batch_size=8).argmax(1) == labels).float().mean())
