"""Small trainings, searches and shards, for tests that kill or multiply the processes they run in.

python -m tests.killable OUTPUT    a training of the ViT, under `torchrun` or alone
"""

import json
import os
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from tests.test_training import DEVICE, TRAIN, VALIDATION, build_tiny, load_tiny, small
from utils import metrics, optuna_search, training
from utils.pipeline import command, driver, stages
from utils.pipeline.store import RunResult
from utils.pipeline.workspace import Workspace
from utils.training import fitting, trainer


def use_tiny_network() -> None:
    """What the `tiny` fixture of test_training does, for the rest of this process."""
    trainer.build_model = build_tiny
    trainer.load_model = fitting.load_model = load_tiny
    torch.set_num_threads(1)


def train(checkpoint: Path, epochs: int = 12) -> None:
    """A small adversarial training with all that has a state: augmentation, averaged weights."""
    use_tiny_network()
    config = small("Resnet_atk", epochs=epochs, augmentation=0.7, ema_decay=0.9, train_steps=2)
    training.fit(
        TRAIN, VALIDATION, config, checkpoint, DEVICE, logs=checkpoint.with_suffix("") / "logs"
    )


def search(folder: Path, trials: int = 5, storage: str | None = None, epochs: int = 4) -> None:
    """A small search; `storage` is the URL of a shared database (None: a file in `folder`)."""
    use_tiny_network()
    config = small("Resnet", trials=trials, search_epochs=epochs)
    optuna_search.search(TRAIN, VALIDATION, config, folder, DEVICE, storage=storage)


#: The models of the tests' grid. Each has five runs under `patient` and one under `slice`.
SHARDED = ("Resnet", "Resnet_atk")


def sharded_workspace(root: Path) -> Workspace:
    return Workspace(root, "phantom", "cpu", root / "raw", "ab" * 32)


class LoggedRun(driver.Run):
    """A run whose stages take `seconds` and give predictions of twelve images without any model.

    Beginning and end are lines of a log.
    """

    seconds = 0.0
    fit, attack_picture = "a stand-in", None
    explanation: ClassVar[dict] = {}

    def log(self, what: str) -> None:
        # One write in append mode: lines of two processes do not mix.
        with open(self.workspace.root / "log", "a", encoding="utf-8") as log:
            log.write(f"{what} {self} {os.getpid()}\n")

    @cached_property
    def result(self) -> RunResult:
        self.log("began")
        time.sleep(self.seconds)
        config = self.config
        labels, patient = np.arange(12) % 4, np.arange(12) + 12 * config.fold
        clean = np.random.default_rng(config.fold).normal(size=(12, 4))
        rows = {
            "labels": labels.astype(np.int8),
            "fold": np.full(12, config.fold, np.int8),
            "seed": np.zeros(12, np.int8),
            "patient_id": patient.astype(np.int32),
            "slice_index": np.zeros(12, np.int16),
            "file_sha256": np.zeros((12, 32), np.uint8),
            "clean": metrics.to_half(clean),
            "4/255:pgd": metrics.to_half(clean - 1),
        }
        self.log("ended")
        meta = {
            **stages.describe(self.workspace, config),
            "init": "random",
            "precision": "fp32",
            "sanity": [],
            "wall_seconds": {"train": self.seconds, "attack": 0.0},
            "attacks": {"4/255": {"pgd": {"norm": "linf"}}},
            "process": os.getpid(),
        }
        return RunResult(rows, meta)


def shard(root: Path, which: str, seconds: float = 0.0) -> None:
    """One shard of the grid of `LoggedRun`s.

    Which run a process takes, what is skipped and what is recorded is decided by the grid itself.
    """
    LoggedRun.seconds = seconds
    command.open_workspace = lambda profile, raw: sharded_workspace(root)
    command.Run = LoggedRun
    stages.fold0_validation_patients = lambda workspace: []  # nothing is prepared in `root`
    command.grid("cpu", shard=which, models=SHARDED)


def train_in_a_team(output: Path) -> None:
    """Trains the ViT in one process or, under `torchrun`, in several.

    The first process writes as JSON how many there were, the validation images that they saw
    together, and the history of the training.
    """
    config = small("Dinov2", epochs=2, batch_size=8, input_size=28, augmentation=0.5, lr=1e-3)
    team, rows = training.Team(DEVICE), torch.arange(len(VALIDATION))
    seen = team.gather(rows[team.share], len(rows)).tolist()
    fit = training.fit(TRAIN, VALIDATION, config, output.with_suffix(".safetensors"), DEVICE)
    if team.leads:
        output.write_text(
            json.dumps({"processes": team.size, "seen": seen, "history": fit.history})
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_in_a_team(Path(sys.argv[1]))
