"""The explain stage of a run: what attacks do to a slice, Grad-CAM maps, and how far they can be
trusted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from utils import data, grad_cam, report, training
from utils.attacks import ATTACKS
from utils.config import RunConfig, parse_eps
from utils.drawing import save_figure
from utils.evaluation.measures import attack_images
from utils.evaluation.plan import headline_of
from utils.prediction import predict
from utils.report.model_figures import attacked_images_figure
from utils.utils_funcs import CLASSES, atomic_path, choose_device

#: The attacks whose images are shown, with their budgets; eps is the headline one where none is
#: given.
SHOWN_ATTACKS: dict[str, dict[str, Any]] = {
    "noise": {},
    "fgsm": {},
    "pgd": {"steps": 20},
    "apgd_t": {"steps": 20},
    "kryptonite": {"steps": 20},
    "square": {"queries": 500},
    "pgd_l2": {"steps": 20, "eps": "0.5"},
    "few_pixel": {"pixels": 5, "eps": "1"},
}
#: What a rehearsal has time for: smaller budgets of those attacks, and of `explanation_measures`.
REHEARSED_ATTACKS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("pgd", "apgd_t", "kryptonite", "pgd_l2"), {"steps": 3}),
    "square": {"queries": 20},
    "few_pixel": {"generations": 2, "population": 8},
}
REHEARSED_MEASURES: dict[str, Any] = {"curve_steps": 4, "map_steps": 3, "draws": 1}
#: Slices that the pictures of maps show: one of each class.
SHOWN_SLICES = len(CLASSES)


def draw_attacks(
    model: nn.Module, test: data.ImageSet, config: RunConfig, label: str, path: Path
) -> None:
    """Writes the picture of `attacks_figure`."""
    save_figure(attacks_figure(model, test, config, label), path, dpi=90, colors=32)


def attacks_figure(
    model: nn.Module,
    test: data.ImageSet,
    config: RunConfig,
    label: str,
    classes: Sequence[str] = CLASSES,
) -> Figure:
    """What each attack of `SHOWN_ATTACKS` does to one test slice, of those shown the first that is
    classified correctly."""
    few = test.pick(data.spread(test, SHOWN_SLICES))
    answers = training.predict(model, few.images, choose_device()).softmax(1)
    right = (answers.argmax(1) == few.labels).nonzero().flatten().tolist()
    number = right[0] if right else 0
    one = few.pick(np.array([number]))
    clean = data.pixels(one.images)
    shown: dict[str, tuple[np.ndarray, str]] = {}
    smaller = REHEARSED_ATTACKS if config.suite == "quick" else {}
    for name, usual in SHOWN_ATTACKS.items():
        budget = usual | smaller.get(name, {})
        eps = str(budget.get("eps", headline_of(config)))
        options = {key: value for key, value in budget.items() if key != "eps"}
        made = attack_images(
            model, clean, one.labels.numpy(), name, parse_eps(eps), seed=config.seed, **options
        )
        probability = predict(model, made).softmax(1)[0]
        size = {"l2": f"L2 {eps}", "l0": "5 pixels"}.get(ATTACKS[name].norm, eps)
        called = f"{classes[int(probability.argmax())]} {probability.max():.0%}"
        shown[f"{name}, {size}"] = made[0, 0].numpy(), called
    answer = training.predict(model, one.images, choose_device()).softmax(1)[0]
    title = (
        f"A {classes[int(one.labels[0])]} slice, called {classes[int(answer.argmax())]} "
        f"({answer.max():.0%}) before the attack"
    )
    return attacked_images_figure(clean[0, 0].numpy(), shown, title=title, label=label)


def draw_maps(
    model: nn.Module, test: data.ImageSet, config: RunConfig, label: str, path: Path, record: Path
) -> None:
    """Draws Grad-CAM of one test slice of each class to `path`, keeps slices and maps next to the
    record for the figure that compares models, and draws the maps of a whole patient unless this is
    a rehearsal."""
    few = test.pick(data.spread(test, SHOWN_SLICES))
    few = few.pick(few.labels.argsort(stable=True))
    images = data.pixels(few.images, choose_device())
    probabilities = training.predict(model, few.images, choose_device()).softmax(1)
    maps = grad_cam.explain(model, images)
    figure = grad_cam.overlay_figure(images, maps, probabilities, few.labels, title=label)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, dpi=100, colors=192)
    with atomic_path(report.explained_path(record)) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            images=few.images[:, 0].numpy(),
            maps=(255 * maps.cpu()).round().byte().numpy(),
            probabilities=probabilities.cpu().numpy(),
            labels=few.labels.numpy(),
            files=np.array(few.files),
        )
    if config.suite != "quick":
        draw_patient(model, test, label, path.with_name(f"person_{config.protocol}"))


def draw_patient(model: nn.Module, test: data.ImageSet, label: str, path: Path) -> None:
    """Draws Grad-CAM over all slices of one test patient, as a strip at `path`.png and as an
    animation at `path`.gif.

    The patient is the first of class Mild, or of the gravest class below it: Moderate is two
        patients."""
    gravest = min(2, int(test.labels.max()))
    patient = int(test.patients[test.labels == gravest].min())
    scan = test.pick(np.flatnonzero(test.patients.numpy() == patient))
    scan = scan.pick(scan.slices.argsort())
    images = data.pixels(scan.images, choose_device())
    maps = grad_cam.explain(model, images)
    probabilities = training.predict(model, scan.images, choose_device()).softmax(1)
    strip = grad_cam.patient_strip(images, maps, probabilities, int(scan.labels[0]), title=label)
    save_figure(strip, path.with_suffix(".png"), dpi=90, colors=192)
    grad_cam.patient_gif(images, maps, path.with_suffix(".gif"), side=128)


def measure_maps(model: nn.Module, test: data.ImageSet, config: RunConfig) -> dict:
    """How far this model's Grad-CAM can be trusted, on a spread sample of test slices:
    faithfulness, anatomy, and what attacks on the image and on the map change
    (`utils.explain.measures`)."""
    sample = config.for_explanations().sample
    part = test.pick(data.spread(test, sample))
    pixels, labels = data.pixels(part.images), part.labels.numpy()
    sweep = config.eps if config.suite != "quick" else (headline_of(config),)
    adversarial = {
        eps: attack_images(
            model,
            pixels,
            labels,
            "pgd",
            parse_eps(eps),
            steps=config.pgd_steps,
            seed=config.seed,
        ).to(choose_device())
        for eps in sweep
    }
    # Measures that need many passes an image take a quarter of the sample.
    expensive = range(min(len(part), 1 if config.suite == "quick" else max(2, sample // 4)))
    measures = grad_cam.explanation_measures(
        model,
        pixels.to(choose_device()),
        methods=("gradcam",),
        sample=expensive,
        adversarial=adversarial,
        **(REHEARSED_MEASURES if config.suite == "quick" else {}),
    )
    return grad_cam.explanation_record(measures, labels, part.patients.numpy())
