"""Worst case over a suite of attacks, the checks that say when not to believe it, and curves and matrices from both.

A model counts as robust on an image, at a norm and eps, only if *every* attack of that norm and eps failed on it. The
suite attacks three *views* of the same four logits, because their decisions do not imply each other: the four classes,
the three classes of the headline (`_merged`), and Non against the rest (`_binary`, pushed to the lowest margin, for
AUROC). Nothing here knows the project's own models: any `nn.Module` from pixels in [0, 1] to four logits will do.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from utils.attacks import (
    ATTACKS,
    BINARY,
    THREE,
    GroupedClasses,
    Groups,
    Precision,
    group_labels,
    group_logits,
    margin,
    nearest_adversarial,
    no_parameter_gradients,
    perturbation_size,
)
from utils.config import RunConfig, parse_eps
from utils.utils_funcs import CLASSES, UserError, atomic_path, progress

#: View of the logits → groups of classes (None: the four classes themselves) and suffix of the stored attack name.
VIEWS: dict[str, tuple[Groups | None, str]] = {
    "four": (None, ""),
    "three": (THREE, "_merged"),
    "binary": (BINARY, "_binary"),
}
#: Bumped when the same settings would give other numbers: states of older code are then not continued.
STATE_VERSION = 2
#: Distance between the seeds of a stage's rounds, a prime larger than what images and restarts add to a seed.
ROUND_SEED = 15_485_863
#: Attack → what a repetition takes from the attack itself: a step size or a start that suits no model converges nowhere.
_OWN_STEPS: dict[str, dict] = {"pgd": {"step_size": None, "random_start": True}}


@dataclass(frozen=True)
class Stage:
    """One attack of a suite.

    `scope`: `all` images; those still `standing` in this view and norm; or the standing ones of the fixed stratified
    `sample`. `eps`: at `every` eps of the sweep, only at the `headline` one, or one of its own, as written ("0.5" of an
    L2 attack). `source`, `mask`: names of what `evaluate_suite` was given. `precision`: arithmetic of the search where it is not
    the run's.
    """

    attack: str
    name: str
    view: str = "four"
    scope: str = "all"
    eps: str = "every"
    budget: dict = field(default_factory=dict)
    source: str | None = None
    mask: str | None = None
    precision: Precision | None = None


@dataclass
class SuiteResult:
    """What a suite leaves. Keys are `(eps as written, stored attack name)`; N images of the declared evaluation set.

    `logits`: float32 (N, 4) at each attack's image. Rows that an attack skipped, because the image had already fallen,
    carry the logits that felled it; a clean error carries its clean logits; NaN lies outside the attack's declared set.
    `kept`: float32 (S, 1, H, W), the strongest four-class adversarial images of the fixed sample `kept_index` (S,) at
    `kept_eps`, with the logits `kept_logits` (S, 4) that re-scoring them must give.
    """

    logits: dict[tuple[str, str], np.ndarray]
    meta: dict[tuple[str, str], dict]
    clean_logits: np.ndarray
    sanity: list[dict]
    kept: np.ndarray
    kept_index: np.ndarray
    kept_logits: np.ndarray
    kept_eps: str


def suite_plan(
    config: RunConfig, sources: Sequence[str] = (), masks: Sequence[str] = ()
) -> list[Stage]:
    """The L-infinity attacks of `config.suite`, cheap ones first.

    `quick`, at every eps: noise, FGSM, and PGD on all three views. `standard` adds, in the views of four and of three
    classes, APGD-T on the robust images at every eps and, at the headline one, PGD towards each other class on the robust
    images and Square on those of the fixed sample; also at the headline eps transfer from each of `sources`, the
    clinically worst target and Kryptonite. `full` adds the other named gradient attacks, and HopSkipJump and official AutoAttack on the
    standing part of the fixed sample.
    """
    steps = dict(steps=config.pgd_steps)
    margin_steps, name = {**steps, "loss": "margin"}, f"pgd{config.pgd_steps}"
    # With two classes there is one direction to go, and every image is pushed to the end: half the steps do.
    half = max(config.pgd_steps // 2, min(config.pgd_steps, 5))
    plan = [
        Stage("noise", "noise"),
        Stage("fgsm", "fgsm"),
        Stage("pgd", name, budget=margin_steps),
        Stage("pgd", f"{name}_merged", "three", "standing", budget=margin_steps),
        Stage(
            "pgd", f"pgd{half}_binary", "binary", budget=dict(steps=half, loss="margin", push=True)
        ),
    ]
    if config.suite == "quick":
        return plan
    plan += [
        Stage("transfer", f"transfer_{source}", eps="headline", budget=steps, source=source)
        for source in sources
    ]
    headline = headline_of(config)
    plan += [
        Stage(
            "apgd_t",
            "apgd_t" + VIEWS[view][1],
            view,
            "standing",
            eps_text,
            dict(steps=config.sweep_steps),
        )
        for eps_text in config.eps
        if eps_text != headline
        for view in ("four", "three")
    ]
    plan += [
        Stage(attack, attack + VIEWS[view][1], view, scope, "headline", budget)
        for attack, scope, budget in (
            ("pgd_targeted", "standing", steps),
            ("apgd_t", "standing", dict(steps=100)),
            ("square", "sample", dict(queries=1000)),
        )
        for view in ("four", "three")
    ]
    # Not for the worst case, which they rarely lower, but for what they alone tell: so on every image.
    plan += [
        Stage("pgd_clinical", "pgd_clinical", eps="headline", budget=steps),
        Stage("kryptonite", "kryptonite", eps="headline", budget=steps),
    ]
    plan += [
        Stage("kryptonite", f"kryptonite_{mask}", eps="headline", budget=steps, mask=mask)
        for mask in masks
    ]
    if config.suite == "full":
        plan += [
            Stage(attack, attack, eps="headline") for attack in ("fgsm_targeted", "ifgsm", "mifgsm")
        ]
        plan += [
            Stage(
                "hopskipjump",
                "hopskipjump",
                scope="sample",
                eps="headline",
                budget=dict(steps=5, evaluations=200),
            ),
            Stage("autoattack", "autoattack", scope="sample", eps="headline"),
        ]
    return plan


def decides_robust_accuracy(stage: Stage) -> bool:
    """Whether a stage is repeated with more steps until it misclassifies no further image: PGD and APGD-T against every
    image, in the views of four and of three classes."""
    whole = stage.scope != "sample" and stage.mask is None
    return (
        whole
        and stage.attack in ("pgd", "apgd_t")
        and stage.view in ("four", "three")
        and "steps" in stage.budget
    )


def headline_of(config: RunConfig) -> str:
    """The eps that the dear attacks run at: `config.headline_eps`, or the largest of a sweep that does not hold it."""
    return (
        config.headline_eps if config.headline_eps in config.eps else max(config.eps, key=parse_eps)
    )


def float32_stages(config: RunConfig) -> list[Stage]:
    """What is added to a suite that searches in bfloat16, after all else at the headline eps: APGD-T in float32 on the
    standing part of the fixed sample, so that the worst case holds what rounding hid, and a check counts it."""
    budget = dict(steps=100)
    return (
        [
            Stage(
                "apgd_t",
                "apgd_t_float32" + VIEWS[view][1],
                view,
                "sample",
                "headline",
                budget,
                precision="fp32",
            )
            for view in ("four", "three")
        ]
        if config.suite != "quick"
        else []
    )


def other_norms_plan(config: RunConfig) -> list[Stage]:
    """Attacks of other norms, reported separately: Euclidean ones at 0.5 and 1 (a pixel is 1 at most), and one and five
    pixels of any value, on the fixed sample."""
    plan = [
        Stage(attack, attack, scope="sample", eps=eps, budget=dict(steps=budget))
        for eps in ("0.5", "1")
        for attack, budget in (("pgd_l2", config.pgd_steps), ("deepfool", 30))
    ]
    evolution = dict(generations=config.pgd_steps // 2, population=20)
    return plan + [
        Stage("one_pixel", "one_pixel", scope="sample", eps="1", budget=evolution),
        Stage("few_pixel", "few_pixel", scope="sample", eps="1", budget={"pixels": 5, **evolution}),
    ]


# -- scoring ----------------------------------------------------------------------------------------------------------


def predict_logits(model: nn.Module, images: Tensor, batch: int = 64) -> Tensor:
    """Float32 logits (N, C) in eval mode, on the CPU; every module's mode is left as it was."""
    modes = {module: module.training for module in model.modules()}
    device = _device(model)
    try:
        model.eval()
        with torch.no_grad():
            return torch.cat([model(part.to(device)).float().cpu() for part in images.split(batch)])
    finally:
        for module, training in modes.items():
            module.training = training


