"""Saves on a disk of 2 MiB that is really full; tests/test_training.py starts it.

    python -m tests.full_disk FOLDER

mounts a small memory disk on FOLDER and prints the result of each way to save as JSON: name →
{error, whole, left}. It is run in a mount namespace, so that other processes do not see the disk,
which disappears with this process.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tests import killable
from tests.test_training import DEVICE, TRAIN, VALIDATION, TinyNet, equal, small, weights
from utils import training
from utils.backbones import read_metadata, save_model
from utils.evaluation import records
from utils.utils_funcs import ROOT, atomic_path, write_json

#: The record that is written again and again: small, so that its predictions are what fills the
#: disk.
RECORD = ROOT / "assets" / "Baselines" / "slice.json"

#: Bytes of the new version of every file: more than is left on the disk, less than the disk.
LARGE = 512 << 10


def network(width: int) -> TinyNet:
    model = TinyNet()
    model.body.extra = torch.nn.Linear(width // 16, 4)  # of `width` bytes
    return model


def save_state(path: Path, width: int) -> None:
    """As `training.fit` saves what a killed run goes on from."""
    with atomic_path(path) as temporary:
        torch.save(network(width).state_dict(), temporary)


def save_record(path: Path, width: int) -> None:
    noise = np.random.default_rng(0).integers(0, 255, width)  # which cannot be compressed
    record = dataclasses.replace(records.read_record(RECORD), hardware=f"{width} bytes")
    records.write_record(path, record, {"clean": noise.astype(np.uint8)})


#: Name → (what saves, the file that it saves).
WAYS: dict[str, tuple[Callable[[Path, int], None], str]] = {
    "checkpoint": (lambda path, width: save_model(network(width), path), "fold0_seed0.safetensors"),
    "state": (save_state, "fold0_seed0.state.pt"),
    "record": (save_record, "patient.json"),
    "json": (lambda path, width: write_json(path, {"text": "x" * width}), "numbers.json"),
}


def fill(folder: Path, leave: int | None) -> list[Path]:
    """Takes all of the disk but about `leave` bytes; None takes all file names, and no bytes."""
    fillers = [folder.parent / "filler"]
    try:
        with open(fillers[0], "wb", buffering=0) as file:
            while leave is not None:
                file.write(b"x" * 4096)
        while True:
            fillers.append(folder.parent / f"filler{len(fillers)}")
            fillers[-1].touch()
    except OSError:
        if leave:
            os.truncate(fillers[0], fillers[0].stat().st_size - leave)
    return fillers


def free(fillers: list[Path]) -> None:
    for path in fillers:
        path.unlink(missing_ok=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def attempt(save: Callable[[Path, int], None], path: Path, leave: int | None) -> dict:
    """Saves over an old file on a full disk: the error, whether the old files are whole, and which
    other files are left."""
    path.parent.mkdir()
    save(path, 64)
    before, fillers, error = contents(path.parent), fill(path.parent, leave), None
    try:
        save(path, LARGE)
    except Exception as raised:  # noqa: BLE001  the test judges whatever was raised
        error = [type(raised).__name__, str(raised)]
    after = contents(path.parent)
    free(fillers)
    save(path, LARGE)  # with space again, the same call succeeds
    return {
        "error": error,
        "whole": all(after.get(name) == content for name, content in before.items()),
        "left": sorted(set(after) - set(before)),
    }


def attempt_training(folder: Path) -> dict:
    """The disk is full after the first epoch of a training; with space again, the same command goes
    on to the same numbers."""
    config, fillers, error = small("Resnet", epochs=3, ema_decay=0.9), [], None
    whole = training.fit(TRAIN, VALIDATION, config, folder / "whole" / "unit.safetensors", DEVICE)
    broken = folder / "broken" / "unit.safetensors"
    kept: dict[str, bytes] = {}

    def fill_up(entry: dict) -> None:
        if entry["epoch"] == 1:
            kept.update(contents(broken.parent))
            fillers.extend(fill(broken.parent, 0))

    try:
        training.fit(TRAIN, VALIDATION, config, broken, DEVICE, on_epoch=fill_up)
    except Exception as raised:  # noqa: BLE001
        error = [type(raised).__name__, str(raised)]
    after = contents(broken.parent)
    free(fillers)
    training.fit(TRAIN, VALIDATION, config, broken, DEVICE)
    same = equal(weights(whole.checkpoint), weights(broken)) and [
        e["score"] for e in whole.history
    ] == [e["score"] for e in read_metadata(broken)["history"]]
    return {
        "error": error,
        "whole": all(after.get(name) == content for name, content in kept.items())
        and len(kept) == 2
        and same,
        "left": sorted(set(after) - set(kept)),
    }


def main(folder: Path) -> None:
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m,nr_inodes=48", "none", str(folder)], check=True
    )
    killable.use_tiny_network()
    results = {"training": attempt_training(folder)}
    for case, leave in {
        "no byte left": 0,
        "128 KiB left": 128 << 10,
        "no file name left": None,
    }.items():
        for name, (save, file) in WAYS.items():
            where = folder / f"{name} {case}"
            results[f"{name}, {case}"] = attempt(save, where / file, leave)
            shutil.rmtree(where)
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
