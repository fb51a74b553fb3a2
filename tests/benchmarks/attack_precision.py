"""Whether attacks that search in bfloat16 are as strong as in float32, and how much faster, on a
run of the real grid.

The first command writes the weights, the second prints what `attack_precision.txt` holds:

    python -m utils.experiment train --profile cpu --raw RAW --model Dinov2 --fold 0
    python tests/benchmarks/attack_precision.py --raw RAW --model Dinov2 --fold 0

The run's record holds the answers of a float32 search. Its suite is evaluated again at the headline
eps with a search in bfloat16 on the same weights, which must give the recorded clean answers;
transfer and the region of Grad-CAM are left out of both. Errors are decided in float32 on both
sides. `only fp32` and `only bf16` count images that one search misclassifies and that are robust
against the other; the last lines do so for the worst case over all attacks, without and with the
two float32 stages that such a suite ends with. Times are processor seconds on the same robust
images, both searches taking turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import data  # noqa: E402
from utils.attacks.base import ATTACKS, Precision  # noqa: E402
from utils.backbones import load_model  # noqa: E402
from utils.config import RunConfig, make_config, parse_eps  # noqa: E402
from utils.evaluation.plan import VIEWS, AttackName, headline_of, suite_plan  # noqa: E402
from utils.evaluation.predictions import as_pixels, misclassified  # noqa: E402
from utils.evaluation.suite import SuiteResult, evaluate_suite  # noqa: E402
from utils.pipeline.store import find_matching_run  # noqa: E402
from utils.pipeline.workspace import load_sets, open_workspace  # noqa: E402
from utils.utils_funcs import hardware  # noqa: E402

FLOAT32 = "apgd_t_float32"


def compared(name: str, view: str, fp32: np.ndarray, bf16: np.ndarray) -> str:
    """A line about which images are robust, bool (N,), against each search."""
    return (
        f"  {name:24} {view:7} {len(fp32):4}   {fp32.sum():4} / {bf16.sum():4}   "
        f"only fp32 {(bf16 & ~fp32).sum():3}   only bf16 {(fp32 & ~bf16).sum():3}"
    )


def robust_to_all(logits: list[np.ndarray], labels: np.ndarray, view: str) -> np.ndarray:
    """Which images no attack misclassifies in a view, bool (N,)."""
    return ~np.any([misclassified(attacked, labels, view) for attacked in logits], axis=0)


def lines(
    result: SuiteResult, rows: dict[str, np.ndarray], labels: np.ndarray, eps: str
) -> list[str]:
    """A line an attack, and two a view about the worst case.

    Args:
        result: of the search in bfloat16.
        rows: columns of the record, whose search was in float32.
    """
    bf16 = {
        name: logits
        for (at, name), logits in result.logits.items()
        if at == eps and f"{eps}:{name}" in rows and not AttackName.parse(name).rounded
    }
    fp32 = {name: rows[f"{eps}:{name}"] for name in bf16}
    found = []
    for name in bf16:
        view, inside = result.meta[eps, name]["view"], ~np.isnan(bf16[name]).any(1)
        robust = [
            ~misclassified(logits[name][inside], labels[inside], view) for logits in (fp32, bf16)
        ]
        found.append(compared(name, view, *robust))
    added = [
        logits
        for (at, name), logits in result.logits.items()
        if at == eps and AttackName.parse(name).attack == FLOAT32
    ]
    for view in VIEWS:
        recorded = robust_to_all([*fp32.values()], labels, view)
        searched = robust_to_all([*bf16.values()], labels, view)
        ended = robust_to_all([*bf16.values(), *added], labels, view)
        found.append(compared("worst case", view, recorded, searched))
        found.append(compared("worst case, fp32 added", view, recorded, ended))
    return found


def ratio(
    attack: str,
    budget: dict,
    model: torch.nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    eps: float,
    rounds: int = 3,
) -> str:
    """Processor seconds of both searches, taking turns."""
    seconds: dict[Precision, list[float]] = {"fp32": [], "bf16": []}
    for _ in range(rounds):
        for precision, spent in seconds.items():
            started = time.process_time()
            ATTACKS[attack](model, images, labels, eps, precision=precision, **budget)
            spent.append(time.process_time() - started)
    medians = {precision: statistics.median(spent) for precision, spent in seconds.items()}
    return (
        f"  {attack} {budget}, {len(images)} robust images, median of {rounds}: "
        f"fp32 {medians['fp32']:.1f} s, bf16 {medians['bf16']:.1f} s, "
        f"ratio {medians['fp32'] / medians['bf16']:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--raw", required=True, help="folder or zip of the real cohort")
    parser.add_argument("--model", default="Dinov2")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--weights", help="the run's weights where they are not in checkpoints/")
    parser.add_argument(
        "--state", help="folder for finished batches, to go on after an interruption"
    )
    options = parser.parse_args()
    workspace = open_workspace("cpu", options.raw)
    config: RunConfig = make_config("cpu", options.model, protocol="patient", fold=options.fold)
    run, test = find_matching_run(workspace, config), load_sets(workspace, config)["test"]
    if run is None:
        raise SystemExit(f"No record holds {config.run_name}: train it first.")
    chosen = data.every_nth(test, config.attack_stride)
    attacked, eps = test.pick(chosen), headline_of(config)
    labels = attacked.labels.numpy()
    config = make_config("cpu", options.model, protocol="patient", fold=options.fold, eps=(eps,))
    model = load_model(options.weights or workspace.checkpoint(config))
    result = evaluate_suite(
        model,
        attacked.images,
        labels,
        attacked.patients,
        config,
        stages=suite_plan(config),
        precision="bf16",
        state_dir=Path(options.state) if options.state else None,
    )
    rows = {
        name: values[chosen].astype(np.float32)
        for name, values in run.rows.items()
        if name == "clean" or ":" in name
    }
    # A record keeps logits in half precision, each image's largest at 0.
    gap = np.abs(
        rows["clean"] - (result.clean_logits - result.clean_logits.max(1, keepdims=True))
    ).max()
    if gap > 0.01:
        raise SystemExit(
            f"The weights' clean logits differ from the record's by {gap:.3f}: they are not that "
            "run's weights."
        )
    print(
        f"{options.model}, patient fold {options.fold}, eps {eps}, n = {len(labels)} slices of "
        f"{len(np.unique(attacked.patients))} patients; {torch.get_num_threads()} thread(s), "
        f"{hardware()}, data: real, init: random\n"
        f"  {'attack':24} {'view':7}    n   robust against fp32 / bf16"
    )
    print("\n".join(lines(result, rows, labels, eps)))
    print(
        "  checks:",
        "; ".join(
            f"{row['check']} {row['figure']}"
            for row in result.sanity
            if not row["passed"] or "float32" in row["check"]
        ),
    )
    robust = np.flatnonzero(~misclassified(result.logits[eps, f"pgd{config.pgd_steps}"], labels))[
        :16
    ]
    for attack, budget in (("apgd_t", {"steps": 5}), ("square", {"queries": 20})):
        print(
            ratio(
                attack,
                budget,
                model,
                as_pixels(attacked.images)[robust],
                torch.as_tensor(labels[robust]),
                parse_eps(eps),
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