def decisions(logits: np.ndarray, view: str = "four") -> np.ndarray:
    """Answer of each row in a view (N,): the group with the largest probability."""
    groups = VIEWS[view][0]
    tensor = torch.as_tensor(logits).float()
    return (tensor if groups is None else group_logits(tensor, groups)).argmax(1).numpy()


def view_labels(labels: np.ndarray, view: str = "four") -> np.ndarray:
    """Labels (N,) as group numbers of a view."""
    groups = VIEWS[view][0]
    return labels if groups is None else group_labels(torch.as_tensor(labels), groups).numpy()


def misclassified(logits: np.ndarray, labels: np.ndarray, view: str = "four") -> np.ndarray:
    """Whether each row's answer is wrong in a view, bool (N,). NaN rows (outside an attack's set) have not fallen."""
    outside = np.isnan(logits).any(1)
    return (
        decisions(np.where(outside[:, None], 0, logits), view) != view_labels(labels, view)
    ) & ~outside


def _wrong_answer(labels: np.ndarray) -> np.ndarray:
    """Logits (N, 4) that are wrong in every view: what a row that is not finite counts as, since NaN is no answer."""
    rows = np.full((len(labels), len(CLASSES)), -10.0, np.float32)
    rows[np.arange(len(labels)), np.where(labels == 0, len(CLASSES) - 1, 0)] = 0
    return rows


