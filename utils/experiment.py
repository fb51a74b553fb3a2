"""One unit of the study, (model, protocol, fold, seed), from data to record: search, train, attack, explain, save.

The notebooks call these functions; the command line runs the same ones:

    python -m utils.experiment prepare                                              # the tensors of both protocols
    python -m utils.experiment run --profile cpu --model Resnet_atk --protocol patient --fold 0
    python -m utils.experiment grid --profile cpu                                   # every unit that no record holds yet
    python -m utils.experiment grid --profile paper --shard 3/8                     # the third of eight shares (job array)
    python -m utils.experiment search --model Resnet_atk --trials 40                # settings, on this machine (--storage: on many)
    torchrun --nproc_per_node 4 -m utils.experiment run --profile paper --model Dinov2_atk   # one training on several GPUs
    python -m utils.experiment attack --model Resnet_atk --protocol patient --eps 4/255
    python -m utils.experiment attack-again --model Efficientnet --eps 0.5/255 1/255 --steps 100   # more steps, into the record
    python -m utils.experiment export --model Efficientnet                          # the unit's weights, half the size, for git
    python -m utils.experiment attack --model my_module:build --raw my_images/ --eps 4/255   # your model, your images

A killed command is simply started again: training goes on from its last epoch, the attacks from their last finished
part, and a unit that stands in a record is not run twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import optuna
import torch
import tyro
from filelock import FileLock
from matplotlib.figure import Figure

from utils import data, figures, grad_cam, optuna_search, phantom, report, training
from utils.attacks import ATTACKS, GroupedClasses
from utils.backbones import load_model, save_half
from utils.cohort import (
    COMMITTED_COHORT,
    Cohort,
    cohort_for,
    find_raw,
    read_cohort,
    read_raw,
    write_cohort,
)
from utils.config import RunConfig, folds_of, make_config, parse_eps
from utils.metrics import correct, fit_temperature, probabilities, scored, to_half
from utils.robustness import (
    VIEWS,
    Stage,
    SuiteResult,
    as_pixels,
    attack_images,
    evaluate_suite,
    misclassified,
    headline_of,
    model_from_factory,
    other_norms_plan,
    predict_logits,
    sample_measures,
    suite_plan,
    verdict,
    view_labels,
    wrong_where_not_finite,
)
from utils.utils_funcs import (
    CLASSES,
    MODELS,
    PROTOCOLS,
    ROOT,
    UserError,
    atomic_path,
    choose_device,
    environment,
    git_state,
    hardware,
    read_json,
    result_root,
    say,
    write_json,
)

#: The grid's order: what readers need most comes first.
GRID_MODELS = ("Resnet", "Resnet_atk", "Efficientnet", "Efficientnet_atk", "Dinov2", "Dinov2_atk")


@dataclass(frozen=True)
class Workspace:
    """Which data, where its tensors lie, and where results go."""

    root: Path
    data: Literal["real", "phantom"]
    profile: str
    raw: Path | None
    """None: there are no images here, and what the committed records hold is shown."""
    cohort_sha256: str

    @property
    def sets(self) -> Path:
        return self.root / "dataset" / "dataset_variables"

    def checkpoint(self, config: RunConfig) -> Path:
        return (
            self.root
            / "checkpoints"
            / config.model
            / config.protocol
            / f"{config.run_name}.safetensors"
        )

    def weights(self, config: RunConfig) -> Path | None:
        """The unit's checkpoint, or else the fp16 copy of it that git keeps; None where neither is on this machine."""
        path = self.checkpoint(config)
        return next((kept for kept in (path, half_of(path)) if kept.is_file()), None)

    def record(self, model: str, protocol: str) -> Path:
        return self.root / "assets" / model / f"{protocol}.json"

    def optuna(self, model: str) -> Path:
        return self.root / "checkpoints" / "optuna" / model


@dataclass(frozen=True)
class Run:
    """What a unit leaves: one row per test image (`Predictions file`, utils/report.py) and what was done to get it."""

    rows: dict[str, np.ndarray]
    meta: dict


# --------------------------------------------------------------------------------------------------------------- data


def open_workspace(
    profile: str = "demo",
    raw: str | Path | None = None,
    *,
    again: bool = False,
    records: bool = False,
) -> Workspace:
    """Finds the data, prepares the tensors of both protocols where they are missing or of other data (or `again`), and says
    what it found. Without any data it draws the phantom cohort, and everything it touches says `data: phantom`; or, with
    `records` and where the repository holds some of this profile, it goes without images and shows these."""
    found = find_raw(raw or None)
    if found is None and records and _holds_records(profile):
        print(
            f"data: real · profile: {profile} · no images here, so what the committed records hold is shown"
        )
        return Workspace(ROOT, "real", profile, None, data.file_sha256(COMMITTED_COHORT))
    kind: Literal["real", "phantom"] = "real" if found else "phantom"
    root = result_root(profile, kind)
    folder = found or _phantom_folder(root)
    sets = root / "dataset" / "dataset_variables"
    source = _fingerprint(folder)
    prepared = read_json(sets / "prepared.json") if (sets / "prepared.json").is_file() else {}
    if again or prepared.get("source") != source:
        prepared = _prepare(folder, sets, root, source)
    print(
        f"data: {kind} · profile: {profile} · {prepared['images']:,} images, {prepared['people']} people · results under "
        f"{'the repository' if root == result_root('cpu', 'real') else root.name}"
    )
    return Workspace(root, kind, profile, folder, prepared["cohort_sha256"])


def _holds_records(profile: str) -> bool:
    return profile != "demo" and any(
        entry.record["profile"] == profile and entry.model in MODELS
        for entry in report.read_entries(ROOT).values()
    )


def _phantom_folder(root: Path) -> Path:
    folder = root / "dataset" / "raw_dataset"
    if not (folder / "people.csv").is_file():
        phantom.write_phantom(folder)
    return folder


def _fingerprint(folder: Path) -> list:
    """Cheap and enough to notice other data: path, size and age of the archive, or the number of files of a folder."""
    status = folder.stat()
    inside = sum(1 for _ in folder.rglob("*")) if folder.is_dir() else status.st_size
    return [folder.name, inside, int(status.st_mtime)]


def _prepare(folder: Path, sets: Path, root: Path, source: list) -> dict:
    raw = read_raw(folder)
    cohort = cohort_for(raw, cache=sets / "cohort.csv")
    folds = data.folds_for(cohort, sets / "folds.csv")
    write_cohort(cohort, sets / "cohort.csv")
    data.prepare(raw, cohort, folds, sets)
    prepared = {
        "source": source,
        "images": len(cohort.label),
        "people": len(data.patients_of(cohort)[0]),
        "cohort_sha256": data.file_sha256(sets / "cohort.csv"),
    }
    write_json(
        sets / "prepared.json", prepared
    )  # last: its presence says that everything above is whole
    return prepared


