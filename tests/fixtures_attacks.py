"""Tiny models and images that the attack and robustness tests share: an honest classifier, a linear
one with a known optimum, one that is wrong only on the way of an ascent, and a zoo of defenses that
must never pass as robust."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.attacks.base import ATTACKS

SIDE = 16


def blobs(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Four classes of faint discs of growing size in noise: uint8 (count, 1, 16, 16), labels
    (count,) and patients (count,), eight images of one class to a patient."""
    random = np.random.default_rng(seed)
    patients = np.arange(count) // 8
    labels = patients % 4
    rows, columns = np.mgrid[:SIDE, :SIDE]
    middle = SIDE / 2 + random.uniform(-1, 1, (2, count, 1, 1))
    radius = (2.0 + 1.5 * labels)[:, None, None]
    discs = ((rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 < radius**2) * 0.12
    images = (0.4 + discs + random.normal(0, 0.06, (count, SIDE, SIDE))).clip(0, 1)
    return (images * 255).round().astype(np.uint8)[:, None], labels.astype(np.int64), patients


def small_net(seed: int = 0) -> nn.Module:
    # A test that compares random states must not see these weights being drawn.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * 16, 4),
        )


@functools.cache
def trained_state(seed: int = 0) -> dict[str, Tensor]:
    images, labels, _ = blobs(512, seed=100 + seed)
    pixels, truth = torch.as_tensor(images).float() / 255, torch.as_tensor(labels)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = small_net(seed).train()
        optimizer = torch.optim.Adam(net.parameters(), 5e-3)
        for _ in range(120):
            part = torch.randint(len(pixels), (64,))
            optimizer.zero_grad()
            F.cross_entropy(net(pixels[part]), truth[part]).backward()
            optimizer.step()
    return net.state_dict()


def honest_model(seed: int = 0) -> nn.Module:
    """A small convolutional classifier of `blobs`, trained in a second, in eval mode."""
    net = small_net(seed)
    net.load_state_dict(trained_state(seed))
    return net.eval()


def linear_model(
    seed: int = 0, classes: int = 4, side: int = 8
) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear model, 12 mid-gray images far from the edges of [0, 1], and its answers."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(side * side, classes)
    with torch.no_grad():
        head.weight.copy_(torch.randn(classes, side * side, generator=generator))
        head.bias.copy_(0.1 * torch.randn(classes, generator=generator))
    model = nn.Sequential(nn.Flatten(), head).eval()
    images = 0.5 + 0.02 * torch.randn(12, 1, side, side, generator=generator)
    with torch.no_grad():
        return model, images, model(images).argmax(1)


def linear_optimum(model: nn.Module, images: Tensor, labels: Tensor, norm: str) -> Tensor:
    """Exact distance of each image to the nearest decision boundary (N,), in `linf` or `l2`."""
    weight, logits = model[-1].weight.detach(), model(images).detach()
    distances = torch.full_like(logits, torch.inf)
    for other in range(weight.shape[0]):
        gap = logits.gather(1, labels[:, None]).squeeze(1) - logits[:, other]
        steepness = (weight[labels] - weight[other]).norm(1 if norm == "linf" else 2, dim=1)
        distances[:, other] = torch.where(labels == other, torch.inf, gap / steepness)
    return distances.amin(1)


def within_oracle(attack: str, budget: dict, slack: float = 1.25) -> bool:
    """Whether a registered attack succeeds on every image of two linear models at `slack` times its
    exact distance."""
    for seed in range(2):
        model, images, labels = linear_model(seed)
        optimum = linear_optimum(model, images, labels, ATTACKS[attack].norm)
        for image, label, distance in zip(images[:, None], labels[:, None], optimum, strict=True):
            found = ATTACKS[attack](model, image, label, slack * float(distance), **budget)
            if model(found).argmax(1) == label:
                return False
    return True


class OnTheWay(nn.Module):
    """Wrong only in a thin shell of brightness that a long ascent passes through: an attack that
    returns its last iterate misses it. Its gradient always points outwards."""

    def forward(self, images: Tensor) -> Tensor:
        shift = (images.flatten(1).mean(1) - 0.5) * 255
        lead = torch.where((shift > 1.5) & (shift < 2.5), -1 - 0.1 * shift, 10 - 0.1 * shift)
        others = torch.zeros_like(lead)
        return torch.stack([lead, others, others - 5, others - 5], 1)


def last_iterate_only(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    """PGD that returns its last iterate, whether or not an earlier one succeeded."""
    import torchattacks

    attack = torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=10, random_start=False)
    return attack(images, labels)


# -- the zoo: defenses that are none ---------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model or honest_model()


class QuantizedInput(Wrapped):
    """Rounds its input to a few gray levels: the gradient is zero everywhere."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images * 12).round() / 12)


class ScaledLogits(Wrapped):
    """Multiplies its logits until softmax saturates in float32."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) * 1e4


class ZeroGradient(Wrapped):
    """Cuts the graph."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).detach() + 0 * images.sum()


class RandomResizing(Wrapped):
    """Resizes its input at random (Xie et al. 2018)."""

    def forward(self, images: Tensor) -> Tensor:
        size = int(torch.randint(SIDE - 4, SIDE + 1, ()))
        small = F.interpolate(images, size=(size, size), mode="bilinear")
        left, top = torch.randint(0, SIDE - size + 1, (2,)).tolist()
        return self.model(F.pad(small, (left, SIDE - size - left, top, SIDE - size - top)))


class ChangesItsMind(Wrapped):
    """Calls every image right once and every image wrong the next time."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__(model)
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.model(images).roll(self.calls % 2, dims=1)


class NonFiniteLogits(Wrapped):
    """Answers NaN to what looks attacked, so that every comparison with it is false."""

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        levels = (images * 255 - (images * 255).round()).abs().flatten(1).amax(1)
        return torch.where((levels > 1e-3)[:, None], torch.nan, logits)


class ChangesItsMode(Wrapped):
    """Switches itself to training mode whenever it is called."""

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        self.train()
        return logits


class ConstantAnswer(Wrapped):
    """Always answers Non, with a gradient."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) * 1e-3 + torch.tensor([10.0, 0.0, 0.0, 0.0])


class KnowsItsAttacker(Wrapped):
    """Answers otherwise as soon as a gradient is asked for."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model(
            images.flip(-1) * 0.5 if torch.is_grad_enabled() and images.requires_grad else images
        )


class DependsOnItsBatch(Wrapped):
    """Centers its input by the mean of the batch."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images - images.mean() + 0.45)


class Probabilities(Wrapped):
    """Returns probabilities instead of logits."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).softmax(1)


class MeanOfMembers(nn.Module):
    """Log of the members' mean probability, differentiable through each of them."""

    def __init__(self, *members: nn.Module) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        log_probabilities = torch.stack([member(images).log_softmax(1) for member in self.members])
        return log_probabilities.logsumexp(0) - np.log(len(self.members))


#: Each must be attacked successfully or flagged, never reported as robust.
ZOO = {
    "quantized input": QuantizedInput,
    "scaled logits": ScaledLogits,
    "zero gradient": ZeroGradient,
    "random resizing": RandomResizing,
    "changes its mind": ChangesItsMind,
    "non-finite logits": NonFiniteLogits,
    "changes its mode": ChangesItsMode,
    "constant answer": ConstantAnswer,
    "knows its attacker": KnowsItsAttacker,
}
