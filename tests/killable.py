"""Small trainings and searches as functions that a test starts in processes of their own, to kill or to multiply."""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from tests.test_training import DEVICE, TRAIN, VALIDATION, TinyNet, small
from utils import experiment, metrics, optuna_search, training
from utils.config import RunConfig


def use_tiny_network() -> None:
    """What the `tiny` fixture does, for a process that is about to end anyway."""
    from safetensors.torch import load_file

    def load(path):
        model = TinyNet().eval()
        model.load_state_dict(load_file(path))
        return model

    training.build_model = lambda name, **options: TinyNet().eval()
    training.load_model = load
    torch.set_num_threads(1)


def train(checkpoint: Path, epochs: int = 12) -> None:
    use_tiny_network()
    config = small("Resnet_atk", epochs=epochs, augmentation=0.7, ema_decay=0.9, train_steps=2)
    training.fit(
        TRAIN, VALIDATION, config, checkpoint, DEVICE, logs=checkpoint.with_suffix("") / "logs"
    )


def search(folder: Path, trials: int = 5, storage: str | None = None, epochs: int = 4) -> None:
    use_tiny_network()
    config = small("Resnet", trials=trials, search_epochs=epochs)
    optuna_search.search(TRAIN, VALIDATION, config, folder, DEVICE, storage=storage)


#: What the shards of the tests run: two models, five folds of `patient` and one unit of `slice`, twelve units.
SHARDED = ("Resnet", "Resnet_atk")


def sharded_workspace(root: Path) -> experiment.Workspace:
    return experiment.Workspace(root, "phantom", "cpu", root / "raw", "ab" * 32)


def shard(root: Path, which: str, seconds: float = 0.0) -> None:
    """One shard of the grid, whose units take `seconds` each and have twelve test images: who does what, what is skipped and
    what is recorded are the grid's own affair. Every beginning and every end of a unit's work is a line of `log`."""

    def tell(what: str, config: RunConfig) -> None:
        with open(
            root / "log", "a", encoding="utf-8"
        ) as log:  # one write in append mode: lines of two processes do not mix
            log.write(f"{what} {config.model} {config.protocol} {config.run_name} {os.getpid()}\n")

    def attack(
        workspace: experiment.Workspace, config: RunConfig, *, retrain: bool = False
    ) -> experiment.Run:
        tell("began", config)
        time.sleep(seconds)
        labels, patient = np.arange(12) % 4, np.arange(12) + 12 * config.fold
        rows = {
            "labels": labels.astype(np.int8),
            "fold": np.full(12, config.fold, np.int8),
            "seed": np.zeros(12, np.int8),
            "patient_id": patient.astype(np.int32),
            "slice_index": np.zeros(12, np.int16),
            "file_sha256": np.zeros((12, 32), np.uint8),
        }
        clean = np.random.default_rng(config.fold).normal(size=(12, 4))
        rows |= {"clean": metrics.to_half(clean), "4/255:pgd": metrics.to_half(clean - 1)}
        tell("ended", config)
        return experiment.Run(
            rows,
            {
                **experiment.describe(workspace, config),
                "init": "random",
                "precision": "fp32",
                "sanity": [],
                "wall_seconds": {"train": seconds, "attack": 0.0},
                "attacks": {"4/255": {"pgd": {"norm": "linf"}}},
                "process": os.getpid(),
            },
        )

    experiment.open_workspace = lambda profile, raw: sharded_workspace(root)
    experiment.train = lambda workspace, config, retrain: "a stand-in"
    experiment._fold0_validation_patients = lambda workspace: []  # nothing is prepared in `root`
    experiment.attack, experiment.explain = attack, lambda workspace, config, retrain: (root, {})
    experiment.grid("cpu", shard=which, models=SHARDED)


def train_in_a_team(output: Path) -> None:
    """Under `torchrun` or alone: trains the ViT, and the leader writes what came out and how many processes there were."""
    config = small("Dinov2", epochs=2, batch_size=8, input_size=28, augmentation=0.5, lr=1e-3)
    team, rows = training.Team(DEVICE), torch.arange(len(VALIDATION))
    seen = team.everyones(rows[team.share], len(rows)).tolist()
    fit = training.fit(TRAIN, VALIDATION, config, output.with_suffix(".safetensors"), DEVICE)
    if team.leads:
        output.write_text(
            json.dumps({"processes": team.size, "seen": seen, "history": fit.history})
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_in_a_team(Path(sys.argv[1]))
