"""Models as people have them, for images whose class is a bright quarter (`write_quarters`)."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

FOUR = ("Non_Demented", "Very_Mild_Demented", "Mild_Demented", "Moderate_Demented")


def write_quarters(root: Path, each: int = 6, splits: tuple[str, ...] = ("",)) -> Path:
    """Images of 32 px: of class k the k-th quarter is brighter."""
    noise = np.random.default_rng(0)
    for label, name in enumerate(FOUR):
        for number in range(each):
            image = noise.integers(50, 80, (32, 32)).astype(np.uint8)
            top, left = 16 * (label // 2), 16 * (label % 2)
            image[top : top + 16, left : left + 16] += 25
            path = root / splits[number % len(splits)] / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root


class Quarters(nn.Module):
    """Reads the class without any training: the mean of each quarter, scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(60.0))

    def forward(self, images: Tensor) -> Tensor:
        means = nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 2)
        return self.scale * (means.flatten(1) - 0.25)


class Changed(Quarters):
    """The same with its answer changed."""

    change = staticmethod(lambda logits: logits)

    def forward(self, images: Tensor) -> object:
        return self.change(super().forward(images))


def changed(change) -> nn.Module:
    model = Changed()
    model.change = change
    return model


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Strict(Quarters):
    """Takes three channels of one size alone, normalized by 0.5."""

    def forward(self, images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != (3, 64, 64):
            raise ValueError(f"expected 3x64x64, got {tuple(images.shape[1:])}")
        return super().forward(images * 0.5 + 0.5)


class Detached(Quarters):
    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(images)


right = Quarters
strict = Strict
detached = Detached


def alphabetical() -> nn.Module:
    return changed(lambda logits: logits[:, [2, 3, 0, 1]])


def reversed_order() -> nn.Module:
    return changed(lambda logits: logits.flip(1))


def softmax() -> nn.Module:
    return changed(lambda logits: logits.softmax(1))


def softmax_in_half() -> nn.Module:
    return changed(lambda logits: logits.half().softmax(1))


def sigmoid() -> nn.Module:
    return changed(torch.sigmoid)


def as_output() -> nn.Module:
    return changed(Output)


def as_tuple() -> nn.Module:
    return changed(lambda logits: (logits, None))


def as_dict() -> nn.Module:
    return changed(lambda logits: {"out": logits})


def five_classes() -> nn.Module:
    return changed(lambda logits: torch.cat([logits, logits[:, :1]], 1))


def colors() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 32), nn.Flatten())


def double() -> nn.Module:
    return Quarters().double()


def without_weights() -> nn.Module:
    return torch.load("my_weights.pt")


def needs_an_argument(path: str) -> nn.Module:
    return Quarters()


# --- Other classes than this project's four ---


def write_stripes(root: Path, classes: tuple[str, ...], each: int = 6) -> Path:
    """Images of 40 × 60 px: of class k the k-th of as many stripes as classes is brighter."""
    noise = np.random.default_rng(0)
    for label, name in enumerate(classes):
        for number in range(each):
            image = noise.integers(50, 80, (40, 60)).astype(np.uint8)
            start, end = (60 * (label + step) // len(classes) for step in (0, 1))
            image[:, start:end] += 25
            path = root / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root


class Stripes(nn.Module):
    """Reads the class without any training: the mean of each stripe, scaled."""

    def __init__(self, count: int, order: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(60.0))
        self.count, self.order = count, order or tuple(range(count))

    def forward(self, images: Tensor) -> Tensor:
        means = nn.functional.adaptive_avg_pool2d(images, (1, self.count)).flatten(1)
        return (self.scale * (means - 0.25))[:, list(self.order)]


def two_stripes() -> nn.Module:
    return Stripes(2)


def three_stripes() -> nn.Module:
    return Stripes(3)


def five_stripes() -> nn.Module:
    return Stripes(5)


def five_backwards() -> nn.Module:
    return Stripes(5, (4, 3, 2, 1, 0))
