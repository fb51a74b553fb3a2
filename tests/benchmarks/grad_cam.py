"""What a full Grad-CAM set costs, compared with the forward and backward passes that it needs, and
its peak memory by batch size.

    python tests/benchmarks/grad_cam.py --models Resnet Efficientnet Dinov2 --rounds 1
    python tests/benchmarks/grad_cam.py --images 64

The first prints the committed `grad_cam.txt`; the second measures ResNet-34 in minutes.

Two costs over the same images in the same batches, in float32: `needed` is one forward pass and one
backward pass from the logits down to the explained layer, which no gradient map can do without;
`full` goes on down to the pixels, as one step of an attack does. A map set may take 3 times
`needed` (exit status 1 if it does not). The rounds of the three are interleaved, so that a machine
that is not quiet slows all alike. Nothing is resumed: a run is measured from its start.

Memory is the process's high-water mark above where it was before the call, without the maps that it
returns; each in a process of its own, for freed memory is not given back. It must grow with the
batch and stay when there are more images.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.backbones import PixelClassifier, build_model  # noqa: E402
from utils.explain.cells import target_layer  # noqa: E402
from utils.explain.maps import explain  # noqa: E402
from utils.utils_funcs import BACKBONES, choose_device, hardware, set_up_process  # noqa: E402

LIMIT, SIDE = 3.0, 128


def passes(model: PixelClassifier, images: torch.Tensor, batch: int, *, to_pixels: bool) -> None:
    """One forward pass and one backward pass of the predicted logit, to the explained layer or on
    to the pixels."""
    hook = None
    if not to_pixels:
        hook = target_layer(model).register_forward_hook(
            lambda _module, _inputs, output: output.detach().requires_grad_()
        )
    try:
        for part in images.split(batch):
            logits = model(part.clone().requires_grad_(to_pixels))
            logits.gather(1, logits.argmax(1, keepdim=True)).sum().backward()
    finally:
        if hook is not None:
            hook.remove()


def seconds(work: Callable[[torch.Tensor], object], images: torch.Tensor) -> float:
    """How long this work on the images takes, all of its GPU kernels included."""
    start = time.perf_counter()
    work(images)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def fresh(name: str) -> PixelClassifier:
    """An untrained backbone; none of the three costs needs the gradient of a weight."""
    return build_model(name, pretrained=False).to(choose_device()).requires_grad_(False)


def random_images(count: int) -> torch.Tensor:
    """Images (count, 1, SIDE, SIDE) in [0, 1], on the device."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 1, SIDE, SIDE, generator=generator).to(choose_device())


def time_row(name: str, method: str, count: int, batch: int, rounds: int) -> tuple[str, float]:
    """A printed row and the ratio of a map set to the passes it needs: medians over rounds, the
    ratio taken within each."""
    model, images = fresh(name), random_images(count)
    kinds: dict[str, Callable[[torch.Tensor], object]] = {
        "needed": lambda part: passes(model, part, batch, to_pixels=False),
        "full": lambda part: passes(model, part, batch, to_pixels=True),
        "maps": lambda part: explain(model, part, method=method, batch_size=batch),
    }
    for work in kinds.values():
        work(images[:batch])  # allocations and kernel choices of the first call belong to none
    times = [{kind: seconds(work, images) for kind, work in kinds.items()} for _ in range(rounds)]
    each = {kind: 1000 * statistics.median(row[kind] for row in times) / count for kind in kinds}
    needed, full = (
        statistics.median(row["maps"] / row[kind] for row in times) for kind in ("needed", "full")
    )
    columns = "".join(f"{each[kind]:>10.1f}" for kind in kinds)
    return f"{name:<14}{method:<11}{columns}{needed:>14.2f}{full:>12.2f}", needed


def peak_mib(name: str, method: str, count: int, batch: int) -> float:
    """Peak MiB that explaining takes above the model, the images and the maps returned (Linux or a
    GPU; else NaN)."""
    model, images = fresh(name), random_images(count)
    # What is imported and set up once does not depend on the batch.
    explain(model, images[:1], method=method)
    returned = count * SIDE**2 * 4 / 2**20
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        explain(model, images, method=method, batch_size=batch)
        return (torch.cuda.max_memory_allocated() - before) / 2**20 - returned
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to now
    except OSError:
        return float("nan")
    before = resident("VmHWM")
    explain(model, images, method=method, batch_size=batch)
    return resident("VmHWM") - before - returned


def resident(field: str) -> float:
    """A field of this process's memory, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field))
    return int(line.split()[1]) / 1024


def memory_table(name: str, method: str, batches: list[int]) -> str:
    """Peak memory by batch size, of two and of six batches of images."""
    lines = [
        f"{name}, {method}: peak MiB above model, images and maps",
        f"{'batch':>8}{'2 batches':>14}{'6 batches':>14}",
    ]
    for batch in batches:
        peaks = []
        for count in (2 * batch, 6 * batch):
            command = [sys.executable, __file__, "--measure", name, method, str(count), str(batch)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            peaks.append(float(done.stdout.split()[-1]))
        lines.append(f"{batch:>8}{peaks[0]:>14.0f}{peaks[1]:>14.0f}")
    return "\n".join(lines)


def main() -> int:
    """Prints both tables. Returns 1 where a map set costs more than `LIMIT` allows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1279)
    parser.add_argument("--models", nargs="+", default=["Resnet"], choices=BACKBONES)
    parser.add_argument(
        "--methods", nargs="+", default=["gradcam"], choices=("gradcam", "gradcam++", "layercam")
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--batches",
        type=int,
        nargs="*",
        default=[8, 16, 32, 64],
        help="batch sizes of the memory table; none skips it",
    )
    parser.add_argument(
        "--measure", nargs=4, metavar=("MODEL", "METHOD", "IMAGES", "BATCH"), help=argparse.SUPPRESS
    )
    chosen = parser.parse_args()
    if chosen.measure:
        # Without `set_up_process`, which keeps freed memory: it would count as taken before.
        name, method, count, batch = chosen.measure
        print(peak_mib(name, method, int(count), int(batch)))
        return 0
    set_up_process()
    print(
        f"{hardware()}, {torch.get_num_threads()} threads, {chosen.images} images of {SIDE} px, "
        f"batch {chosen.batch}, float32, median of {chosen.rounds} rounds, random weights"
    )
    print(
        f"{'backbone':<14}{'method':<11}{'needed':>10}{'full':>10}{'maps':>10}{'maps/needed':>14}"
        f"{'maps/full':>12}   (first three: ms per image)"
    )
    ratios = []
    for name in chosen.models:
        for method in chosen.methods:
            row, ratio = time_row(name, method, chosen.images, chosen.batch, chosen.rounds)
            print(row, flush=True)
            ratios.append(ratio)
    verdict = "holds" if max(ratios) <= LIMIT else "DOES NOT HOLD"
    print(f"limit: maps/needed at most {LIMIT:g}: {verdict}", flush=True)
    for name in chosen.models if chosen.batches else []:
        print("\n" + memory_table(name, chosen.methods[0], chosen.batches), flush=True)
    return int(max(ratios) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