def wrong_where_not_finite(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Float32 logits (N, 4) with every row that is not finite replaced by an answer that is wrong in every view."""
    broken = ~np.isfinite(logits).all(1)
    return np.where(broken[:, None], _wrong_answer(labels), logits).astype(np.float32)


def _device(model: nn.Module) -> torch.device:
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def as_pixels(images: np.ndarray | Tensor) -> Tensor:
    """uint8 (N, 1, H, W) → float32 in [0, 1]."""
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise UserError(
            "The evaluation takes uint8 images of shape (N, 1, H, W), "
            f"not {images.dtype} {tuple(images.shape)}."
        )
    return images.float() / 255


def stratified_sample(labels: np.ndarray, patients: np.ndarray, size: int) -> np.ndarray:
    """Sorted indices of `size` images spread over classes in proportion (each at least once) and, within a class, over
    people and then along each person's stack. No randomness: the same set gives the same sample."""
    total = len(labels)
    if size >= total:
        return np.arange(total)
    # Each image's place in line within its person, spread by bit reversal so that any prefix covers the whole stack.
    queue = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        turn = np.empty(len(members))
        for patient in np.unique(patients[members]):
            own = np.flatnonzero(patients[members] == patient)
            turn[own] = np.argsort(np.argsort([_reversed_bits(k) for k in range(len(own))]))
        line = members[np.lexsort((patients[members], turn))]
        # The k-th of a class of n stands at (k + 1/2)/n: merging by this keeps the classes' proportions in any prefix.
        queue += [
            ((k + 0.5) / len(line) if k else -1.0, int(index)) for k, index in enumerate(line)
        ]
    return np.sort([index for _, index in sorted(queue)[:size]])


def _reversed_bits(number: int, bits: int = 12) -> int:
    return int(f"{number:0{bits}b}"[::-1], 2)


# -- the runner -------------------------------------------------------------------------------------------------------


def evaluate_suite(
    model: nn.Module,
    images_uint8: np.ndarray | Tensor,
    labels: np.ndarray | Tensor,
    patients: np.ndarray | Tensor,
    config: RunConfig,
    *,
    state_dir: Path | None = None,
    stages: Sequence[Stage] | None = None,
    sources: Mapping[str, nn.Module] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    time_limit: float | None = None,
    precision: Precision = "fp32",
) -> SuiteResult:
    """Attacks `model` with a suite at every eps of `config.eps`, then checks the evaluation itself.

    Args:
        model: pixels float32 (N, 1, H, W) in [0, 1] → logits (N, 4); evaluated in eval mode, left as it was.
        people: person of each image (N,); -1 where unknown.
        state_dir: finished batches are kept here, so that an interrupted run continues and gives the same numbers.
        stages: other attacks than `suite_plan(config)`.
        sources: other models, by name, that transfer attacks are made on.
        masks: regions, by name, that Kryptonite is confined to, 1 inside, (N, 1, H, W).
        time_limit: seconds that one batch of one attack may take before the evaluation fails.
        precision: `bf16` lets the attacks search in bfloat16, faster on processors that have it. What fell is always
            decided in float32, and `float32_stages` are added.

    Raises:
        StudyError: an attack raised, ran out of time, or changed no image: a failed run, never a robust model.
    """
    labels, patients = np.asarray(labels).astype(np.int64), np.asarray(patients)
    run = _Run(
        model,
        as_pixels(images_uint8),
        labels,
        patients,
        config,
        state_dir,
        time_limit,
        dict(sources or {}),
        dict(masks or {}),
        precision,
    )
    plan = list(
        suite_plan(config, tuple(run.sources), tuple(run.masks)) if stages is None else stages
    )
    plan += float32_stages(config) if precision != "fp32" else []
    sweep = sorted(config.eps, key=parse_eps)
    # Ascending, so that what fell at a smaller eps, a point of every larger ball, need not be attacked again.
    work = sorted(
        [(eps_text, stage) for stage in plan for eps_text in run.eps_of(stage, sweep)],
        key=lambda item: parse_eps(item[0]),
    )
    bar = progress(work, "attack")
    for eps_text, stage in bar:
        bar.set_postfix_str(f"{stage.name} at {eps_text}, {run.share_robust(stage):.0%} standing")
        run.attack(stage, eps_text)
    return SuiteResult(
        run.logits,
        run.meta,
        run.clean,
        sanity_table(run, plan, sweep),
        run.kept.numpy(),
        run.sample,
        run.kept_logits,
        run.headline,
    )


class _Counted(nn.Module):
    """Passes images on, counts them, and stops an attack that has used up its time."""

    def __init__(self, model: nn.Module, deadline: float) -> None:
        super().__init__()
        self.model, self.deadline, self.images = model, deadline, 0

    def forward(self, images: Tensor) -> Tensor:
        if time.monotonic() > self.deadline:
            raise TimeoutError("time limit reached")
        self.images += len(images)
        return self.model(images)


@dataclass
class _Outcome:
    """What a stage has found so far at one eps, over all of its rounds.

    `logits`, `rounded`: float32 (N, 4) at the attack's images, and at these rounded to 8 bits. `chosen`: the images that
    the first round attacks, bool (N,). `before`: share of robust images before it. `attacked`: images summed over rounds.
    `rounds`: steps, restarts, images attacked and images newly misclassified in the stage's view, one entry a round.
    """

    logits: np.ndarray
    rounded: np.ndarray
    chosen: np.ndarray
    before: float
    attacked: int = 0
    seconds: float = 0.0
    queries: int = 0
    unchanged: int = 0
    largest: float = 0.0
    flags: set[str] = field(default_factory=set)
    rounds: list[dict] = field(default_factory=list)


class _Run:
    """The state of one evaluation: what has fallen in each norm and view, to which logits, and what each attack
    left."""

    def __init__(
        self,
        model: nn.Module,
        pixels: Tensor,
        labels: np.ndarray,
        patients: np.ndarray,
        config: RunConfig,
        state_dir: Path | None,
        time_limit: float | None,
        sources: dict[str, nn.Module],
        masks: dict[str, Tensor],
        precision: Precision,
    ) -> None:
        if not (len(pixels) == len(labels) == len(patients)) or not len(pixels):
            raise UserError(
                f"The evaluation got {len(pixels)} images, {len(labels)} labels and {len(patients)} people: "
                "give one of each for every image, and at least one."
            )
        self.model, self.pixels, self.labels, self.patients, self.config = (
            model,
            pixels,
            labels,
            patients,
            config,
        )
        self.sources, self.masks, self.time_limit, self.device = (
            sources,
            masks,
            time_limit,
            _device(model),
        )
        self.precision: Precision = precision
        self.digest, self.modes = (
            model_digest(model),
            [module.training for module in model.modules()],
        )
        self.headline = headline_of(config)
        self.nonfinite = 0
        clean = predict_logits(model, pixels, config.attack_batch).numpy()
        if clean.shape != (len(labels), len(CLASSES)):
            raise UserError(
                f"The model returned {clean.shape[1:]} for an image: expected {len(CLASSES)} logits."
            )
        self.clean = self.finite(clean, labels)
        norms = ("linf", "l2", "l0")
        self.misclassified = {
            (norm, view): misclassified(self.clean, labels, view)
            for norm in norms
            for view in VIEWS
        }
        self.flipped_logits = {(norm, view): self.clean.copy() for norm in norms for view in VIEWS}
        self.sample = stratified_sample(labels, patients, config.sample)
        self.kept, self.kept_logits = pixels[self.sample].clone(), self.clean[self.sample].copy()
        self.logits: dict[tuple[str, str], np.ndarray] = {}
        self.meta: dict[tuple[str, str], dict] = {}
        self.attacked: dict[tuple[str, str], np.ndarray] = {}
        # Later rounds attack robust images alone, so that only first rounds can be compared between attacks and eps.
        self.first_round: dict[tuple[str, str], np.ndarray] = {}
        # What was repeated → key → numbers of robust images before and after the last repetition (None: none was run).
        self.last_round: dict[str, dict[tuple[str, str], list[int] | None]] = {
            "steps": {},
            "restarts": {},
        }
        self.store = _Store(state_dir, self.digest, pixels, labels, self.clean)

    def eps_of(self, stage: Stage, sweep: Sequence[str]) -> list[str]:
        return {"every": list(sweep), "headline": [self.headline]}.get(stage.eps, [stage.eps])

    def precision_of(self, stage: Stage) -> Precision:
        return stage.precision or self.precision

    def share_robust(self, stage: Stage) -> float:
        return float((~self.misclassified[ATTACKS[stage.attack].norm, stage.view]).mean())

    def finite(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Logits with every row that is not finite replaced by a wrong answer, and counted."""
        self.nonfinite += int((~np.isfinite(logits).all(1)).sum())
        return wrong_where_not_finite(logits, labels)

    def attack(self, stage: Stage, eps_text: str) -> None:
        """Runs one stage at one eps, and repeats it until it has converged where it decides robust accuracy."""
        state = ATTACKS[stage.attack].norm, stage.view
        inside = np.isin(np.arange(len(self.labels)), self.sample) | (stage.scope != "sample")
        chosen = inside if stage.scope == "all" else inside & ~self.misclassified[state]
        logits = self.flipped_logits[state].copy()
        logits[~inside] = np.nan
        outcome = _Outcome(logits, logits.copy(), chosen, self.share_robust(stage))
        self._attack_round(stage, eps_text, np.flatnonzero(chosen), outcome)
        self.first_round[eps_text, stage.name] = outcome.logits.copy()
        if decides_robust_accuracy(stage):
            self._repeat_until_converged(stage, eps_text, outcome)

    def _attack_round(
        self,
        stage: Stage,
        eps_text: str,
        rows: np.ndarray,
        outcome: _Outcome,
        changes: Mapping[str, object] | None = None,
    ) -> int:
        """Attacks the images `rows`, batch by batch, adds what that found to `outcome`, and books it. Returns how many
        images are newly misclassified in the stage's view. `changes`: what differs from the stage's own budget."""
        repeated = replace(stage, budget={**stage.budget, **(changes or {})})
        robust = self._count_robust(stage)
        unchanged = 0
        for start in range(0, len(rows), self.config.attack_batch):
            part = rows[start : start + self.config.attack_batch]
            done = self.batch(repeated, eps_text, part, len(outcome.rounds))
            self._take_over(outcome.logits, part, done["logits"], stage, outcome)
            self._take_over(outcome.rounded, part, done["rounded"], stage, outcome)
            outcome.seconds += done["seconds"].item()
            outcome.queries += done["queries"].item()
            outcome.largest = max(outcome.largest, done["largest"].item())
            outcome.flags |= set(done["flags"].tolist())
            unchanged += done["unchanged"].item()
            if self._keeps(stage, eps_text):
                self.keep(part, done)
        self._check_moved(stage, eps_text, rows, unchanged)
        outcome.unchanged += unchanged
        outcome.attacked += len(rows)
        self._count_misclassified(outcome.logits, stage)
        if _rounds(stage, eps_text):
            self._count_misclassified(outcome.rounded, stage)
        found = robust - self._count_robust(stage)
        outcome.rounds.append(
            {
                "steps": repeated.budget.get("steps"),
                "restarts": repeated.budget.get("restarts", 1),
                "n_attacked": len(rows),
                "misclassified": found,
            }
        )
        self.book(stage, eps_text, outcome)
        return found

    def _take_over(
        self, logits: np.ndarray, rows: np.ndarray, new: np.ndarray, stage: Stage, outcome: _Outcome
    ) -> None:
        """Writes a round's logits (len(rows), 4) into those of the stage (N, 4): all of them in the first round, later
        those that are the first to misclassify their image."""
        labels = self.labels[rows]
        first = misclassified(new, labels, stage.view) & ~misclassified(
            logits[rows], labels, stage.view
        )
        taken = first if outcome.rounds else np.ones(len(rows), bool)
        logits[rows[taken]] = new[taken]

    def _repeat_until_converged(self, stage: Stage, eps_text: str, outcome: _Outcome) -> None:
        """Repeats a stage on the images that are still robust in its view, each time from fresh starting points and with the
        attack's own step size: with its steps doubled until a round misclassifies none, or `config.max_steps` is reached;
        then, for PGD, with a start towards each other class until a round misclassifies none, or as many rounds were run as
        `config.max_steps` holds its steps."""
        key, steps = (eps_text, stage.name), stage.budget["steps"]
        budgets = [{"steps": 2 * steps}]
        while 2 * budgets[-1]["steps"] <= self.config.max_steps:
            budgets.append({"steps": 2 * budgets[-1]["steps"]})
        robust, left = self.last_round["steps"][key] = self._repeat(
            stage, eps_text, budgets, outcome
        )
        if stage.attack != "pgd":
            return
        if left < robust:
            # More steps still misclassify further images, so restarts with fewer would prove nothing.
            self.last_round["restarts"][key] = None
            return
        # Margin PGD climbs towards the k-th nearest class at its k-th start: one start leaves the other classes untried.
        groups = VIEWS[stage.view][0]
        others = len(CLASSES if groups is None else groups) - 1
        restarts = {"restarts": others * stage.budget.get("restarts", 1)}
        budgets = [restarts] * max(1, self.config.max_steps // steps)
        self.last_round["restarts"][key] = self._repeat(stage, eps_text, budgets, outcome)

    def _repeat(
        self, stage: Stage, eps_text: str, budgets: Sequence[dict], outcome: _Outcome
    ) -> list[int]:
        """Repeats a stage with each of these changes of its budget until one misclassifies no further image. Returns the
        numbers of robust images before and after the last repetition."""
        counts = [0, 0]
        for budget in budgets:
            rows = np.flatnonzero(~self.misclassified[ATTACKS[stage.attack].norm, stage.view])
            if not len(rows):
                return [0, 0]
            found = self._attack_round(
                stage, eps_text, rows, outcome, {**_OWN_STEPS.get(stage.attack, {}), **budget}
            )
            counts = [len(rows), len(rows) - found]
            if not found:
                break
        return counts

    def _count_robust(self, stage: Stage) -> int:
        return int((~self.misclassified[ATTACKS[stage.attack].norm, stage.view]).sum())

    def _clean_errors_stay(self, logits: np.ndarray, view: str) -> np.ndarray:
        """A clean error is an error, whatever an attack happens to turn it into."""
        mended = (
            misclassified(self.clean, self.labels, view)
            & ~misclassified(logits, self.labels, view)
            & ~np.isnan(logits).any(1)
        )
        return np.where(mended[:, None], self.clean, logits)

    def _keeps(self, stage: Stage, eps_text: str) -> bool:
        return (
            eps_text == self.headline
            and stage.view == "four"
            and ATTACKS[stage.attack].norm == "linf"
        )

    def _count_misclassified(self, logits: np.ndarray, stage: Stage) -> None:
        """Marks the images that these logits (N, 4) misclassify, in every view of the attack's norm."""
        logits[:] = self._clean_errors_stay(logits, stage.view)
        for view in VIEWS:
            state = ATTACKS[stage.attack].norm, view
            new = misclassified(logits, self.labels, view) & ~self.misclassified[state]
            self.flipped_logits[state][new] = logits[new]
            self.misclassified[state] |= new

    def book(self, stage: Stage, eps_text: str, outcome: _Outcome) -> None:
        """Stores a stage's logits and its budget; where images are also rounded to 8 bits, in a column of their own."""
        key = eps_text, stage.name
        self.logits[key], self.attacked[key] = outcome.logits, outcome.chosen
        self.meta[key] = self._describe(stage, outcome)
        if decides_robust_accuracy(stage):
            self.meta[key]["rounds"] = list(outcome.rounds)
        if _rounds(stage, eps_text):
            key = eps_text, f"{stage.name}_8bit"
            self.logits[key], self.attacked[key] = outcome.rounded, outcome.chosen
            self.meta[key] = self._describe(
                stage, replace(outcome, seconds=0.0, queries=outcome.attacked)
            )

    def _describe(self, stage: Stage, outcome: _Outcome) -> dict:
        """What a record says of a stage at one eps: what was attacked, with which budget, and what it cost."""
        attack, count = ATTACKS[stage.attack], int(outcome.chosen.sum())
        meta = {
            "n_attacked": count,
            "n_set": int((~np.isnan(outcome.logits).any(1)).sum()),
            "norm": attack.norm,
            "kind": attack.kind,
            "view": stage.view,
            "scope": stage.scope,
            "seed": self.config.seed,
            "precision": self.precision_of(stage),
            "standing_before": round(outcome.before, 4),
            "standing_after": round(self.share_robust(stage), 4),
            "seconds": round(outcome.seconds, 2),
            "queries": round(outcome.queries / max(count, 1), 1),
            "n_unchanged": outcome.unchanged,
            "largest_perturbation": outcome.largest,
            "flags": sorted(outcome.flags),
            **stage.budget,
        }
        if attack.package:
            meta["package"] = f"{attack.package} {version(attack.package)}"
        return meta

    def batch(
        self, stage: Stage, eps_text: str, rows: np.ndarray, number: int
    ) -> dict[str, np.ndarray]:
        """One batch of one attack: from the state on disk if it is there, else attacked now and written there. `number`
        counts the rounds of the stage from 0; each has starting points of its own."""
        seed = self.config.seed + 7919 * int(rows[0]) + ROUND_SEED * number
        name = self.store.name(eps_text, stage, seed, rows, self._given(stage))
        if (stored := self.store.load(name)) is not None:
            return stored
        started = time.perf_counter()
        adversarial, queries, flags = self._perturb(stage, eps_text, rows, seed)
        seconds, images = time.perf_counter() - started, self.pixels[rows]
        logits = self._score(adversarial, rows)
        unchanged = (adversarial == images).flatten(1).all(1).numpy() & ~misclassified(
            self.clean[rows], self.labels[rows], stage.view
        )
        # Rounded, not truncated: truncation would shift every perturbation by half a grey level.
        rounded = (
            self._score((adversarial * 255).round() / 255, rows)
            if _rounds(stage, eps_text)
            else logits
        )
        kept = (
            adversarial[np.isin(rows, self.sample)]
            if self._keeps(stage, eps_text)
            else adversarial[:0]
        )
        largest = perturbation_size(images, adversarial, ATTACKS[stage.attack].norm).max()
        done = {
            "logits": logits,
            "rounded": rounded,
            "adversarial": kept.numpy(),
            "seconds": np.float64(seconds),
            "queries": np.int64(queries),
            "unchanged": np.int64(unchanged.sum()),
            "largest": np.float64(largest),
            "flags": np.array(flags, dtype=np.str_),
        }
        self.store.save(name, done)
        return done

    def _score(self, images: Tensor, rows: np.ndarray) -> np.ndarray:
        return self.finite(
            predict_logits(self.model, images, self.config.attack_batch).numpy(), self.labels[rows]
        )

    def _perturb(
        self, stage: Stage, eps_text: str, rows: np.ndarray, seed: int
    ) -> tuple[Tensor, int, list[str]]:
        """Adversarial images, images passed through the model, and warnings of the attack's own code."""
        groups, budget = VIEWS[stage.view][0], dict(stage.budget)
        if stage.source:
            source = self.sources[stage.source]
            budget["source"] = source if groups is None else GroupedClasses(source, groups)
        if stage.mask:
            budget["mask"] = torch.as_tensor(self.masks[stage.mask])[rows]
        view = self.model if groups is None else GroupedClasses(self.model, groups)
        counted = _Counted(view, time.monotonic() + (self.time_limit or float("inf")))
        labels = torch.as_tensor(view_labels(self.labels[rows], stage.view)).to(self.device)
        try:
            with _warnings_of_official_code() as flags:
                adversarial = ATTACKS[stage.attack](
                    counted,
                    self.pixels[rows].to(self.device),
                    labels,
                    parse_eps(eps_text),
                    seed=seed,
                    precision=self.precision_of(stage),
                    **budget,
                ).cpu()
        except Exception as error:
            kind = (
                "ran out of time"
                if isinstance(error, TimeoutError)
                else f"failed ({type(error).__name__}: {error})"
            )
            raise UserError(
                f"Attack {stage.name} at eps {eps_text} {kind} on images {rows[0]}-{rows[-1]}: this is a "
                "failed evaluation, not a robust model; mend the attack or the model and run it "
                "again."
            ) from error
        return adversarial, counted.images, flags

    def _given(self, stage: Stage) -> str:
        """Identity of what a stage was given beside its budget: the precision, the source's weights, the mask."""
        source = "" if (precision := self.precision_of(stage)) == "fp32" else precision
        source += model_digest(self.sources[stage.source]) if stage.source else ""
        if not stage.mask:
            return source
        return (
            source
            + hashlib.sha256(
                np.ascontiguousarray(torch.as_tensor(self.masks[stage.mask]))
            ).hexdigest()
        )

    def keep(self, rows: np.ndarray, done: dict[str, np.ndarray]) -> None:
        """Keeps a sample image's adversarial until a stronger one comes: the lowest four-class margin wins."""
        inside = np.isin(rows, self.sample)
        places = np.searchsorted(self.sample, rows[inside])
        labels = torch.as_tensor(self.labels[rows[inside]])
        new, old = done["logits"][inside], self.kept_logits[places]
        lower = (
            margin(torch.as_tensor(new), labels) < margin(torch.as_tensor(old), labels)
        ).numpy()
        self.kept[places[lower]] = torch.as_tensor(done["adversarial"])[lower]
        self.kept_logits[places[lower]] = new[lower]

    def _check_moved(self, stage: Stage, eps_text: str, rows: np.ndarray, unchanged: int) -> None:
        """An attack that left every image as it was did not run, whatever its score says; unless the model's answers change by
        themselves, so that images were wrong when it came to them, which the sanity table names."""
        asked = int((~misclassified(self.clean[rows], self.labels[rows], stage.view)).sum())
        if (
            asked
            and unchanged == asked
            and parse_eps(eps_text) > 0
            and _same_every_time(self)["passed"]
        ):
            raise UserError(
                f"Attack {stage.name} at eps {eps_text} changed none of the {asked} images it was given: "
                "this is a failed evaluation, not a robust model; its gradient may be zero everywhere."
            )


def _rounds(stage: Stage, eps_text: str) -> bool:
    """Whether a stage gets a column of its own for 8-bit images: PGD, where eps is a whole number of grey levels."""
    levels = parse_eps(eps_text) * 255
    return (
        stage.attack == "pgd"
        and stage.view == "four"
        and levels > 0.5
        and abs(levels - round(levels)) < 1e-6
    )


@contextlib.contextmanager
def _warnings_of_official_code() -> Iterator[list[str]]:
    """Collects what AutoAttack warns of (randomness, zero gradients, a black box that beats a white box)."""
    flags: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            flags.append(record.getMessage())

    logger, handler = logging.getLogger("auto-attack"), Collect(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield flags
        flags += sorted(
            {str(warning.message) for warning in caught if "pyautoattack" in str(warning.filename)}
        )
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def model_digest(model: nn.Module) -> str:
    """SHA-256 of a model's class and of all its weights and buffers."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class _Store:
    """Finished batches on disk, under a name that holds everything their numbers depend on.

    One atomic `.npz` a batch, read without unpickling. The folder is named by weights, images and labels; each file by
    eps, attack, budget, seed and rows: so a state is never continued by a run that it does not fit.
    """

    def __init__(
        self,
        folder: Path | None,
        digest: str,
        pixels: Tensor,
        labels: np.ndarray,
        clean: np.ndarray,
    ) -> None:
        self.folder = None
        if folder is None:
            return
        identity = hashlib.sha256(f"{STATE_VERSION} {torch.__version__} {digest}".encode())
        identity.update(pixels.numpy())
        identity.update(labels)
        self.folder = Path(folder) / identity.hexdigest()[:16]
        # The same weights under changed code are another model: its clean answers tell.
        stored = self.load("clean.npz")
        if stored is not None and not np.allclose(stored["logits"], clean, rtol=1e-3, atol=1e-3):
            for path in self.folder.glob("*.npz"):
                path.unlink()
            stored = None
        if stored is None:
            self.save("clean.npz", {"logits": clean})

    def name(self, eps_text: str, stage: Stage, seed: int, rows: np.ndarray, given: str) -> str:
        identity = (
            f"{stage.attack} {stage.view} {sorted(stage.budget.items())} {seed} {given}".encode()
        )
        digest = hashlib.sha256(identity + rows.tobytes()).hexdigest()[:12]
        return f"{eps_text.replace('/', '-')}_{stage.name}_{digest}.npz"

    def load(self, name: str) -> dict[str, np.ndarray] | None:
        if self.folder is None or not (self.folder / name).is_file():
            return None
        with np.load(self.folder / name, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    def save(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        if self.folder is not None:
            with atomic_path(self.folder / name) as temporary, open(temporary, "wb") as file:
                np.savez(file, **arrays)


# -- the checks -------------------------------------------------------------------------------------------------------

#: Largest difference between two evaluations of the same images that still counts as the same logits.
SAME_LOGITS = 1e-4
#: Accuracy differences up to this share, or one image, are chance.
CHANCE = 0.005


def _row(check: str, passed: bool, figure: object, note: str) -> dict:
    return {"check": check, "passed": bool(passed), "figure": figure, "note": note}


def sanity_table(run: _Run, plan: Sequence[Stage], sweep: Sequence[str]) -> list[dict]:
    """The conditions of an honest evaluation, each with what was found: `check`, `passed`, `figure` and a `note` that
    says in plain words what it means. On the fixed stratified sample where a check costs model passes."""
    model_checks = [
        _finite_logits,
        _logits_not_probabilities,
        _same_every_time,
        _same_with_gradient,
        _batch_independent,
        _not_constant,
        _gradients_present,
        _eps_zero,
    ]
    rows = [check(run) for check in model_checks]
    rows += [
        *_ordered(run, sweep),
        _falls_with_eps(run, plan, sweep),
        _eps_one(run),
        *_converged(run),
    ]
    rows += [
        _masking(run, sweep),
        _inside_ball(run),
        _moved(run),
        _denominator(run, plan),
        _worst_by_image(run),
    ]
    rows += [_search_precision(run)] if (run.headline, "apgd_t_float32") in run.meta else []
    return [*rows, _kept_rescore(run), _untouched_model(run)]


def verdict(sanity: Sequence[dict]) -> str:
    """One sentence: whether these robust numbers can be believed, and if not, why."""
    failed = [row for row in sanity if not row["passed"]]
    if not failed:
        return f"All {len(sanity)} checks passed: nothing speaks against these numbers."
    reasons = "; ".join(row["note"] for row in failed)
    return f"{len(failed)} of {len(sanity)} checks failed, so do not take these numbers for robustness: {reasons}."


def _sampled(run: _Run) -> tuple[Tensor, Tensor]:
    return run.pixels[run.sample].to(run.device), torch.as_tensor(run.labels[run.sample]).to(
        run.device
    )


def _finite_logits(run: _Run) -> dict:
    note = (
        "every logit is a number"
        if not run.nonfinite
        else f"{run.nonfinite} answers were NaN or infinite and count as wrong: the model is broken there, not robust"
    )
    return _row("finite_logits", run.nonfinite == 0, run.nonfinite, note)


def _logits_not_probabilities(run: _Run) -> dict:
    inside = (
        (run.clean >= 0).all()
        and (run.clean <= 1).all()
        and np.allclose(run.clean.sum(1), 1, atol=1e-4)
    )
    note = (
        "raw [0, 1] pixels in, logits out"
        if not inside
        else "the outputs look like probabilities: losses on them have the wrong gradient, so return logits"
    )
    return _row("logits_from_pixels", not inside, int(run.clean.shape[1]), note)


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of two sets of logits, in units of their scale where that is above 1."""
    if not (a.isfinite().all() and b.isfinite().all()):
        return float("inf") if not torch.equal(a.isfinite(), b.isfinite()) else 0.0
    return float((a - b).abs().max() / a.abs().max().clamp_min(1.0))


def _same_every_time(run: _Run) -> dict:
    images = run.pixels[run.sample]
    gap = _difference(predict_logits(run.model, images), predict_logits(run.model, images))
    note = (
        "the same image always gets the same answer"
        if gap <= SAME_LOGITS
        else "the answer to the same image changes: attack the average over the randomness, or these numbers mean little"
    )
    return _row("same_every_time", gap <= SAME_LOGITS, _figure(gap), note)


def _figure(value: float) -> float | str:
    return float(f"{value:.3g}") if np.isfinite(value) else "infinite"


def _same_with_gradient(run: _Run) -> dict:
    images, _ = _sampled(run)
    modes = [module.training for module in run.model.modules()]
    plain = predict_logits(run.model, images)
    with _evaluating(run.model):
        during = [module.training for module in run.model.modules()]
        followed = run.model(images.clone().requires_grad_(True)).detach().float().cpu()
        after = [module.training for module in run.model.modules()]
    gap, kept = _difference(plain, followed), during == after
    note = (
        "the model answers alike whether or not its gradient is asked for"
        if gap <= SAME_LOGITS and kept
        else "the model changes its train/eval mode when it is called"
        if not kept
        else "the model answers otherwise when its gradient is asked for: it knows when it is attacked"
    )
    return _row(
        "same_under_attack", gap <= SAME_LOGITS and kept and modes == run.modes, _figure(gap), note
    )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _batch_independent(run: _Run) -> dict:
    images = run.pixels[run.sample][:16]
    together = predict_logits(run.model, images, len(images))
    alone = predict_logits(run.model, images, 1)
    backwards = predict_logits(run.model, images.flip(0), max(len(images) // 2, 1)).flip(0)
    gap = max(_difference(together, alone), _difference(together, backwards))
    note = (
        "an image's answer does not depend on its neighbours in the batch"
        if gap <= SAME_LOGITS
        else "an image's answer depends on batch size or order: is BatchNorm in training mode?"
    )
    return _row("batch_independent", gap <= SAME_LOGITS, _figure(gap), note)


def _not_constant(run: _Run) -> dict:
    share = float(np.bincount(decisions(run.clean), minlength=len(CLASSES)).max() / len(run.labels))
    several = len(np.unique(run.labels)) > 1
    note = (
        "the model tells images apart"
        if share < 0.99 or not several
        else f"the model gives one answer to {share:.0%} of the images: its robustness is that of a constant"
    )
    return _row("not_constant", share < 0.99 or not several, _figure(share), note)


def gradient_shares(
    model: nn.Module, images: Tensor, labels: Tensor, batch: int = 64
) -> dict[str, float]:
    """Shares of images whose pixel gradient is zero everywhere or not finite, for the plain cross-entropy (`zero_ce`),
    which vanishes where softmax saturates, and for the margin (`zero_margin`); `not_finite` for either."""
    zero_ce, zero_margin, broken = [], [], []
    with _evaluating(model), no_parameter_gradients(model), torch.enable_grad():
        for part, truth in zip(images.split(batch), labels.split(batch), strict=True):
            part = part.clone().requires_grad_(True)
            logits = model(part).float()
            losses = (
                torch.nn.functional.cross_entropy(logits, truth, reduction="sum"),
                margin(logits, truth).sum(),
            )
            gradients = [
                torch.autograd.grad(loss, part, retain_graph=True, allow_unused=True)[0]
                if loss.requires_grad
                else None
                for loss in losses
            ]
            ce, gap = [
                torch.zeros_like(part) if gradient is None else gradient for gradient in gradients
            ]
            zero_ce.append((ce == 0).flatten(1).all(1))
            zero_margin.append((gap == 0).flatten(1).all(1))
            broken.append(~(ce.isfinite() & gap.isfinite()).flatten(1).all(1))
    shares = {"zero_ce": zero_ce, "zero_margin": zero_margin, "not_finite": broken}
    return {name: float(torch.cat(parts).float().mean()) for name, parts in shares.items()}


def _gradients_present(run: _Run) -> dict:
    shares = gradient_shares(run.model, *_sampled(run), run.config.attack_batch)
    passed = shares["zero_margin"] == 0 and shares["not_finite"] == 0 and shares["zero_ce"] <= 0.05
    if passed:
        note = "every sampled image has a gradient to follow"
    elif shares["zero_margin"] or shares["not_finite"]:
        note = (
            f"{shares['zero_margin']:.0%} of gradients are zero and {shares['not_finite']:.0%} not finite: "
            "gradients are masked, so gradient attacks prove nothing here"
        )
    else:
        note = (
            f"softmax saturates on {shares['zero_ce']:.0%} of the images (scaled logits?): cross-entropy has no "
            "gradient there"
        )
    return _row(
        "gradients_present", passed, {name: _figure(share) for name, share in shares.items()}, note
    )


def _eps_zero(run: _Run) -> dict:
    images, labels = _sampled(run)
    attacked = ATTACKS["pgd"](run.model, images, labels, 0.0, steps=2)
    gap = _difference(predict_logits(run.model, images), predict_logits(run.model, attacked))
    note = (
        "an attack with eps 0 gives the clean answers"
        if gap <= SAME_LOGITS
        else "an attack with eps 0 changes answers: something else than the pixels is attacked"
    )
    return _row("eps_zero_is_clean", gap <= SAME_LOGITS, _figure(gap), note)


def _robust_count(run: _Run, key: tuple[str, str], view: str = "four") -> float:
    return float((~misclassified(run.logits[key], run.labels, view)).mean())


def _robust_to_first_round(run: _Run, key: tuple[str, str]) -> float:
    return float((~misclassified(run.first_round[key], run.labels)).mean())


def _first(run: _Run, eps_text: str, attack: str) -> str | None:
    """Stored name of the plain four-class form of an attack, None where the suite has none."""
    return next(
        (
            name
            for (eps, name), meta in run.meta.items()
            if eps == eps_text
            and meta["view"] == "four"
            and meta["scope"] == "all"
            and (name == attack or name.removeprefix(attack).isdigit())
        ),
        None,
    )


def _ordered(run: _Run, sweep: Sequence[str]) -> list[dict]:
    """PGD ≤ FGSM ≤ noise ≤ clean, at every eps, in the first round of each."""
    rows, slack = [], max(CHANCE, 1 / len(run.labels)) + 1e-9
    clean = float((~misclassified(run.clean, run.labels)).mean())
    for weaker, stronger in (("clean", "noise"), ("noise", "fgsm"), ("fgsm", "pgd")):
        figures, broken = {}, []
        for eps_text in sweep:
            names = [_first(run, eps_text, attack) for attack in (weaker, stronger)]
            if names[1] is None or (names[0] is None and weaker != "clean"):
                continue
            above = (
                clean if weaker == "clean" else _robust_to_first_round(run, (eps_text, names[0]))
            )
            below = _robust_to_first_round(run, (eps_text, names[1]))
            figures[eps_text] = [_figure(below), _figure(above)]
            # Decided before rounding for print, which can turn a difference of one image into more than one.
            if below > above + slack:
                broken.append(eps_text)
        note = (
            f"accuracy under {stronger} is not above {weaker}"
            if not broken
            else f"accuracy under {stronger} is above {weaker} at {', '.join(broken)}: the stronger attack does not work"
        )
        if figures:
            rows.append(_row(f"{stronger}_le_{weaker}", not broken, figures, note))
    return rows


def _falls_with_eps(run: _Run, plan: Sequence[Stage], sweep: Sequence[str]) -> dict:
    """On attacks that start anew at each eps: first rounds on all images. Other rounds and stages inherit what smaller eps
    misclassified."""
    name = next(
        (
            stage.name
            for stage in plan
            if stage.attack == "pgd" and stage.scope == "all" and stage.view == "four"
        ),
        None,
    )
    curve = [_robust_to_first_round(run, (eps_text, name)) for eps_text in sweep] if name else []
    rise = max(
        (later - earlier for earlier, later in zip(curve, curve[1:], strict=False)), default=0.0
    )
    passed = rise <= max(CHANCE, 1 / len(run.labels)) + 1e-9
    note = (
        "accuracy does not rise with eps"
        if passed
        else f"accuracy rises by {rise:.1%} with eps: PGD gets stuck"
    )
    return _row("falls_with_eps", passed, [_figure(value) for value in curve], note)


def _sample_robust(run: _Run, eps: float, **budget: object) -> np.ndarray:
    """Which images of the fixed sample stand against PGD with this budget, bool (S,)."""
    robust = []
    for start in range(0, len(run.sample), run.config.attack_batch):
        part = run.sample[start : start + run.config.attack_batch]
        images, labels = (
            run.pixels[part].to(run.device),
            torch.as_tensor(run.labels[part]).to(run.device),
        )
        attacked = ATTACKS["pgd"](
            run.model, images, labels, eps, seed=run.config.seed + 1, loss="margin", **budget
        )
        robust.append((predict_logits(run.model, attacked).argmax(1) == labels.cpu()).numpy())
    return np.concatenate(robust)


def _eps_one(run: _Run) -> dict:
    correct = ~misclassified(run.clean, run.labels)
    balanced = float(
        np.mean([correct[run.labels == label].mean() for label in np.unique(run.labels)])
    )
    accuracy = float(_sample_robust(run, 1.0, steps=run.config.pgd_steps).mean())
    passed = accuracy <= 0.05 or balanced <= 0.6
    if accuracy <= 0.05:
        note = "with eps 1 nothing is left"
    elif passed:
        note = f"{accuracy:.0%} survive eps 1, as a constant answer would; clean balanced accuracy is {balanced:.0%}"
    else:
        note = f"{accuracy:.0%} survive eps 1, where any image may be shown: the attack does not work on this model"
    return _row("eps_one_breaks_all", passed, _figure(accuracy), note)


def _converged(run: _Run) -> list[dict]:
    """Whether the last round of each stage that decides robust accuracy misclassified no further image, at every eps: with
    twice the steps, and with a start towards each other class. `figure`: eps → stage → robust images before and after that
    round (None: it was not run, because more steps still misclassified images)."""
    return [
        _last_rounds(run, "steps", "twice the steps"),
        _last_rounds(run, "restarts", "another start towards each other class"),
    ]


def _last_rounds(run: _Run, what: str, told: str) -> dict:
    figures: dict[str, dict[str, list[int] | None]] = {}
    for (eps_text, name), counts in run.last_round[what].items():
        figures.setdefault(eps_text, {})[name] = counts
    # A round that was not run (None) has shown no convergence either.
    unfinished = [
        eps_text
        for eps_text, counts in figures.items()
        if any(pair is None or pair[0] > pair[1] for pair in counts.values())
    ]
    if not figures:
        note = f"no attack of this suite was repeated with {told}: nothing tells whether it has converged"
    elif unfinished:
        note = (
            f"{told} may misclassify further images at {', '.join(unfinished)}: the rounds ended at "
            f"{run.config.max_steps} steps (max_steps), so give them more"
        )
    else:
        note = f"{told} misclassifies no further image at any eps"
    return _row(f"converged_in_{what}", bool(figures) and not unfinished, figures, note)


def _search_precision(run: _Run) -> dict:
    """What the faster arithmetic of the search may have cost: how many of the sample's images that everything else left
    standing fell when APGD-T searched in float32, `[fallen, attacked]` by attack."""
    found = {}
    for stage in float32_stages(run.config):
        key = run.headline, stage.name
        own = run.attacked[key]
        found[stage.name] = [
            int(misclassified(run.logits[key][own], run.labels[own], stage.view).sum()),
            int(own.sum()),
        ]
    passed = all(fell <= max(CHANCE * len(run.sample), 1) for fell, _ in found.values())
    told = f"a search in float32 fells {sum(fell for fell, _ in found.values())} images that the one in {run.precision} left standing"
    note = told if passed else f"{told}: attack this model in float32"
    return _row("float32_finds_no_more", passed, found, note)


def _masking(run: _Run, sweep: Sequence[str]) -> dict:
    """Images that an attack without gradients felled and no attack with gradients did, by eps."""
    counts = {}
    for eps_text in sweep:
        hits = {
            "white-box": np.zeros(len(run.labels), bool),
            "other": np.zeros(len(run.labels), bool),
        }
        for key, meta in run.meta.items():
            if key[0] == eps_text and meta["view"] == "four" and meta["norm"] == "linf":
                own = run.attacked[key] & misclassified(run.logits[key], run.labels)
                hits["white-box" if meta["kind"] == "white-box" else "other"] |= own
        counts[eps_text] = int(
            (hits["other"] & ~hits["white-box"] & ~misclassified(run.clean, run.labels)).sum()
        )
    total = max(counts.values(), default=0)
    note = (
        "no image falls to a black box and stands against every white box"
        if not total
        else f"black box beats white box on {total} image{'s' * (total != 1)}: gradients may be masked"
    )
    return _row("white_box_le_black_box", total == 0, counts, note)


def _inside_ball(run: _Run) -> dict:
    excess = max(
        (
            meta["largest_perturbation"] - parse_eps(eps_text)
            for (eps_text, _), meta in run.meta.items()
            if meta["norm"] == "linf"
        ),
        default=0.0,
    )
    note = (
        "no perturbation exceeds eps, none leaves [0, 1]"
        if excess <= 1e-6
        else "a perturbation is larger than eps"
    )
    return _row("inside_the_ball", excess <= 1e-6, _figure(max(excess, 0.0)), note)


def _moved(run: _Run) -> dict:
    unchanged = {
        f"{eps_text}:{name}": meta["n_unchanged"]
        for (eps_text, name), meta in run.meta.items()
        if meta["n_unchanged"]
    }
    told = ", ".join(
        f"{name} left {count} images as they were" for name, count in list(unchanged.items())[:3]
    )
    note = (
        f"{told}: not robust, not attacked"
        if unchanged
        else "every attack changed every image it was given"
    )
    return _row("every_image_changed", not unchanged, unchanged, note)


def _denominator(run: _Run, plan: Sequence[Stage]) -> dict:
    partial = {stage.name for stage in plan if stage.scope == "sample"}
    missing = [
        f"{eps_text}:{name}"
        for (eps_text, name), logits in run.logits.items()
        if len(logits) != len(run.labels) or (np.isnan(logits).any() and name not in partial)
    ]
    return _row(
        "full_denominator",
        not missing,
        len(run.labels),
        f"every score counts all {len(run.labels)} images"
        if not missing
        else f"{', '.join(missing)} left images out",
    )


def worst_case(
    logits: Mapping[tuple[str, str], np.ndarray],
    labels: np.ndarray,
    eps_text: str,
    view: str = "four",
) -> np.ndarray:
    """Whether each image stands against every attack at an eps, bool (N,): the minimum over attacks per image. Give the
    logits of one norm."""
    robust = np.ones(len(labels), bool)
    for (eps, _), rows in logits.items():
        if eps == eps_text:
            robust &= ~misclassified(rows, labels, view)
    return robust


def _worst_by_image(run: _Run) -> dict:
    linf = {key: rows for key, rows in run.logits.items() if run.meta[key]["norm"] == "linf"}
    mean_of_min = float(
        (worst_case(linf, run.labels, run.headline) & ~misclassified(run.clean, run.labels)).mean()
    )
    min_of_means = min(
        (_robust_count(run, key) for key in linf if key[0] == run.headline), default=1.0
    )
    note = f"{mean_of_min:.1%} stand against every attack at once; the best single attack leaves {min_of_means:.1%}"
    figures = [_figure(mean_of_min), _figure(min_of_means)]
    return _row("worst_case_by_image", mean_of_min <= min_of_means + 1e-9, figures, note)


def _kept_rescore(run: _Run) -> dict:
    again = predict_logits(run.model, run.kept, run.config.attack_batch)
    finite = again.isfinite().all(1)
    gap = (
        _difference(again[finite], torch.as_tensor(run.kept_logits)[finite])
        if finite.any()
        else 0.0
    )
    note = f"the kept adversarial images {'' if gap <= SAME_LOGITS else 'do not '}give the recorded answers again"
    return _row("kept_images_rescore", gap <= SAME_LOGITS, _figure(gap), note)


def _untouched_model(run: _Run) -> dict:
    same = (
        model_digest(run.model) == run.digest
        and [module.training for module in run.model.modules()] == run.modes
    )
    return _row(
        "model_untouched",
        same,
        same,
        "weights, BatchNorm statistics and modes are as before"
        if same
        else "the evaluation changed the model: weights, BatchNorm statistics or modes differ",
    )


# -- curves, matrices, distributions -----------------------------------------------------------------------------------


def accuracy_curves(
    result: SuiteResult, labels: np.ndarray, view: str = "four", norm: str = "linf"
) -> dict[str, np.ndarray]:
    """Attack → which images stand at each eps, bool (E, N), eps ascending; `worst_case` over all of them. Each curve is
    the union over smaller eps, whose balls lie inside the larger ones, so it never rises. Attacks not run at every eps
    are left out, except from `worst_case`."""
    keys = [key for key in result.logits if result.meta[key]["norm"] == norm]
    sweep = sorted({eps_text for eps_text, _ in keys}, key=parse_eps)
    curves = {}
    for name in dict.fromkeys(name for _, name in keys):
        if all((eps_text, name) in result.logits for eps_text in sweep):
            robust = np.stack(
                [~misclassified(result.logits[eps_text, name], labels, view) for eps_text in sweep]
            )
            curves[name] = np.logical_and.accumulate(robust, axis=0)
    chosen = {key: result.logits[key] for key in keys}
    worst = np.stack([worst_case(chosen, labels, eps_text, view) for eps_text in sweep])
    curves["worst_case"] = np.logical_and.accumulate(
        worst & ~misclassified(result.clean_logits, labels, view), axis=0
    )
    return curves


def transfer_matrix(
    models: Mapping[str, nn.Module],
    images_uint8: np.ndarray | Tensor,
    labels: np.ndarray,
    eps: float,
    *,
    steps: int = 20,
    batch: int = 64,
    seed: int = 0,
) -> np.ndarray:
    """Which images of each target model stand against images made on each source model, bool (source, target, N), in
    the order of `models`. The diagonal is momentum PGD on the model itself."""
    pixels, truth, members = as_pixels(images_uint8), np.asarray(labels), list(models.values())
    robust = np.zeros((len(members), len(members), len(pixels)), bool)
    for row, source in enumerate(progress(members, "transfer")):
        made = attack_images(
            source,
            pixels,
            truth,
            "transfer",
            eps,
            batch=batch,
            seed=seed,
            source=source,
            steps=steps,
        )
        for column, target in enumerate(members):
            robust[row, column] = ~misclassified(predict_logits(target, made, batch).numpy(), truth)
    return robust


def attack_images(
    model: nn.Module,
    pixels: Tensor,
    labels: np.ndarray,
    attack: str,
    eps: float,
    /,
    *,
    batch: int = 64,
    seed: int = 0,
    targets: np.ndarray | None = None,
    **budget: object,
) -> Tensor:
    """Adversarial images (N, 1, H, W) of a registered attack, on the CPU, batch by batch; pixels float32 in [0, 1]."""
    device, made = _device(model), []
    for start in range(0, len(pixels), batch):
        part = slice(start, start + batch)
        aims = None if targets is None else torch.as_tensor(targets[part]).to(device)
        made.append(
            ATTACKS[attack](
                model,
                pixels[part].to(device),
                torch.as_tensor(labels[part]).to(device),
                eps,
                seed=seed + 7919 * start,
                targets=aims,
                **budget,
            ).cpu()
        )
    return torch.cat(made)


def minimal_perturbations(
    model: nn.Module,
    images_uint8: np.ndarray | Tensor,
    labels: np.ndarray,
    *,
    norm: str = "linf",
    steps: int = 50,
    batch: int = 64,
    seed: int = 0,
) -> np.ndarray:
    """Size of the smallest adversarial perturbation that FAB-T finds for each image, float (N,), in units of the [0, 1]
    pixel range: an upper bound on the true one; 0 for clean errors, infinite where none is found."""
    pixels, device, sizes = as_pixels(images_uint8), _device(model), []
    for start in range(0, len(pixels), batch):
        images, truth = (
            pixels[start : start + batch],
            torch.as_tensor(np.asarray(labels)[start : start + batch]),
        )
        found = nearest_adversarial(
            model, images.to(device), truth.to(device), norm=norm, steps=steps, seed=seed
        ).cpu()
        fooled = predict_logits(model, found, batch).argmax(1) != truth
        sizes.append(torch.where(fooled, perturbation_size(images, found, norm), torch.inf))
    return torch.cat(sizes).numpy()


def direction_success(
    model: nn.Module,
    images_uint8: np.ndarray | Tensor,
    labels: np.ndarray,
    eps: float,
    *,
    steps: int = 20,
    batch: int = 64,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """For `healthier` and `sicker`: 1 where PGD moves the answer to a class below or above the truth, 0 where it does
    not, NaN where there is no such class (Non cannot be made healthier), float (N,)."""
    pixels, truth = as_pixels(images_uint8), np.asarray(labels).astype(np.int64)
    success = {}
    for direction, step in (("healthier", -1), ("sicker", 1)):
        moved = np.where((truth + step >= 0) & (truth + step < len(CLASSES)), 0.0, np.nan)
        for distance in range(1, len(CLASSES)):
            target = truth + step * distance
            rows = np.flatnonzero((moved == 0) & (target >= 0) & (target < len(CLASSES)))
            if not len(rows):
                break
            made = attack_images(
                model,
                pixels[rows],
                truth[rows],
                "pgd_targeted",
                eps,
                batch=batch,
                seed=seed,
                targets=target[rows],
                steps=steps,
            )
            answers = predict_logits(model, made, batch).argmax(1).numpy()
            moved[rows[(answers - truth[rows]) * step > 0]] = 1.0
        success[direction] = moved
    return success


def pgd_convergence(
    model: nn.Module,
    images_uint8: np.ndarray | Tensor,
    labels: np.ndarray,
    eps: float,
    *,
    steps: Sequence[int] = (1, 2, 5, 10, 20, 50),
    restarts: Sequence[int] = (1, 2, 5),
    restart_steps: int = 20,
    batch: int = 64,
    seed: int = 0,
) -> dict[tuple[str, int], np.ndarray]:
    """Which images stand after PGD with each number of steps, and with each number of restarts of `restart_steps`
    steps, bool (N,), under the keys `("steps", k)` and `("restarts", k)`."""
    pixels, truth = as_pixels(images_uint8), np.asarray(labels)
    budgets = {("steps", count): dict(steps=count) for count in steps}
    budgets |= {
        ("restarts", count): dict(steps=restart_steps, restarts=count) for count in restarts
    }
    robust = {}
    for key, budget in budgets.items():
        made = attack_images(
            model, pixels, truth, "pgd", eps, batch=batch, seed=seed, loss="margin", **budget
        )
        robust[key] = ~misclassified(predict_logits(model, made, batch).numpy(), truth)
    return robust


def sample_measures(
    model: nn.Module,
    images_uint8: np.ndarray | Tensor,
    labels: np.ndarray,
    patients: np.ndarray,
    config: RunConfig,
) -> dict:
    """What a worst case does not tell, on the fixed stratified sample, at the headline eps, with four classes, as JSON:
    the smallest perturbation found for each image, whether PGD can move it towards `healthier` and `sicker` answers, and
    whether it stands after PGD of growing budgets. `None` stands for a perturbation not found and a direction that is not
    there; `rows` are the sample's rows of the images given."""
    rows, eps_text = stratified_sample(labels, patients, config.sample), headline_of(config)
    given = (model, torch.as_tensor(images_uint8)[torch.as_tensor(rows)], np.asarray(labels)[rows])
    options = dict(batch=config.attack_batch, seed=config.seed)
    sizes = minimal_perturbations(*given, steps=20, **options)
    directions = direction_success(*given, parse_eps(eps_text), steps=config.pgd_steps, **options)
    converged = pgd_convergence(
        *given, parse_eps(eps_text), restart_steps=config.pgd_steps, **options
    )
    return {
        "eps": eps_text,
        "pgd_steps": config.pgd_steps,
        "rows": rows.tolist(),
        "minimal_linf": _finite_or_none(sizes),
        **{name: _finite_or_none(success) for name, success in directions.items()},
        "convergence": [
            {"kind": kind, "count": count, "standing": robust.tolist()}
            for (kind, count), robust in converged.items()
        ],
    }


def _finite_or_none(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def model_from_factory(spec: str) -> nn.Module:
    """The model that a user's `module:function` returns, in eval mode.

    Raises:
        StudyError: no such module or function, or it returns no `nn.Module`.
    """
    module_name, _, function_name = spec.partition(":")
    try:
        model = getattr(importlib.import_module(module_name), function_name or "build_model")()
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{spec!r} gave no model ({type(error).__name__}: {error}): write it as module:function, "
            "where the function takes nothing and returns a torch.nn.Module."
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{spec!r} returned a {type(model).__name__}: expected a torch.nn.Module.")
    return model.eval()
