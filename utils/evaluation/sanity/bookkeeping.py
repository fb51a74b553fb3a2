"""Checks of the bookkeeping: is every image counted, and was the model left as it was?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from utils.config import parse_eps
from utils.evaluation.plan import Stage
from utils.evaluation.predictions import misclassified, model_digest, worst_case
from utils.evaluation.sanity.rows import (
    SAME_LOGITS,
    largest_difference,
    robust_share,
    sanity_row,
    three_digits,
)
from utils.evaluation.suite_run import SuiteRun


def inside_ball(run: SuiteRun) -> dict:
    """Whether no perturbation is larger than eps."""
    excess = [
        meta["largest_perturbation"] - parse_eps(eps_text)
        for (eps_text, _), meta in run.meta.items()
        if meta["norm"] == "linf"
    ]
    largest = max(excess, default=0.0)
    note = "no perturbation exceeds eps, none leaves [0, 1]"
    if largest > 1e-6:
        note = "a perturbation is larger than eps"
    return sanity_row("inside_the_ball", largest <= 1e-6, three_digits(max(largest, 0.0)), note)


def every_image_changed(run: SuiteRun) -> dict:
    """Whether no attack returned an image as it was given."""
    unchanged = {
        f"{eps_text}:{name}": meta["n_unchanged"]
        for (eps_text, name), meta in run.meta.items()
        if meta["n_unchanged"]
    }
    note = "every attack changed every image it was given"
    if unchanged:
        examples = ", ".join(
            f"{name} left {count} images as they were"
            for name, count in list(unchanged.items())[:3]
        )
        note = f"{examples}: not robust, not attacked"
    return sanity_row("every_image_changed", not unchanged, unchanged, note)


def full_denominator(run: SuiteRun, plan: Sequence[Stage]) -> dict:
    """Whether every score counts all images; attacks of the fixed sample may leave others out."""
    partial = {stage.name for stage in plan if stage.scope == "sample"}
    missing = [
        f"{eps_text}:{name}"
        for (eps_text, name), logits in run.logits.items()
        if len(logits) != len(run.labels) or (np.isnan(logits).any() and name not in partial)
    ]
    note = f"every score counts all {len(run.labels)} images"
    if missing:
        note = f"{', '.join(missing)} left images out"
    return sanity_row("full_denominator", not missing, len(run.labels), note)


def worst_case_by_image(run: SuiteRun) -> dict:
    """Whether the worst case is taken image by image: its accuracy is then at most that of any
    single attack."""
    linf = {key: logits for key, logits in run.logits.items() if run.meta[key]["norm"] == "linf"}
    robust = worst_case(linf, run.labels, run.headline) & ~misclassified(run.clean, run.labels)
    mean_of_minima = float(robust.mean())
    minimum_of_means = min(
        (
            robust_share(logits, run.labels)
            for (eps_text, _), logits in linf.items()
            if eps_text == run.headline
        ),
        default=1.0,
    )
    note = (
        f"{mean_of_minima:.1%} are robust against every attack at once, {minimum_of_means:.1%} "
        "against the strongest single attack"
    )
    figures = [three_digits(mean_of_minima), three_digits(minimum_of_means)]
    passed = mean_of_minima <= minimum_of_means + 1e-9
    return sanity_row("worst_case_by_image", passed, figures, note)


def kept_images_rescore(run: SuiteRun) -> dict:
    """Whether predicting the kept adversarial images again gives the recorded logits."""
    again = run.predict(run.kept.images)
    finite, gap = again.isfinite().all(1), 0.0
    if finite.any():
        gap = largest_difference(again[finite], torch.as_tensor(run.kept.logits)[finite])
    passed = gap <= SAME_LOGITS
    note = (
        f"the kept adversarial images {'' if passed else 'do not '}give the recorded answers again"
    )
    return sanity_row("kept_images_rescore", passed, three_digits(gap), note)


def model_untouched(run: SuiteRun) -> dict:
    """Whether weights, buffers and modes of the model are as before the evaluation."""
    modes = [module.training for module in run.model.modules()]
    same = model_digest(run.model) == run.digest and modes == run.modes
    note = "weights, BatchNorm statistics and modes are as before"
    if not same:
        note = "the evaluation changed the model: weights, BatchNorm statistics or modes differ"
    return sanity_row("model_untouched", same, same, note)
