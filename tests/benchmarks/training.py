"""One epoch of ours against one as people write it, in the same run; the ratio is the claim.

    python tests/benchmarks/training.py > tests/benchmarks/training.txt

Plain: prepared float32 tensors (N, 3, S, S) through a DataLoader, fp32, AdamW, then one pass over
the training set for its accuracy and one over the validation set. Ours: `uint8` native images,
precision by the probe, channels-last, no extra pass. Neither augments. Both train the same
architecture on the same images, the plain loop as its library delivers it; the adversarial step has
`torchattacks.PGD` around it.
Processor seconds, since a shared machine's clock says little. Each comparison runs in a new
process, in which the plain loop comes first: what ours changes for the whole process
(`set_up_process`) must not help the other.

    python tests/benchmarks/training.py --scores --raw RAW

says what bfloat16 does to validation scores: both precisions, three seeds, on the real patients of
`patient` fold 0, seen at 64 px (DINOv2: 70), one in four validation slices.
"""

import argparse
import copy
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import training  # noqa: E402
from utils.backbones import build_model  # noqa: E402
from utils.config import make_config  # noqa: E402
from utils.data import ImageSet, every_nth, pixels  # noqa: E402
from utils.utils_funcs import hardware, set_up_process  # noqa: E402

DEVICE = torch.device("cpu")


def random_set(count: int, seed: int) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 1, 128, 128), generator=generator, dtype=torch.uint8)
    return ImageSet(
        images,
        torch.arange(count),
        torch.arange(count) % 4,
        torch.arange(count),
        torch.zeros(count, dtype=torch.long),
        [f"{row:064x}" for row in range(count)],
        "random pixels",
        pixels=[f"{row:064x}" for row in range(count)],
        cohort_sha256="",
    )


def accuracy_pass(body, loader) -> None:
    body.eval()
    with torch.no_grad():
        sum(int((body(images).argmax(1) == labels).sum()) for images, labels in loader)


def as_delivered(model) -> torch.nn.Module:
    """The backbone as its library delivers it: timm's network, or that of transformers with its
    attention."""
    name = {"Resnet": "resnet34", "Efficientnet": "efficientnet_b0"}.get(
        model.name.removesuffix("_atk")
    )
    if name is not None:
        return timm.create_model(name, num_classes=4)
    body = copy.deepcopy(model.body)
    body.backbone.set_attn_implementation("sdpa")
    return body


def plain_epoch(
    model, train: ImageSet, validation: ImageSet, batch: int, attack_steps: int = 0
) -> float:
    body = as_delivered(model)
    optimizer, loss = torch.optim.AdamW(body.parameters(), 3e-4), torch.nn.CrossEntropyLoss()
    with torch.no_grad():
        loaders = [
            DataLoader(
                TensorDataset(model.pixels_to_input(pixels(part.images)).contiguous(), part.labels),
                batch,
                shuffle=True,
            )
            for part in (train, validation)
        ]
    start = time.process_time()
    body.train()
    for images, labels in loaders[0]:
        if attack_steps:
            import torchattacks

            images = torchattacks.PGD(body, eps=4 / 255, alpha=4 / 255, steps=attack_steps)(
                images.clamp(0, 1), labels
            )
            body.train()
        optimizer.zero_grad()
        loss(body(images), labels).backward()
        optimizer.step()
    if attack_steps:  # the step alone is compared
        return time.process_time() - start
    for loader in loaders:
        accuracy_pass(body, loader)
    return time.process_time() - start


def our_epoch(trainer, adversarial: bool) -> float:
    start = time.process_time()
    trainer.train_pass(len(trainer.history)) if adversarial else trainer.epoch()
    return time.process_time() - start


