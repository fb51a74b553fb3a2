"""How long our suite takes compared with official AutoAttack, and whether any image that AutoAttack
misclassifies is robust against ours.

The first command prints what `attack_suite.txt` holds, the second the same on the phantom cohort:

    python tests/benchmarks/attack_suite.py --raw RAW --n 128 512
    python tests/benchmarks/attack_suite.py [--n 128] [--size 32]
    python tests/benchmarks/attack_suite.py --raw RAW --checkpoint FILE

Same model, same images, same eps, float32. Without a checkpoint a ResNet-34 that sees the images at
`--size` is trained adversarially first, on the training patients of `patient` fold 0 (or on the
phantom), a few minutes on two cores; it is kept under runs/. It is attacked on test patients, in
native pixels.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.attacks.training import perturb_for_training  # noqa: E402
from utils.backbones import PixelClassifier, build_model, load_model, save_model  # noqa: E402
from utils.config import RunConfig, make_config, parse_eps  # noqa: E402
from utils.data import ImageSet, load_set  # noqa: E402
from utils.evaluation.plan import suite_plan  # noqa: E402
from utils.evaluation.predictions import (  # noqa: E402
    as_pixels,
    misclassified,
    stratified_sample,
    worst_case,
)
from utils.evaluation.suite import evaluate_suite  # noqa: E402
from utils.phantom import draw_cohort  # noqa: E402
from utils.pipeline.workspace import open_workspace  # noqa: E402
from utils.prediction import predict  # noqa: E402
from utils.training import fit  # noqa: E402
from utils.utils_funcs import hardware  # noqa: E402


def phantom_images(size: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images uint8 (N, 1, size, size), labels and patients, all classes equally."""
    cohort = draw_cohort(
        patients=(12, 12, 12, 12), slices=8, size=size, synthetic=0, duplicates=0, seed=seed
    )
    return (
        np.stack(cohort.images)[:, None],
        np.asarray(cohort.label, np.int64),
        np.asarray(cohort.patient),
    )


def real_set(raw: str, part: str) -> ImageSet:
    """One part of `patient` fold 0; the line about the workspace is not this benchmark's output."""
    with contextlib.redirect_stdout(sys.stderr):
        return load_set(open_workspace("cpu", raw).sets, "patient", 0, part)


