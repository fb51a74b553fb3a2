"""The search space and the Optuna study of a model: pruned, resumable, blind to the test set."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from pathlib import Path

import optuna
import torch

from utils.config import RunConfig
from utils.data import ImageSet
from utils.training import fit
from utils.utils_funcs import StudyError, read_json, write_json

#: Startup trials before the median rule may prune one.
PRUNER_STARTUP = 4


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
    return optuna.create_study(
        study_name=f"{config.model}-{best_path.stem.removesuffix('_best')}-{config.profile}", direction="minimize",
        storage=storage or f"sqlite:///{database.as_posix()}", load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=PRUNER_STARTUP, n_warmup_steps=1))


def search(train: ImageSet, validation: ImageSet, config: RunConfig, folder: Path, device: torch.device, *,
           storage: str | None = None) -> optuna.Study:
    """Runs trials until `config.trials` are finished in the study, and writes the best settings beside it.

    The objective is the validation score of `training.validate` (adversarial for `_atk` models): macro-averaged
    cross-entropy of the best epoch, lower is better. A trial that fails (NaN, out of memory) is recorded as failed, the
    next one goes on. The sampler is seeded by the number of trials done, so a resumed search does not repeat itself.
    """
    study = open_study(folder, config, storage)
    while (done := len(_finished(study))) < config.trials:
        study.sampler = optuna.samplers.TPESampler(seed=config.seed * 10_007 + len(study.trials), multivariate=True)
        study.optimize(lambda trial: objective(trial, train, validation, config, device), n_trials=1,
                       catch=(StudyError, RuntimeError, ValueError))
        failed = sum(trial.state == optuna.trial.TrialState.FAIL for trial in study.trials)
        if failed > config.trials and done == 0:
            raise StudyError(f"All of the first {failed} trials of {study.study_name} failed: run one training by hand to see why.")
    write_json(study_paths(folder, config)[1],
               {"study": study.study_name, "trials": len(_finished(study)), "value": study.best_value, "trial": study.best_trial.number,
                "settings": study.best_trial.params})
    return study


def objective(trial: optuna.Trial, train: ImageSet, validation: ImageSet, config: RunConfig, device: torch.device) -> float:
    settings = dataclasses.replace(config, **suggest(trial), epochs=config.search_epochs)
    best = math.inf

    def report(entry: dict) -> None:
        nonlocal best
        if entry["validation_classes"] > 1:  # an epoch that answers one class is never the best
            best = min(best, entry["score"])
        trial.report(entry["score"], entry["epoch"])
        if entry["epoch"] < settings.epochs and trial.should_prune():
            raise optuna.TrialPruned

    with tempfile.TemporaryDirectory() as folder:
        fitted = fit(train, validation, settings, Path(folder) / "trial.safetensors", device, on_epoch=report)
    # A constant answer scores worse than any model that learnt something, but stays comparable with its like.
    return best if math.isfinite(best) else 10.0 + fitted.history[-1]["score"]


def _finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED))


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
