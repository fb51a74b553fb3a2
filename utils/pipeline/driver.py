"""The driver: takes a run through its stages (search, train, attack, explain) into its record, and
lists runs.

    for run in runs_of(workspace, "Resnet"):
        print(run.fit)
        run.save()

Notebooks, command line, grid and shards all use it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from functools import cached_property
from pathlib import Path

from filelock import FileLock
from torch import nn

from utils import data, optuna_search, training
from utils.backbones import load_model
from utils.config import Profile, Protocol, RunConfig, folds_of, make_config, protocols_of
from utils.evaluation import records
from utils.pipeline import explanations, stages
from utils.pipeline.store import RunResult, add_machine, add_run, find_matching_run, keep_json
from utils.pipeline.workspace import Workspace, is_leader, load_sets, process_count
from utils.utils_funcs import BACKBONES, MODELS, PROTOCOLS, UserError, choose_device, say

#: The order of the grid: what costs least comes first.
GRID_MODELS = tuple(
    f"{backbone}{regime}" for backbone in BACKBONES[::-1] for regime in ("", "_atk")
)


class Run:
    """One model, protocol, fold and seed, from data to record.

    Each property is the result of one stage: taken from the record, or from this machine's disk, if
    it is there with the same settings, and otherwise computed from the results of the stages before
    it, and kept. It is computed once.

    Args:
        requested: the settings before any search.
        retrain: compute everything again, and replace the run in its record.
    """

    def __init__(self, workspace: Workspace, requested: RunConfig, *, retrain: bool = False):
        self.workspace, self.requested, self.retrain = workspace, requested, retrain

    def __str__(self) -> str:
        config = self.requested
        return f"{config.model} {config.protocol} {config.run_name}"

    @cached_property
    def recorded(self) -> RunResult | None:
        """The run as its record holds it; None where no record does, or with `retrain`."""
        return None if self.retrain else find_matching_run(self.workspace, self.requested)

    @cached_property
    def config(self) -> RunConfig:
        """The settings: the requested ones, or the best of the model's search, which is run first
        where trials are due.

        Profile `paper` searches inside every fold, the others on fold 0.
        """
        requested = self.requested
        if not requested.trials:
            return requested
        searched = requested if requested.profile == "paper" else on_fold_0(requested)
        folder = self.workspace.optuna(requested.model)
        cohort = self.workspace.cohort_sha256
        if self.recorded is None and not optuna_search.best_settings(folder, searched, cohort):
            if process_count() > 1:
                raise UserError(
                    f"{requested.model} has no searched settings yet and several processes cannot "
                    "search together: "
                    f"run `python -m utils.experiment search --model {requested.model} --profile "
                    f"{requested.profile} "
                    f"--protocol {requested.protocol} --fold {searched.fold} --trials "
                    f"{requested.trials}` first, or "
                    "train with --trials 0."
                )
            sets = load_sets(self.workspace, searched)
            optuna_search.search(
                sets["train"],
                sets["validation"],
                searched,
                folder,
                choose_device(),
                start=start_of(self.workspace, searched),
            )
        best = optuna_search.best_settings(folder, searched, cohort)
        return dataclasses.replace(requested, **best)

    @cached_property
    def sets(self) -> dict[str, data.ImageSet]:
        """The run's training, validation and test set."""
        return load_sets(self.workspace, self.config)

    @cached_property
    def fit(self) -> training.Fit:
        """The training: the record's where it holds the run and the weights are elsewhere, else
        `trained`."""
        path = self.workspace.checkpoint(self.config)
        if self.recorded is None or path.is_file():
            return self.trained
        meta = self.recorded.meta
        return training.Fit(
            path,
            meta["history"],
            meta["best_epoch"],
            meta["init"],
            meta["precision"],
            meta["wall_seconds"]["train"],
            meta["one_class"],
        )

    @cached_property
    def trained(self) -> training.Fit:
        """The training with its weights on this machine: read, continued, or run."""
        config, path = self.config, self.workspace.checkpoint(self.config)
        start = start_of(self.workspace, config)
        path.parent.mkdir(parents=True, exist_ok=True)
        cohort = self.workspace.cohort_sha256
        if self.retrain or training.finished_fit(path, config, cohort) is None:
            add_machine(self.workspace, config, anew=self.retrain)
        # Two shards may want the same clean model, one as its run, one to start from: the second
        # waits. (The processes of one training must not wait for each other.)
        lock = FileLock(path.with_suffix(".lock"))
        with lock if process_count() == 1 else contextlib.nullcontext():
            return training.fit(
                self.sets["train"],
                self.sets["validation"],
                config,
                path,
                choose_device(),
                retrain=self.retrain,
                logs=self.workspace.state(config) / "logs",
                start=start,
            )

    @cached_property
    def model(self) -> nn.Module:
        """The trained model, on the device."""
        return self.fit.load().to(choose_device())

    @property
    def has_weights(self) -> bool:
        """Whether this machine holds the trained weights in full precision."""
        return self.workspace.checkpoint(self.config).is_file()

    @cached_property
    def result(self) -> RunResult:
        """Test predictions, clean and under every attack of the suite, and how they came about."""
        if self.recorded is not None:
            return self.recorded
        state = self.workspace.state(self.config) / "attack"
        if self.retrain:
            shutil.rmtree(state, ignore_errors=True)
        fit = self.fit
        found = stages.attack(
            self.model, fit, self.sets, self.config, sources=self.other_models(), state=state
        )
        origin = stages.describe(self.workspace, self.config)
        origin["hardware"] = add_machine(self.workspace, self.config)
        return RunResult(found.rows, origin | found.meta)

    def other_models(self) -> dict[str, nn.Module]:
        """The other models of the same protocol, fold and seed whose weights are on this machine,
        by name: what transfer attacks are made on. A rehearsal's suite has none."""
        if self.config.suite == "quick":
            return {}
        others = {
            name: self.workspace.weights(dataclasses.replace(self.config, model=name))
            for name in MODELS
            if name != self.config.model
        }
        return {name: load_model(path).to(choose_device()) for name, path in others.items() if path}

    @cached_property
    def attack_picture(self) -> Path:
        """The picture of what each attack does to one test slice, the same for every model.

        A picture that is there stays, except that of another run (a rehearsal), whose place fold 0
        takes. Without weights none is drawn."""
        folder = self.workspace.root / "assets" / self.config.model
        path = folder / f"attacks_{self.config.protocol}.png"
        keep = path.is_file() and not self.retrain
        if keep and (self.config.fold != 0 or self.recorded is not None) or not self.has_weights:
            return path
        explanations.draw_attacks(self.model, self.sets["test"], self.config, self.label, path)
        return path

    @cached_property
    def explanation(self) -> dict:
        """How far the maps of this model can be trusted (`utils.explain`), {} where neither a
        record nor weights are here. Fold 0 draws the pictures of maps as well."""
        config, drawn = self.config, self.map_picture.is_file() or self.config.fold != 0
        recorded = None if self.recorded is None else self.recorded.meta["explanation"]
        numbers = self.workspace.state(config) / "explanation.json"
        if recorded is not None and (drawn or not self.has_weights):
            return recorded
        if not drawn and self.has_weights:
            record = self.workspace.record(config.model, config.protocol)
            explanations.draw_maps(
                self.model, self.sets["test"], config, self.label, self.map_picture, record
            )
        if recorded is not None or not self.has_weights and not numbers.is_file():
            return recorded or {}
        return keep_json(
            numbers,
            lambda: explanations.measure_maps(self.model, self.sets["test"], config),
            again=self.retrain,
        )

    @property
    def map_picture(self) -> Path:
        """The path of the picture of Grad-CAM maps."""
        config = self.config
        return self.workspace.root / "assets" / config.model / f"grad_cam_{config.protocol}.png"

    @property
    def label(self) -> str:
        """What a figure says of where it comes from."""
        config = self.config
        return (
            f"{config.model} · {config.protocol} · data: {self.workspace.data} · profile: "
            f"{config.profile}"
        )

    def save(self) -> records.Record | None:
        """Takes the run through all stages into its record; returns the record. A run that a record
        holds stays as it is."""
        if self.recorded is not None:
            return records.read_record(
                self.workspace.record(self.requested.model, self.requested.protocol)
            )
        print(f"{self}: {self.fit}")
        if not is_leader():
            return None
        if self.requested.protocol not in PROTOCOLS:  # an experiment on the side: no pictures
            return add_run(self.workspace, self.result)
        meta = self.result.meta
        _ = self.attack_picture  # drawn as fold 0's is asked for
        result = RunResult(self.result.rows, meta | {"explanation": self.explanation})
        return add_run(self.workspace, result)


