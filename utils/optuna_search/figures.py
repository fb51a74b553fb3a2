"""How a search went: its trials as a table, and its history and importances as a figure."""

from __future__ import annotations

import json
import warnings

import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from optuna.trial import FrozenTrial, TrialState

from utils.drawing import BASE, COLORS, GREY, ResultFigure, absent, canvas, styled
from utils.optuna_search.trials import ONE_CLASS

#: Complete trials below which the importances of settings would be noise.
LEAST_FOR_IMPORTANCE = 4
#: What a figure calls the states of trials.
STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def trials_table(study: optuna.Study) -> str:
    """The trials as a table of plain text, best first."""
    scored = [(trial.value, trial) for trial in study.trials if trial.value is not None]
    lines = [f"{'trial':>5} {'score':>8} {'state':>9}  settings"]
    for value, trial in sorted(scored, key=lambda pair: pair[0]):
        settings = json.dumps(
            {
                name: float(f"{setting:.3g}") if isinstance(setting, float) else setting
                for name, setting in trial.params.items()
            }
        )
        lines.append(f"{trial.number:>5} {value:>8.4f} {trial.state.name.lower():>9}  {settings}")
    return "\n".join(lines)


@styled
def search_figures(study: optuna.Study) -> ResultFigure:
    """How the best score came about, and which settings decided, as one figure of two panels."""
    trials = study.get_trials(deepcopy=False)
    figure, axes = canvas(1, 2, (10, 3.9), f"Search {study.study_name}", states_text(trials))
    color = COLORS.get(study.study_name.split("-")[0], GREY)
    draw_history(axes[0, 0], trials, color)
    draw_importances(axes[0, 1], study, color)
    return figure


def states_text(trials: list[FrozenTrial]) -> str:
    """How many trials there are, and how many in each state, in one line."""
    counts = {word: sum(trial.state == state for trial in trials) for state, word in STATES.items()}
    parts = [f"{count} {word}" for word, count in counts.items() if count]
    return " · ".join([f"n = {len(trials)} trials", *parts])


def scores_of(trials: list[FrozenTrial], state: TrialState) -> dict[int, float]:
    """Trial's number → score, of the trials in that state that have one."""
    return {
        trial.number: trial.value
        for trial in trials
        if trial.state == state and trial.value is not None
    }


def draw_history(panel: Axes, trials: list[FrozenTrial], color: str) -> None:
    """Score by trial.

    Trials without a comparable score (failed, one class) are at the upper edge, so that the others
    keep the height of the panel.
    """
    panel.set_title("validation score of each trial (lower is better)")
    panel.set(xlabel="trial", ylabel="cross-entropy (nats)")
    if not any(trial.state.is_finished() for trial in trials):
        absent(panel, "no trial is finished yet")
        return
    complete = scores_of(trials, TrialState.COMPLETE)
    several_classes = {number: score for number, score in complete.items() if score < ONE_CLASS}
    one_class = [number for number in complete if number not in several_classes]
    failed = [trial.number for trial in trials if trial.state == TrialState.FAIL]
    pruned = scores_of(trials, TrialState.PRUNED)
    for scores, face, label in (
        (several_classes, color, "complete"),
        (pruned, "none", "pruned (last epoch's)"),
    ):
        if scores:
            panel.scatter(
                list(scores),
                list(scores.values()),
                facecolors=face,
                edgecolors=color,
                s=26,
                zorder=3,
                label=label,
            )
    if several_classes:
        best = np.minimum.accumulate(list(several_classes.values()))
        panel.step(
            [*several_classes, len(trials) - 1],
            [*best, best[-1]],
            where="post",
            color=BASE,
            linewidth=1.2,
            label="best so far",
        )
    for numbers, marker, label in ((failed, "x", "failed"), (one_class, "^", "answered one class")):
        if numbers:
            panel.scatter(
                numbers,
                [0.97] * len(numbers),
                marker=marker,
                color=GREY,
                s=30,
                zorder=3,
                label=label,
                transform=panel.get_xaxis_transform(),
            )
    if not several_classes and not pruned:
        panel.set_yticks([])
    panel.margins(y=0.15)
    panel.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    panel.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=3)


def draw_importances(panel: Axes, study: optuna.Study, color: str) -> None:
    """Bars of `importances_of`, or in words why there are none."""
    complete = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    panel.set_title(f"what puts a trial among the best, n = {complete}")
    importances = importances_of(study)
    if not importances:
        absent(
            panel,
            f"importances need at least {LEAST_FOR_IMPORTANCE} complete trials\nthat differ; this "
            f"search has {complete} complete",
        )
        return
    bars = panel.barh(list(importances)[::-1], list(importances.values())[::-1], color=color)
    panel.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    panel.set(
        xlabel="share of the importance of all settings", xlim=(0, 1.15 * max(importances.values()))
    )
    panel.grid(False, axis="y")


def importances_of(study: optuna.Study) -> dict[str, float]:
    """Setting → share of the importance, most important first.

    Optuna's PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255). It looks at the ranks of scores, so
    the size of `ONE_CLASS` does not matter. Empty where the complete trials are too few, or too
    similar to say anything.
    """
    if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < LEAST_FOR_IMPORTANCE:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of equal scores, which the panel says in words
        importances = optuna.importance.get_param_importances(study)
    # All equal is the answer where it found nothing.
    return importances if len(set(importances.values())) > 1 else {}
