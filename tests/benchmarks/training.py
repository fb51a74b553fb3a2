"""One epoch of ours against one as people write it, in the same run; the ratio is the claim.

    python tests/benchmarks/training.py > tests/benchmarks/training.txt

Plain: prepared float32 tensors (N, 3, S, S) through a DataLoader, fp32, AdamW, then one pass over the training set for its
accuracy and one over the validation set. Ours: `uint8` native images, precision by the probe, channels-last, no extra pass.
Neither augments. Both train the same network on the same images; the adversarial step has `torchattacks.PGD` around it.
"""

import argparse
import copy
import os
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import training  # noqa: E402
from utils.backbones import build_model  # noqa: E402
from utils.config import make_config  # noqa: E402
from utils.data import ImageSet, pixels  # noqa: E402
from utils.utils_funcs import hardware  # noqa: E402

DEVICE = torch.device("cpu")


def random_set(count: int, seed: int) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 1, 128, 128), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % 4, torch.arange(count), torch.zeros(count, dtype=torch.long),
                    [f"{row:064x}" for row in range(count)], "random pixels")


def accuracy_pass(body, loader) -> None:
    body.eval()
    with torch.no_grad():
        sum(int((body(images).argmax(1) == labels).sum()) for images, labels in loader)


def plain_epoch(model, train: ImageSet, validation: ImageSet, batch: int, attack_steps: int = 0) -> float:
    body = copy.deepcopy(model.body)
    optimizer, loss = torch.optim.AdamW(body.parameters(), 3e-4), torch.nn.CrossEntropyLoss()
    with torch.no_grad():
        loaders = [DataLoader(TensorDataset(model.pixels_to_input(pixels(part.images)).contiguous(), part.labels), batch, shuffle=True)
                   for part in (train, validation)]
    start = time.perf_counter()
    body.train()
    for images, labels in loaders[0]:
        if attack_steps:
            import torchattacks

            images = torchattacks.PGD(body, eps=4 / 255, alpha=4 / 255, steps=attack_steps)(images.clamp(0, 1), labels)
            body.train()
        optimizer.zero_grad()
        loss(body(images), labels).backward()
        optimizer.step()
    if attack_steps:  # the step alone is compared
        return time.perf_counter() - start
    for loader in loaders:
        accuracy_pass(body, loader)
    return time.perf_counter() - start


def our_epoch(trainer, adversarial: bool) -> float:
    start = time.perf_counter()
    trainer._pass(len(trainer.history)) if adversarial else trainer.epoch()
    return time.perf_counter() - start


def compare(model: str, size: int | None, images: int, batch: int, repeats: int) -> None:
    adversarial = model.endswith("_atk")
    config = make_config("cpu", model, input_size=size, slice_stride=1, augmentation=0.0, batch_size=batch, precision="auto",
                         pretrained=False, eps_ramp=0.0, train_steps=2)
    train, validation = random_set(images, 1), random_set(images // 4, 2)
    network = build_model(model, pretrained=False, input_size=size)
    trainer = training._Trainer(train, validation, config, DEVICE)
    plain, ours = [], []
    for _ in range(repeats):  # in turns, so that another process's load falls on both
        plain.append(plain_epoch(network, train, validation, batch, 2 if adversarial else 0))
        ours.append(our_epoch(trainer, adversarial))
    what = "PGD-2 training pass" if adversarial else "epoch with validation"
    print(f"{model:<16} {size or 'native':>6} px  {what:<22} plain {min(plain):6.1f} s   ours {min(ours):6.1f} s   ratio {min(plain) / min(ours):.2f}"
          f"   ({trainer.precision})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    os.environ["ALZHEIMER_QUIET"] = "1"
    print(f"{hardware()}, {torch.get_num_threads()} thread(s), {options.images} images of 128 px, batches of {options.batch}, best of {options.repeats}")
    for model in ("Resnet", "Dinov2", "Efficientnet"):
        for size in (224, None):
            if not options.only or model in options.only:
                compare(model, size, options.images, options.batch, options.repeats)
    if not options.only or "Resnet_atk" in options.only:
        compare("Resnet_atk", None, options.images, options.batch, options.repeats)


if __name__ == "__main__":
    main()
