"""Which settings? Short comparisons on training and validation patients of `patient` fold 0.

    python tests/benchmarks/defaults.py --raw RAW                Resnet_atk: which training
    python tests/benchmarks/defaults.py --raw RAW --model NAME   another model

For `Resnet` and `Efficientnet` the question is which learning rate suits random weights, for
`Efficientnet_atk` and `Dinov2_atk` which adversarial training does not end at one answer (the
latter with the learning rate and epochs of its runs). No test image is read. Goes on where it
stopped; writes assets/<Model>/defaults.json. The ResNets see the images at 64 px, which makes
theirs four times cheaper; attacks act on native pixels, as always. Scores are of the best epoch,
chosen as every training chooses it; all lines have the same epochs, so that they can be compared,
and too few of them to say what a method reaches in the end.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils import data, experiment, training  # noqa: E402
from utils.config import make_config  # noqa: E402
from utils.utils_funcs import (  # noqa: E402
    UserError,
    choose_device,
    environment,
    hardware,
    read_json,
    write_json,
)

ADVERSARIAL = {
    "PGD-AT, 2 steps, eps ramp": {},
    "TRADES, beta 6": {"method": "trades"},
    "fast single-step": {"method": "fast"},
    "half clean, half adversarial": {"clean_weight": 0.5},
    "weight average, decay 0.99": {"ema_decay": 0.99},
    "no eps ramp": {"eps_ramp": 0.0},
    "ordinal soft labels": {"loss": "ordinal"},
    "label smoothing 0.1": {"label_smoothing": 0.1},
    "learning rate 0.001": {"lr": 1e-3},
    "weaker augmentation": {"augmentation": 0.2},
}
CLEAN = {
    "learning rate 0.0003": {"lr": 3e-4},
    "learning rate 0.001": {"lr": 1e-3},
    "learning rate 0.001, no class weights": {"lr": 1e-3, "class_weights": False},
    "learning rate 0.003": {"lr": 3e-3},
    "learning rate 0.001, batches of 16": {"lr": 1e-3, "batch_size": 16},
    "learning rate 0.001, weaker augmentation": {"lr": 1e-3, "augmentation": 0.2},
    "learning rate 0.001, weight average, decay 0.99": {"lr": 1e-3, "ema_decay": 0.99},
}
FROM_CLEAN_COUNTERPART = {
    "PGD-AT from random weights": {},
    "PGD-AT from the clean twin": {"warm_start": True},
    "half clean, half adversarial, from the clean twin": {"warm_start": True, "clean_weight": 0.5},
    "TRADES, beta 2, from the clean twin": {
        "warm_start": True,
        "method": "trades",
        "trades_beta": 2.0,
    },
    "TRADES, beta 6, from the clean twin": {
        "warm_start": True,
        "method": "trades",
        "trades_beta": 6.0,
    },
}
#: Model → (lines, what all of them share).
STUDIES = {
    "Resnet_atk": (ADVERSARIAL, dict(epochs=8, input_size=64, slice_stride=2)),
    "Resnet": (CLEAN, dict(epochs=12, input_size=64, slice_stride=4)),
    "Efficientnet": (CLEAN, dict(epochs=4, input_size=None, slice_stride=2)),
    "Efficientnet_atk": (
        FROM_CLEAN_COUNTERPART,
        dict(epochs=8, input_size=None, slice_stride=4, method="pgd", warm_start=False),
    ),
    "Dinov2_atk": (
        FROM_CLEAN_COUNTERPART,
        dict(epochs=12, input_size=126, slice_stride=4, lr=1e-4),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--raw")
    parser.add_argument("--model", choices=tuple(STUDIES), default="Resnet_atk")
    options = parser.parse_args()
    lines, shared = STUDIES[options.model]
    output = ROOT / "assets" / options.model / "defaults.json"
    workspace = experiment.open_workspace("cpu", options.raw)
    if workspace.data != "real":
        raise SystemExit("The study of defaults needs the real cohort: give it with --raw.")
    done = read_json(output) if output.is_file() else {"rows": {}}
    sets = {
        name: data.load_set(workspace.sets, "patient", 0, name) for name in ("train", "validation")
    }
    machine = {"hardware": hardware(), "threads": torch.get_num_threads()}
    for row in done["rows"].values():
        row |= {
            key: row.get(key, done[key]) for key in machine
        }  # lines of before may come from another machine
    for name, changes in lines.items():
        if name in done["rows"]:
            continue
        config = make_config("cpu", options.model, **{"lr": 3e-4, **shared, **changes})
        with tempfile.TemporaryDirectory() as folder:
            try:
                fit = training.fit(
                    sets["train"],
                    sets["validation"],
                    config,
                    Path(folder) / "line.safetensors",
                    choose_device(),
                    start=experiment.start_of(workspace, config),
                )
                best = dict(fit.history[fit.best_epoch - 1])
                done["rows"][name] = {
                    "changes": changes,
                    "best_epoch": fit.best_epoch,
                    "one_class": fit.one_class,
                    "best": best,
                    "last": fit.history[-1],
                    "seconds": fit.seconds,
                    "init": fit.init,
                    "precision": fit.precision,
                    **machine,
                }
            except UserError as error:
                done["rows"][name] = {"changes": changes, "failed": str(error), **machine}
        done |= {
            "model": options.model,
            "protocol": "patient",
            "fold": 0,
            "data": workspace.data,
            "profile": "cpu",
            **shared,
            "train": sets["train"].balance(),
            "validation": sets["validation"].balance(),
            "n_validation": len(sets["validation"]),
            "cohort_sha256": workspace.cohort_sha256,
            **machine,
            "environment": environment(),
        }
        write_json(output, done)
        print(json.dumps({name: done["rows"][name].get("best", done["rows"][name])}), flush=True)


if __name__ == "__main__":
    main()
