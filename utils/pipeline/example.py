"""One attacked test slice, for the picture on README's first screen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from utils.attacks import ATTACKS
from utils.backbones import load_model, read_metadata
from utils.config import parse_eps
from utils.grad_cam import explain
from utils.report.example import Example, example_path, write_example
from utils.utils_funcs import ROOT, UserError

#: One gray level, the smallest change that an image file can hold.
EPS = "1/255"


def example_command(model: str = "Efficientnet", root: Path = ROOT) -> None:
    """Attacks one of the committed slices with a committed model, and keeps slice, attacked slice,
    answers and maps for README's first picture. Needs no data.

    Args:
        model: one whose weights are in git.
        root: the tree that holds checkpoints/ and assets/.
    """
    weights = root / "checkpoints" / model / "patient" / "fold0_seed0_fp16.safetensors"
    slices = root / "assets" / model / "patient_explained.npz"
    for path in (weights, slices):
        if not path.is_file():
            raise UserError(f"There is no {path}: name a model whose weights are in git.")
    write_example(make_example(weights, slices), example_path(root))


def make_example(weights: Path, slices: Path) -> Example:
    """The first of the slices that the model gets right, and the same after PGD at `EPS`, rounded
    to whole gray levels as an image file holds them.

    Raises:
        UserError: the model gets no slice right, or the attack fails on it.
    """
    model = load_model(weights)
    with np.load(slices, allow_pickle=False) as file:
        images, labels = file["images"], torch.tensor(file["labels"])
    pixels = torch.from_numpy(images)[:, None] / 255
    with torch.no_grad():
        right = (model(pixels).argmax(1) == labels).nonzero().flatten().tolist()
    for row in right:
        clean, label = pixels[row : row + 1], labels[row : row + 1]
        attacked = ATTACKS["pgd"](model, clean, label, parse_eps(EPS), steps=50, loss="margin")
        both = torch.cat([clean, (attacked * 255).round() / 255])
        with torch.no_grad():
            probabilities = model(both).softmax(1)
        if int(probabilities[1].argmax()) == int(label):
            continue
        return Example(
            images=(both[:, 0] * 255).round().byte().numpy(),
            maps=(explain(model, both) * 255).round().byte().numpy(),
            probabilities=probabilities.numpy(),
            label=int(label),
            model=str(read_metadata(weights)["settings"]["model"]),
            eps=EPS,
        )
    raise UserError(f"{weights} gets no slice of {slices} right that the attack then changes.")
