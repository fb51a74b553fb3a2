"""How much of a map lies on the evidence, where its place is known: backbones trained from random
weights on planted stripes.

All three backbones take about 25 minutes on one core; a single one leaves the others' rows as they
are:

    python tests/benchmarks/planted_evidence.py
    python tests/benchmarks/planted_evidence.py --models Efficientnet

Writes `assets/planted_evidence.json`, which every model's notebook and README cite, and prints it.
A ResNet or EfficientNet reads images of any size, so the same network is measured at several: its
map has one cell in 32 px. DINOv2's grid is fixed, and it learns in two ways: whole from the class,
as the models of the results do, and tokens first. The patch is half as wide as the image
everywhere, so an even map has 0.25 of itself inside.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.planted_evidence import (  # noqa: E402
    BUDGETS,
    LIMIT,
    SIDE,
    accuracy,
    inside,
    stripes_in_patch,
    trained_backbone,
)
from utils.utils_funcs import atomic_path, hardware  # noqa: E402

METHODS, SIDES, COUNT = ("gradcam", "gradcam++", "layercam"), (128, 256, 512), 48
NAMES = sorted({name for name, _ in BUDGETS})


def rows_of(name: str, training: str) -> list[dict]:
    """A row for each side: accuracy on fresh images, and each method's share inside the patch with
    its 95% interval."""
    model, budget = trained_backbone(name, training), BUDGETS[name, training]
    rows = []
    for side in (SIDE,) if name == "Dinov2" else SIDES:
        images, labels, patch = stripes_in_patch(COUNT, seed=9, side=side, noise=budget["noise"])
        cells = budget["input_size"] // 14 if name == "Dinov2" else side // 32
        shares = {
            method: interval(inside(model, images, labels, patch, method)) for method in METHODS
        }
        rows.append(
            {
                "training": training,
                "side": side,
                "cells": cells,
                "noise": budget["noise"],
                "area": float(patch.float().mean()),
                "trained_on": budget["count"],
                "tokens_trained_on": budget.get("tokens"),
                "accuracy": accuracy(model, images, labels),
                "inside": shares,
            }
        )
    return rows


def interval(values: np.ndarray) -> dict:
    """The mean over images with a 95% percentile bootstrap; phantom images are independent, and an
    empty map has nothing inside."""
    empty, values = int(np.isnan(values).sum()), np.nan_to_num(values)
    drawn = values[np.random.default_rng(0).integers(len(values), size=(2000, len(values)))].mean(1)
    return {
        "value": float(values.mean()),
        "ci": [float(value) for value in np.quantile(drawn, (0.025, 0.975))],
        "n": len(values),
        "empty": empty,
    }


def line_of(name: str, row: dict) -> str:
    """A row of the record as one printed line."""
    shares = []
    for method, found in row["inside"].items():
        low, high = found["ci"]
        shares.append(f"{method} {found['value']:.2f} [{low:.2f}, {high:.2f}] ({found['empty']})")
    return (
        f"{name:<13}{row['training']:<13}{row['side']:>4} px {row['cells']:>3} cells a side   "
        f"accuracy {row['accuracy']:.2f}   {'   '.join(shares)}   (empty maps, of {COUNT})"
    )


def main() -> None:
    """Measures the chosen backbones, prints their rows and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = ROOT / "assets" / "planted_evidence.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    record |= {"data": "phantom", "init": "random", "limit": LIMIT, "hardware": hardware()}
    for name in args.models:
        record.setdefault("backbones", {})[name] = [
            row
            for backbone, training in BUDGETS
            if backbone == name
            for row in rows_of(name, training)
        ]
        for row in record["backbones"][name]:
            print(line_of(name, row), flush=True)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
