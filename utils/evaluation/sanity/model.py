"""Checks of the model: does it answer as a deterministic classifier with gradients does?"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from utils.attacks.base import ATTACKS, margin
from utils.evaluation.predictions import decisions
from utils.evaluation.sanity.rows import (
    BATCH,
    SAME_LOGITS,
    largest_difference,
    sampled_images,
    sanity_row,
    three_digits,
)
from utils.evaluation.suite_run import SuiteRun
from utils.model_state import frozen
from utils.prediction import predict

#: How often the same images are predicted: a model that draws one of five sizes at random gives the
#: same answers as often once in ten million evaluations.
PREDICTIONS = 10
#: How far the sum of probabilities may lie from 1: bfloat16 has eight bits.
SUM_OF_PROBABILITIES = 0.02


def finite_logits(run: SuiteRun) -> dict:
    """Whether every answer of the suite was a finite number."""
    note = "every logit is a number"
    if run.nonfinite:
        note = (
            f"{run.nonfinite} answers were NaN or infinite and count as wrong: the model is broken "
            "there, not robust"
        )
    return sanity_row("finite_logits", run.nonfinite == 0, run.nonfinite, note)


def logits_not_probabilities(run: SuiteRun) -> dict:
    """Whether the outputs are logits, and not already probabilities, in whatever precision.

    Outputs of a softmax add up to 1. Those of a sigmoid stay between 0 and 1 whatever the input
    is, so the model is shown pixels far outside their range as well; logits grow there.
    """
    bounded = (run.clean >= 0).all() and (run.clean <= 1).all()
    softmax = bounded and np.allclose(run.clean.sum(1), 1, atol=SUM_OF_PROBABILITIES)
    sigmoid = bounded and not softmax and _is_bounded(run)
    note = "raw [0, 1] pixels in, logits out"
    if softmax or sigmoid:
        note = (
            f"the outputs look like probabilities (of a {'softmax' if softmax else 'sigmoid'}): "
            "losses on them have the wrong gradient, so return logits"
        )
    passed = not (softmax or sigmoid)
    return sanity_row("logits_from_pixels", passed, int(run.clean.shape[1]), note)


def _is_bounded(run: SuiteRun) -> bool:
    """Whether the outputs stay between 0 and 1 far outside the range of pixels; False where the
    model refuses such images, as those of this project do."""
    images, _ = sampled_images(run)
    try:
        found = [predict(run.model, images * factor, batch_size=BATCH) for factor in (-1e3, 1e3)]
    except Exception:  # noqa: BLE001  whatever a user's model raises, nothing is shown
        return False
    return all(bool(((logits >= 0) & (logits <= 1)).all()) for logits in found)


def classes_in_order(run: SuiteRun) -> dict:
    """Whether the outputs stand in the order of the classes: whether no other order of them is
    right far more often, and the given one not below chance.

    `figure`: balanced accuracy in the given order and in the best one.
    """
    classes = run.classes
    counts = np.zeros((len(classes), len(classes)))
    np.add.at(counts, (run.labels, decisions(run.clean)), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    present = counts.sum(1) > 0
    labels, outputs = linear_sum_assignment(-shares)
    given, best = (
        float(np.diag(shares)[present].mean()),
        float(shares[labels, outputs][present].mean()),
    )
    more = counts[labels, outputs].sum() - np.diag(counts).sum()
    swapped = best > given + 0.25 and more > 3 * np.sqrt(counts.sum())
    wrong = (decisions(run.clean) != run.labels).sum()
    below = wrong - (1 - 1 / len(classes)) * counts.sum() > 3 * np.sqrt(counts.sum()) / 2
    note = "the outputs stand in the order of the classes"
    if swapped:
        order = [classes[label] for label in np.argsort(outputs)]
        note = (
            f"the model seems to answer in the order {', '.join(order)}: in that order "
            f"{best:.0%} are right and not {given:.0%}, so reorder its outputs to "
            f"{', '.join(classes)}"
        )
    elif below:
        note = (
            f"{given:.0%} are right, less than by guessing: is this the data and the order of "
            "classes that the model was made for?"
        )
    figure = [three_digits(given), three_digits(best)]
    return sanity_row("classes_in_order", not (swapped or below), figure, note)


def same_every_time(run: SuiteRun) -> dict:
    """Whether the model gives the same images the same logits every time."""
    images = run.pixels[run.sample]
    first, gap = predict(run.model, images, batch_size=BATCH), 0.0
    for _ in range(PREDICTIONS - 1):
        again = predict(run.model, images, batch_size=BATCH)
        gap = max(gap, largest_difference(first, again))
        if gap > SAME_LOGITS:
            break
    note = "the same image always gets the same answer"
    if gap > SAME_LOGITS:
        note = (
            "the answer to the same image changes: attack the average over the randomness, or "
            "these numbers mean little"
        )
    return sanity_row("same_every_time", gap <= SAME_LOGITS, three_digits(gap), note)


def same_with_gradient(run: SuiteRun) -> dict:
    """Whether the model answers alike, and keeps its modes, when gradients are recorded."""
    images, _ = sampled_images(run)

    def modes() -> list[bool]:
        return [module.training for module in run.model.modules()]

    before = modes()
    plain = predict(run.model, images, batch_size=BATCH)
    with frozen(run.model):
        during = modes()
        followed = run.model(images.clone().requires_grad_(True)).detach().float().cpu()
        kept = modes() == during
    gap = largest_difference(plain, followed)
    if not kept:
        note = "the model changes its train/eval mode when it is called"
    elif gap > SAME_LOGITS:
        note = (
            "the model answers otherwise when its gradient is asked for: it knows when it is "
            "attacked"
        )
    else:
        note = "the model answers alike whether or not its gradient is asked for"
    passed = gap <= SAME_LOGITS and kept and before == run.modes
    return sanity_row("same_under_attack", passed, three_digits(gap), note)


def batch_independent(run: SuiteRun) -> dict:
    """Whether an image's logits are the same alone, in a batch and in another order."""
    images = run.pixels[run.sample][:16]
    together = predict(run.model, images, batch_size=len(images))
    alone = predict(run.model, images, batch_size=1)
    half = max(len(images) // 2, 1)
    backwards = predict(run.model, images.flip(0), batch_size=half).flip(0)
    gap = max(largest_difference(together, alone), largest_difference(together, backwards))
    note = "an image's answer does not depend on the other images of its batch"
    if gap > SAME_LOGITS:
        note = "an image's answer depends on batch size or order: is BatchNorm in training mode?"
    return sanity_row("batch_independent", gap <= SAME_LOGITS, three_digits(gap), note)


def not_constant(run: SuiteRun) -> dict:
    """Whether the answers differ between images."""
    counts = np.bincount(decisions(run.clean), minlength=len(run.classes))
    share = float(counts.max() / len(run.labels))
    passed = share < 0.99 or len(np.unique(run.labels)) == 1
    note = "the model gives different images different answers"
    if not passed:
        note = (
            f"the model gives one answer to {share:.0%} of the images: its robustness is that of a "
            "constant"
        )
    return sanity_row("not_constant", passed, three_digits(share), note)


def gradient_shares(
    model: nn.Module, images: Tensor, labels: Tensor, batch: int = 64
) -> dict[str, float]:
    """Shares of images whose pixel gradient is missing, by the kinds of `missing_gradients`."""
    found = missing_gradients(model, images, labels, batch)
    return {name: float(missing.float().mean()) for name, missing in found.items()}


def missing_gradients(
    model: nn.Module, images: Tensor, labels: Tensor, batch: int = 64
) -> dict[str, Tensor]:
    """Whose pixel gradient is missing.

    Returns:
        Bool (N,) each: `zero_ce`, that of the plain cross-entropy, which vanishes where softmax
        saturates, is 0 in every pixel; `zero_margin`, that of the margin is; `not_finite`, either
        is not finite.
    """
    found: dict[str, list[Tensor]] = {"zero_ce": [], "zero_margin": [], "not_finite": []}
    with frozen(model), torch.enable_grad():
        for part, truth in zip(images.split(batch), labels.split(batch), strict=True):
            part = part.clone().requires_grad_(True)
            logits = model(part).float()
            cross_entropy = nn.functional.cross_entropy(logits, truth, reduction="sum")
            of_ce = _gradient(cross_entropy, part)
            of_margin = _gradient(margin(logits, truth).sum(), part)
            finite = of_ce.isfinite() & of_margin.isfinite()
            found["zero_ce"].append((of_ce == 0).flatten(1).all(1))
            found["zero_margin"].append((of_margin == 0).flatten(1).all(1))
            found["not_finite"].append(~finite.flatten(1).all(1))
    return {name: torch.cat(parts) for name, parts in found.items()}


def _gradient(value: Tensor, images: Tensor) -> Tensor:
    """Gradient of a number with respect to the pixels, 0 where it does not depend on them."""
    gradient = None
    if value.requires_grad:
        gradient = torch.autograd.grad(value, images, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(images) if gradient is None else gradient


def gradients_present(run: SuiteRun) -> dict:
    """Whether every image of the sample has a gradient that an attack can follow."""
    shares = gradient_shares(run.model, *sampled_images(run), run.config.attack_batch)
    masked = shares["zero_margin"] > 0 or shares["not_finite"] > 0
    saturated = shares["zero_ce"] > 0.05
    note = "every sampled image has a gradient to follow"
    if masked:
        note = (
            f"{shares['zero_margin']:.0%} of gradients are zero and {shares['not_finite']:.0%} not "
            "finite: gradients are masked, so gradient attacks prove nothing here"
        )
    elif saturated:
        note = (
            f"softmax saturates on {shares['zero_ce']:.0%} of the images (scaled logits?): "
            "cross-entropy has no gradient there"
        )
    figures = {name: three_digits(share) for name, share in shares.items()}
    return sanity_row("gradients_present", not (masked or saturated), figures, note)


def eps_zero(run: SuiteRun) -> dict:
    """Whether an attack with eps 0 gives the clean answers."""
    images, labels = sampled_images(run)
    attacked = ATTACKS["pgd"](run.model, images, labels, 0.0, steps=2)
    clean = predict(run.model, images, batch_size=BATCH)
    gap = largest_difference(clean, predict(run.model, attacked, batch_size=BATCH))
    note = "an attack with eps 0 gives the clean answers"
    if gap > SAME_LOGITS:
        note = "an attack with eps 0 changes answers: something else than the pixels is attacked"
    return sanity_row("eps_zero_is_clean", gap <= SAME_LOGITS, three_digits(gap), note)
