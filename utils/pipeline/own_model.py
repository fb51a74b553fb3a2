"""A model of one's own, made to fit the evaluation: loaded, wrapped, tried on one image.

The evaluation asks a model for one thing: float32 pixels (N, 1, H, W) in [0, 1] in, logits (N, K)
out, in the order of the K classes: Non, Very mild, Mild, Moderate, or those of the data.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.backbones import load_model
from utils.manifest.layout import class_of_folder
from utils.utils_funcs import CLASSES, UserError

#: Sizes that models commonly take, tried where an image's own is refused.
COMMON_SIZES = (224, 128, 256, 384, 299, 96, 64, 32)


def contract(wanted: Sequence[str] = CLASSES) -> str:
    """What the evaluation asks of a model, for messages."""
    return (
        "the evaluation gives float32 pixels (N, 1, H, W) in [0, 1] and expects logits "
        f"(N, {len(wanted)}) in the order {', '.join(wanted)}"
    )


@dataclass(frozen=True)
class Wrapping:
    """How images and answers are changed for a model that was made for others.

    Attributes:
        channels: the gray image is repeated so many times.
        size: side in pixels that images are resized to (bilinear); None: as they are.
        mean, std: of each channel, subtracted and divided by.
        order: which output is the logit of each class; empty: they stand in the classes' order.
    """

    channels: int = 1
    size: int | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    order: tuple[int, ...] = ()


class WrappedModel(nn.Module):
    """A model behind its `Wrapping`: pixels (N, 1, H, W) in [0, 1] → logits (N, K)."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, wrapping: Wrapping) -> None:
        super().__init__()
        self.model, self.wrapping = model, wrapping
        self.register_buffer("mean", torch.tensor(wrapping.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(wrapping.std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K), in the order of the classes."""
        wrapping = self.wrapping
        if wrapping.size is not None:
            side = (wrapping.size, wrapping.size)
            images = F.interpolate(images, side, mode="bilinear", align_corners=False)
        found = self.model((images.expand(-1, wrapping.channels, -1, -1) - self.mean) / self.std)
        return found[:, list(wrapping.order)] if wrapping.order else found


class LogitsOf(nn.Module):
    """A model of the transformers library, whose answer is an object that holds the logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """The logits alone."""
        return self.model(images).logits


# --- Loading ------------------------------------------------------------------------------------


def is_factory(spec: str) -> bool:
    """Whether a model is named as `module:function`."""
    return not (spec.startswith(("hf:", "timm:")) or spec.endswith(".safetensors"))


def load_own(
    spec: str, classes: str | None = None, wanted: Sequence[str] = CLASSES
) -> tuple[nn.Module, Wrapping]:
    """The model that `spec` names, in eval mode, and the wrapping that it says itself.

    Args:
        spec: `module:function`, `hf:ORG/NAME` (or a folder), `timm:NAME@checkpoint.safetensors`, or
            a checkpoint of this project.
        classes: the order of its outputs, where the names that it brings do not say it.
        wanted: the classes of the data.

    Raises:
        UserError: in one sentence, what is wrong with it.
    """
    kind, _, rest = spec.partition(":")
    if kind == "hf":
        return from_transformers(rest, classes, wanted)
    if kind == "timm":
        return from_timm(rest, len(wanted))
    if spec.endswith(".safetensors"):
        return load_model(spec), Wrapping()
    return model_from_factory(spec), Wrapping()


def model_from_factory(spec: str) -> nn.Module:
    """The model that a user's `module:function` returns, in eval mode.

    Raises:
        UserError: no such module or function, it raises, or it returns no `nn.Module`.
    """
    module_name, _, function_name = spec.partition(":")
    try:
        model = getattr(importlib.import_module(module_name), function_name or "build_model")()
    except Exception as error:  # noqa: BLE001  it is somebody else's code
        raise UserError(
            f"{spec!r} gave no model ({_short(error)}): write it as module:function, where the "
            "function takes nothing, loads its weights and returns a torch.nn.Module."
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{spec!r} returned a {type(model).__name__}: expected a torch.nn.Module.")
    return model.eval()


def from_transformers(
    name: str, classes: str | None = None, wanted: Sequence[str] = CLASSES
) -> tuple[nn.Module, Wrapping]:
    """An image classifier of the transformers library, by its name on the hub or its folder, with
    the size and normalization of its preprocessor, and its classes by their names, or `classes`."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    try:
        model = AutoModelForImageClassification.from_pretrained(name)
        processor = AutoImageProcessor.from_pretrained(name)
    except Exception as error:  # noqa: BLE001  whatever the hub's client raises
        raise UserError(
            f"hf:{name} could not be loaded ({_short(error)}): name an image classifier on the hub "
            "as ORG/NAME, or a folder that save_pretrained wrote, with its preprocessor."
        ) from error
    channels = getattr(model.config, "num_channels", 3)
    size = processor.size or {}
    wrapping = Wrapping(
        channels=channels,
        size=size.get("height") or size.get("shortest_edge"),
        mean=tuple(processor.image_mean or (0.0,) * channels),
        std=tuple(processor.image_std or (1.0,) * channels),
        order=order_of(
            classes.split(",") if classes else list(model.config.id2label.values()),
            f"hf:{name}",
            wanted,
        ),
    )
    return LogitsOf(model).eval(), wrapping


def from_timm(text: str, n_classes: int = len(CLASSES)) -> tuple[nn.Module, Wrapping]:
    """A model of the timm library with the weights of a file, and its own normalization."""
    import timm
    from timm.data import resolve_data_config
    from timm.models import load_state_dict

    name, _, file = text.partition("@")
    if not file or not Path(file).is_file():
        raise UserError(
            f"timm:{text} names no file of weights: write timm:NAME@checkpoint.safetensors (or "
            ".pth)."
        )
    try:
        state = load_state_dict(file)
        first = next(value for value in state.values() if value.ndim == 4)
        model = timm.create_model(name, num_classes=n_classes, in_chans=first.shape[1])
        model.load_state_dict(state)
    except Exception as error:  # noqa: BLE001  timm and torch raise many kinds
        raise UserError(
            f"timm:{text} could not be loaded ({_short(error)}): name timm's model that the "
            f"weights are of, with {n_classes} classes."
        ) from error
    config = resolve_data_config({}, model=model)
    channels = int(first.shape[1])
    mean, std = (tuple(config[key])[:channels] for key in ("mean", "std"))
    return model.eval(), Wrapping(channels=channels, mean=mean, std=std)


def order_of(names: Sequence[str], source: str, wanted: Sequence[str] = CLASSES) -> tuple[int, ...]:
    """Which output is the logit of each class, from the names of the outputs in their order.

    Args:
        wanted: the classes of the data.

    Raises:
        UserError: they are not these classes, each once.
    """
    if tuple(wanted) == CLASSES:
        found = [class_of_folder(name) for name in names]
        expected = "the four of this project"
    else:
        place = {_plain(name): label for label, name in enumerate(wanted)}
        found = [place.get(_plain(name)) for name in names]
        expected = f"the {len(wanted)} of the data, {', '.join(wanted)},"
    if sorted(found, key=str) != sorted(range(len(wanted)), key=str):
        raise UserError(
            f"{source} has the classes {', '.join(map(str, names))}: expected {expected} in any "
            f"order; say with --classes which they are, as {','.join(wanted)}."
        )
    return tuple(found.index(label) for label in range(len(wanted)))


def _plain(name: str) -> str:
    """A class's name as far as its letters and digits say it."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


# --- One image first ----------------------------------------------------------------------------


def wrapped(
    model: nn.Module,
    wrapping: Wrapping,
    *,
    channels: int | None = None,
    size: int | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    classes: str | None = None,
    wanted: Sequence[str] = CLASSES,
) -> nn.Module:
    """The model behind its own wrapping, changed by what the command line asks for."""
    channels = channels or wrapping.channels
    own_mean = wrapping.mean if len(wrapping.mean) in (1, channels) else (0.0,)
    own_std = wrapping.std if len(wrapping.std) in (1, channels) else (1.0,)
    for name, values in (("--mean", mean), ("--std", std)):
        if values and len(values) not in (1, channels):
            raise UserError(
                f"{name} has {len(values)} numbers and the model takes {channels} channels: give "
                "one number, or one a channel."
            )
    if any(value <= 0 for value in std):
        raise UserError(f"--std holds {min(std)}: expected positive numbers.")
    order = order_of(classes.split(","), "--classes", wanted) if classes else wrapping.order
    if order == tuple(range(len(wanted))):
        order = ()
    asked = Wrapping(channels, size or wrapping.size, mean or own_mean, std or own_std, order)
    return model if asked == Wrapping() else WrappedModel(model, asked).eval()


def try_one(model: nn.Module, image: Tensor, spec: str, wanted: Sequence[str] = CLASSES) -> None:
    """Shows the model one image, and says what is wrong where it does not answer as it must.

    Args:
        image: float32 (1, 1, H, W) in [0, 1].
        wanted: the classes of the data.

    Raises:
        UserError: in one sentence, what was found and what to give instead.
    """
    if any(parameter.dtype == torch.float64 for parameter in model.parameters()):
        raise UserError(
            f"{spec} is in double precision and {contract(wanted)}: return model.float() instead."
        )
    try:
        with torch.no_grad():
            found = model(image)
    except Exception as error:  # noqa: BLE001  it is somebody else's code
        remedy = _remedy(model, image)
        raise UserError(
            f"{spec} does not take an image of shape {tuple(image.shape)} ({_short(error)}), and "
            f"{contract(wanted)}: {remedy}."
        ) from error
    _check_answer(found, spec, wanted)


def _remedy(model: nn.Module, image: Tensor) -> str:
    """Which options make the model take the image, in words."""
    own = model.wrapping if isinstance(model, WrappedModel) else Wrapping()
    inner = model.model if isinstance(model, WrappedModel) else model
    tried: list[tuple[int, int | None]] = [(3, own.size)]
    tried += [(channels, size) for size in COMMON_SIZES for channels in (1, 3)]
    for channels, size in tried:
        try:
            with torch.no_grad():
                WrappedModel(inner, Wrapping(channels, size))(image)
        except Exception:  # noqa: BLE001, S112  the next one is tried
            continue
        options = [f"--channels {channels}"] * (channels != own.channels)
        options += [f"--size {size}"] * (size != own.size)
        return f"it does with {' '.join(options)}, so add that"
    return "no usual number of channels or size helps; wrap it in a module that takes such images"


def _check_answer(found: object, spec: str, wanted: Sequence[str]) -> None:
    """Refuses an answer (to one image) that is no row of a logit a class."""
    if not isinstance(found, Tensor):
        if hasattr(found, "logits"):
            what, remedy = type(found).__name__, "return output.logits"
        elif isinstance(found, Mapping):
            keys = ", ".join(map(str, found))
            what, remedy = f"dict with {keys}", "return the logits in it alone"
        elif isinstance(found, (tuple, list)):
            what, remedy = type(found).__name__, "return its first part, if that is the logits"
        else:
            what, remedy = type(found).__name__, "return a tensor"
        raise UserError(f"{spec} answers with a {what}, and {contract(wanted)}: {remedy}.")
    if tuple(found.shape) != (1, len(wanted)) or not found.is_floating_point():
        raise UserError(
            f"{spec} answers one image with {found.dtype} of shape {tuple(found.shape)}, and "
            f"{contract(wanted)}: give a model with {len(wanted)} outputs."
        )


def _short(error: Exception) -> str:
    """An exception in a few words: its type and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
