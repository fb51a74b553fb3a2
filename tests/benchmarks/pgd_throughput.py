"""How many images a second our PGD-20 attacks, against `torchattacks.PGD`, and is it no weaker?

    python tests/benchmarks/pgd_throughput.py --raw RAW --models Resnet:64 Resnet_atk:64 --epochs 6
    python tests/benchmarks/pgd_throughput.py --raw RAW --models Dinov2:70 Dinov2_atk:70 --epochs 5
    python tests/benchmarks/pgd_throughput.py --raw RAW --checkpoints FILE …

`pgd_throughput.txt` holds the output of the first two, and of the second with `--precision bf16`,
which lets our search run in bfloat16. Without --raw the data is the phantom cohort.

Same model, same images, same eps, step and number of steps, random start. Both take their turns in
the same run, `--rounds` times; the ratio is that of the medians. Success counts in float32 alone,
for both. Ours leaves an image alone once it is misclassified, so in float32 its gain is at most one
over the share that is robust, which is printed as the bound. Without checkpoints, models are
trained first, as in `attack_suite.py`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torchattacks
from attack_suite import robust_model, test_images
from torch import Tensor, nn

from utils.attacks.base import ATTACKS, Precision
from utils.backbones import load_model
from utils.config import parse_eps
from utils.evaluation.predictions import as_pixels
from utils.prediction import predict
from utils.utils_funcs import hardware

STEPS = 20


def timed(attack: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What an attack returns and the processor seconds it took (a shared machine's clock says
    little)."""
    started = time.process_time()
    found = attack()
    return found, time.process_time() - started


def compare(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    eps: float,
    batch: int,
    rounds: int,
    precision: Precision,
) -> str:
    def ours() -> Tensor:
        parts = zip(pixels.split(batch), labels.split(batch), strict=True)
        return torch.cat(
            [
                ATTACKS["pgd"](
                    model, x, y, eps, steps=STEPS, step_size=eps / 4, precision=precision
                )
                for x, y in parts
            ]
        )

    def theirs() -> Tensor:
        attack = torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=STEPS)
        return torch.cat(
            [attack(x, y) for x, y in zip(pixels.split(batch), labels.split(batch), strict=True)]
        )

    turns = [(timed(ours), timed(theirs)) for _ in range(rounds)]
    seconds = [statistics.median(turn[side][1] for turn in turns) for side in (0, 1)]
    # The weakest of our rounds against the strongest of theirs, whose start is another draw each
    # time.
    robust = [
        [
            float((predict(model, turn[side][0]).argmax(1) == labels).float().mean())
            for turn in turns
        ]
        for side in (0, 1)
    ]
    bound = f" (bound {_bound(max(robust[0]))})" if precision == "fp32" else ""
    return (
        f"  eps {eps * 255:.0f}/255: ours {len(labels) / seconds[0]:6.2f} images/s, "
        f"{max(robust[0]):6.1%} robust; torchattacks {len(labels) / seconds[1]:6.2f} images/s, "
        f"{min(robust[1]):6.1%} robust; "
        f"ratio {seconds[1] / seconds[0]:.2f}{bound}"
    )


def _bound(robust: float) -> str:
    return f"{1 / robust:.2f}" if robust else "none, no image is robust"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eps", nargs="+", default=["2/255", "4/255", "8/255"])
    parser.add_argument(
        "--models", nargs="+", default=["Resnet_atk:64", "Dinov2_atk:70"], help="name:pixels"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of our search; success counts in float32",
    )
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument(
        "--checkpoints", nargs="*", default=[], help="measure these instead of --models"
    )
    parser.add_argument("--raw", help="folder or zip of the real cohort; the phantom without it")
    options = parser.parse_args()
    print(
        f"PGD-{STEPS}, n = {options.n}, batches of {options.batch}, our search in "
        f"{options.precision}, theirs in fp32, median of {options.rounds} rounds, "
        f"{torch.get_num_threads()} thread(s), {hardware()}, "
        f"data: {'real' if options.raw else 'phantom'}"
    )
    wanted = [(load_model(path), 128) for path in options.checkpoints]
    for spec in [] if wanted else options.models:
        name, size = spec.split(":")
        wanted.append(
            (robust_model(name, int(size), 4 / 255, options.epochs, options.raw), int(size))
        )
    for model, size in wanted:
        images, labels, _ = test_images(size, options.n, options.raw)
        pixels, truth = as_pixels(images), torch.as_tensor(labels)
        clean = (predict(model, pixels).argmax(1) == truth).float().mean()
        print(
            f"{model.name} on images of {pixels.shape[-1]} px, seen at "
            f"{model.input_size or pixels.shape[-1]} px, clean accuracy {clean:.1%}",
            flush=True,
        )
        for eps in options.eps:
            print(
                compare(
                    model,
                    pixels,
                    truth,
                    parse_eps(eps),
                    options.batch,
                    options.rounds,
                    options.precision,
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
