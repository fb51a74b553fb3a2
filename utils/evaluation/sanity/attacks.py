"""Checks of the attacks: are they as strong as such attacks must be?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from utils.attacks.base import ATTACKS
from utils.evaluation.plan import AttackName, Stage, float32_stages
from utils.evaluation.predictions import misclassified
from utils.evaluation.sanity.model import missing_gradients
from utils.evaluation.sanity.rows import (
    BATCH,
    CHANCE,
    chance,
    robust_share,
    sampled_images,
    sanity_row,
    three_digits,
)
from utils.evaluation.suite_run import Key, SuiteRun
from utils.prediction import predict


def attack_order(
    clean: np.ndarray,
    labels: np.ndarray,
    first_round: Mapping[Key, np.ndarray],
    meta: Mapping[Key, dict],
    sweep: Sequence[str],
) -> list[dict]:
    """PGD ≤ FGSM ≤ noise ≤ clean: accuracy in the first round of each, at every eps.

    Args:
        clean: logits (N, 4).
        labels: (N,).
        first_round: (eps as written, attack) → logits (N, 4).
        meta: the same keys → `view` and `scope` of the attack.
    """

    def accuracy(eps_text: str, attack: str) -> float | None:
        """Under an attack of all images on four classes (None: the suite has no such attack)."""
        if attack == "clean":
            return robust_share(clean, labels)
        for (eps, name), about in meta.items():
            parsed = AttackName.parse(name)
            if (
                eps == eps_text
                and about["view"] == "four"
                and about["scope"] == "all"
                and parsed.without_steps == attack
                and not parsed.rounded
            ):
                return robust_share(first_round[eps, name], labels)
        return None

    rows = []
    for weaker, stronger in (("clean", "noise"), ("noise", "fgsm"), ("fgsm", "pgd")):
        figures, broken = {}, []
        for eps_text in sweep:
            above, below = accuracy(eps_text, weaker), accuracy(eps_text, stronger)
            if above is None or below is None:
                continue
            figures[eps_text] = [three_digits(below), three_digits(above)]
            # Decided before rounding, which can turn a difference of one image into more than one.
            if below > above + chance(labels):
                broken.append(eps_text)
        note = f"accuracy under {stronger} is not above {weaker}"
        if broken:
            note = (
                f"accuracy under {stronger} is above {weaker} at {', '.join(broken)}: the stronger "
                "attack does not work"
            )
        if figures:
            rows.append(sanity_row(f"{stronger}_le_{weaker}", not broken, figures, note))
    return rows


def falls_with_eps(
    labels: np.ndarray,
    first_round: Mapping[Key, np.ndarray],
    plan: Sequence[Stage],
    sweep: Sequence[str],
) -> list[dict]:
    """Whether accuracy under PGD does not rise with eps. In the first round on all images, which
    begins anew at each eps: other rounds and stages inherit what smaller eps misclassified. No
    row where the suite has no PGD on all images, since nothing could fail.

    Args:
        labels, first_round: see `attack_order`.
    """
    name = next(
        (
            stage.name
            for stage in plan
            if stage.attack == "pgd" and stage.scope == "all" and stage.view == "four"
        ),
        None,
    )
    if name is None:
        return []
    curve = [robust_share(first_round[eps, name], labels) for eps in sweep]
    rises = [later - earlier for earlier, later in zip(curve, curve[1:], strict=False)]
    rise = max(rises, default=0.0)
    passed = rise <= chance(labels)
    note = "accuracy does not rise with eps"
    if not passed:
        note = f"accuracy rises by {rise:.1%} with eps: PGD gets stuck"
    return [sanity_row("falls_with_eps", passed, [three_digits(value) for value in curve], note)]


def eps_one(run: SuiteRun) -> dict:
    """Whether no image is robust at eps 1, where any image may be shown: against the attack from
    the image itself, the one that starts from an image of another class, and every attack of the
    suite with a smaller eps. (A start from another class finds an error by itself, so it counts
    only where the image has a gradient that an attack can follow.)

    A nearly constant answer is robust there too, so a low clean balanced accuracy excuses it.
    """
    accuracy = float(_robust_at_one(run).mean())
    right = ~misclassified(run.clean, run.labels)
    recalls = [right[run.labels == label].mean() for label in np.unique(run.labels)]
    balanced = float(np.mean(recalls))
    passed = accuracy <= 0.05 or balanced <= 0.6
    if accuracy <= 0.05:
        note = "with eps 1 no image is robust"
    elif passed:
        note = (
            f"{accuracy:.0%} are robust at eps 1, as with a constant answer; clean balanced "
            f"accuracy is {balanced:.0%}"
        )
    else:
        note = (
            f"{accuracy:.0%} are robust at eps 1, where any image may be shown: the attack does "
            "not work on this model"
        )
    return sanity_row("eps_one_breaks_all", passed, three_digits(accuracy), note)


def _robust_at_one(run: SuiteRun) -> np.ndarray:
    """Which images of the fixed sample are robust at eps 1, bool (n,)."""
    images, labels = sampled_images(run)
    robust = np.ones(len(labels), bool)
    for key, logits in run.logits.items():
        meta = run.meta[key]
        if meta["norm"] == "linf" and meta["view"] == "four":
            found = run.attacked[key] & misclassified(logits, run.labels)
            robust &= ~found[run.sample]
    # The ball of eps 1 around any image holds all images: so where the attack starts is free.
    others = torch.stack([_of_another_class(labels, row) for row in range(len(labels))])
    missing = missing_gradients(run.model, images, labels, run.config.attack_batch)["zero_margin"]
    for start, allowed in (
        (images, np.ones(len(labels), bool)),
        (images[others], ~missing.cpu().numpy()),
    ):
        left = torch.as_tensor(np.flatnonzero(robust & allowed), device=images.device)
        for rows in left.split(run.config.attack_batch) if len(left) else ():
            attacked = ATTACKS["pgd"](
                run.model,
                start[rows],
                labels[rows],
                1.0,
                seed=run.config.seed + 1,
                loss="margin",
                steps=run.config.pgd_steps,
            )
            answers = predict(run.model, attacked, batch_size=BATCH).argmax(1)
            robust[rows.cpu().numpy()] = (answers == labels[rows].cpu()).numpy()
    return robust


def _of_another_class(labels: Tensor, row: int) -> Tensor:
    """The first row after `row`, in a circle, whose label is another one; `row` where none is."""
    others = (labels.roll(-row) != labels[row]).nonzero()
    return (row + others[0, 0]) % len(labels) if len(others) else labels.new_tensor(row)


def converged(run: SuiteRun, repeated: str, change: str) -> dict:
    """Whether the last round of each stage that decides robust accuracy misclassified no further
    image, at every eps.

    `figure`: eps → stage → numbers of robust images before and after the last round (None: it
    was not run, because more steps still misclassified images).

    Args:
        repeated: key of `SuiteRun.last_round`.
        change: what the rounds repeated, in words.
    """
    figures: dict[str, dict[str, list[int] | None]] = {}
    for (eps_text, name), counts in run.last_round[repeated].items():
        figures.setdefault(eps_text, {})[name] = counts
    # A round that was not run (None) has shown no convergence either.
    unfinished = [
        eps_text
        for eps_text, counts in figures.items()
        if any(pair is None or pair[0] > pair[1] for pair in counts.values())
    ]
    if not figures:
        note = (
            f"no attack of this suite was repeated with {change}: nothing shows whether it has "
            "converged"
        )
    elif unfinished:
        note = (
            f"{change} may misclassify further images at {', '.join(unfinished)}: the rounds ended "
            f"at {run.config.max_steps} steps (max_steps), so give them more"
        )
    else:
        note = f"{change} misclassifies no further image at any eps"
    return sanity_row(f"converged_in_{repeated}", bool(figures) and not unfinished, figures, note)


def gradients_not_masked(run: SuiteRun, sweep: Sequence[str]) -> dict:
    """Whether gradient attacks are at least as strong as the others.

    `figure`: eps → number of images that an attack without gradients misclassified and no attack
    with gradients did.
    """
    counts = {}
    right = ~misclassified(run.clean, run.labels)
    for eps_text in sweep:
        white, other = np.zeros((2, len(run.labels)), bool)
        for key, meta in run.meta.items():
            if key[0] == eps_text and meta["view"] == "four" and meta["norm"] == "linf":
                found = white if meta["kind"] == "white-box" else other
                found |= run.attacked[key] & misclassified(run.logits[key], run.labels)
        counts[eps_text] = int((other & ~white & right).sum())
    total = max(counts.values(), default=0)
    note = "a black box misclassifies no image that is robust against every white box"
    if total:
        note = (
            f"black box beats white box on {total} image{'s' * (total != 1)}: gradients may be "
            "masked"
        )
    return sanity_row("white_box_le_black_box", total == 0, counts, note)


def float32_finds_no_more(run: SuiteRun) -> dict:
    """Whether the faster arithmetic of the search missed nothing.

    `figure`: attack → how many of the sample's images that were robust against everything else
    APGD-T misclassified in float32, and how many it attacked.
    """
    found = {}
    for stage in float32_stages(run.config):
        key = run.headline, stage.name
        attacked = run.attacked[key]
        wrong = misclassified(run.logits[key][attacked], run.labels[attacked], stage.view)
        found[stage.name] = [int(wrong.sum()), int(attacked.sum())]
    passed = all(wrong <= max(CHANCE * len(run.sample), 1) for wrong, _ in found.values())
    note = (
        f"a search in float32 misclassifies {sum(wrong for wrong, _ in found.values())} images "
        f"that were robust against the one in {run.precision}"
    )
    if not passed:
        note += ": attack this model in float32"
    return sanity_row("float32_finds_no_more", passed, found, note)
