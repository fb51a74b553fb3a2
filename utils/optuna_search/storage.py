"""Where a search is kept: its Optuna study, its waiting trials, and the best settings found."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import optuna

from utils.config import RunConfig
from utils.utils_funcs import read_json

#: Trials before the median rule may prune one.
PRUNER_STARTUP = 4
#: Seconds between two signs of life of a trial on a shared storage, and after how many seconds
#: without one it counts as failed.
HEARTBEAT, GRACE = 30, 120


def search_paths(folder: Path, config: RunConfig) -> tuple[Path, Path]:
    """SQLite file of a search and JSON file of its best settings, in checkpoints/optuna/<Model>."""
    name = "slice" if config.protocol == "slice" else f"patient_fold{config.fold}"
    return folder / "study.db", folder / f"{name}_best.json"


def search_name(config: RunConfig) -> str:
    """Name of the Optuna study of a model, protocol and fold at this profile."""
    part = search_paths(Path(), config)[1].stem.removesuffix("_best")
    return f"{config.model}-{part}-{config.profile}"


def known_search(folder: Path, config: RunConfig) -> optuna.Study | None:
    """The search on this machine, to look at; None where there is none. Nothing is created."""
    database = search_paths(folder, config)[0]
    if not database.is_file():
        return None
    with contextlib.suppress(KeyError):  # the file may hold searches of other folds only
        return optuna.load_study(
            study_name=search_name(config), storage=f"sqlite:///{database.as_posix()}"
        )
    return None


def open_search(folder: Path, config: RunConfig, storage: str | None = None) -> optuna.Study:
    """The search of a model, protocol and fold, created where there is none yet.

    From then on Optuna logs only warnings.

    Args:
        folder: checkpoints/optuna/<Model>.
        storage: any Optuna URL, as of PostgreSQL for several machines (None: SQLite in `folder`).
    """
    database = search_paths(folder, config)[0]
    database.parent.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        study_name=search_name(config),
        direction="minimize",
        storage=optuna.storages.RDBStorage(
            storage or f"sqlite:///{database.as_posix()}",
            heartbeat_interval=HEARTBEAT if storage else None,
            grace_period=GRACE if storage else None,
        ),
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=PRUNER_STARTUP, n_warmup_steps=1),
    )


def enqueue(study: optuna.Study, trials: int) -> None:
    """Adds waiting trials until there are `trials` in all, with finished and failed ones."""
    for _ in range(trials - len(study.get_trials(deepcopy=False))):
        study.enqueue_trial({})


def best_settings(folder: Path, config: RunConfig) -> dict[str, Any]:
    """The best settings of a search; empty where none was run."""
    path = search_paths(folder, config)[1]
    return read_json(path)["settings"] if path.is_file() else {}
