"""Runs a suite of attacks against a model, and keeps what each attack found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from utils.attacks.base import ATTACKS, Precision
from utils.config import RunConfig, parse_eps
from utils.evaluation.batches import BatchStore, attack_batch
from utils.evaluation.plan import (
    VIEWS,
    AttackName,
    Stage,
    decides_robust_accuracy,
    float32_stages,
    is_rounded,
    suite_plan,
)
from utils.evaluation.predictions import as_pixels, misclassified
from utils.evaluation.sanity import sanity_table
from utils.evaluation.sanity.model import same_every_time
from utils.evaluation.suite_run import Outcome, SuiteRun
from utils.utils_funcs import CLASSES, UserError, progress

#: Attack → what its repetitions take from the attack's defaults instead of the stage's budget: a
#: step size or a start that suits no model converges nowhere.
DEFAULTS_OF_REPETITIONS: dict[str, dict] = {"pgd": {"step_size": None, "random_start": True}}
#: Attacks that aim by the clinical meaning of the four classes.
OF_RATINGS = ("pgd_clinical",)


@dataclass
class SuiteResult:
    """What a suite returns, for N images of the declared evaluation set.

    Attributes:
        logits: (eps as written, attack) → float32 (N, 4) of the attack's images. An image that the
            attack skipped, because it was misclassified already, has the logits that misclassified
            it; a clean error has its clean logits; NaN is outside of the attack's declared set.
        meta: the same keys → what the record says of the attack.
        clean_logits: float32 (N, 4).
        sanity: the rows of `sanity_table`.
        kept: float32 (S, 1, H, W), the strongest four-class adversarial images of the fixed sample
            `kept_index` (S,) at `kept_eps`.
        kept_logits: float32 (S, 4) that predicting `kept` again must give.
    """

    logits: dict[tuple[str, str], np.ndarray]
    meta: dict[tuple[str, str], dict]
    clean_logits: np.ndarray
    sanity: list[dict]
    kept: np.ndarray
    kept_index: np.ndarray
    kept_logits: np.ndarray
    kept_eps: str


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
    classes: Sequence[str] = CLASSES,
) -> SuiteResult:
    """Attacks `model` with a suite at every eps of `config.eps`, then checks the evaluation itself.

    Args:
        model: pixels float32 (N, 1, H, W) in [0, 1] → logits (N, 4); evaluated in eval mode, left
            as it was.
        patients: patient of each image (N,); -1 where unknown.
        state_dir: finished batches are kept here, so that an interrupted run continues and gives
            the same numbers.
        stages: other attacks than `suite_plan(config)`.
        sources: other models, by name, that transfer attacks are made on.
        masks: regions, by name, that Kryptonite is confined to, 1 inside, (N, 1, H, W).
        time_limit: seconds that one batch of one attack may take before the evaluation fails.
        precision: `bf16` lets the attacks search in bfloat16, faster on processors that have it.
            What is misclassified is always decided in float32, and `float32_stages` are added.
        classes: names of the model's outputs. Of other classes than this project's four no view
            merges any, and what depends on their meaning is left out.

    Raises:
        UserError: an attack raised, ran out of time, or changed no image: a failed evaluation,
            never a robust model.
    """
    run = SuiteRun(
        model,
        as_pixels(images_uint8),
        np.asarray(labels).astype(np.int64),
        np.asarray(patients),
        config,
        sources=dict(sources or {}),
        masks=dict(masks or {}),
        precision=precision,
        time_limit=time_limit,
        classes=classes,
    )
    store = BatchStore(state_dir, run)
    if stages is None:
        stages = suite_plan(config, tuple(run.sources), tuple(run.masks))
    plan = [*stages, *(float32_stages(config) if precision != "fp32" else [])]
    if run.classes != CLASSES:
        plan = [
            stage for stage in plan if stage.view in run.views and stage.attack not in OF_RATINGS
        ]
    sweep = sorted(config.eps, key=parse_eps)
    # Ascending: what is misclassified at a smaller eps, a point of every larger ball, need not be
    # attacked again.
    work = sorted(
        [(eps_text, stage) for stage in plan for eps_text in run.eps_of(stage, sweep)],
        key=lambda item: parse_eps(item[0]),
    )
    bar = progress(work, "attack")
    for eps_text, stage in bar:
        robust = run.progress.robust(stage).mean()
        bar.set_postfix_str(f"{stage.name} at {eps_text}, {robust:.0%} robust")
        attack_in_rounds(run, store, stage, eps_text)
    return SuiteResult(
        run.logits,
        run.meta,
        run.clean,
        sanity_table(run, plan, sweep),
        run.kept.images.numpy(),
        run.sample,
        run.kept.logits,
        run.headline,
    )


# -- the rounds of a stage -------------------------------------------------------------------------


def attack_in_rounds(run: SuiteRun, store: BatchStore, stage: Stage, eps_text: str) -> None:
    """Runs one stage at one eps. Where it decides robust accuracy it is repeated until it has
    converged."""
    norm, robust = ATTACKS[stage.attack].norm, run.progress.robust(stage)
    inside = np.ones(len(robust), bool)
    if stage.scope == "sample":
        inside = np.isin(np.arange(len(robust)), run.sample)
    chosen = inside if stage.scope == "all" else inside & robust
    logits = run.progress.logits[norm, stage.view].copy()
    logits[~inside] = np.nan
    outcome = Outcome(logits, logits.copy(), chosen, float(robust.mean()))
    attack_round(run, store, stage, eps_text, np.flatnonzero(chosen), outcome)
    run.first_round[eps_text, stage.name] = outcome.logits.copy()
    if decides_robust_accuracy(stage):
        repeat_until_converged(run, store, stage, eps_text, outcome)


def repeat_until_converged(
    run: SuiteRun, store: BatchStore, stage: Stage, eps_text: str, outcome: Outcome
) -> None:
    """Repeats a stage on the images that are still robust in its view, each time from new starting
    points and with the attack's default step size.

    First its steps are doubled until a round misclassifies no image, or `config.max_steps` is
    reached. Then PGD is started towards each other class until a round misclassifies no image, or
    as many rounds were run as `config.max_steps` holds its steps.
    """
    key, steps = (eps_text, stage.name), stage.budget["steps"]
    budgets = [{"steps": 2 * steps}]
    while 2 * budgets[-1]["steps"] <= run.config.max_steps:
        budgets.append({"steps": 2 * budgets[-1]["steps"]})
    before, after = _repeat(run, store, stage, eps_text, budgets, outcome)
    run.last_round["steps"][key] = [before, after]
    if stage.attack != "pgd":
        return
    if after < before:
        # More steps still misclassify images, so restarts with fewer steps would prove nothing.
        run.last_round["restarts"][key] = None
        return
    # Margin PGD ascends towards the k-th nearest class at its k-th start: one start leaves the
    # other classes untried.
    others = len(VIEWS[stage.view].groups or run.classes) - 1
    restarts = {"restarts": others * stage.budget.get("restarts", 1)}
    budgets = [restarts] * max(1, run.config.max_steps // steps)
    run.last_round["restarts"][key] = _repeat(run, store, stage, eps_text, budgets, outcome)


def _repeat(
    run: SuiteRun,
    store: BatchStore,
    stage: Stage,
    eps_text: str,
    budgets: Sequence[dict],
    outcome: Outcome,
) -> list[int]:
    """Repeats a stage with each of these changes of its budget until a round misclassifies no
    further image. Returns the numbers of robust images before and after the last round."""
    counts = [0, 0]
    for budget in budgets:
        rows = np.flatnonzero(run.progress.robust(stage))
        if not len(rows):
            return [0, 0]
        changes = {**DEFAULTS_OF_REPETITIONS.get(stage.attack, {}), **budget}
        found = attack_round(run, store, stage, eps_text, rows, outcome, changes)
        counts = [len(rows), len(rows) - found]
        if not found:
            break
    return counts


def attack_round(
    run: SuiteRun,
    store: BatchStore,
    stage: Stage,
    eps_text: str,
    rows: np.ndarray,
    outcome: Outcome,
    changes: Mapping[str, object] | None = None,
) -> int:
    """Attacks the images `rows`, batch by batch, and adds what that found to `outcome` and `run`.

    Args:
        changes: what differs from the stage's budget.

    Returns:
        How many images are newly misclassified in the stage's view.
    """
    repeated = replace(stage, budget={**stage.budget, **(changes or {})})
    robust = run.progress.robust(stage)
    unchanged = 0
    for start in range(0, len(rows), run.config.attack_batch):
        part = rows[start : start + run.config.attack_batch]
        done = attack_batch(run, store, repeated, eps_text, part, len(outcome.rounds))
        _merge_batch(run, stage, part, done, outcome)
        unchanged += done["unchanged"].item()
        if run.keeps_images(stage, eps_text):
            run.kept.take_stronger(part, done["adversarial"], done["logits"], run.labels[part])
    _refuse_idle_attack(run, stage, eps_text, rows, unchanged)
    outcome.unchanged += unchanged
    outcome.n_attacked += len(rows)

    norm = ATTACKS[stage.attack].norm
    outcome.logits[:] = _with_clean_errors(run, outcome.logits, stage.view)
    run.progress.add(outcome.logits, norm)
    if is_rounded(stage, eps_text):
        outcome.rounded[:] = _with_clean_errors(run, outcome.rounded, stage.view)
        run.progress.add(outcome.rounded, norm)

    found = int((robust & ~run.progress.robust(stage)).sum())
    outcome.rounds.append(
        {
            "steps": repeated.budget.get("steps"),
            "restarts": repeated.budget.get("restarts", 1),
            "n_attacked": len(rows),
            "misclassified": found,
        }
    )
    add_columns(run, stage, eps_text, outcome)
    return found


def _merge_batch(
    run: SuiteRun, stage: Stage, rows: np.ndarray, done: dict[str, np.ndarray], outcome: Outcome
) -> None:
    """Adds what a batch found to what its stage has found so far. In the first round all logits are
    taken, later those that are the first to misclassify their image."""
    labels = run.labels[rows]
    for logits, new in ((outcome.logits, done["logits"]), (outcome.rounded, done["rounded"])):
        taken = np.ones(len(rows), bool)
        if outcome.rounds:
            already = misclassified(logits[rows], labels, stage.view)
            taken = misclassified(new, labels, stage.view) & ~already
        logits[rows[taken]] = new[taken]
    outcome.seconds += done["seconds"].item()
    outcome.queries += done["queries"].item()
    outcome.largest = max(outcome.largest, done["largest"].item())
    outcome.flags |= set(done["flags"].tolist())


def _with_clean_errors(run: SuiteRun, logits: np.ndarray, view: str) -> np.ndarray:
    """Logits (N, 4) in which a clean error has its clean logits wherever an attack happened to
    correct it."""
    corrected = (
        misclassified(run.clean, run.labels, view)
        & ~misclassified(logits, run.labels, view)
        & ~np.isnan(logits).any(1)
    )
    return np.where(corrected[:, None], run.clean, logits)


def _refuse_idle_attack(
    run: SuiteRun, stage: Stage, eps_text: str, rows: np.ndarray, unchanged: int
) -> None:
    """An attack that left every right image as it was did not run, whatever its score says.

    A model whose answers change by themselves is no reason to fail: images may then have been wrong
    when the attack saw them, and the sanity table names the defect.
    """
    right = int((~misclassified(run.clean[rows], run.labels[rows], stage.view)).sum())
    idle = right and unchanged == right and parse_eps(eps_text) > 0
    if idle and same_every_time(run)["passed"]:
        raise UserError(
            f"Attack {stage.name} at eps {eps_text} changed none of the {right} images it was "
            "given: this is a failed evaluation, not a robust model; its gradient may be zero "
            "everywhere."
        )


# -- what is kept of a stage -----------------------------------------------------------------------


def add_columns(run: SuiteRun, stage: Stage, eps_text: str, outcome: Outcome) -> None:
    """Adds a stage's logits to the run with their metadata; those of images that were rounded to 8
    bits in a column of their own."""
    key = eps_text, stage.name
    run.logits[key], run.attacked[key] = outcome.logits, outcome.chosen
    run.meta[key] = _metadata(run, stage, outcome)
    if decides_robust_accuracy(stage):
        run.meta[key]["rounds"] = list(outcome.rounds)
    if is_rounded(stage, eps_text):
        # Rounding takes no time to speak of, and one query an image.
        rounding = replace(outcome, seconds=0.0, queries=outcome.n_attacked)
        key = eps_text, str(replace(AttackName.parse(stage.name), rounded=True))
        run.logits[key], run.attacked[key] = outcome.rounded, outcome.chosen
        run.meta[key] = _metadata(run, stage, rounding)


def _metadata(run: SuiteRun, stage: Stage, outcome: Outcome) -> dict:
    """What a record says of a stage at one eps: which images, with which budget, at which cost."""
    attack, count = ATTACKS[stage.attack], int(outcome.chosen.sum())
    meta = {
        "n_attacked": count,
        "n_set": int((~np.isnan(outcome.logits).any(1)).sum()),
        "norm": attack.norm,
        "kind": attack.kind,
        "view": stage.view,
        "scope": stage.scope,
        "seed": run.config.seed,
        "precision": run.precision_of(stage),
        "standing_before": round(outcome.share_before, 4),
        "standing_after": round(float(run.progress.robust(stage).mean()), 4),
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