def load_sets(workspace: Workspace, config: RunConfig) -> dict[str, data.ImageSet]:
    """Training, validation and test set of a unit."""
    return data.load_sets(
        workspace.sets,
        config.protocol,
        config.fold,
        max_train=config.max_train,
        max_test=config.max_test,
    )


def runs_of(
    workspace: Workspace, model: str, seeds: tuple[int, ...] = (0,), *, run_missing: bool = True
) -> list[RunConfig]:
    """The units of a model at the study's profile, `patient` first: all of them, or, without `run_missing`, those that its
    records hold already. Where no record holds any, all of them in either case."""
    runs = [
        make_config(workspace.profile, model, protocol=protocol, fold=fold, seed=seed)
        for protocol in reversed(PROTOCOLS)
        for seed in seeds
        for fold in folds_of(workspace.profile, protocol)
    ]
    held = runs if run_missing else [run for run in runs if recorded(workspace, run) is not None]
    if held and len(held) < len(runs):
        print(
            f"{len(runs) - len(held)} of {len(runs)} units are in no record yet and are left out here (run_missing = True runs them)."
        )
    return held or runs


# ------------------------------------------------------------------------------------------------------------- stages


def search(workspace: Workspace, config: RunConfig) -> RunConfig:
    """The config with the best settings of the model's search, which is run first where trials are still due.

    `paper` searches inside every fold; other profiles search on fold 0, and its validation people are named in the record.
    """
    searched = config if config.profile == "paper" else dataclasses.replace(config, fold=0)
    folder = workspace.optuna(config.model)
    if (
        config.trials
        and recorded(workspace, config) is None
        and not optuna_search.best_settings(folder, searched)
    ):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(
                f"{config.model} has no searched settings yet and several processes cannot search together: run `python -m "
                f"utils.experiment search --model {config.model} --profile {config.profile} --protocol {config.protocol} "
                f"--fold {searched.fold} --trials {config.trials}` first, or train with --trials 0."
            )
        sets = load_sets(workspace, searched)
        optuna_search.search(
            sets["train"],
            sets["validation"],
            searched,
            folder,
            choose_device(),
            start=start_of(workspace, searched),
        )
    return (
        dataclasses.replace(config, **optuna_search.best_settings(folder, searched))
        if config.trials
        else config
    )


def search_label(config: RunConfig) -> str:
    """How the settings came about: `inside` (searched within the fold), `fold0` (searched on fold 0), `fold0 recipes`
    (profile `cpu`: set by hand after looking at fold 0's validation patients, assets/<Model>/defaults.json) or `none`.
    Where fold 0's validation patients took part the record also gives the score without them."""
    if not config.trials:
        return "fold0 recipes" if config.profile == "cpu" else "none"
    return "inside" if config.profile == "paper" or config.protocol == "slice" else "fold0"


def train(workspace: Workspace, config: RunConfig, *, retrain: bool = False) -> training.Fit:
    """The unit's training: run, resumed, or read from the checkpoint or the record that holds it."""
    known = None if retrain else recorded(workspace, config)
    path = workspace.checkpoint(config)
    if known is not None and not path.is_file():
        meta = known.meta
        return training.Fit(
            path,
            meta["history"],
            meta["best_epoch"],
            meta["init"],
            meta["precision"],
            meta["wall_seconds"]["train"],
            meta["one_class"],
        )
    return _fit(workspace, config, retrain=retrain)


