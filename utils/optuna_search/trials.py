"""Works on a search: a short training for each trial, scored on validation images alone."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import optuna
import torch
from optuna.trial import TrialState

from utils.config import RunConfig
from utils.data import ImageSet
from utils.optuna_search.space import suggest
from utils.optuna_search.storage import GRACE, open_search, search_paths
from utils.optuna_search.workers import local_trials, shared_trials
from utils.training import fit
from utils.utils_funcs import UserError, say, write_json

#: Added to the score of a trial that answered one class: it is worse than any other, but still
#: comparable with its like.
ONE_CLASS = 10.0


def search(
    train: ImageSet,
    validation: ImageSet,
    config: RunConfig,
    folder: Path,
    device: torch.device,
    *,
    storage: str | None = None,
    start: Path | None = None,
) -> optuna.Study:
    """Works on the search until none of its trials waits or runs; writes the best settings.

    On one machine this enqueues `config.trials` trials, and another one for each that failed, as
    long as no more failed than were asked for. With `storage` the trials must have been enqueued
    (`enqueue`), once, before workers start.

    The objective is the score of `training.validate` (adversarial for `_atk` models) of the best
    epoch, lower is better. A trial that fails (NaN, out of memory) is recorded as failed, and the
    next one follows. The sampler is seeded by the trial's number, so it matters neither which
    worker takes a trial nor how often it was killed.

    Args:
        folder: checkpoints/optuna/<Model>.
        storage: see `open_search`.
        start: checkpoint from whose weights every trial starts (None: as `config.pretrained`).

    Raises:
        UserError: no trial is enqueued on a shared storage, or every trial failed.
    """
    cohort = train.cohort_sha256
    study = open_search(folder, config, cohort, storage)
    if storage is not None and not study.get_trials(deepcopy=False):
        raise UserError(
            f"No trial is enqueued in {study.study_name}: enqueue them once with `python -m "
            "utils.experiment search --enqueue N`, then start as many workers as you like."
        )
    states = folder / "trials" / study.study_name
    taken = shared_trials(study) if storage else local_trials(study, states, config.trials)
    for trial in taken:
        folder_of_trial = states / f"{trial.number}"
        run_trial(study, trial, train, validation, config, device, folder_of_trial, start)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not complete:
        raise UserError(
            f"All {len(study.trials)} trials of {study.study_name} failed: run one training by "
            "hand to see why."
        )
    write_json(
        search_paths(folder, config, cohort)[1],
        {
            "study": study.study_name,
            "profile": config.profile,
            "cohort_sha256": cohort,
            "trials": len(complete),
            "value": study.best_value,
            "trial": study.best_trial.number,
            "settings": study.best_trial.params,
        },
    )
    return study


def run_trial(
    study: optuna.Study,
    trial: optuna.Trial,
    train: ImageSet,
    validation: ImageSet,
    config: RunConfig,
    device: torch.device,
    folder: Path,
    start: Path | None,
) -> None:
    """Runs one trial and records how it ended.

    The result is dropped where others marked the trial as failed meanwhile (as on a machine that
    slept). Its checkpoints are in `folder` while it runs.
    """
    value, state = None, None
    try:
        value = objective(trial, train, validation, config, device, folder, start)
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except optuna.exceptions.UpdateFinishedTrialError:
        state = TrialState.FAIL
    except (UserError, RuntimeError, ValueError, MemoryError) as error:
        state = TrialState.FAIL
        trial.set_user_attr("error", f"{type(error).__name__}: {error}"[:500])
        say(f"trial {trial.number} failed: {error}")
    if study.trials[trial.number].state.is_finished():
        say(
            f"trial {trial.number} was given up by another worker, which saw no sign of life for "
            f"{GRACE} s; its result is left out"
        )
    study.tell(trial, value, state=state, skip_if_finished=True)
    shutil.rmtree(folder, ignore_errors=True)


def objective(
    trial: optuna.Trial,
    train: ImageSet,
    validation: ImageSet,
    config: RunConfig,
    device: torch.device,
    folder: Path,
    start: Path | None = None,
) -> float:
    """Best validation score of a short training with the trial's settings, lower is better.

    It goes on from what a killed worker left in `folder`.

    Raises:
        optuna.TrialPruned: the trial is clearly worse than those before it.
    """
    settings = dataclasses.replace(config, **suggest(trial), epochs=config.search_epochs)
    reported = trial.study.trials[trial.number].intermediate_values

    def report(scores: dict) -> None:
        if scores["epoch"] not in reported:
            trial.report(scores["score"], scores["epoch"])
        if scores["epoch"] < settings.epochs and trial.should_prune():
            raise optuna.TrialPruned

    fitted = fit(
        train,
        validation,
        settings,
        folder / "trial.safetensors",
        device,
        on_epoch=report,
        start=start,
    )
    if fitted.one_class:
        return ONE_CLASS + fitted.history[-1]["score"]
    return fitted.history[fitted.best_epoch - 1]["score"]
