"""The settings that a search chooses, and their ranges."""

from __future__ import annotations

from typing import Any

import optuna

#: The settings that a search chooses, in the order in which a trial draws them.
SPACE = ("lr", "weight_decay", "optimizer", "schedule", "batch_size", "augmentation")


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    """One point of the search space; the keys are `SPACE`, settings of `RunConfig`."""
    return {
        "lr": trial.suggest_float("lr", 3e-5, 3e-3, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-4, 0.3, log=True),
        "optimizer": trial.suggest_categorical("optimizer", ["adamw", "sgd"]),
        "schedule": trial.suggest_categorical("schedule", ["cosine", "constant"]),
        "batch_size": trial.suggest_categorical("batch_size", [16, 32, 64]),
        "augmentation": trial.suggest_float("augmentation", 0.0, 1.0),
    }
