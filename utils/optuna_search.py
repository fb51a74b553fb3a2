"""The search space and the Optuna study of a model: pruned, resumable, blind to the test set.

A study holds a fixed number of enqueued trials, and any number of workers takes them one by one until none waits. On one
machine (SQLite, the default) a killed worker's trial is taken up again from its last epoch, to the same numbers. Over
several machines (any other Optuna storage URL, as `postgresql://…`) a killed worker's trial counts as failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optuna
import torch
from filelock import FileLock, Timeout
from matplotlib.axes import Axes
from optuna.trial import FrozenTrial, TrialState

from utils.config import RunConfig
from utils.data import ImageSet
from utils.figures import BASE, COLOURS, GREY, ResultFigure, _absent, canvas, styled
from utils.training import fit
from utils.utils_funcs import UserError, read_json, say, write_json

#: Startup trials before the median rule may prune one.
PRUNER_STARTUP = 4
#: Seconds between two signs of life of a trial on a shared storage, and after how many silent ones it counts as dead.
HEARTBEAT, GRACE = 30, 120
#: What a trial that answered one class is charged: it scores worse than any that learnt something, but stays comparable with its like.
ONE_CLASS = 10.0
#: Finished trials below which importances would be the noise of the draw.
LEAST_FOR_IMPORTANCE = 4


#: The settings that a search chooses.
SPACE = ("lr", "weight_decay", "optimizer", "schedule", "batch_size", "augmentation")


def suggest(trial: optuna.Trial) -> dict[str, object]:
    """One point of the search space; the keys are `SPACE`, settings of `RunConfig`."""
    return {
        "lr": trial.suggest_float("lr", 3e-5, 3e-3, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-4, 0.3, log=True),
        "optimizer": trial.suggest_categorical("optimizer", ["adamw", "sgd"]),
        "schedule": trial.suggest_categorical("schedule", ["cosine", "constant"]),
        "batch_size": trial.suggest_categorical("batch_size", [16, 32, 64]),
        "augmentation": trial.suggest_float("augmentation", 0.0, 1.0),
    }


def search_paths(folder: Path, config: RunConfig) -> tuple[Path, Path]:
    """(SQLite file, JSON of the best settings) of this model's search in `folder` = checkpoints/optuna/<Model>."""
    name = "slice" if config.protocol == "slice" else f"patient_fold{config.fold}"
    return folder / "study.db", folder / f"{name}_best.json"


def search_name(config: RunConfig) -> str:
    """Name of the study of (model, protocol, fold) at this profile."""
    return f"{config.model}-{search_paths(Path(), config)[1].stem.removesuffix('_best')}-{config.profile}"


def known_search(folder: Path, config: RunConfig) -> optuna.Study | None:
    """The study on this machine, to look at; None where it holds none: unlike `open_search` it makes nothing."""
    database = search_paths(folder, config)[0]
    if not database.is_file():
        return None
    with contextlib.suppress(KeyError):  # the file may hold the studies of other folds alone
        return optuna.load_study(
            study_name=search_name(config), storage=f"sqlite:///{database.as_posix()}"
        )
    return None


def open_search(folder: Path, config: RunConfig, storage: str | None = None) -> optuna.Study:
    """The persistent study of (model, protocol, fold); `storage` is any Optuna URL (PostgreSQL for several machines)."""
    database = search_paths(folder, config)[0]
    database.parent.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    beating = dict(heartbeat_interval=HEARTBEAT, grace_period=GRACE) if storage else {}
    return optuna.create_study(
        study_name=search_name(config),
        direction="minimize",
        storage=optuna.storages.RDBStorage(
            storage or f"sqlite:///{database.as_posix()}", **beating
        ),
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=PRUNER_STARTUP, n_warmup_steps=1),
    )


def enqueue(study: optuna.Study, trials: int) -> None:
    """Puts trials into the queue until the study has `trials` of them, finished and failed ones included."""
    for _ in range(trials - len(study.get_trials(deepcopy=False))):
        study.enqueue_trial({})


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
    """Works on the study until none of its trials waits or runs, and writes the best settings beside it. On one machine it
    enqueues `config.trials` trials itself, and one for each that failed, as long as no more failed than were asked for.

    The objective is the validation score of `training.validate` (adversarial for `_atk` models): macro-averaged
    cross-entropy of the best epoch, lower is better. A trial that fails (NaN, out of memory) is recorded as failed, the
    next one goes on. The sampler is seeded by the trial's number, so it matters neither which worker takes a trial nor
    how often it was killed. With `storage` the trials must have been enqueued (`enqueue`), once, before workers start. Every
    trial starts from the weights of the checkpoint `start`, where there is one.

    Raises:
        StudyError: no trial waits in a shared study, or every trial failed.
    """
    study = open_search(folder, config, storage)
    if storage is not None and not study.get_trials(deepcopy=False):
        raise UserError(
            f"No trial is enqueued in {study.study_name}: enqueue them once with `python -m utils.experiment search "
            "--enqueue N`, then start as many workers as you like."
        )
    workplace = folder / "trials" / study.study_name
    take = (
        _local_trials(study, workplace, config.trials) if storage is None else _shared_trials(study)
    )
    for trial in take:
        _work(study, trial, train, validation, config, device, workplace / f"{trial.number}", start)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not complete:
        raise UserError(
            f"All {len(study.trials)} trials of {study.study_name} failed: run one training by hand to see why."
        )
    write_json(
        search_paths(folder, config)[1],
        {
            "study": study.study_name,
            "trials": len(complete),
            "value": study.best_value,
            "trial": study.best_trial.number,
            "settings": study.best_trial.params,
        },
    )
    return study


