"""The store: what a workspace keeps of its runs; loads it, or has it computed and keeps it.

Stages (`utils/pipeline/stages.py`) get values and return values. Whether something is there
already, whether it fits, and how it is written (to a temporary name, then renamed, under a lock
where several processes write) is decided here alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from utils import optuna_search, training
from utils.config import RunConfig
from utils.evaluation import records, schema
from utils.pipeline.workspace import Workspace, is_leader
from utils.utils_funcs import UserError, atomic_path, hardware, read_json, write_json


@dataclass(frozen=True)
class RunResult:
    """What a run leaves in its record.

    rows: columns of the predictions file, one row a test image (a patient, for sequence models).
    meta: how they came about: settings, training history, attacks, checks.
    """

    rows: dict[str, np.ndarray]
    meta: dict


# --- Runs in records ----------------------------------------------------------------------------


def find_run(workspace: Workspace, model: str, config: RunConfig) -> RunResult | None:
    """What the record of `model` (one of them, Ensemble or Sequence) holds of this fold and seed,
    at this profile and of this cohort; None where it holds nothing."""
    wanted = {
        "fold": config.fold,
        "seed": config.seed,
        "profile": config.profile,
        "cohort_sha256": workspace.cohort_sha256,
    }
    return _find_in(workspace.record(model, config.protocol), wanted)


def find_matching_run(workspace: Workspace, config: RunConfig) -> RunResult | None:
    """The run as its record holds it; None where no record does.

    Raises:
        UserError: the record holds it with other training settings than `config`'s. (Settings that
            a search chose may differ.)
    """
    found = find_run(workspace, config.model, config)
    if found is not None:
        searched = optuna_search.SPACE if config.trials else ()
        different = training.different_settings(found.meta["config"], config, searched)
        if different:
            raise UserError(
                f"{workspace.record(config.model, config.protocol)} holds {config.run_name} "
                "trained "
                f"with {'; '.join(different[:4])}: run with these settings, or with retrain to "
                "replace it."
            )
    return found


def add_run(
    workspace: Workspace,
    result: RunResult,
    merge: Callable[[RunResult, RunResult], RunResult] | None = None,
) -> records.Record:
    """Adds a run to its record and returns the record, with every score computed anew.

    A lock lets the shards of a grid finish at the same time. Runs of another profile or cohort
    leave the record.

    Args:
        merge: makes one run of what the record holds of it already and of `result` (None: `result`
            replaces it).
    """
    meta = result.meta
    path = workspace.record(meta["model"], meta["protocol"])
    lock = workspace.root / "checkpoints" / meta["model"] / f"{meta['protocol']}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        others, rows = [], {}
        if path.is_file():
            recorded = records.read_record(path).metas
            if meta in recorded:
                return records.read_record(path)
            if merge is not None and (known := _find_in(path, meta)) is not None:
                result = merge(known, result)
            others = [
                run
                for run in recorded
                if all(run[key] == meta[key] for key in ("profile", "cohort_sha256"))
                and (run["fold"], run["seed"]) != (meta["fold"], meta["seed"])
            ]
            rows = rows_of(schema.read_predictions(path), others)
        rows = pool_rows(rows, result.rows)
        runs = sorted([*others, result.meta], key=lambda run: (run["seed"], run["fold"]))
        record = records.summarize(rows, runs)
        records.write_record(path, record, rows)
    return record


def _find_in(path: Path, wanted: dict) -> RunResult | None:
    """The run of a record whose fold, seed, profile and cohort are those of `wanted`."""
    for meta in records.read_record(path).metas if path.is_file() else ():
        if all(meta[key] == wanted[key] for key in ("fold", "seed", "profile", "cohort_sha256")):
            return RunResult(rows_of(schema.read_predictions(path), [meta]), meta)
    return None


def rows_of(rows: dict[str, np.ndarray], runs: list[dict]) -> dict[str, np.ndarray]:
    """The rows of these runs alone."""
    kept = np.zeros(len(rows["labels"]), bool)
    for meta in runs:
        kept |= (rows["fold"] == meta["fold"]) & (rows["seed"] == meta["seed"])
    return {name: values[kept] for name, values in rows.items()}


def pool_rows(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows of both; an attack that only one of them ran is NaN (outside its declared set) in the
    other's rows."""
    if not first or not len(first["labels"]):
        return second
    pooled = {}
    for name in {**first, **second}:
        parts = [
            rows[name] if name in rows else np.full((len(rows["labels"]), 4), np.nan, np.float16)
            for rows in (first, second)
        ]
        pooled[name] = np.concatenate(parts)
    return pooled


# --- Intermediate results on disk ---------------------------------------------------------------


def keep_json(path: Path, compute: Callable[[], dict], *, again: bool = False) -> dict:
    """What the file holds, or what `compute` returns, which is then kept there."""
    if again or not path.is_file():
        write_json(path, compute())
    return read_json(path)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file; {} where there is none. Nothing in it is unpickled."""
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes the arrays to an `.npz` file, which is whole or absent whenever the process ends."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub knows no dict of arrays


def keep_arrays(path: Path, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of the file, or those that `compute` returns, which are then kept there."""
    if not path.is_file():
        write_arrays(path, compute())
    return read_arrays(path)


def add_machine(workspace: Workspace, config: RunConfig, *, anew: bool = False) -> str:
    """Every machine that worked on the run, this one last, in a line: training and attacks may
    continue on another machine than the one where they were stopped.

    Args:
        anew: the list begins with this machine, since the training does.
    """
    path = workspace.state(config) / "machines.json"
    known = read_json(path)["machines"] if path.is_file() and not anew else []
    machines = list(dict.fromkeys([*known, hardware()]))
    if is_leader():
        write_json(path, {"machines": machines})
    return " + ".join(machines)