def compare(model: str, size: int | None, images: int, batch: int, repeats: int) -> None:
    adversarial = model.endswith("_atk")
    config = make_config(
        "cpu",
        model,
        input_size=size,
        slice_stride=1,
        augmentation=0.0,
        batch_size=batch,
        precision="auto",
        pretrained=False,
        eps_ramp=0.0,
        train_steps=2,
    )
    train, validation = random_set(images, 1), random_set(images // 4, 2)
    network = build_model(
        model, pretrained=False, input_size=size
    )  # prepares the plain loop's images
    plain = [
        plain_epoch(network, train, validation, batch, 2 if adversarial else 0)
        for _ in range(repeats)
    ]
    set_up_process()
    trainer = training.Trainer(train, validation, config, DEVICE)
    ours = [our_epoch(trainer, adversarial) for _ in range(repeats)]
    what = "PGD-2 training pass" if adversarial else "epoch with validation"
    print(
        f"{model:<16} {size or 'native':>6} px  {what:<22} plain {min(plain):6.1f} s   "
        f"ours {min(ours):6.1f} s   ratio {min(plain) / min(ours):.2f}   ({trainer.precision})",
        flush=True,
    )


def scores(model: str, size: int | None, raw: str, images: int, epochs: int, seeds: int) -> None:
    """Best validation scores of both precisions over seeds, on `patient` fold 0 of real data."""
    from utils.pipeline.workspace import load_sets, open_workspace

    workspace, found = open_workspace("cpu", raw), {}
    for precision in ("fp32", "bf16"):
        for seed in range(seeds):
            config = make_config(
                "cpu",
                model,
                input_size=size,
                max_train=images,
                epochs=epochs,
                precision=precision,
                pretrained=False,
                seed=seed,
            )
            sets = load_sets(workspace, config)
            sets["validation"] = sets["validation"].pick(every_nth(sets["validation"], 4))
            with tempfile.TemporaryDirectory() as folder:
                fit = training.fit(
                    sets["train"],
                    sets["validation"],
                    config,
                    Path(folder) / "unit.safetensors",
                    DEVICE,
                )
            best = fit.history[fit.best_epoch - 1]
            found.setdefault(precision, []).append(
                (best["validation_loss"], best["validation_balanced_accuracy"])
            )
    for place, name in enumerate(("validation loss", "balanced accuracy")):
        values = {precision: [row[place] for row in rows] for precision, rows in found.items()}
        means = {precision: statistics.mean(row) for precision, row in values.items()}
        noise = max(statistics.stdev(row) for row in values.values())
        texts = {
            precision: " ".join(f"{value:.3f}" for value in row)
            for precision, row in values.items()
        }
        print(
            f"{model:<14} {size or 'native':>6} px  {name:<18} fp32 {texts['fp32']}   "
            f"bf16 {texts['bf16']}   bf16 - fp32 {means['bf16'] - means['fp32']:+.3f}   "
            f"seeds differ by {noise:.3f} (standard deviation)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument(
        "--scores",
        action="store_true",
        help="compare validation scores of both precisions instead of times",
    )
    parser.add_argument("--raw", help="folder or zip of the real cohort, for --scores")
    parser.add_argument("--train", type=int, default=1920)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    os.environ["ALZHEIMER_QUIET"] = "1"
    wanted = options.only or [
        "Resnet",
        "Dinov2",
        "Efficientnet",
        *([] if options.scores else ["Resnet_atk"]),
    ]
    head = f"{hardware()}, {torch.get_num_threads()} thread(s)"
    if options.scores:
        print(
            f"{head}, {options.train} training slices (every fourth an epoch), "
            f"{options.epochs} epochs, {options.seeds} seeds, random init, best epoch",
            flush=True,
        )
        for model in wanted:
            scores(
                model,
                70 if model == "Dinov2" else 64,
                options.raw,
                options.train,
                options.epochs,
                options.seeds,
            )
        return
    print(
        f"{head}, {options.images} images of 128 px, batches of {options.batch}, "
        f"best of {options.repeats}, processor seconds",
        flush=True,
    )
    for model in wanted:
        for size in (None,) if model.endswith("_atk") else (224, None):
            process = multiprocessing.get_context("spawn").Process(
                target=compare, args=(model, size, options.images, options.batch, options.repeats)
            )
            process.start()
            process.join()
            if process.exitcode:
                sys.exit(
                    f"{model} at {size or 'native'} px failed with exit code {process.exitcode}."
                )


if __name__ == "__main__":
    main()