def _fit(workspace: Workspace, config: RunConfig, *, retrain: bool = False) -> training.Fit:
    sets, path = load_sets(workspace, config), workspace.checkpoint(config)
    start = start_of(workspace, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    if retrain or training.finished_fit(path, config) is None:
        _machines(workspace, config, anew=retrain)
    # Two shards may want the same clean model, one as its unit, one to start from: the second waits. (Several processes
    # of one training must not wait for each other.)
    alone = (
        contextlib.nullcontext()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1
        else FileLock(path.with_suffix(".lock"))
    )
    with alone:
        return training.fit(
            sets["train"],
            sets["validation"],
            config,
            path,
            choose_device(),
            retrain=retrain,
            logs=path.with_suffix("") / "logs",
            start=start,
        )


def _machines(workspace: Workspace, config: RunConfig, *, anew: bool = False) -> str:
    """Every machine that worked on the unit, this one last, in a line: training and attacks may go on where others stopped."""
    path = workspace.checkpoint(config).with_suffix("") / "machines.json"
    known = read_json(path)["machines"] if path.is_file() and not anew else []
    machines = list(dict.fromkeys([*known, hardware()]))
    if not int(os.environ.get("RANK", 0)):
        write_json(path, {"machines": machines})
    return " + ".join(machines)


def start_of(workspace: Workspace, config: RunConfig) -> Path | None:
    """The checkpoint whose weights a training starts from: with `warm_start` the clean twin's, or the fp16 copy of it that
    git keeps; where there is neither, the clean twin is trained first. None without `warm_start`."""
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
    say(
        f"{config.model} {config.protocol} {config.run_name} starts from the clean {counterpart.model}, which is trained first."
    )
    return _fit(workspace, search(workspace, counterpart)).checkpoint


def half_of(checkpoint: Path) -> Path:
    """Where a checkpoint's fp16 copy lies, the one kind of weights that git keeps."""
    return checkpoint.with_name(f"{checkpoint.stem}_fp16.safetensors")


def attack(workspace: Workspace, config: RunConfig, *, retrain: bool = False) -> Run:
    """The unit's test predictions, clean and under every attack of the suite: computed, resumed, or read from the record."""
    if not retrain and (known := recorded(workspace, config)) is not None:
        return known
    fit = train(workspace, config)
    sets, model = load_sets(workspace, config), fit.load().to(choose_device())
    test, start = sets["test"], time.perf_counter()
    state = workspace.checkpoint(config).with_suffix("") / "attack"
    if retrain:
        _remove_tree(state)
    chosen = data.every_nth(test, config.attack_stride)
    attacked = test.pick(chosen)
    sources, masks, stages = attack_plan(workspace, config, model, attacked)
    result = evaluate_suite(
        model,
        attacked.images,
        attacked.labels,
        attacked.patients,
        config,
        state_dir=state,
        stages=stages,
        sources=sources,
        masks=masks,
        precision=fit.precision if config.attack_as_trained else "fp32",
    )
    clean = training.predict(model, test.images, choose_device()).numpy()
    rows, attacks = suite_rows(test, config, result, chosen, clean)
    measures = {}
    if config.suite != "quick":
        measures = _kept_json(
            state / "measures.json",
            lambda: sample_measures(
                model,
                attacked.images,
                attacked.labels.numpy(),
                attacked.patients.numpy(),
                config.for_explanations(),
            ),
        )
    if measures:
        measures |= {"rows": chosen[measures["rows"]].tolist()}
    seconds = {
        "train": fit.seconds,
        "attack": max(time.perf_counter() - start, sum(m["seconds"] for m in result.meta.values())),
    }
    validation = training.predict(model, sets["validation"].images, choose_device()).numpy()
    return Run(
        rows,
        {
            **describe(workspace, config),
            "hardware": _machines(workspace, config),
            "init": fit.init,
            "precision": fit.precision,
            "wall_seconds": seconds,
            "attacks": attacks,
            "sanity": result.sanity,
            "temperature": fit_temperature(validation, sets["validation"].labels.numpy()),
            "measures": measures,
            "history": fit.history,
            "best_epoch": fit.best_epoch,
            "one_class": fit.one_class,
        },
    )


def _kept_json(path: Path, compute: Callable[[], dict]) -> dict:
    """What `path` holds, or what `compute` gives, which is then kept there."""
    if not path.is_file():
        write_json(path, compute())
    return read_json(path)


def attack_plan(
    workspace: Workspace, config: RunConfig, model: torch.nn.Module, attacked: data.ImageSet
) -> tuple[dict[str, torch.nn.Module], dict[str, torch.Tensor], list[Stage]]:
    """(models that transfer attacks are made on, regions for Kryptonite, stages) of a unit's evaluation.

    The sources are the other models of the same protocol, fold and seed whose weights lie on this machine; the region
    is the fifth of each image that Grad-CAM of the clean image lights up most.
    """
    if config.suite == "quick":
        return {}, {}, suite_plan(config)
    paths = {
        name: workspace.weights(dataclasses.replace(config, model=name))
        for name in MODELS
        if name != config.model
    }
    sources = {
        name: load_model(path).to(choose_device())
        for name, path in paths.items()
        if path is not None
    }
    maps = grad_cam.explain(model, data.pixels(attacked.images, choose_device())).flatten(1)
    region = (
        (maps >= maps.quantile(0.8, dim=1, keepdim=True)).float().view(attacked.images.shape).cpu()
    )
    stages = suite_plan(config, tuple(sources), ("gradcam",))
    return (
        sources,
        {"gradcam": region},
        stages + (other_norms_plan(config) if config.suite == "full" else []),
    )


#: Largest difference of two probabilities that a copy of the weights in half precision may make (measured: 0.0016).
SAME_WEIGHTS = 0.02


def attack_again(
    workspace: Workspace,
    config: RunConfig,
    eps: tuple[str, ...],
    *,
    steps: int = 100,
    restarts: int = 2,
    attack_seed: int = 1,
) -> Run:
    """Attacks the slices that a run's record still holds robust, by margin PGD of a larger budget, in the views of four and
    of three classes.

    Returns the run with one more column an eps and view, `"<eps>:pgd<steps>_again"` and `"…_merged"` (`_again_seed<s>` for
    another attack seed than 1), and in its metadata what these attacks did, and nothing else. Slices that were
    not attacked carry the recorded logits that misclassified them; slices outside the recorded attacks' set are NaN.

    Args:
        eps: budgets that the record holds, as written there.
        attack_seed: of the starting points; another one than the recorded attacks had.

    Raises:
        StudyError: no such run, eps or weights, the weights are not those of the record, or it holds this attack already.
    """
    known = recorded_as(workspace, config.model, config)
    path = workspace.record(config.model, config.protocol)
    if known is None:
        raise UserError(
            f"{path} holds no {config.run_name} of profile {config.profile} and this cohort: run it first."
        )
    if missing := [name for name in eps if name not in known.meta["attacks"]]:
        raise UserError(
            f"{path} holds no attacks at eps {', '.join(missing)}: give some of {', '.join(known.meta['attacks'])}."
        )
    again = f"pgd{steps}_again" + (f"_seed{attack_seed}" if attack_seed != 1 else "")
    if done := [name for name in eps if again in known.meta["attacks"][name]]:
        raise UserError(
            f"{path} holds {again} at eps {', '.join(done)} already: give other steps or another attack seed."
        )
    test, (model, weights) = (
        load_sets(workspace, config)["test"],
        _recorded_model(workspace, config),
    )
    _check_same_run(known, model, test, path)
    budget = dict(steps=steps, restarts=restarts, seed=attack_seed)
    rows: dict[str, np.ndarray] = {}
    attacks: dict[str, dict] = {}
    for eps_text in eps:
        for view in ("four", "three"):
            name = again + VIEWS[view][1]
            logits, meta = _attack_robust_slices(known, model, test, config, eps_text, view, budget)
            rows[f"{eps_text}:{name}"] = logits
            attacks.setdefault(eps_text, {})[name] = {**meta, "weights": weights, **git_state()}
    return Run({**known.rows, **rows}, {**known.meta, "attacks": attacks})


def _recorded_model(workspace: Workspace, config: RunConfig) -> tuple[torch.nn.Module, str]:
    """A run's trained model and which of its weights these are: `checkpoint` or `fp16 copy`."""
    path = workspace.weights(config)
    if path is None:
        raise UserError(
            f"{workspace.checkpoint(config)} is not on this machine, nor is its fp16 copy: train the run again, or fetch "
            "its weights."
        )
    return load_model(path).to(choose_device()), "checkpoint" if path == workspace.checkpoint(
        config
    ) else "fp16 copy"


def _check_same_run(known: Run, model: torch.nn.Module, test: data.ImageSet, path: Path) -> None:
    """Whether the test slices and the model's clean answers are those of the record: otherwise attacks on other slices, or
    on another model, would be added to it."""
    digests = [bytes(digest).hex() for digest in known.rows["file_sha256"]]
    if digests != list(test.files):
        raise UserError(
            f"{path} was made with other test slices than these: prepare the data that it was made with."
        )
    clean = training.predict(model, test.images, choose_device()).numpy()
    difference = float(
        np.abs(probabilities(clean) - probabilities(known.rows["clean"].astype(np.float64))).max()
    )
    if not difference <= SAME_WEIGHTS:
        raise UserError(
            f"The weights here are not those of {path}: a clean probability differs by {difference:.3f}, and a copy in "
            f"half precision makes no more than {SAME_WEIGHTS}; fetch the run's own weights."
        )


def _attack_robust_slices(
    known: Run,
    model: torch.nn.Module,
    test: data.ImageSet,
    config: RunConfig,
    eps_text: str,
    view: str,
    budget: dict,
) -> tuple[np.ndarray, dict]:
    """(float16 logits (N, 4) of a new column, what was done) of margin PGD on a run's robust slices at one eps and view."""
    logits, robust = _misclassified_so_far(known, eps_text, view)
    attacked, started = np.flatnonzero(robust), time.perf_counter()
    if len(attacked):
        part = test.pick(attacked)
        pixels, labels, groups = as_pixels(part.images), part.labels.numpy(), VIEWS[view][0]
        viewed = model if groups is None else GroupedClasses(model, groups)
        made = attack_images(
            viewed,
            pixels,
            view_labels(labels, view),
            "pgd",
            parse_eps(eps_text),
            batch=config.attack_batch,
            loss="margin",
            **budget,
        )
        logits[attacked] = wrong_where_not_finite(
            predict_logits(model, made, config.attack_batch).numpy(), labels
        )
    meta = {
        "norm": "linf",
        "kind": "white-box",
        "view": view,
        "scope": "standing",
        "precision": "fp32",
        "loss": "margin",
        **budget,
        "n_attacked": len(attacked),
        "n_set": int(scored(logits).sum()),
        "misclassified": int(
            misclassified(
                logits[attacked], known.rows["labels"][attacked].astype(np.int64), view
            ).sum()
        ),
        "seconds": round(time.perf_counter() - started, 2),
    }
    return to_half(logits), meta


def _misclassified_so_far(known: Run, eps_text: str, view: str) -> tuple[np.ndarray, np.ndarray]:
    """What a run's record holds of its slices at an eps: the logits (N, 4) that first misclassified each in a view, clean or
    under an L-infinity attack of this or a smaller eps, clean ones where none did, NaN for slices that no attack of this eps
    was given; and which of the attacked slices are still robust, bool (N,)."""
    labels, place = known.rows["labels"], ("four", "three").index(view)
    logits = known.rows["clean"].astype(np.float64)
    robust = correct(logits, labels)[place]
    inside = np.zeros(len(labels), bool)
    smaller = sorted(
        (other for other in known.meta["attacks"] if parse_eps(other) <= parse_eps(eps_text)),
        key=parse_eps,
    )
    for other in smaller:
        for name, meta in known.meta["attacks"][other].items():
            if meta["norm"] != "linf":
                continue
            found = known.rows[f"{other}:{name}"].astype(np.float64)
            new = robust & scored(found) & ~correct(found, labels)[place]
            logits[new] = found[new]
            robust &= ~new
            inside |= scored(found) & (other == eps_text)
    logits[~inside] = np.nan
    return logits, robust & inside


def with_more_attacks(known: Run, more: Run) -> Run:
    """A recorded run with the columns and the attacks of `more` added to it, and their seconds."""
    attacks = {**known.meta["attacks"]}
    for eps_text, added in more.meta["attacks"].items():
        attacks[eps_text] = {**attacks.get(eps_text, {}), **added}
    seconds = sum(
        meta["seconds"] for added in more.meta["attacks"].values() for meta in added.values()
    )
    wall = {**known.meta["wall_seconds"], "attack": known.meta["wall_seconds"]["attack"] + seconds}
    return Run(
        {**known.rows, **more.rows}, {**known.meta, "attacks": attacks, "wall_seconds": wall}
    )


def prediction_rows(test: data.ImageSet, config: RunConfig) -> dict[str, np.ndarray]:
    """The columns that say whose image each row of a prediction file is."""
    count = len(test)
    digests = np.frombuffer(bytes.fromhex("".join(test.files)), np.uint8).reshape(count, 32)
    return {
        "labels": test.labels.numpy().astype(np.int8),
        "fold": np.full(count, config.fold, np.int8),
        "seed": np.full(count, config.seed, np.int8),
        "patient_id": test.patients.numpy().astype(np.int32),
        "slice_index": test.slices.numpy().astype(np.int16),
        "file_sha256": digests,
    }


def spread_out(logits: np.ndarray, chosen: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Float16 logits (N, 4) for the predictions file: `logits` on the `chosen` rows, `rest` (N, 4) on the others."""
    full = np.array(rest, dtype=float)
    full[chosen] = logits
    return to_half(full)


def suite_rows(
    test: data.ImageSet,
    config: RunConfig,
    result: SuiteResult,
    chosen: np.ndarray | None = None,
    clean: np.ndarray | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, dict]]:
    """(rows of the predictions file, eps → attack → what it cost) of an evaluated suite.

    Args:
        chosen: which rows of `test` were attacked (None: all); the others are NaN, outside the declared set.
        clean: clean logits of all of `test`, needed where only some were attacked.
    """
    chosen = np.arange(len(test)) if chosen is None else chosen
    clean = np.full((len(test), len(CLASSES)), np.nan) if clean is None else clean
    rows = prediction_rows(test, config) | {"clean": spread_out(result.clean_logits, chosen, clean)}
    rows |= {
        f"{eps}:{name}": spread_out(logits, chosen, np.full_like(clean, np.nan))
        for (eps, name), logits in result.logits.items()
    }
    attacks: dict[str, dict] = {}
    for (eps, name), meta in result.meta.items():
        attacks.setdefault(eps, {})[name] = meta
    return rows, attacks


def describe(workspace: Workspace, config: RunConfig) -> dict:
    """What a record says of how a unit came about."""
    label = search_label(config)
    patients = _fold0_validation_patients(workspace) if label.startswith("fold0") else []
    return {
        "model": config.model,
        "regime": config.regime,
        "protocol": config.protocol,
        "data": workspace.data,
        "profile": config.profile,
        "search": label,
        "search_people": patients,
        "fold": config.fold,
        "seed": config.seed,
        "cohort_sha256": workspace.cohort_sha256,
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "environment": environment(),
        "hardware": hardware(),
        **git_state(),
    }


def _fold0_validation_patients(workspace: Workspace) -> list[int]:
    """The patients whom settings were chosen on, whichever protocol and fold they are used for."""
    return data.load_set(workspace.sets, "patient", 0, "validation").patients.unique().tolist()


#: The attacks whose images are shown, with their budgets; the eps is the headline one, or the L2 and L0 one given.
SHOWN_ATTACKS = {
    "noise": {},
    "fgsm": {},
    "pgd": dict(steps=20),
    "apgd_t": dict(steps=20),
    "kryptonite": dict(steps=20),
    "square": dict(queries=500),
    "pgd_l2": dict(steps=20, eps="0.5"),
    "few_pixel": dict(pixels=5, eps="1"),
}


def show_attacks(workspace: Workspace, config: RunConfig, *, retrain: bool = False) -> Path:
    """Draws what each attack does to one test slice, the same for every model, into `assets/<Model>/attacks_<protocol>.png`.

    A picture that is there already stays, but for that of another run (a rehearsal) whose place fold 0 of this one takes."""
    path = workspace.root / "assets" / config.model / f"attacks_{config.protocol}.png"
    taken = (
        path.is_file()
        and not retrain
        and (config.fold != 0 or recorded(workspace, config) is not None)
    )
    if taken or not workspace.checkpoint(config).is_file():
        return path
    test, model = (
        load_sets(workspace, config)["test"],
        train(workspace, config).load().to(choose_device()),
    )
    few = test.pick(data.spread(test, len(CLASSES)))
    right = (
        (training.predict(model, few.images, choose_device()).argmax(1) == few.labels)
        .nonzero()
        .flatten()
        .tolist()
    )
    one = few.pick(np.array([right[0] if right else 0]))
    clean, shown = data.pixels(one.images), {}
    for name, budget in SHOWN_ATTACKS.items():
        eps = str(budget.get("eps", headline_of(config)))
        made = attack_images(
            model,
            clean,
            one.labels.numpy(),
            name,
            parse_eps(eps),
            seed=config.seed,
            **{key: value for key, value in budget.items() if key != "eps"},
        )
        probability = predict_logits(model, made).softmax(1)[0]
        norm = {"l2": "L2 ", "l0": "5 pixels"}.get(ATTACKS[name].norm, "")
        called = f"{CLASSES[int(probability.argmax())]} {probability.max():.0%}"
        shown[f"{name}, {norm}{'' if norm == '5 pixels' else eps}"] = made[0, 0].numpy(), called
    answer = training.predict(model, one.images, choose_device()).softmax(1)[0]
    title = f"A {CLASSES[int(one.labels[0])]} slice, called {CLASSES[int(answer.argmax())]} ({answer.max():.0%}) before the attack"
    report.save_figure(
        figures.attacked_images_figure(
            clean[0, 0].numpy(), shown, title=title, label=label_of(workspace, config)
        ),
        path,
        dpi=90,
        colours=32,
    )
    return path


def explain(
    workspace: Workspace, config: RunConfig, *, count: int = 4, retrain: bool = False
) -> tuple[Path, dict]:
    """Draws Grad-CAM of a few test slices into `assets/<Model>/grad_cam_<protocol>.png` and measures the maps.

    The slices are the same for every model: one of each class, the middle of the stack. Returns (figure, figures of merit).
    """
    figure_path = workspace.root / "assets" / config.model / f"grad_cam_{config.protocol}.png"
    numbers_path = workspace.checkpoint(config).with_suffix("") / "explanation.json"
    known = None if retrain else recorded(workspace, config)
    drawn = figure_path.is_file() or config.fold != 0  # the slices shown are fold 0's
    if drawn and (known is not None or numbers_path.is_file() and not retrain):
        return figure_path, known.meta["explanation"] if known is not None else read_json(
            numbers_path
        )
    if not workspace.checkpoint(config).is_file():
        return figure_path, known.meta["explanation"] if known is not None else {}
    test, model = (
        load_sets(workspace, config)["test"],
        train(workspace, config).load().to(choose_device()),
    )
    figure_path.parent.mkdir(parents=True, exist_ok=True)
    sample = config.for_explanations().sample
    few, more = (test.pick(data.spread(test, size)) for size in (count, sample))
    few = few.pick(few.labels.argsort(stable=True))
    images, probabilities = (
        data.pixels(few.images, choose_device()),
        training.predict(model, few.images, choose_device()).softmax(1),
    )
    maps = grad_cam.explain(model, images)
    dear = range(
        min(len(more), max(2, sample // 4))
    )  # slices for the measures that need many passes each
    pixels, shown = (
        data.pixels(more.images),
        config.eps if config.suite != "quick" else (headline_of(config),),
    )
    attacked = {
        eps: attack_images(
            model,
            pixels,
            more.labels.numpy(),
            "pgd",
            parse_eps(eps),
            steps=config.pgd_steps,
            seed=config.seed,
        )
        for eps in shown
    }
    measures = grad_cam.explanation_measures(
        model,
        pixels.to(choose_device()),
        methods=("gradcam",),
        sample=dear,
        adversarial={eps: images.to(choose_device()) for eps, images in attacked.items()},
    )
    numbers = grad_cam.explanation_record(measures, more.labels.numpy(), more.patients.numpy())
    if config.fold == 0:  # the figures show one model on the same slices, whichever folds follow
        figure = grad_cam.overlay_figure(
            images, maps, probabilities, few.labels, title=label_of(workspace, config)
        )
        report.save_figure(figure, figure_path, dpi=100, colours=192)
        _keep_explained(
            few,
            maps,
            probabilities,
            report.explained_path(workspace.record(config.model, config.protocol)),
        )
    if config.suite != "quick" and config.fold == 0:
        _through_a_patient(
            test,
            model,
            figure_path.with_name(f"person_{config.protocol}"),
            label_of(workspace, config),
        )
    write_json(numbers_path, numbers)
    return figure_path, numbers


def _keep_explained(
    few: data.ImageSet, maps: torch.Tensor, probabilities: torch.Tensor, path: Path
) -> None:
    """The few slices that the comparison of all models shows, with this model's maps, 8 bits each."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            images=few.images[:, 0].numpy(),
            maps=(255 * maps.cpu()).round().byte().numpy(),
            probabilities=probabilities.cpu().numpy(),
            labels=few.labels.numpy(),
            files=np.array(few.files),
        )


def _through_a_patient(test: data.ImageSet, model: torch.nn.Module, path: Path, label: str) -> None:
    """Grad-CAM over the slices of one test person, the first with the gravest rating of more than a few people, as a strip
    and as a GIF at `path`.png and .gif."""
    patient = int(test.patients[test.labels == min(2, int(test.labels.max()))].min())
    own = test.pick(np.flatnonzero(test.patients.numpy() == patient))
    own = own.pick(own.slices.argsort())
    images = data.pixels(own.images, choose_device())
    maps, probabilities = (
        grad_cam.explain(model, images),
        training.predict(model, own.images, choose_device()).softmax(1),
    )
    report.save_figure(
        grad_cam.patient_strip(images, maps, probabilities, int(own.labels[0]), title=label),
        path.with_suffix(".png"),
        dpi=90,
        colours=192,
    )
    grad_cam.patient_gif(images, maps, path.with_suffix(".gif"), side=128)


def label_of(workspace: Workspace, config: RunConfig) -> str:
    return (
        f"{config.model} · {config.protocol} · data: {workspace.data} · profile: {config.profile}"
    )


# ------------------------------------------------------------------------------------------------------------- record


def recorded(workspace: Workspace, config: RunConfig) -> Run | None:
    """The unit as its record holds it; None where no record does. Other training settings than `config`'s are an error."""
    found = recorded_as(workspace, config.model, config)
    if found is not None:
        _check_recorded(
            found.meta["config"], config, workspace.record(config.model, config.protocol)
        )
    return found


def recorded_as(workspace: Workspace, model: str, config: RunConfig) -> Run | None:
    """What the record of `model` (one of them, Ensemble or Sequence) holds of this fold and seed at this profile and of this
    cohort; None where it holds nothing."""
    return _held(
        workspace,
        {
            "model": model,
            "protocol": config.protocol,
            "fold": config.fold,
            "seed": config.seed,
            "profile": config.profile,
            "cohort_sha256": workspace.cohort_sha256,
        },
    )


def _held(workspace: Workspace, wanted: dict) -> Run | None:
    """The unit of a record whose model, protocol, fold, seed, profile and cohort are those of `wanted`."""
    path = workspace.record(wanted["model"], wanted["protocol"])
    for meta in report.read_record(path)["units"] if path.is_file() else ():
        if all(meta[key] == wanted[key] for key in ("fold", "seed", "profile", "cohort_sha256")):
            return Run(rows_of(report.read_predictions(path), [meta]), meta)
    return None


def _check_recorded(found: dict, config: RunConfig, path: Path) -> None:
    """A record of other training settings is an error, not a match; settings that a search chose are its own affair."""
    different = training.different_settings(
        found, config, optuna_search.SPACE if config.trials else ()
    )
    if different:
        raise UserError(
            f"{path} holds {config.run_name} trained with {'; '.join(different[:4])}: run with these settings, or with retrain "
            "to replace it."
        )


def save(workspace: Workspace, run: Run, grow: Callable[[Run, Run], Run] | None = None) -> dict:
    """Adds a unit's rows to its record and returns the record, recomputed.

    A lock lets the shards of a grid finish at the same time.

    Args:
        grow: makes one unit of what the record holds of it already and of this one (None: this one replaces it).
    """
    meta = run.meta
    path = workspace.record(meta["model"], meta["protocol"])
    lock = workspace.root / "checkpoints" / meta["model"] / f"{meta['protocol']}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        runs, rows = [], {}
        if path.is_file():
            old = report.read_record(path)
            if meta in old["units"]:
                return old  # shown from the record, not run again
            if grow is not None and (known := _held(workspace, meta)) is not None:
                run = grow(known, run)
                meta = run.meta
            runs = [
                known
                for known in old["units"]
                if known["profile"] == meta["profile"]
                and known["cohort_sha256"] == meta["cohort_sha256"]
                and (known["fold"], known["seed"]) != (meta["fold"], meta["seed"])
            ]
            rows = rows_of(report.read_predictions(path), runs)
        rows = _pool(rows, run.rows)
        runs = sorted([*runs, meta], key=lambda known: (known["seed"], known["fold"]))
        record = report.summarise(rows, runs)
        report.write_record(path, record, rows)
    return record


def rows_of(rows: dict[str, np.ndarray], runs: list[dict]) -> dict[str, np.ndarray]:
    """The rows of these units alone."""
    kept = np.zeros(len(rows["labels"]), bool)
    for meta in runs:
        kept |= (rows["fold"] == meta["fold"]) & (rows["seed"] == meta["seed"])
    return {name: values[kept] for name, values in rows.items()}


def _pool(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows of both; an attack that only one of them ran is NaN (outside its declared set) in the other's rows."""
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


def run_stages(workspace: Workspace, config: RunConfig, *, retrain: bool = False) -> dict:
    """Search, train, attack, explain, save; returns the record. A unit that a record holds is not run again."""
    if not retrain and recorded(workspace, config) is not None:
        return report.read_record(workspace.record(config.model, config.protocol))
    config = search(workspace, config)
    fit = train(workspace, config, retrain=retrain)
    print(f"{config.model} {config.protocol} {config.run_name}: {fit}")
    if int(os.environ.get("RANK", 0)):
        return {}  # several processes share a training; one of them attacks, explains and writes the record
    run = attack(workspace, config, retrain=retrain)
    show_attacks(workspace, config, retrain=retrain)
    run.meta["explanation"] = explain(workspace, config, retrain=retrain)[1]
    return save(workspace, run)


def _remove_tree(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def with_explanation(run: Run, numbers: dict) -> Run:
    return dataclasses.replace(run, meta={**run.meta, "explanation": numbers})


def results_root(profile: str, raw: str | Path | None = None) -> Path:
    """Where a profile's records lie, without touching the data: those of this machine's data, or of the phantom; where there are
    none, the repository itself if it holds some of this profile."""
    root = result_root(profile, "real" if find_raw(raw or None) else "phantom")
    return root if report.read_entries(root) or not _holds_records(profile) else ROOT


# ------------------------------------------------------------------------------------------- what a notebook prints


def balance_text(workspace: Workspace, runs: list[RunConfig]) -> str:
    """People and slices of each set of the first unit of each protocol."""
    first = {run.protocol: run for run in reversed(runs)}
    return _balance_table(
        {
            f"{protocol} {config.run_name} {name}": balance
            for protocol, config in first.items()
            for name, balance in _balances(workspace, config).items()
        }
    )


def _balances(workspace: Workspace, config: RunConfig) -> dict[str, dict[str, tuple[int, int]]]:
    """Set → class → (people, slices), from the prepared sets, or from the committed tables where there are no images."""
    if workspace.raw is not None:
        return {name: part.balance() for name, part in load_sets(workspace, config).items()}
    table, folds = read_cohort(COMMITTED_COHORT), data.read_folds(data.COMMITTED_FOLDS)
    rows = (
        data.split_slices(table)
        if config.protocol == "slice"
        else data.split_patients(table, folds, config.fold)
    )
    return {
        name: data.balance(table.label[own], table.patient_id[own]) for name, own in rows.items()
    }


def _balance_table(balances: dict[str, dict[str, tuple[int, int]]]) -> str:
    lines = [f"{'':<32}" + "".join(f"{name:>20}" for name in CLASSES)]
    for title, balance in balances.items():
        lines.append(
            f"{title:<32}"
            + "".join(
                f"{f'{patients} people, {slices:,}':>20}" for patients, slices in balance.values()
            )
        )
    return "\n".join(lines)


def protocols_text(workspace: Workspace) -> str:
    """People and slices of each set of both protocols, all folds, by class."""
    return _balance_table(
        {
            f"{protocol}{f' fold {fold}' if folds > 1 else ''} {name}": data.load_set(
                workspace.sets, protocol, fold, name
            ).balance()
            for protocol, folds in (("slice", 1), ("patient", data.N_FOLDS))
            for fold in range(folds)
            for name in data.SETS
        }
    )


def cohort_text(table: Cohort) -> str:
    """Images by kind and class, and people by class."""
    patients, label = data.patients_of(table)
    lines = [f"{'':<12}" + "".join(f"{name:>12}" for name in (*CLASSES, "all"))]
    for kind in ("real", "duplicate", "synthetic"):
        counts = np.bincount(table.label[table.kind == kind], minlength=4)
        lines.append(f"{kind:<12}" + "".join(f"{count:>12,}" for count in (*counts, counts.sum())))
    counts = np.bincount(label, minlength=4)
    return "\n".join(
        [*lines, f"{'people':<12}" + "".join(f"{count:>12,}" for count in (*counts, counts.sum()))]
    )


def example_images(
    workspace: Workspace, table: Cohort, columns: int = 8
) -> tuple[list[np.ndarray], list[str], int]:
    """(images, titles, columns): slices of the first person of each class from the top of the head down, then synthetic ones."""
    folders = [data.load_set(workspace.sets, "slice", 0, name) for name in data.SETS]
    image_of = {
        file: image
        for part in folders
        for file, image in zip(part.files, part.images[:, 0].numpy())
    }
    images, titles = [], []
    patients, label = data.patients_of(table)
    for value in np.unique(label):
        patient = patients[label == value][0]
        rows = np.flatnonzero((table.patient_id == patient) & (table.kind == "real"))
        rows = rows[np.argsort(table.slice_index[rows])]
        for row in rows[np.linspace(0, len(rows) - 1, columns).round().astype(int)]:
            images.append(image_of[table.file_sha256[row]])
            titles.append(f"{CLASSES[value]} · slice {table.slice_index[row]}")
    for row in np.flatnonzero(table.kind == "synthetic")[
        :: max(1, (table.kind == "synthetic").sum() // columns)
    ][:columns]:
        images.append(image_of[table.file_sha256[row]])
        titles.append(f"{CLASSES[table.label[row]]} · synthetic")
    return images, titles, columns


def _searches(
    workspace: Workspace, runs: list[RunConfig]
) -> list[tuple[RunConfig, optuna.Study]]:
    """Every search that these units rest on and this machine holds; as in `search`, only `paper` searches inside every fold."""
    configs = [
        run if run.profile == "paper" else dataclasses.replace(run, fold=0)
        for run in runs
        if run.trials
    ]
    distinct = {
        optuna_search.search_paths(workspace.optuna(config.model), config): config
        for config in configs
    }
    found = [
        (config, optuna_search.known_search(workspace.optuna(config.model), config))
        for config in distinct.values()
    ]
    return [(config, known) for config, known in found if known is not None]


def search_text(workspace: Workspace, runs: list[RunConfig]) -> str:
    """The trials of every search that these units rest on, best first."""
    texts = [
        f"{config.protocol} fold {config.fold} ({search_label(config)})\n{optuna_search.trials_table(known)}"
        for config, known in _searches(workspace, runs)
    ]
    return (
        "\n\n".join(texts)
        or f"no search in profile {workspace.profile}, or its trials are on another machine"
    )


def search_figures(workspace: Workspace, runs: list[RunConfig]) -> list[Figure]:
    """History and importances of every search that these units rest on; empty where there is none on this machine."""
    return [optuna_search.search_figures(known) for _, known in _searches(workspace, runs)]


def defaults_text(model: str, data: str | None = None, root: Path = ROOT) -> str:
    """The committed study of a model's training defaults (tests/benchmarks/defaults.py) as a table, in the order it was run.

    With `data` ("real" or "phantom") a study of other data is named and not shown: no notebook mixes the two.
    """
    path = Path(root) / "assets" / model / "defaults.json"
    if not path.is_file():
        return f"No study of training defaults was run for {model}."
    workspace = read_json(path)
    if data not in (None, workspace["data"]):
        return (
            f"The training defaults were chosen on the {workspace['data']} cohort (assets/{model}/defaults.json); this run is on "
            f"{data} data."
        )
    finished = [row for row in workspace["rows"].values() if "best" in row]
    present = {name: size for name, size in workspace["validation"].items() if size[1]}
    size = f"{workspace['input_size']} px" if workspace["input_size"] else "at native size"
    machines = dict.fromkeys(
        f"{row.get('hardware', workspace['hardware'])}, threads: {row.get('threads', workspace['threads'])}"
        for row in workspace["rows"].values()
    )
    lines = [
        f"{model} · protocol {workspace['protocol']}, fold {workspace['fold']} · data: {workspace['data']} · profile: {workspace['profile']} · "
        f"input {size} · init {', '.join(sorted({row['init'] for row in finished})) or 'unknown'} · {'; '.join(machines)}",
        f"validation people only, no test image was read: n = {sum(patients for patients, _ in present.values())} people, "
        f"{workspace['n_validation']:,} slices; bal.acc.: balanced accuracy over the {len(present)} classes present "
        f"({', '.join(present)}), loss: cross-entropy averaged over them (nats)",
    ]
    attacked = any("adversarial_validation_loss" in row["best"] for row in finished)
    if attacked:
        eps = max(row["last"]["train_eps"] for row in finished)
        lines.append(
            f"attacked: bal.acc. under PGD of {training.VALIDATION_STEPS} steps at eps {255 * eps:g}/255, on "
            + (
                f"one in {workspace['slice_stride']} slices of each person"
                if "slice_stride" in workspace
                else "a part of each person's slices"
            )
        )
    scores = {"bal.acc.": "validation_balanced_accuracy", "loss": "validation_loss"}
    if attacked:
        scores |= {
            "attacked": "adversarial_validation_balanced_accuracy",
            "attacked loss": "adversarial_validation_loss",
        }
    wide = max(map(len, workspace["rows"]))
    lines += ["", f"{'':<{wide}}  best epoch  " + "  ".join(scores) + "  seconds"]
    for name, row in workspace["rows"].items():
        if "failed" in row:
            lines.append(f"{name:<{wide}}  failed: {row['failed']}")
            continue
        cells = "  ".join(f"{row['best'][key]:>{len(title)}.3f}" for title, key in scores.items())
        epoch = f"{row['best_epoch']} of {workspace['epochs']}"
        lines.append(
            f"{name:<{wide}}  {epoch:>10}  {cells}  {row['seconds']:>7,.0f}"
            + ("  ANSWERED ONE CLASS" if row["one_class"] else "")
        )
    return "\n".join(lines)


def sanity_text(run: Run) -> str:
    """The sanity checks of one evaluation with their verdicts."""
    return "\n".join(
        f"{'ok' if check['passed'] else 'LOOK':>4}  {check['check']:<28} {check['note']}"
        for check in run.meta["sanity"]
    )


# -------------------------------------------------------------------------------------------------------- command line


def prepare(raw: str | None = None, profile: Literal["demo", "cpu", "paper"] = "demo") -> None:
    """Writes the tensors of both protocols."""
    open_workspace(profile, raw)


@dataclass(frozen=True)
class RunCommand:
    """Runs one unit. The defaults shown are those of the `--profile`, `--model` and `--protocol` that stand on the command line."""

    config: tyro.conf.OmitArgPrefixes[RunConfig]
    raw: str | None = None
    """Folder or zip of the raw data (default: found as README says, or the phantom)."""
    retrain: bool = False
    """Replace a checkpoint and a record's unit of the same name."""


def run_command(arguments: list[str]) -> None:
    """Runs one unit: parses `RunCommand` with the defaults of its own profile, model and protocol."""
    import argparse

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
    if record := run_stages(workspace, command.config, retrain=command.retrain):
        print(report.results_text([record]))


def train_command(
    model: str,
    protocol: Literal["slice", "patient"] = "patient",
    fold: int = 0,
    profile: Literal["demo", "cpu", "paper"] = "cpu",
    raw: str | None = None,
) -> None:
    """Trains a model, or goes on, and leaves its weights under checkpoints/: evaluates nothing and changes no record. For the
    weights of a unit that a record holds already."""
    workspace = open_workspace(profile, raw)
    config = search(workspace, make_config(profile, model, protocol=protocol, fold=fold))
    print(f"{model} {protocol} {config.run_name}: {_fit(workspace, config)}")


def grid(
    profile: Literal["demo", "cpu", "paper"] = "cpu",
    raw: str | None = None,
    shard: str = "1/1",
    models: tuple[str, ...] = GRID_MODELS,
    protocols: tuple[str, ...] = ("patient", "slice"),
    seeds: tuple[int, ...] = (0,),
) -> None:
    """Runs every unit of the grid that no record holds yet; `--shard i/n` takes every n-th, starting from the i-th."""
    workspace = open_workspace(profile, raw)
    for config in shard_of(grid_runs(profile, models, protocols, seeds), shard):
        if recorded(workspace, config) is not None:
            print(
                f"{config.model} {config.protocol} {config.run_name}: stands in the record already."
            )
            continue
        run_stages(workspace, config)


def grid_runs(
    profile: str, models: tuple[str, ...], protocols: tuple[str, ...], seeds: tuple[int, ...]
) -> list[RunConfig]:
    """All units, most valuable first: protocol, then model, then fold."""
    return [
        make_config(profile, model, protocol=protocol, fold=fold, seed=seed)
        for seed in seeds
        for protocol in protocols
        for model in models
        for fold in folds_of(profile, protocol)
    ]


def shard_of(runs: list[RunConfig], shard: str) -> list[RunConfig]:
    """The i-th of n shares of the units, `shard` = "i/n" counted from 1."""
    index, _, count = shard.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise UserError(f"--shard {shard!r} is not of the form i/n with 1 ≤ i ≤ n, as 3/8.")
    return runs[int(index) - 1 :: int(count)]


def search_command(
    model: str,
    protocol: Literal["slice", "patient"] = "patient",
    fold: int = 0,
    profile: Literal["demo", "cpu", "paper"] = "paper",
    trials: int = 40,
    storage: str | None = None,
    enqueue: int = 0,
    raw: str | None = None,
) -> None:
    """Searches a model's settings; start it several times for several workers. A killed worker is simply started again.

    Args:
        trials: of a search on this machine, kept in SQLite under checkpoints/optuna/.
        storage: URL of a study that several machines share, as postgresql://user:password@host/database.
        enqueue: put so many trials into the shared study and end; do this once, before the workers start.
    """
    workspace = open_workspace(profile, raw)
    config = make_config(profile, model, protocol=protocol, fold=fold, trials=trials)
    if enqueue:
        optuna_search.enqueue(
            optuna_search.open_search(workspace.optuna(model), config, storage), enqueue
        )
        print(f"{enqueue} trials of {model}, {protocol} fold {fold}, are enqueued.")
        return
    sets = load_sets(workspace, config)
    done = optuna_search.search(
        sets["train"],
        sets["validation"],
        config,
        workspace.optuna(model),
        choose_device(),
        storage=storage,
        start=start_of(workspace, config),
    )
    print(optuna_search.trials_table(done))


def export(
    model: str,
    protocol: Literal["slice", "patient"] = "patient",
    fold: int = 0,
    profile: Literal["cpu", "paper"] = "cpu",
) -> None:
    """Writes a trained unit's weights beside its checkpoint as `<unit>_fp16.safetensors`, the one kind that git keeps."""
    workspace = open_workspace(profile)
    path = workspace.checkpoint(make_config(profile, model, protocol=protocol, fold=fold))
    half = half_of(path)
    save_half(path, half)
    print(f"{half.relative_to(workspace.root).as_posix()}: {half.stat().st_size / 1e6:.1f} MB")


def attack_command(
    model: str,
    protocol: Literal["slice", "patient"] = "patient",
    fold: int = 0,
    eps: tuple[str, ...] = ("4/255",),
    profile: Literal["demo", "cpu", "paper"] = "demo",
    suite: Literal["quick", "standard", "full"] = "standard",
    raw: str | None = None,
) -> None:
    """Attacks a trained model and prints the table and the checks that say whether to believe it.

    Args:
        model: a model of this study, from its checkpoint; or your own as `module:function`, a function that returns a
            `torch.nn.Module` from float32 pixels (N, 1, H, W) in [0, 1] to four logits, evaluated on every image of `raw`.
        raw: folder or zip of class folders.
    """
    if ":" in model:
        test, network = _everything_in(raw), model_from_factory(model)
        config = make_config(profile, "Resnet", eps=eps, headline_eps=eps[0], suite=suite)
        origin = {
            "model": model,
            "protocol": "all images",
            "data": "your images",
            "init": "yours",
            "search": "none",
            "cohort_sha256": "",
        }
    elif model in MODELS:
        workspace = open_workspace(profile, raw)
        config = make_config(
            profile, model, protocol=protocol, fold=fold, eps=eps, headline_eps=eps[0], suite=suite
        )
        test, network = (
            load_sets(workspace, config)["test"],
            load_model(workspace.weights(config) or workspace.checkpoint(config)),
        )
        origin = {
            "model": model,
            "protocol": protocol,
            "data": workspace.data,
            "init": network.init,
            "search": "none",
            "cohort_sha256": workspace.cohort_sha256,
        }
    else:
        raise UserError(
            f"Unknown model {model!r}: expected one of {', '.join(MODELS)}, or your own as module:function."
        )
    result = evaluate_suite(
        network.to(choose_device()), test.images, test.labels, test.patients, config
    )
    rows, attacks = suite_rows(test, config, result)
    meta = {
        **origin,
        "regime": config.regime,
        "profile": profile,
        "fold": config.fold,
        "seed": config.seed,
        "attacks": attacks,
        "sanity": result.sanity,
        "config": dataclasses.asdict(config),
    }
    print(report.attacks_text(report.summarise(rows, [meta])))
    print(f"{sanity_text(Run(rows, meta))}\n\n{verdict(result.sanity)}")


def attack_again_command(
    model: str,
    protocol: Literal["slice", "patient"] = "patient",
    fold: int = 0,
    seed: int = 0,
    eps: tuple[str, ...] = ("0.5/255", "1/255"),
    steps: int = 100,
    restarts: int = 2,
    attack_seed: int = 1,
    profile: Literal["demo", "cpu", "paper"] = "cpu",
    raw: str | None = None,
) -> None:
    """Attacks what a recorded run still holds robust, by PGD with more steps, and adds the result to its record.

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
    save(workspace, again, grow=with_more_attacks)
    for eps_text, attacks in again.meta["attacks"].items():
        for name, meta in attacks.items():
            print(
                f"{model} {protocol} {config.run_name}, {name} at {eps_text} ({meta['weights']}): {meta['misclassified']} of "
                f"{meta['n_attacked']} robust slices misclassified, {meta['n_set']} slices in all"
            )


def _everything_in(raw: str | None) -> data.ImageSet:
    """Every image of a folder as one set; nobody's person is known, so each image stands for itself in the intervals."""
    folder = find_raw(raw)
    if folder is None:
        raise UserError(
            "Your own model needs images: give a folder or zip of class folders with --raw."
        )
    images = read_raw(folder)
    nobody = torch.arange(len(images))
    return data.ImageSet(
        data.stack_images(images),
        torch.from_numpy(images.label),
        nobody,
        torch.zeros_like(nobody),
        list(images.file_sha256),
        "your images",
    )


def main() -> None:
    commands = {
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


if __name__ == "__main__":
    main()
