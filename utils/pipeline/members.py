"""The trained models that an ensemble or a sequence model is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import nn

from utils.backbones import load_model
from utils.config import Protocol, RunConfig, make_config
from utils.evaluation.predictions import model_digest
from utils.pipeline.stages import describe
from utils.pipeline.store import RunResult
from utils.pipeline.workspace import Workspace
from utils.utils_funcs import BACKBONES, UserError, choose_device

MEMBERSHIPS = {
    "clean": BACKBONES,
    "robust": tuple(f"{name}_atk" for name in BACKBONES),
    "mixed": tuple(f"{name}{counterpart}" for name in BACKBONES for counterpart in ("", "_atk")),
}


#: (combiner, membership): who is in, and with which weights.
FORMS = (
    ("uniform", "clean"),
    ("uniform", "robust"),
    ("uniform", "mixed"),
    ("weighted", "mixed"),
    ("stacking", "mixed"),
    ("blending", "mixed"),
)


#: What a rehearsal has time for: these forms, of these backbones, attacked on so many slices.
DEMO_FORMS = ("uniform mixed",)
DEMO_BACKBONES = ("Efficientnet", "Resnet")
DEMO_ATTACKED = 4


class MissingMembersError(UserError):
    """A member's weights are not on this machine."""


def members_of(
    workspace: Workspace, config: RunConfig, names: tuple[str, ...]
) -> dict[str, nn.Module]:
    """The trained models of one protocol, fold and seed, by name.

    Raises:
        MissingMembersError: a member's weights are not on this machine.
    """
    if missing := untrained(workspace, config, names):
        raise MissingMembersError(
            f"{', '.join(missing)} {'has' if len(missing) == 1 else 'have'} no checkpoint of "
            f"{config.protocol} "
            f"{config.run_name} here: run `python -m utils.experiment train --profile "
            f"{config.profile} --model {missing[0]} --protocol {config.protocol} "
            f"--fold {config.fold}` first."
        )
    paths = {name: workspace.weights(dataclasses.replace(config, model=name)) for name in names}
    return {name: load_model(path).to(choose_device()) for name, path in paths.items() if path}


def untrained(workspace: Workspace, config: RunConfig, names: tuple[str, ...]) -> list[str]:
    """Which of these models have no weights of this protocol, fold and seed here."""
    return [
        name for name in names if workspace.weights(dataclasses.replace(config, model=name)) is None
    ]


def member_config(workspace: Workspace, protocol: Protocol, fold: int, seed: int) -> RunConfig:
    """The settings that ensembles and sequences share with the models of their fold."""
    return make_config(workspace.profile, "Resnet", protocol=protocol, fold=fold, seed=seed)


def origin_of(
    workspace: Workspace, config: RunConfig, model: str, members: Mapping[str, nn.Module]
) -> dict:
    """What a record says of where these members come from."""
    meta = describe(workspace, config)
    settings = {
        key: value
        for key, value in meta["config"].items()
        if key
        in (
            "protocol",
            "fold",
            "seed",
            "profile",
            "input_size",
            "eps",
            "headline_eps",
            "pgd_steps",
            "attack_stride",
            "sample",
        )
    }
    inits = dict.fromkeys(str(member.init) for member in members.values())
    halved = [
        name
        for name in members
        if not workspace.checkpoint(dataclasses.replace(config, model=name)).is_file()
    ]
    return {
        **meta,
        "model": model,
        "regime": "both",
        "init": " + ".join(inits),
        "config": settings | {"members": list(members), "fp16_members": halved},
        "weights_sha256": {name: model_digest(member) for name, member in members.items()},
    }


def state_folder(workspace: Workspace, model: str, config: RunConfig) -> Path:
    """The folder from which a stopped run of ensembles or sequence models continues."""
    return workspace.root / "checkpoints" / model / config.protocol / config.run_name


def with_more_variants(known: RunResult, more: RunResult, order: tuple[str, ...] = ()) -> RunResult:
    """One run that holds the variants of both, which are of the same patients and, where they share
    members, of the same weights; variants named in `order` come first and in this order.

    Raises:
        UserError: the patients differ, or a member was trained again since.
    """
    old, new = known.meta["weights_sha256"], more.meta["weights_sha256"]
    if not np.array_equal(known.rows["file_sha256"], more.rows["file_sha256"]):
        raise UserError(
            f"The record of {more.meta['model']} holds other patients for fold "
            f"{more.meta['fold']} than its test set now: run "
            "it with --retrain to replace the run."
        )
    if changed := [name for name in new if old.get(name, new[name]) != new[name]]:
        raise UserError(
            f"{' and '.join(changed)} {'has' if len(changed) == 1 else 'have'} other weights now "
            "than when "
            f"{more.meta['model']} fold {more.meta['fold']} was recorded: run it with --retrain "
            "to replace the run."
        )
    both = (known.meta, more.meta)
    variants = known.meta["variants"] | more.meta["variants"]
    place = {name: number for number, name in enumerate(dict.fromkeys((*order, *variants)))}
    members = {
        key: list(dict.fromkeys(name for part in both for name in part["config"].get(key, ())))
        for key in ("members", "fp16_members")
    }
    meta = {
        **more.meta,
        "variants": dict(sorted(variants.items(), key=lambda item: place[item[0]])),
        "weights_sha256": old | new,
        "sanity": sorted(
            known.meta["sanity"] + more.meta["sanity"], key=lambda check: place[check["variant"]]
        ),
        "git_dirty": any(part["git_dirty"] for part in both),
        "config": more.meta["config"] | members,
        "wall_seconds": {
            phase: round(sum(part["wall_seconds"][phase] for part in both), 1)
            for phase in ("train", "attack")
        },
    }
    for key in ("init", "git_commit", "hardware"):
        meta[key] = " + ".join(
            dict.fromkeys(name for part in both for name in part[key].split(" + "))
        )
    columns = known.rows | more.rows
    return RunResult(
        {
            name: columns[name]
            for name in sorted(
                columns, key=lambda name: place[name.split("/")[0]] if "/" in name else -1
            )
        },
        meta,
    )