def start_of(workspace: Workspace, config: RunConfig) -> Path | None:
    """The checkpoint whose weights a training starts from, None without `warm_start`: the clean
    counterpart's, or the fp16 copy of it that git keeps; where there is neither, the clean
    counterpart is trained first."""
    if not (config.adversarial and config.warm_start):
        return None
    counterpart = make_config(
        config.profile,
        config.backbone,
        protocol=config.protocol,
        fold=config.fold,
        seed=config.seed,
    )
    if (kept := workspace.weights(counterpart)) is not None:
        return kept
    clean = Run(workspace, counterpart)
    say(
        f"{config.model} {config.protocol} {config.run_name} starts from the clean "
        f"{clean.requested.model}, which is "
        "trained first."
    )
    return clean.trained.checkpoint


def on_fold_0(config: RunConfig) -> RunConfig:
    """The same settings on fold 0, where profiles below `paper` search."""
    return dataclasses.replace(config, fold=0)


# --- Which runs there are -----------------------------------------------------------------------


def runs_of(
    workspace: Workspace,
    model: str,
    seeds: tuple[int, ...] = (0,),
    *,
    run_missing: bool = True,
    retrain: bool = False,
) -> list[Run]:
    """The runs of a model at the workspace's profile, `patient` first.

    Args:
        run_missing: all runs (True), or those alone that a record holds; where no record holds any,
            all in either case.
    """
    runs = [
        Run(
            workspace,
            make_config(workspace.profile, model, protocol=protocol, fold=fold, seed=seed),
            retrain=retrain,
        )
        for protocol in protocols_of(workspace.profile, model)
        for seed in seeds
        for fold in folds_of(workspace.profile, protocol)
    ]
    held = runs if run_missing or retrain else [run for run in runs if run.recorded is not None]
    if held and len(held) < len(runs):
        print(
            f"{len(runs) - len(held)} of {len(runs)} runs are in no record yet and are left out "
            "here "
            "(run_missing = True runs them)."
        )
    return held or runs


def grid_configs(
    profile: Profile,
    models: tuple[str, ...],
    protocols: tuple[Protocol, ...],
    seeds: tuple[int, ...],
) -> list[RunConfig]:
    """The settings of all runs, most valuable first: protocol, then model, then fold."""
    return [
        make_config(profile, model, protocol=protocol, fold=fold, seed=seed)
        for seed in seeds
        for protocol in protocols
        for model in models
        for fold in folds_of(profile, protocol)
    ]


def shard_of(configs: list[RunConfig], shard: str) -> list[RunConfig]:
    """The i-th of n shares of the runs, `shard` = "i/n" counted from 1."""
    index, _, count = shard.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise UserError(f"--shard {shard!r} is not of the form i/n with 1 ≤ i ≤ n, as 3/8.")
    return configs[int(index) - 1 :: int(count)]
