"""Small trainings and searches as functions that a test starts in processes of their own, to kill or to multiply."""

import json
import sys
from pathlib import Path

import torch

from tests.test_training import DEVICE, TRAIN, VALIDATION, TinyNet, small
from utils import optuna_search, training


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
    training.fit(TRAIN, VALIDATION, config, checkpoint, DEVICE, logs=checkpoint.with_suffix("") / "logs")


def search(folder: Path, trials: int = 5, storage: str | None = None, epochs: int = 4) -> None:
    use_tiny_network()
    config = small("Resnet", trials=trials, search_epochs=epochs)
    optuna_search.search(TRAIN, VALIDATION, config, folder, DEVICE, storage=storage)


def train_in_a_team(output: Path) -> None:
    """Under `torchrun` or alone: trains the ViT, and the leader writes what came out and how many processes there were."""
    config = small("Dinov2", epochs=2, batch_size=8, input_size=28, augmentation=0.5, lr=1e-3)
    team, rows = training.Team(DEVICE), torch.arange(len(VALIDATION))
    seen = team.everyones(rows[team.share], len(rows)).tolist()
    fit = training.fit(TRAIN, VALIDATION, config, output.with_suffix(".safetensors"), DEVICE)
    if team.leads:
        output.write_text(json.dumps({"processes": team.size, "seen": seen, "history": fit.history}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_in_a_team(Path(sys.argv[1]))