def _local_trials(study: optuna.Study, workplace: Path, trials: int) -> Iterator[optuna.Trial]:
    """Trials for this worker, one at a time. Each running trial's worker holds a lock that the system frees when the
    worker dies; so a running trial whose lock is free belongs to nobody, and is taken up again."""
    workplace.mkdir(parents=True, exist_ok=True)
    while True:
        with FileLock(workplace / "queue.lock"):
            failed = len(study.get_trials(deepcopy=False, states=(TrialState.FAIL,)))
            enqueue(study, trials + min(failed, trials))
        open_trials = study.get_trials(
            deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)
        )
        if not open_trials:
            return
        for waiting in open_trials:
            with (
                contextlib.suppress(Timeout),
                FileLock(workplace / f"{waiting.number}.lock", timeout=0),
            ):
                if not study.trials[waiting.number].state.is_finished():
                    _claim(study, waiting._trial_id)
                    yield _begin(study, waiting)
                    break
        else:
            time.sleep(1)  # other workers hold all that is left; one of them may still die


def _shared_trials(study: optuna.Study) -> Iterator[optuna.Trial]:
    """Trials for this worker, one at a time; those of workers that gave no sign of life are failed on the way."""
    while True:
        optuna.storages.fail_stale_trials(study)
        open_trials = study.get_trials(
            deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)
        )
        if not open_trials:
            return
        for waiting in (trial for trial in open_trials if trial.state == TrialState.WAITING):
            # Before the claim: a running trial without any sign of life never counts as stale, and all would wait for it.
            study._storage.record_heartbeat(waiting._trial_id)
            if _claim(study, waiting._trial_id):
                with _signs_of_life(study, waiting._trial_id):
                    yield _begin(study, waiting)
                break
        else:
            time.sleep(min(HEARTBEAT, 5))


def _claim(study: optuna.Study, trial_id: int) -> bool:
    """Whether this worker, and no other, turned a waiting trial into a running one (the storage decides)."""
    try:
        return study._storage.set_trial_state_values(trial_id, state=TrialState.RUNNING)
    except optuna.exceptions.UpdateFinishedTrialError:
        return False


def _begin(study: optuna.Study, waiting: optuna.trial.FrozenTrial) -> optuna.Trial:
    # Startup trials are random; a later one looks at all trials before it, whoever ran them.
    study.sampler = optuna.samplers.TPESampler(seed=10_007 + waiting.number, multivariate=True)
    study._thread_local.cached_all_trials = (
        None  # as `Study.ask` does: see what other workers wrote meanwhile
    )
    return optuna.Trial(study, waiting._trial_id)


@contextlib.contextmanager
def _signs_of_life(study: optuna.Study, trial_id: int) -> Iterator[None]:
    """Tells the shared storage every `HEARTBEAT` seconds that this trial's worker lives; the first sign precedes the claim."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT):
            study._storage.record_heartbeat(trial_id)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _work(
    study: optuna.Study,
    trial: optuna.Trial,
    train: ImageSet,
    validation: ImageSet,
    config: RunConfig,
    device: torch.device,
    folder: Path,
    start: Path | None,
) -> None:
    """Runs one trial and tells the study how it ended, unless others gave it up meanwhile (a machine that slept); its
    checkpoints live in `folder` while it runs."""
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
            f"trial {trial.number} was given up by another worker, and what it came to here is left out: no sign of life for {GRACE} s"
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
    """Best validation score of a short training with the trial's settings; resumes what a killed worker left in `folder`."""
    settings = dataclasses.replace(config, **suggest(trial), epochs=config.search_epochs)
    reported = trial.study.trials[trial.number].intermediate_values

    def report(entry: dict) -> None:
        if entry["epoch"] not in reported:
            trial.report(entry["score"], entry["epoch"])
        if entry["epoch"] < settings.epochs and trial.should_prune():
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
    # An epoch that answers one class is never the best.
    return (
        ONE_CLASS + fitted.history[-1]["score"]
        if fitted.one_class
        else fitted.history[fitted.best_epoch - 1]["score"]
    )