def robust_model(
    name: str, size: int, eps: float, epochs: int, raw: str | None = None
) -> PixelClassifier:
    """A model trained with two-step PGD on the training patients of `patient` fold 0, or on the
    phantom; kept for the next time."""
    path = (
        ROOT / "runs" / "benchmarks" / f"{name}_{size}_{epochs}{'_real' if raw else ''}.safetensors"
    )
    if raw:
        sets = {part: real_set(raw, part) for part in ("train", "validation")}
        config = make_config(
            "cpu", name, input_size=size, epochs=epochs, train_eps=eps, slice_stride=2
        )
        return fit(sets["train"], sets["validation"], config, path, torch.device("cpu")).load()
    if path.is_file():
        return load_model(path)
    images, labels, _ = phantom_images(size, seed=1)
    pixels, truth = as_pixels(images), torch.as_tensor(labels)
    torch.manual_seed(0)
    model = build_model(name, pretrained=False, input_size=size)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4, weight_decay=0.01)
    for epoch in range(epochs):
        ramp, losses = eps * min(1.0, 2 * epoch / epochs), []
        for part in torch.randperm(len(pixels)).split(32):
            model.eval()
            adversarial = perturb_for_training(model, pixels[part], truth[part], ramp, steps=2)
            model.train()
            loss = torch.nn.functional.cross_entropy(model(adversarial), truth[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        print(
            f"  epoch {epoch + 1}/{epochs}: adversarial loss {np.mean(losses):.3f}",
            file=sys.stderr,
            flush=True,
        )
    save_model(model.eval(), path)
    return model.eval()


def test_images(
    size: int, count: int, raw: str | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, labels and patients: the same stratified test slices of `patient` fold 0, or of
    another phantom cohort."""
    if raw:
        test = real_set(raw, "test")
        images, labels, patients = test.images.numpy(), test.labels.numpy(), test.patients.numpy()
    else:
        images, labels, patients = phantom_images(size, seed=2)
    chosen = stratified_sample(labels, patients, count)
    return images[chosen], labels[chosen].astype(np.int64), patients[chosen]


def ours(
    model: PixelClassifier,
    images: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    config: RunConfig,
) -> np.ndarray:
    """Which images are robust against the four-class part of suite `standard`, bool (N,)."""
    plan = [
        stage
        for stage in suite_plan(config)
        if stage.view == "four" and stage.attack not in ("pgd_clinical", "kryptonite")
    ]
    result = evaluate_suite(model, images, labels, patients, config, stages=plan)
    for (_, name), meta in result.meta.items():
        print(
            f"    {name:<14} on {meta['n_attacked']:>4} images: "
            f"{meta['standing_after']:6.1%} robust, "
            f"{meta['seconds']:7.1f} s"
        )
    return worst_case(result.logits, labels, config.headline_eps) & ~misclassified(
        result.clean_logits, labels
    )


def official(
    model: PixelClassifier, images: np.ndarray, labels: np.ndarray, eps: float, batch: int
) -> np.ndarray:
    """Which images are robust against AutoAttack `standard` as its authors run it, with three
    target classes, bool (N,)."""
    from pyautoattack import AutoAttack

    attack = AutoAttack(model, norm="Linf", eps=eps, version="standard", seed=0)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = 3
    pixels, truth = as_pixels(images), torch.as_tensor(labels)
    found = attack.run_standard_evaluation(pixels, truth, batch_size=batch)[0]
    return (
        torch.stack([predict(model, x).argmax(1) == truth for x in (pixels, found)]).all(0).numpy()
    )


def compare(model: PixelClassifier, count: int, options: argparse.Namespace) -> None:
    images, labels, patients = test_images(options.size, count, options.raw)
    config = make_config(
        "cpu",
        "Resnet_atk",
        suite="standard",
        eps=(options.eps,),
        headline_eps=options.eps,
        attack_batch=options.batch,
    )
    answers = predict(model, as_pixels(images)).argmax(1).numpy()
    seen = f", seen at {model.input_size} px" if model.input_size else ""
    print(
        f"\n{model.name} at {images.shape[-1]} px{seen}, "
        f"data: {'real' if options.raw else 'phantom'}, eps {options.eps}, "
        f"n = {len(labels)} of {len(np.unique(patients))} patients, batches of {options.batch}, "
        f"float32, {torch.get_num_threads()} thread(s), {hardware()}\n"
        f"clean accuracy {(answers == labels).mean():.1%}, "
        f"answers by class: {np.bincount(answers, minlength=4).tolist()}",
        flush=True,
    )
    wall, cpu = time.perf_counter(), time.process_time()
    ours_robust = ours(model, images, labels, patients, config)
    our_wall, our_cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(
        f"ours, checks included: {ours_robust.mean():.1%} robust, {our_wall:.0f} s "
        f"({our_cpu:.0f} s of processor time)",
        flush=True,
    )
    wall, cpu = time.perf_counter(), time.process_time()
    official_robust = official(model, images, labels, parse_eps(options.eps), options.batch)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(
        f"official AutoAttack standard: {official_robust.mean():.1%} robust, {wall:.0f} s "
        f"({cpu:.0f} s of processor time)"
    )
    print(
        f"robust against ours alone: {int((ours_robust & ~official_robust).sum())}; "
        f"robust against the official one alone: {int((official_robust & ~ours_robust).sum())}"
    )
    print(
        f"time, ours / official: {our_wall / wall:.2f} by the clock, {our_cpu / cpu:.2f} by "
        "processor time (at most 0.33 wanted)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, nargs="+", default=[128])
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--eps", default="4/255")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--checkpoint")
    parser.add_argument("--raw", help="folder or zip of the real cohort; the phantom without it")
    options = parser.parse_args()
    os.environ["ALZHEIMER_QUIET"] = "1"
    model = (
        load_model(options.checkpoint)
        if options.checkpoint
        else robust_model(
            "Resnet_atk", options.size, parse_eps(options.eps), options.epochs, options.raw
        )
    )
    for count in options.n:
        compare(model, count, options)


if __name__ == "__main__":
    main()
