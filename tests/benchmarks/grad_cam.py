"""What Grad-CAM maps cost beside one forward and backward pass: `python tests/benchmarks/grad_cam.py [COUNT]`.

The maps may take three times one forward and one backward pass to the pixels over the same images in the same batches.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.backbones import build_model  # noqa: E402
from utils.grad_cam import explain  # noqa: E402
from utils.utils_funcs import BACKBONES, choose_device, hardware  # noqa: E402

BATCH, ROUNDS = 32, 3


def seconds(work: Callable[[], object]) -> float:
    """Best of `ROUNDS`, after one unmeasured run: the machine is rarely quiet."""
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main(count: int) -> None:
    device = choose_device()
    images = torch.rand(count, 1, 128, 128, device=device)
    print(f"{hardware()}, {torch.get_num_threads()} threads, {count} images of 128 px, batch {BATCH}, float32")
    print(f"{'backbone':14}{'forward+backward':>18}{'maps':>10}{'ratio':>8}   (ms per image)")
    for name in BACKBONES:
        model = build_model(name, pretrained=False).to(device).requires_grad_(False)  # no weight gradients

        def forward_backward() -> None:
            for batch in images.split(BATCH):
                pixels = batch.clone().requires_grad_()
                logits = model(pixels)
                logits.gather(1, logits.argmax(1, keepdim=True)).sum().backward()

        base, maps = seconds(forward_backward), seconds(lambda: explain(model, images, batch_size=BATCH))
        print(f"{name:14}{1000 * base / count:18.1f}{1000 * maps / count:10.1f}{maps / base:8.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1279)