def best_settings(folder: Path, config: RunConfig) -> dict[str, object]:
    """The saved best settings of this model's search; empty where none was run."""
    path = search_paths(folder, config)[1]
    return read_json(path)["settings"] if path.is_file() else {}


def trials_table(study: optuna.Study) -> str:
    """The study as a plain-text table, best first."""
    rows = sorted((t for t in study.trials if t.value is not None), key=lambda trial: trial.value)
    lines = [f"{'trial':>5} {'score':>8} {'state':>9}  settings"]
    for trial in rows:
        settings = json.dumps(
            {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in trial.params.items()}
        )
        lines.append(
            f"{trial.number:>5} {trial.value:>8.4f} {trial.state.name.lower():>9}  {settings}"
        )
    return "\n".join(lines)


#: What a figure calls the states of trials.
STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@styled
def search_figures(study: optuna.Study) -> ResultFigure:
    """The study as one figure: how its best score came about, and which settings decided."""
    trials = study.get_trials(deepcopy=False)
    figure, axes = canvas(1, 2, (10, 3.9), f"Search {study.study_name}", _states_text(trials))
    colour = COLOURS.get(study.study_name.split("-")[0], GREY)
    _history_panel(axes[0, 0], trials, colour)
    _importance_panel(axes[0, 1], study, colour)
    return figure


def _states_text(trials: list[FrozenTrial]) -> str:
    counts = {state: sum(trial.state == state for trial in trials) for state in STATES}
    return " · ".join(
        [
            f"n = {len(trials)} trials",
            *(f"{count} {STATES[state]}" for state, count in counts.items() if count),
        ]
    )


def _history_panel(panel: Axes, trials: list[FrozenTrial], colour: str) -> None:
    """Score by trial. Trials without a comparable score (failed, one class) stand at the upper edge, so that they do not
    squeeze the others into a line."""
    panel.set_title("validation score of each trial (lower is better)")
    panel.set(xlabel="trial", ylabel="cross-entropy (nats)")
    if not any(trial.state.is_finished() for trial in trials):
        _absent(panel, "no trial is finished yet")
        return
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    learnt = [trial for trial in complete if trial.value < ONE_CLASS]
    pruned = [
        trial for trial in trials if trial.state == TrialState.PRUNED and trial.value is not None
    ]
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    for those, face, label in (
        (learnt, colour, "complete"),
        (pruned, "none", "pruned (last epoch's)"),
    ):
        if those:
            panel.scatter(
                *zip(*((trial.number, trial.value) for trial in those)),
                facecolors=face,
                edgecolors=colour,
                s=26,
                zorder=3,
                label=label,
            )
    if learnt:
        best = np.minimum.accumulate([trial.value for trial in learnt])
        panel.step(
            [*(trial.number for trial in learnt), len(trials) - 1],
            [*best, best[-1]],
            where="post",
            color=BASE,
            linewidth=1.2,
            label="best so far",
        )
    for those, marker, label in (
        (failed, "x", "failed"),
        ([t for t in complete if t.value >= ONE_CLASS], "^", "answered one class"),
    ):
        if those:
            panel.scatter(
                [trial.number for trial in those],
                [0.97] * len(those),
                marker=marker,
                color=GREY,
                s=30,
                zorder=3,
                label=label,
                transform=panel.get_xaxis_transform(),
            )
    if not learnt and not pruned:
        panel.set_yticks([])
    panel.margins(y=0.15)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=3)


def _importance_panel(panel: Axes, study: optuna.Study, colour: str) -> None:
    """Optuna's importances, PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255): ranks of scores, so the charge for one
    class, however high, does not decide them."""
    complete = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    panel.set_title(f"what puts a trial among the best, n = {complete}")
    importances = importances_of(study)
    if not importances:
        _absent(
            panel,
            f"importances need at least {LEAST_FOR_IMPORTANCE} complete trials\nthat differ; this search has {complete} "
            "complete",
        )
        return
    bars = panel.barh(list(importances)[::-1], list(importances.values())[::-1], color=colour)
    panel.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    panel.set(
        xlabel="share of the importance of all settings", xlim=(0, 1.15 * max(importances.values()))
    )
    panel.grid(False, axis="y")


def importances_of(study: optuna.Study) -> dict[str, float]:
    """Setting → share of the importance, most important first; empty where the complete trials are too few or too alike."""
    if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < LEAST_FOR_IMPORTANCE:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # that it cannot tell equal scores apart is said in the panel
        importances = optuna.importance.get_param_importances(study)
    return (
        importances if len(set(importances.values())) > 1 else {}
    )  # all equal is what it answers where it found nothing
