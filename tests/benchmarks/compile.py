"""Does `torch.compile` pay? Seconds of a training step and of an attack step, eager and compiled, and what compiling costs.

    python tests/benchmarks/compile.py > tests/benchmarks/compile.txt

Break-even: so many steps must follow before the time that compiling took is won back. A unit of profile `cpu` has about 420
training steps, and its attacks come in batches of many sizes, each of which is compiled again or runs slower dynamic code.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.backbones import build_model  # noqa: E402
from utils.utils_funcs import BACKBONES, hardware  # noqa: E402

BATCH = 32


def timed(step: Callable[[], None], repeats: int) -> tuple[float, float]:
    """(seconds of the first call, of the fastest later one)."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds[0], min(seconds[1:])


def steps_of(name: str, compiled: bool) -> dict[str, Callable[[], None]]:
    """A training step (gradients of all weights) and an attack step (gradient of the pixels, eval mode) of one batch."""
    model = build_model(name, pretrained=False)
    forward = torch.compile(model) if compiled else model
    images, labels = torch.rand(BATCH, 1, 128, 128), torch.arange(BATCH) % 4

    def train() -> None:
        model.train().requires_grad_(True).zero_grad()
        F.cross_entropy(forward(images), labels).backward()

    def attack() -> None:
        model.eval().requires_grad_(False)
        torch.autograd.grad(F.cross_entropy(forward(pixels), labels), pixels)

    pixels = images.clone().requires_grad_()
    return {"train": train, "attack": attack}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=BACKBONES, choices=BACKBONES)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # what a reader's first run costs
    print(f"{hardware()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, batches of {BATCH}, float32, native size")
    print(f"{'backbone':<14}{'step':<8}{'eager':>9}{'compiled':>10}{'ratio':>8}{'compiling':>12}{'break-even':>13}   (ms an image; s; steps)")
    for name in options.models:
        eager = {kind: timed(step, options.repeats)[1] for kind, step in steps_of(name, False).items()}
        for kind, step in steps_of(name, True).items():
            torch.compiler.reset()
            first, fastest = timed(step, options.repeats)
            saved = eager[kind] - fastest
            steps = f"{(first - fastest) / saved:,.0f}" if saved > 0 else "never"
            print(f"{name:<14}{kind:<8}{1000 * eager[kind] / BATCH:>9.1f}{1000 * fastest / BATCH:>10.1f}{eager[kind] / fastest:>8.2f}"
                  f"{first - fastest:>12.0f}{steps:>13}", flush=True)


if __name__ == "__main__":
    main()
