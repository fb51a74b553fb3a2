"""The command line of runs: `python -m utils.experiment prepare | search | run | train | grid |
export | attack | attack-again`."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from torch import nn

from utils import data, optuna_search, report
from utils.backbones import load_model, read_metadata, save_half
from utils.cohort.raw import find_raw, read_raw
from utils.config import Profile, Protocol, RunConfig, make_config
from utils.evaluation import records
from utils.evaluation.measures import model_from_factory
from utils.evaluation.sanity import verdict
from utils.evaluation.suite import evaluate_suite
from utils.pipeline.attack_again import attack_again, with_more_attacks
from utils.pipeline.driver import GRID_MODELS, Run, grid_configs, shard_of, start_of
from utils.pipeline.stages import suite_rows
from utils.pipeline.store import RunResult, add_run
from utils.pipeline.texts import sanity_text
from utils.pipeline.workspace import half_of, load_sets, open_workspace
from utils.provenance import seen_before
from utils.utils_funcs import MODELS, UserError, choose_device


def prepare(raw: str | None = None, profile: Profile = "demo") -> None:
    """Writes the tensors of both protocols, again where they are there already."""
    open_workspace(profile, raw, again=True)


@dataclass(frozen=True)
class RunCommand:
    """Takes one run through all its stages. The defaults shown are those of the `--profile`,
    `--model` and `--protocol` on the command line."""

    config: tyro.conf.OmitArgPrefixes[RunConfig]
    raw: str | None = None
    """Folder or zip of the raw data (default: found as README says, or the phantom)."""
    retrain: bool = False
    """Replace a checkpoint and a record's run of the same name."""


