"""How many images a second our PGD-20 attacks, against `torchattacks.PGD`, and that it is no weaker.

    python tests/benchmarks/pgd_throughput.py --raw RAW --models Resnet_atk:64 --epochs 6      what `pgd_throughput.txt` holds, with
                                                                 Dinov2_atk:70 --epochs 5
    python tests/benchmarks/pgd_throughput.py [--n 64]                                         the same on the phantom cohort
    python tests/benchmarks/pgd_throughput.py --raw RAW --checkpoints FILE …

Same model, same images, same eps, step and number of steps, float32, random start. Ours leaves an image alone once it
has fallen, so the gain depends on how many stand, and is measured at several eps. It is smaller on tiny images, where a
full batch is cheaper per image than what is left of one. Without checkpoints, models are trained adversarially first,
as in `attack_suite.py`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torchattacks
from attack_suite import robust_model, test_images
from torch import Tensor, nn

from utils.attacks import ATTACKS
from utils.backbones import load_model
from utils.robustness import as_pixels, predict_logits
from utils.utils_funcs import hardware

STEPS = 20


def timed(attack: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What an attack returns and the processor seconds it took (a shared machine's clock says little)."""
    started = time.process_time()
    found = attack()
    return found, time.process_time() - started


def compare(model: nn.Module, pixels: Tensor, labels: Tensor, eps: float, batch: int) -> str:
    def ours() -> Tensor:
        parts = zip(pixels.split(batch), labels.split(batch), strict=True)
        return torch.cat([ATTACKS["pgd"](model, x, y, eps, steps=STEPS, step_size=eps / 4) for x, y in parts])

    def theirs() -> Tensor:
        attack = torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=STEPS)
        return torch.cat([attack(x, y) for x, y in zip(pixels.split(batch), labels.split(batch), strict=True)])

    (ours_made, our_seconds), (theirs_made, their_seconds) = timed(ours), timed(theirs)
    standing = [(predict_logits(model, made).argmax(1) == labels).float().mean() for made in (ours_made, theirs_made)]
    return (f"  eps {eps * 255:.0f}/255: ours {len(labels) / our_seconds:6.2f} images/s, {standing[0]:6.1%} stand; "
            f"torchattacks {len(labels) / their_seconds:6.2f} images/s, {standing[1]:6.1%} stand; "
            f"ratio {their_seconds / our_seconds:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--models", nargs="+", default=["Resnet_atk:64", "Dinov2_atk:70"], help="name:pixels")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--checkpoints", nargs="*", default=[], help="measure these instead of --models")
    parser.add_argument("--raw", help="folder or zip of the real cohort; the phantom without it")
    options = parser.parse_args()
    print(f"PGD-{STEPS}, n = {options.n}, batches of {options.batch}, float32, {torch.get_num_threads()} thread(s), "
          f"{hardware()}, data: {'real' if options.raw else 'phantom'}")
    wanted = [(load_model(path), 128) for path in options.checkpoints]
    for spec in [] if wanted else options.models:
        name, size = spec.split(":")
        wanted.append((robust_model(name, int(size), 4 / 255, options.epochs, options.raw), int(size)))
    for model, size in wanted:
        images, labels, _ = test_images(size, options.n, options.raw)
        pixels, truth = as_pixels(images), torch.as_tensor(labels)
        clean = (predict_logits(model, pixels).argmax(1) == truth).float().mean()
        print(f"{model.name} on images of {pixels.shape[-1]} px, seen at {model.input_size or pixels.shape[-1]} px, "
              f"clean accuracy {clean:.1%}", flush=True)
        for eps in (2 / 255, 4 / 255, 8 / 255):
            print(compare(model, pixels, truth, eps, options.batch), flush=True)


if __name__ == "__main__":
    main()
