"""Checks that say when the result of a suite must not be believed.

model        does it answer as a deterministic classifier with gradients does?
attacks      are they as strong as such attacks must be?
bookkeeping  is every image counted, and was the model left as it was?
"""

from __future__ import annotations

from collections.abc import Sequence

from utils.evaluation.plan import Stage
from utils.evaluation.sanity import attacks, bookkeeping, model
from utils.evaluation.suite_run import SuiteRun


def sanity_table(run: SuiteRun, plan: Sequence[Stage], sweep: Sequence[str]) -> list[dict]:
    """The conditions of an honest evaluation, in order: `check`, whether it `passed`, the `figure`
    that decided it, and a `note` that says in plain words what it means.

    Checks that cost passes through the model use the fixed stratified sample.

    Args:
        sweep: eps as written, ascending.
    """
    rows = [
        model.finite_logits(run),
        model.logits_not_probabilities(run),
        model.classes_in_order(run),
        model.same_every_time(run),
        model.same_with_gradient(run),
        model.batch_independent(run),
        model.not_constant(run),
        model.gradients_present(run),
        model.eps_zero(run),
        *attacks.attack_order(run.clean, run.labels, run.first_round, run.meta, sweep),
        *attacks.falls_with_eps(run.labels, run.first_round, plan, sweep),
        attacks.eps_one(run),
        attacks.converged(run, "steps", "twice the steps"),
        attacks.converged(run, "restarts", "another start towards each other class"),
        attacks.gradients_not_masked(run, sweep),
        bookkeeping.inside_ball(run),
        bookkeeping.every_image_changed(run),
        bookkeeping.full_denominator(run, plan),
        bookkeeping.worst_case_by_image(run),
    ]
    if (run.headline, "apgd_t_float32") in run.meta:
        rows.append(attacks.float32_finds_no_more(run))
    return [*rows, bookkeeping.kept_images_rescore(run), bookkeeping.model_untouched(run)]


def verdict(sanity: Sequence[dict]) -> str:
    """One sentence: whether these robust numbers can be believed, and if not, why."""
    failed = [row for row in sanity if not row["passed"]]
    if not failed:
        return f"All {len(sanity)} checks passed: nothing speaks against these numbers."
    reasons = "; ".join(row["note"] for row in failed)
    return (
        f"{len(failed)} of {len(sanity)} checks failed, so do not take these numbers for "
        f"robustness: {reasons}."
    )
