"""A recorded run attacked again with more steps."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from utils import data, training
from utils.attacks.base import GroupedClasses
from utils.backbones import load_model
from utils.config import RunConfig, parse_eps
from utils.evaluation.measures import attack_images
from utils.evaluation.plan import VIEWS
from utils.evaluation.predictions import (
    as_pixels,
    misclassified,
    view_labels,
    wrong_where_not_finite,
)
from utils.metrics.scores import correct, probabilities, scored, to_half
from utils.pipeline.store import RunResult, find_run
from utils.pipeline.workspace import Workspace, load_sets
from utils.prediction import predict
from utils.utils_funcs import (
    UserError,
    choose_device,
    git_state,
)

#: Largest difference of two probabilities that a copy of the weights in half precision may make
#: (measured: 0.0016).
SAME_WEIGHTS = 0.02


def attack_again(
    workspace: Workspace,
    config: RunConfig,
    eps: tuple[str, ...],
    *,
    steps: int = 100,
    restarts: int = 2,
    attack_seed: int = 1,
) -> RunResult:
    """Attacks the slices that a run's record still holds robust, by margin PGD of a larger budget,
    in the views of four and of three classes.

    Returns the run with one more column an eps and view, `"<eps>:pgd<steps>_again"` and
    `"…_merged"` (`_again_seed<s>` for another attack seed than 1), and in its metadata what these
    attacks did, and nothing else. Slices that were not attacked carry the recorded logits that
    misclassified them; slices outside the recorded attacks' set are NaN.

    Args:
        eps: budgets that the record holds, as written there.
        attack_seed: of the starting points; another one than the recorded attacks had.

    Raises:
        UserError: no such run, eps or weights, the weights are not those of the record, or it holds
            this attack already.
    """
    known = find_run(workspace, config.model, config)
    path = workspace.record(config.model, config.protocol)
    if known is None:
        raise UserError(
            f"{path} holds no {config.run_name} of profile {config.profile} and this cohort: run "
            "it first."
        )
    if missing := [name for name in eps if name not in known.meta["attacks"]]:
        raise UserError(
            f"{path} holds no attacks at eps {', '.join(missing)}: give some of "
            f"{', '.join(known.meta['attacks'])}."
        )
    again = f"pgd{steps}_again" + (f"_seed{attack_seed}" if attack_seed != 1 else "")
    if done := [name for name in eps if again in known.meta["attacks"][name]]:
        raise UserError(
            f"{path} holds {again} at eps {', '.join(done)} already: give other steps or another "
            "attack seed."
        )
    test, (model, weights) = (
        load_sets(workspace, config)["test"],
        _recorded_model(workspace, config),
    )
    _check_same_run(known, model, test, path)
    budget = {"steps": steps, "restarts": restarts, "seed": attack_seed}
    rows: dict[str, np.ndarray] = {}
    attacks: dict[str, dict] = {}
    for eps_text in eps:
        for view in ("four", "three"):
            name = again + VIEWS[view][1]
            logits, meta = _attack_robust_slices(known, model, test, config, eps_text, view, budget)
            rows[f"{eps_text}:{name}"] = logits
            attacks.setdefault(eps_text, {})[name] = {**meta, "weights": weights, **git_state()}
    return RunResult({**known.rows, **rows}, {**known.meta, "attacks": attacks})


def _recorded_model(workspace: Workspace, config: RunConfig) -> tuple[torch.nn.Module, str]:
    """A run's trained model and which of its weights these are: `checkpoint` or `fp16 copy`."""
    path = workspace.weights(config)
    if path is None:
        raise UserError(
            f"{workspace.checkpoint(config)} is not on this machine, nor is its fp16 copy: train "
            "the run again, or fetch "
            "its weights."
        )
    return load_model(path).to(choose_device()), "checkpoint" if path == workspace.checkpoint(
        config
    ) else "fp16 copy"


def _check_same_run(
    known: RunResult, model: torch.nn.Module, test: data.ImageSet, path: Path
) -> None:
    """Whether the test slices and the model's clean answers are those of the record: otherwise
    attacks on other slices, or on another model, would be added to it."""
    digests = [bytes(digest).hex() for digest in known.rows["file_sha256"]]
    if digests != list(test.files):
        raise UserError(
            f"{path} was made with other test slices than these: prepare the data that it was "
            "made with."
        )
    clean = training.predict(model, test.images, choose_device()).numpy()
    difference = float(
        np.abs(probabilities(clean) - probabilities(known.rows["clean"].astype(np.float64))).max()
    )
    if not difference <= SAME_WEIGHTS:
        raise UserError(
            f"The weights here are not those of {path}: a clean probability differs by "
            f"{difference:.3f}, and a copy in "
            f"half precision makes no more than {SAME_WEIGHTS}; fetch the run's own weights."
        )


def _attack_robust_slices(
    known: RunResult,
    model: torch.nn.Module,
    test: data.ImageSet,
    config: RunConfig,
    eps_text: str,
    view: str,
    budget: dict,
) -> tuple[np.ndarray, dict]:
    """(float16 logits (N, 4) of a new column, what was done) of margin PGD on a run's robust slices
    at one eps and view."""
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
            predict(model, made, batch_size=config.attack_batch).numpy(), labels
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


def _misclassified_so_far(
    known: RunResult, eps_text: str, view: str
) -> tuple[np.ndarray, np.ndarray]:
    """What a run's record holds of its slices at an eps: the logits (N, 4) that first misclassified
    each in a view, clean or under an L-infinity attack of this or a smaller eps, clean ones where
    none did, NaN for slices that no attack of this eps was given; and which of the attacked slices
    are still robust, bool (N,)."""
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


def with_more_attacks(known: RunResult, more: RunResult) -> RunResult:
    """A recorded run with the columns and the attacks of `more` added to it, and their seconds."""
    attacks = {**known.meta["attacks"]}
    for eps_text, added in more.meta["attacks"].items():
        attacks[eps_text] = {**attacks.get(eps_text, {}), **added}
    seconds = sum(
        meta["seconds"] for added in more.meta["attacks"].values() for meta in added.values()
    )
    wall = {**known.meta["wall_seconds"], "attack": known.meta["wall_seconds"]["attack"] + seconds}
    return RunResult(
        {**known.rows, **more.rows}, {**known.meta, "attacks": attacks, "wall_seconds": wall}
    )
