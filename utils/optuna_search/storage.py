"""Where a search is kept: its Optuna study, its waiting trials, and the best settings found."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import optuna

from utils.config import RunConfig
from utils.utils_funcs import UserError, read_json, short_name

#: Trials before the median rule may prune one.
PRUNER_STARTUP = 4
#: Seconds between two signs of life of a trial on a shared storage, and after how many seconds
#: without one it counts as failed.
HEARTBEAT, GRACE = 30, 120


def search_paths(folder: Path, config: RunConfig, cohort_sha256: str) -> tuple[Path, Path]:
    """SQLite file of a search and JSON file of its best settings, in checkpoints/optuna/<Model>.

    The second is of one protocol, fold, profile and cohort.
    """
    name = search_name(config, cohort_sha256).removeprefix(f"{config.model}-")
    return folder / "study.db", folder / f"{name}_best.json"


def search_name(config: RunConfig, cohort_sha256: str) -> str:
    """Name of the Optuna study of a model, protocol and fold at this profile on this cohort."""
    part = "slice" if config.protocol == "slice" else f"{config.protocol}_fold{config.fold}"
    return f"{config.model}-{part}-{config.profile}-{short_name(cohort_sha256)}"


def known_search(folder: Path, config: RunConfig, cohort_sha256: str) -> optuna.Study | None:
    """The search on this machine, to look at; None where there is none. Nothing is created."""
    database = search_paths(folder, config, cohort_sha256)[0]
    if not database.is_file():
        return None
    check_storage(f"sqlite:///{database.as_posix()}")
    with contextlib.suppress(KeyError):  # the file may hold searches of other folds only
        return optuna.load_study(
            study_name=search_name(config, cohort_sha256),
            storage=f"sqlite:///{database.as_posix()}",
        )
    return None


def open_search(
    folder: Path, config: RunConfig, cohort_sha256: str, storage: str | None = None
) -> optuna.Study:
    """The search of a model, protocol and fold on a cohort, created where there is none yet.

    From then on Optuna logs only warnings.

    Args:
        folder: checkpoints/optuna/<Model>.
        storage: any Optuna URL, as of PostgreSQL for several machines (None: SQLite in `folder`).
    """
    database = search_paths(folder, config, cohort_sha256)[0]
    database.parent.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if storage is None and database.is_file():
        check_storage(f"sqlite:///{database.as_posix()}")
    return optuna.create_study(
        study_name=search_name(config, cohort_sha256),
        direction="minimize",
        storage=optuna.storages.RDBStorage(
            storage or f"sqlite:///{database.as_posix()}",
            heartbeat_interval=HEARTBEAT if storage else None,
            grace_period=GRACE if storage else None,
        ),
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=PRUNER_STARTUP, n_warmup_steps=1),
    )


def check_storage(storage: str | None) -> None:
    """Refuses, before any work, the URL of a storage that cannot be opened (None: no URL).

    Raises:
        UserError: it is no URL, or there is no database behind it.
    """
    if storage is None:
        return
    try:
        optuna.storages.RDBStorage(storage)
    except Exception as error:  # noqa: BLE001  SQLAlchemy, the drivers and the system raise many
        raise UserError(
            f"The storage {storage!r} cannot be opened ({str(error).strip().splitlines()[0][:160]})"
            ": give the URL of a database that runs, as postgresql://user:password@host/database, "
            "or delete a damaged file."
        ) from error


def enqueue(study: optuna.Study, trials: int) -> None:
    """Adds waiting trials until there are `trials` in all, with finished and failed ones."""
    for _ in range(trials - len(study.get_trials(deepcopy=False))):
        study.enqueue_trial({})


def best_settings(folder: Path, config: RunConfig, cohort_sha256: str) -> dict[str, Any]:
    """The best settings of a search on this cohort; empty where none was run."""
    path = search_paths(folder, config, cohort_sha256)[1]
    return read_json(path)["settings"] if path.is_file() else {}
