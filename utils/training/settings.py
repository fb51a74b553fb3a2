"""Which settings decide the trained weights, and whether a checkpoint was trained with them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path

from utils.config import RunConfig
from utils.utils_funcs import UserError

#: What to do about weights of another cohort.
TRAIN_AGAIN = "name the data that it was trained on, or run with retrain to replace it"
#: Settings that change the trained weights; a checkpoint of other ones is not silently reused.
TRAINING_FIELDS = (
    "model",
    "protocol",
    "fold",
    "seed",
    "max_train",
    "max_test",
    "slice_stride",
    "input_size",
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
    "weight_decay",
    "schedule",
    "warmup_epochs",
    "augmentation",
    "loss",
    "label_smoothing",
    "class_weights",
    "gradient_clip",
    "patience",
    "kept_epoch",
    "ema_decay",
    "pretrained",
    "fine_tune",
    "layer_decay",
    "precision",
)
#: Those that only adversarial training reads.
ADVERSARIAL_FIELDS = (
    "method",
    "train_eps",
    "train_steps",
    "clean_weight",
    "trades_beta",
    "eps_ramp",
    "warm_start",
)


def training_settings(config: RunConfig) -> dict[str, object]:
    """The settings that decide the weights, as JSON keeps them."""
    fields = TRAINING_FIELDS + (ADVERSARIAL_FIELDS if config.adversarial else ())
    return {name: getattr(config, name) for name in fields}


def different_settings(
    found: Mapping[str, object], config: RunConfig, ignore: Collection[str] = ()
) -> list[str]:
    """In words, each training setting in which `found` is not `config`.

    A setting that `found` does not name did not exist when it was written: it had its default.
    """
    default = {field.name: field.default for field in dataclasses.fields(RunConfig)}
    expected = json.loads(json.dumps(training_settings(config)))
    return [
        f"{name} {found.get(name, default[name])!r} instead of {value!r}"
        for name, value in expected.items()
        if name not in ignore and found.get(name, default[name]) != value
    ]


def check_settings(found: Mapping[str, object], config: RunConfig, path: Path) -> None:
    """Raises `UserError` where the file at `path` was trained with other settings than `config`."""
    different = different_settings(found, config)
    if different:
        raise UserError(
            f"{path} was trained with {'; '.join(different[:4])}: run with these settings, or with "
            "retrain to replace it."
        )
