"""The attack stage of a run: trained model and sets in, rows of the predictions file and metadata
out."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from utils import data, grad_cam, training
from utils.attacks.base import Precision
from utils.config import RunConfig
from utils.evaluation.measures import sample_measures
from utils.evaluation.plan import Stage, firmness_plan, other_norms_plan, suite_plan
from utils.evaluation.suite import SuiteResult, evaluate_suite
from utils.metrics.calibration import fit_temperature
from utils.metrics.scores import scored, to_half
from utils.pipeline.store import RunResult, keep_json
from utils.pipeline.workspace import Workspace
from utils.utils_funcs import CLASSES, choose_device, environment, git_state, hardware


def attack(
    model: nn.Module,
    fit: training.Fit,
    sets: Mapping[str, data.ImageSet],
    config: RunConfig,
    *,
    sources: Mapping[str, nn.Module],
    state: Path,
) -> RunResult:
    """Test predictions of a trained model, clean and under every attack of its suite.

    Args:
        model: on the device, in eval mode.
        fit: its training, whose course the metadata keep.
        sources: other models of the same protocol, fold and seed, which transfer attacks are made
            on.
        state: folder from which a stopped evaluation continues.
    """
    test, start = sets["test"], time.perf_counter()
    chosen = data.every_nth(test, config.attack_stride)
    attacked = test.pick(chosen)
    masks, stages = attack_plan(model, attacked, config, sources)
    result = evaluate_suite(
        model,
        attacked.images,
        attacked.labels,
        attacked.patients,
        config,
        state_dir=state,
        stages=stages,
        sources=dict(sources),
        masks=masks,
        precision=cast(Precision, fit.precision) if config.attack_as_trained else "fp32",
    )
    clean = training.predict(model, test.images, choose_device()).numpy()
    rows, attacks = suite_rows(test, config, result, chosen, clean)
    measures = {}
    if config.suite != "quick":
        measures = keep_json(
            state / "measures.json",
            lambda: sample_measures(
                model,
                attacked.images,
                attacked.labels.numpy(),
                attacked.patients.numpy(),
                config.for_explanations(),
            ),
        )
        measures |= {"rows": chosen[measures["rows"]].tolist()}
    # A continued evaluation took longer than this process worked on it.
    seconds = max(
        time.perf_counter() - start, sum(meta["seconds"] for meta in result.meta.values())
    )
    validation = training.predict(model, sets["validation"].images, choose_device()).numpy()
    meta = {
        "init": fit.init,
        "precision": fit.precision,
        "wall_seconds": {"train": fit.seconds, "attack": seconds},
        "attacks": attacks,
        "sanity": result.sanity,
        "temperature": fit_temperature(validation, sets["validation"].labels.numpy()),
        "measures": measures,
        "history": fit.history,
        "best_epoch": fit.best_epoch,
        "one_class": fit.one_class,
    }
    return by_part(RunResult(rows, meta), test) if test.parts else RunResult(rows, meta)


def by_part(result: RunResult, test: data.ImageSet) -> RunResult:
    """The same result with each part of its test set as a variant, whose logits are NaN on the rows
    of other parts."""
    whose = [name for name in result.rows if result.rows[name].ndim == 2 and name != "file_sha256"]
    rows = {name: column for name, column in result.rows.items() if name not in whose}
    variants: dict[str, dict] = {}
    for part in dict.fromkeys(test.parts):
        inside = np.array(test.parts) == part
        for name in whose:
            rows[f"{part}/{name}"] = np.where(inside[:, None], result.rows[name], np.nan).astype(
                result.rows[name].dtype
            )
        # Costs are of the whole set, and their numbers of images too.
        variants[part] = {
            "attacks": {
                eps: {
                    name: {key: value for key, value in meta.items() if key != "n_attacked"}
                    | {"n_set": int((inside & scored(result.rows[f"{eps}:{name}"])).sum())}
                    for name, meta in attacks.items()
                }
                for eps, attacks in result.meta["attacks"].items()
            }
        }
    return RunResult(rows, result.meta | {"variants": variants})


def attack_plan(
    model: nn.Module,
    attacked: data.ImageSet,
    config: RunConfig,
    sources: Mapping[str, nn.Module],
) -> tuple[dict[str, Tensor], list[Stage]]:
    """(regions for Kryptonite, stages) of a run's evaluation.

    The region is the fifth of each image that Grad-CAM of the clean image marks most.
    """
    if attacked.parts:
        return {}, firmness_plan(config)
    if config.suite == "quick":
        return {}, suite_plan(config)
    maps = grad_cam.explain(model, data.pixels(attacked.images, choose_device())).flatten(1)
    marked = maps >= maps.quantile(0.8, dim=1, keepdim=True)
    region = marked.float().view(attacked.images.shape).cpu()
    stages = suite_plan(config, tuple(sources), ("gradcam",))
    if config.suite == "full":
        stages += other_norms_plan(config)
    return {"gradcam": region}, stages


# --- Rows of the predictions file ---------------------------------------------------------------


def prediction_rows(test: data.ImageSet, config: RunConfig) -> dict[str, np.ndarray]:
    """The columns that say which image each row of a predictions file is."""
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
    """Float16 logits (N, 4) for the predictions file: `logits` on the `chosen` rows, `rest` (N, 4)
    on the others."""
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
    """(columns of the predictions file, eps → attack → what was done) of an evaluated suite.

    Args:
        chosen: which rows of `test` were attacked (None: all); the others are NaN, which means
            outside the declared set.
        clean: clean logits (N, 4) of all of `test`, needed where only some were attacked.
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


# --- How a run came about -----------------------------------------------------------------------


def describe(workspace: Workspace, config: RunConfig) -> dict:
    """What a record says of how a run came about."""
    label = search_label(config)
    patients = fold0_validation_patients(workspace) if label.startswith("fold0") else []
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


def search_label(config: RunConfig) -> str:
    """How the settings were chosen.

    Returns:
        `inside`: searched within the fold; `fold0`: searched on fold 0; `fold0 recipes` (profile
        `cpu`): set by hand after looking at fold 0's validation patients, as
        assets/<Model>/defaults.json shows; `none`. Where fold 0's validation patients took part,
        the record also gives the score without them.
    """
    if not config.trials:
        return "fold0 recipes" if config.profile == "cpu" else "none"
    return "inside" if config.profile == "paper" or config.protocol == "slice" else "fold0"


def fold0_validation_patients(workspace: Workspace) -> list[int]:
    """The patients whom settings were chosen on, whichever protocol and fold they are used for."""
    patients = data.load_set(workspace.sets, "patient", 0, "validation").patients
    return torch.unique(patients).tolist()
