"""The command line of runs: `python -m utils.experiment prepare | search | run | train | grid |
export | attack | attack-again`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn

from utils import data, optuna_search, report
from utils.backbones import load_model, read_metadata, save_half
from utils.config import Profile, Protocol, RunConfig, make_config, parse_eps
from utils.evaluation import records
from utils.evaluation.sanity import verdict
from utils.evaluation.suite import evaluate_suite
from utils.pipeline.attack_again import attack_again, with_more_attacks
from utils.pipeline.driver import GRID_MODELS, Run, grid_configs, shard_of, start_of
from utils.pipeline.example import example_command
from utils.pipeline.explanations import attacks_figure
from utils.pipeline.other_classes import attack_other_classes, card_of_other, other_text
from utils.pipeline.own_images import classes_of, own_images
from utils.pipeline.own_model import is_factory, load_own, try_one, wrapped
from utils.pipeline.stages import suite_rows
from utils.pipeline.store import RunResult, add_run
from utils.pipeline.texts import sanity_text
from utils.pipeline.workspace import half_of, load_sets, open_workspace
from utils.provenance import seen_before
from utils.report.card import card_of, write_card
from utils.utils_funcs import CLASSES, MODELS, UserError, check_output, choose_device


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
        within = record.protocol in report.WITHIN
        print(report.within_markdown([record]) if within else report.results_text([record]))


def train_command(
    model: str,
    protocol: Protocol = "patient",
    fold: int = 0,
    profile: Profile = "cpu",
    raw: str | None = None,
) -> None:
    """Trains a model, or continues, and leaves its weights under checkpoints/: evaluates nothing
    and changes no record. For the weights of a run that a record holds already."""
    config = make_config(profile, model, protocol=protocol, fold=fold)
    run = Run(open_workspace(profile, raw), config)
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
    configs = shard_of(grid_configs(profile, models, protocols, seeds), shard)
    workspace = open_workspace(profile, raw)
    for config in configs:
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
    config = make_config(profile, model, protocol=protocol, fold=fold, trials=trials)
    for name, count in (("--trials", trials), ("--enqueue", enqueue or 1)):
        if count < 1:
            raise UserError(f"{name} is {count}: expected a whole number from 1 on.")
    optuna_search.check_storage(storage)
    workspace = open_workspace(profile, raw)
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
    config = make_config(profile, model, protocol=protocol, fold=fold)
    workspace = open_workspace(profile)
    path = workspace.checkpoint(config)
    half = half_of(path)
    save_half(path, half)
    print(f"{half.relative_to(workspace.root).as_posix()}: {half.stat().st_size / 1e6:.1f} MB")


def attack_command(
    model: str,
    protocol: Protocol = "patient",
    fold: int = 0,
    eps: tuple[str, ...] = ("4/255",),
    profile: Profile | None = None,
    suite: Literal["quick", "standard", "full"] = "standard",
    raw: str | None = None,
    part: Literal["train", "validation", "test", "all"] | None = None,
    limit: int | None = None,
    channels: int | None = None,
    size: int | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    classes: str | None = None,
    card: Path | None = None,
) -> None:
    """Attacks a trained model and prints the table and the checks that say whether to believe it.

    A model of your own gets float32 pixels (N, 1, H, W) in [0, 1] and returns logits (N, 4) in the
    order Non, Very mild, Mild, Moderate; or, on data of K other classes, (N, K) in the order of
    `--classes`. One image is tried first.

    Args:
        model: a model of this repository by its name, on the test set of its protocol and fold; or,
            on your images, a checkpoint.safetensors of it, or your own model: module:function (a
            function that returns a torch.nn.Module), hf:ORG/NAME, or
            timm:NAME@checkpoint.safetensors.
        profile: whose budgets the attacks have: by default `demo` for a model of this repository,
            whose weights are then taken, and `cpu` for your own.
        raw: folder or zip of class folders, or a manifest.
        part: which of your images: by default those of test/, or all where there is no such folder.
        limit: of your images take a sample of so many, spread over classes and patients.
        channels: 3 repeats the gray image for a model that takes colors.
        size: side in pixels that images are resized to before your model.
        mean: subtracted from the pixels before your model, one number or one a channel.
        std: divided by, likewise.
        classes: the order of your model's outputs, such as "Mild,Moderate,Non,Very mild".
        card: write an HTML page of the result here, and the same as JSON beside it.
    """
    profile = profile or ("demo" if model in MODELS else "cpu")
    config = make_config(
        profile,
        model if model in MODELS else "Resnet",
        protocol=protocol,
        fold=fold,
        eps=eps,
        headline_eps=eps[0] if eps else "4/255",
        suite=suite,
    )
    check_output(card, raw)
    for name, number in (("--limit", limit), ("--size", size), ("--channels", channels)):
        if number is not None and number < 1:
            raise UserError(f"{name} is {number}: expected a whole number from 1 on.")
    options = {"channels": channels, "size": size, "mean": mean, "std": std}
    subject = (
        _of_repository(model, config, raw)
        if model in MODELS
        else _of_ones_own(model, raw, part, limit, classes, options)
    )
    network = subject.network.to(choose_device())
    if subject.classes == CLASSES:
        result = _evaluated(network, subject.test, config, {"model": model, **subject.origin})
        record = records.summarize(result.rows, [result.meta])
        text, checks, content = report.attacks_text(record), result.meta["sanity"], card_of(record)
    else:
        other = attack_other_classes(network, subject.test, subject.classes, config, model)
        text, checks, content = other_text(other), other.sanity, card_of_other(other)
    print("\n".join(f"{note[0].upper()}{note[1:]}." for note in subject.notes))
    print(f"\n{text}\n{sanity_text(checks)}\n\n{verdict(checks)}")
    if card is not None:
        label = f"{model} · {subject.origin['data']}"
        example = attacks_figure(network, subject.test, config, label, subject.classes)
        known = subject.patients_known
        kept = write_card(card, content, subject.notes, example, patients_known=known)
        print(f"written to {card} and {kept}")


@dataclass(frozen=True)
class Subject:
    """What `attack` attacks.

    Attributes:
        notes: sentences on the images, the patients and what the model has seen.
        patients_known: whether intervals are over patients, or each image counts as one.
        origin: what a record says of where the model and the images come from.
    """

    network: nn.Module
    test: data.ImageSet
    notes: list[str]
    patients_known: bool
    origin: dict[str, str]
    classes: tuple[str, ...] = CLASSES


def _of_repository(model: str, config: RunConfig, raw: str | None) -> Subject:
    """A model of this repository, on the test set of its protocol and fold."""
    workspace = open_workspace(config.profile, raw)
    test = load_sets(workspace, config)["test"]
    path = workspace.weights(config) or workspace.checkpoint(config)
    trained = load_model(path)
    origin = {
        "protocol": config.protocol,
        "data": workspace.data,
        "init": trained.init,
        "cohort_sha256": workspace.cohort_sha256,
    }
    notes = [str(seen_before(read_metadata(path), test))]
    return Subject(trained, test, notes, patients_known=True, origin=origin)


def _of_ones_own(
    model: str,
    raw: str | None,
    part: str | None,
    limit: int | None,
    classes: str | None,
    options: dict[str, Any],
) -> Subject:
    """A model of one's own, tried on one image, with images of one's own.

    Args:
        options: of `wrapped`, as the command line gives them.
    """
    # A function of yours is called before any data are read; other models need the classes.
    given = load_own(model) if is_factory(model) else None
    wanted = classes_of(raw)
    if wanted != CLASSES and classes is None:
        raise UserError(
            f"{raw} has the classes {', '.join(wanted)}, which are not the four of this project: "
            "say with --classes in which order your model's outputs stand, such as "
            f"{','.join(wanted)}."
        )
    own, wrapping = given or load_own(model, classes, wanted)
    network = wrapped(own, wrapping, **options, classes=classes, wanted=wanted)
    images = own_images(raw, part, limit, wanted)
    try_one(network, data.pixels(images.part.images_at(torch.tensor([0]))), model, wanted)
    metadata = read_metadata(model) if model.endswith(".safetensors") else {}
    seen = (
        str(seen_before(metadata, images.part))
        if metadata
        else "nothing is known of the images that this model was trained on"
    )
    origin = {
        "protocol": "your images",
        "data": "your images",
        "init": "unknown",
        "cohort_sha256": images.part.cohort_sha256,
    }
    notes = [*images.notes, seen]
    return Subject(network, images.part, notes, images.patients_known, origin, wanted)


def _evaluated(
    network: nn.Module, test: data.ImageSet, config: RunConfig, origin: dict
) -> RunResult:
    """One evaluation, as a record takes it; none keeps it."""
    result = evaluate_suite(network, test.images, test.labels, test.patients, config)
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
    return RunResult(rows, meta)


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
    config = make_config(profile, model, protocol=protocol, fold=fold, seed=seed)
    for text in eps:
        parse_eps(text)
    workspace = open_workspace(profile, raw)
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
        "example": example_command,
    }
    try:
        if sys.argv[1:2] == ["run"]:
            run_command(sys.argv[2:])
        else:
            tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    except UserError as error:
        sys.exit(f"error: {error}")
