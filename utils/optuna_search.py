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
from collections.abc import Iterator
from pathlib import Path

import optuna
import torch
from filelock import FileLock, Timeout
from optuna.trial import TrialState

from utils.config import RunConfig
from utils.data import ImageSet
from utils.training import fit
from utils.utils_funcs import StudyError, read_json, say, write_json

#: Startup trials before the median rule may prune one.
PRUNER_STARTUP = 4
#: Seconds between two signs of life of a trial on a shared storage, and after how many silent ones it counts as dead.
HEARTBEAT, GRACE = 30, 120


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


def study_paths(folder: Path, config: RunConfig) -> tuple[Path, Path]:
    """(SQLite file, JSON of the best settings) of this model's search in `folder` = checkpoints/optuna/<Model>."""
    name = "slice" if config.protocol == "slice" else f"patient_fold{config.fold}"
    return folder / "study.db", folder / f"{name}_best.json"


def open_study(folder: Path, config: RunConfig, storage: str | None = None) -> optuna.Study:
    """The persistent study of (model, protocol, fold); `storage` is any Optuna URL (PostgreSQL for several machines)."""
    database, best_path = study_paths(folder, config)
    database.parent.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    beating = dict(heartbeat_interval=HEARTBEAT, grace_period=GRACE) if storage else {}
    return optuna.create_study(
        study_name=f"{config.model}-{best_path.stem.removesuffix('_best')}-{config.profile}", direction="minimize",
        storage=optuna.storages.RDBStorage(storage or f"sqlite:///{database.as_posix()}", **beating), load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=PRUNER_STARTUP, n_warmup_steps=1))


def enqueue(study: optuna.Study, trials: int) -> None:
    """Puts trials into the queue until the study has `trials` of them, finished and failed ones included."""
    for _ in range(trials - len(study.get_trials(deepcopy=False))):
        study.enqueue_trial({})


def search(train: ImageSet, validation: ImageSet, config: RunConfig, folder: Path, device: torch.device, *,
           storage: str | None = None) -> optuna.Study:
    """Works on the study until none of its trials waits or runs, and writes the best settings beside it. On one machine it
    enqueues `config.trials` trials itself, and one for each that failed, as long as no more failed than were asked for.

    The objective is the validation score of `training.validate` (adversarial for `_atk` models): macro-averaged
    cross-entropy of the best epoch, lower is better. A trial that fails (NaN, out of memory) is recorded as failed, the
    next one goes on. The sampler is seeded by the trial's number, so it matters neither which worker takes a trial nor
    how often it was killed. With `storage` the trials must have been enqueued (`enqueue`), once, before workers start.

    Raises:
        StudyError: no trial waits in a shared study, or every trial failed.
    """
    study = open_study(folder, config, storage)
    if storage is not None and not study.get_trials(deepcopy=False):
        raise StudyError(f"No trial is enqueued in {study.study_name}: enqueue them once with `python -m utils.experiment search "
                         "--enqueue N`, then start as many workers as you like.")
    workplace = folder / "trials" / study.study_name
    take = _local_trials(study, workplace, config.trials) if storage is None else _shared_trials(study)
    for trial in take:
        _work(study, trial, train, validation, config, device, workplace / f"{trial.number}")
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not complete:
        raise StudyError(f"All {len(study.trials)} trials of {study.study_name} failed: run one training by hand to see why.")
    write_json(study_paths(folder, config)[1],
               {"study": study.study_name, "trials": len(complete), "value": study.best_value, "trial": study.best_trial.number,
                "settings": study.best_trial.params})
    return study


def _local_trials(study: optuna.Study, workplace: Path, trials: int) -> Iterator[optuna.Trial]:
    """Trials for this worker, one at a time. Each running trial's worker holds a lock that the system frees when the
    worker dies; so a running trial whose lock is free belongs to nobody, and is taken up again."""
    workplace.mkdir(parents=True, exist_ok=True)
    while True:
        with FileLock(workplace / "queue.lock"):
            failed = len(study.get_trials(deepcopy=False, states=(TrialState.FAIL,)))
            enqueue(study, trials + min(failed, trials))
        open_trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))
        if not open_trials:
            return
        for waiting in open_trials:
            with contextlib.suppress(Timeout), FileLock(workplace / f"{waiting.number}.lock", timeout=0):
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
        open_trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))
        if not open_trials:
            return
        for waiting in open_trials:
            if waiting.state == TrialState.WAITING and _claim(study, waiting._trial_id):
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
    study._thread_local.cached_all_trials = None  # as `Study.ask` does: see what other workers wrote meanwhile
    return optuna.Trial(study, waiting._trial_id)


@contextlib.contextmanager
def _signs_of_life(study: optuna.Study, trial_id: int) -> Iterator[None]:
    """Tells the shared storage every `HEARTBEAT` seconds that this trial's worker lives."""
    done = threading.Event()

    def beat() -> None:
        while not done.is_set():
            study._storage.record_heartbeat(trial_id)
            done.wait(HEARTBEAT)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _work(study: optuna.Study, trial: optuna.Trial, train: ImageSet, validation: ImageSet, config: RunConfig, device: torch.device,
          folder: Path) -> None:
    """Runs one trial and tells the study how it ended; its checkpoints live in `folder` while it runs."""
    try:
        value = objective(trial, train, validation, config, device, folder)
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
    except (StudyError, RuntimeError, ValueError, MemoryError) as error:
        trial.set_user_attr("error", f"{type(error).__name__}: {error}"[:500])
        study.tell(trial, state=TrialState.FAIL)
        say(f"trial {trial.number} failed: {error}")
    else:
        study.tell(trial, value)
    shutil.rmtree(folder, ignore_errors=True)


def objective(trial: optuna.Trial, train: ImageSet, validation: ImageSet, config: RunConfig, device: torch.device, folder: Path) -> float:
    """Best validation score of a short training with the trial's settings; resumes what a killed worker left in `folder`."""
    settings = dataclasses.replace(config, **suggest(trial), epochs=config.search_epochs)
    reported = trial.study.trials[trial.number].intermediate_values

    def report(entry: dict) -> None:
        if entry["epoch"] not in reported:
            trial.report(entry["score"], entry["epoch"])
        if entry["epoch"] < settings.epochs and trial.should_prune():
            raise optuna.TrialPruned

    fitted = fit(train, validation, settings, folder / "trial.safetensors", device, on_epoch=report)
    # An epoch that answers one class is never the best. A constant answer scores worse than any model that learnt
    # something, but stays comparable with its like.
    return 10.0 + fitted.history[-1]["score"] if fitted.one_class else fitted.history[fitted.best_epoch - 1]["score"]


def best_settings(folder: Path, config: RunConfig) -> dict[str, object]:
    """The saved best settings of this model's search; empty where none was run."""
    path = study_paths(folder, config)[1]
    return read_json(path)["settings"] if path.is_file() else {}


def trials_table(study: optuna.Study) -> str:
    """The study as a plain-text table, best first."""
    rows = sorted((t for t in study.trials if t.value is not None), key=lambda trial: trial.value)
    lines = [f"{'trial':>5} {'score':>8} {'state':>9}  settings"]
    for trial in rows:
        settings = json.dumps({k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in trial.params.items()})
        lines.append(f"{trial.number:>5} {trial.value:>8.4f} {trial.state.name.lower():>9}  {settings}")
    return "\n".join(lines)