def run_command(arguments: list[str]) -> None:
    """Parses `RunCommand` with the defaults of its own profile, model and protocol, and runs it."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--profile", default="demo")
    first.add_argument("--model", default="Resnet")
    first.add_argument("--protocol", default="patient")
    named = first.parse_known_args(arguments)[0]
    command = tyro.cli(
        RunCommand,
        args=arguments,
        default=RunCommand(make_config(named.profile, named.model, protocol=named.protocol)),
        prog="python -m utils.experiment run",
    )
    workspace = open_workspace(command.config.profile, command.raw)
    if record := Run(workspace, command.config, retrain=command.retrain).save():
        print(report.results_text([record]))


def train_command(
    model: str,
    protocol: Protocol = "patient",
    fold: int = 0,
    profile: Profile = "cpu",
    raw: str | None = None,
) -> None:
    """Trains a model, or continues, and leaves its weights under checkpoints/: evaluates nothing
    and changes no record. For the weights of a run that a record holds already."""
    workspace = open_workspace(profile, raw)
    run = Run(workspace, make_config(profile, model, protocol=protocol, fold=fold))
    print(f"{run}: {run.trained}")


def grid(
    profile: Profile = "cpu",
    raw: str | None = None,
    shard: str = "1/1",
    models: tuple[str, ...] = GRID_MODELS,
    protocols: tuple[Protocol, ...] = ("patient", "slice"),
    seeds: tuple[int, ...] = (0,),
) -> None:
    """Runs everything in the grid that no record holds yet; `--shard i/n` takes every n-th run,
    starting from the i-th."""
    workspace = open_workspace(profile, raw)
    for config in shard_of(grid_configs(profile, models, protocols, seeds), shard):
        run = Run(workspace, config)
        if run.recorded is not None:
            print(f"{run}: is in the record already.")
            continue
        run.save()


def search_command(
    model: str,
    protocol: Protocol = "patient",
    fold: int = 0,
    profile: Profile = "paper",
    trials: int = 40,
    storage: str | None = None,
    enqueue: int = 0,
    raw: str | None = None,
) -> None:
    """Searches a model's settings; start it several times for several workers. A killed worker is
    simply started again.

    Args:
        trials: of a search on this machine, kept in SQLite under checkpoints/optuna/.
        storage: URL of a search that several machines share, as
            postgresql://user:password@host/database.
        enqueue: put so many trials into the shared search and end; do this once, before the workers
            start.
    """
    workspace = open_workspace(profile, raw)
    config = make_config(profile, model, protocol=protocol, fold=fold, trials=trials)
    folder = workspace.optuna(model)
    if enqueue:
        waiting = optuna_search.open_search(folder, config, workspace.cohort_sha256, storage)
        optuna_search.enqueue(waiting, enqueue)
        print(f"{enqueue} trials of {model}, {protocol} fold {fold}, are enqueued.")
        return
    sets = load_sets(workspace, config)
    done = optuna_search.search(
        sets["train"],
        sets["validation"],
        config,
        folder,
        choose_device(),
        storage=storage,
        start=start_of(workspace, config),
    )
    print(optuna_search.trials_table(done))


def export(
    model: str,
    protocol: Protocol = "patient",
    fold: int = 0,
    profile: Literal["cpu", "paper"] = "cpu",
) -> None:
    """Writes a trained run's weights next to its checkpoint as `<run>_fp16.safetensors`, the one
    kind that git keeps."""
    workspace = open_workspace(profile)
    path = workspace.checkpoint(make_config(profile, model, protocol=protocol, fold=fold))
    half = half_of(path)
    save_half(path, half)
    print(f"{half.relative_to(workspace.root).as_posix()}: {half.stat().st_size / 1e6:.1f} MB")


def attack_command(
    model: str,
    protocol: Protocol = "patient",
    fold: int = 0,
    eps: tuple[str, ...] = ("4/255",),
    profile: Profile = "demo",
    suite: Literal["quick", "standard", "full"] = "standard",
    raw: str | None = None,
) -> None:
    """Attacks a trained model and prints the table and the checks that say whether to believe it.

    Args:
        model: a model of this repository, from its checkpoint; or your own as `module:function`, a
            function that returns a `torch.nn.Module` from float32 pixels (N, 1, H, W) in [0, 1] to
            four logits, evaluated on every image of `raw`.
        raw: folder or zip of class folders.
    """
    options = {"eps": eps, "headline_eps": eps[0], "suite": suite}
    if ":" in model:
        config = make_config(profile, "Resnet", **options)
        test, network = _everything_in(raw), model_from_factory(model)
        seen = "nothing is known of the images that this model was trained on"
        origin = {
            "model": model,
            "protocol": "all images",
            "data": "your images",
            "init": "yours",
            "cohort_sha256": "",
        }
    elif model in MODELS:
        workspace = open_workspace(profile, raw)
        config = make_config(profile, model, protocol=protocol, fold=fold, **options)
        test = load_sets(workspace, config)["test"]
        path = workspace.weights(config) or workspace.checkpoint(config)
        network, seen = load_model(path), str(seen_before(read_metadata(path), test))
        origin = {
            "model": model,
            "protocol": protocol,
            "data": workspace.data,
            "init": network.init,
            "cohort_sha256": workspace.cohort_sha256,
        }
    else:
        raise UserError(
            f"Unknown model {model!r}: expected one of {', '.join(MODELS)}, or your own as "
            "module:function."
        )
    print(_attack_text(network, test, config, origin))
    print(f"\nSeen before: {seen}.")


def _attack_text(network: nn.Module, test: data.ImageSet, config: RunConfig, origin: dict) -> str:
    """Table, checks and verdict of one evaluation that no record keeps."""
    result = evaluate_suite(
        network.to(choose_device()), test.images, test.labels, test.patients, config
    )
    rows, attacks = suite_rows(test, config, result)
    meta = {
        **origin,
        "search": "none",
        "regime": config.regime,
        "profile": config.profile,
        "fold": config.fold,
        "seed": config.seed,
        "attacks": attacks,
        "sanity": result.sanity,
        "config": dataclasses.asdict(config),
    }
    table = report.attacks_text(records.summarize(rows, [meta]))
    return f"{table}\n{sanity_text(RunResult(rows, meta))}\n\n{verdict(result.sanity)}"


def attack_again_command(
    model: str,
    protocol: Protocol = "patient",
    fold: int = 0,
    seed: int = 0,
    eps: tuple[str, ...] = ("0.5/255", "1/255"),
    steps: int = 100,
    restarts: int = 2,
    attack_seed: int = 1,
    profile: Profile = "cpu",
    raw: str | None = None,
) -> None:
    """Attacks what a recorded run still holds robust, by PGD with more steps, and adds the result
    to its record.

    Args:
        eps: budgets that the record holds.
        restarts: starts of PGD, each towards the next nearest class.
        attack_seed: of the starting points; another one finds what this one missed.
    """
    workspace = open_workspace(profile, raw)
    config = make_config(profile, model, protocol=protocol, fold=fold, seed=seed)
    again = attack_again(
        workspace, config, eps, steps=steps, restarts=restarts, attack_seed=attack_seed
    )
    add_run(workspace, again, merge=with_more_attacks)
    for eps_text, attacks in again.meta["attacks"].items():
        for name, meta in attacks.items():
            print(
                f"{model} {protocol} {config.run_name}, {name} at {eps_text} ({meta['weights']}): "
                f"{meta['misclassified']} of {meta['n_attacked']} robust slices misclassified, "
                f"{meta['n_set']} slices in all"
            )


def _everything_in(raw: str | None) -> data.ImageSet:
    """Every image of a folder as one set; no patient is known, so each image counts as its own
    patient in the intervals."""
    folder = find_raw(raw)
    if folder is None:
        raise UserError(
            "Your own model needs images: give a folder or zip of class folders with --raw."
        )
    images = read_raw(folder)
    number = torch.arange(len(images))
    return data.ImageSet(
        data.stack_images(images),
        torch.from_numpy(images.label),
        number,
        torch.zeros_like(number),
        list(images.file_sha256),
        "your images",
        pixels=[hashlib.sha256(image.tobytes()).hexdigest() for image in images.images],
        cohort_sha256="",
    )


def main() -> None:
    """Runs the command that `sys.argv` names; a `UserError` ends it with one sentence."""
    commands: dict[str, Callable[..., Any]] = {
        "prepare": prepare,
        "search": search_command,
        "run": run_command,
        "train": train_command,
        "grid": grid,
        "export": export,
        "attack": attack_command,
        "attack-again": attack_again_command,
    }
    try:
        if sys.argv[1:2] == ["run"]:
            run_command(sys.argv[2:])
        else:
            tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    except UserError as error:
        sys.exit(f"error: {error}")
