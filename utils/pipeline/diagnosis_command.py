"""The command line of ensembles and sequence models."""

from __future__ import annotations

import sys
import textwrap
from typing import Literal

import tyro

from utils import report
from utils.config import Profile, Protocol, folds_of, make_config
from utils.evaluation.schema import Record
from utils.pipeline.ensembles import run_ensemble
from utils.pipeline.members import MissingMembersError
from utils.pipeline.scans import run_sequence
from utils.pipeline.workspace import Workspace, open_workspace
from utils.utils_funcs import BACKBONES, UserError


def run_available(
    workspace: Workspace,
    model: Literal["Ensemble", "Sequence"],
    protocol: Protocol = "patient",
    *,
    retrain: bool = False,
) -> Record | None:
    """Every fold whose members are trained on this machine, or that the record holds; says which
    are not. Returns the record, None where there is nothing."""
    record = None
    for fold in folds_of(workspace.profile, protocol):
        try:
            record = (
                run_ensemble(workspace, protocol, fold, retrain=retrain)
                if model == "Ensemble"
                else run_sequence(workspace, fold, retrain=retrain)
            )
        except MissingMembersError as error:
            text = f"{model} · {protocol} fold {fold} is left out: {error}"
            print(textwrap.fill(text, 96, subsequent_indent="  ", break_on_hyphens=False))
    return record


def protocols_of(profile: str) -> tuple[str, ...]:
    """The protocols that ensembles are scored under: both, but for a rehearsal, whose time is
    short."""
    return ("patient",) if profile == "demo" else ("patient", "slice")


def ensemble_command(
    profile: Profile = "cpu",
    protocol: Protocol = "patient",
    fold: int = 0,
    seed: int = 0,
    backbones: tuple[str, ...] | None = None,
    forms: tuple[str, ...] | None = None,
    raw: str | None = None,
) -> None:
    """Ensembles of one fold's trained models; `--forms "uniform mixed" "stacking mixed"` takes some
    of the forms, so that several processes share them."""
    if unknown := [name for name in backbones or () if name not in BACKBONES]:
        raise UserError(f"--backbones {unknown[0]}: expected some of {', '.join(BACKBONES)}.")
    make_config(profile, "Resnet", protocol=protocol, fold=fold, seed=seed)
    print(
        report.results_text(
            [
                run_ensemble(
                    open_workspace(profile, raw),
                    protocol,
                    fold,
                    seed,
                    backbones=backbones,
                    forms=forms,
                )
            ]
        )
    )


def sequence_command(
    profile: Profile = "cpu",
    fold: int = 0,
    seed: int = 0,
    raw: str | None = None,
    retrain: bool = False,
) -> None:
    """Sequence models over one fold's patients."""
    make_config(profile, "Resnet", fold=fold, seed=seed)
    print(
        report.results_text(
            [run_sequence(open_workspace(profile, raw), fold, seed, retrain=retrain)]
        )
    )


def main() -> None:
    """Runs the command that `sys.argv` names; a `UserError` ends it with one sentence."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"ensemble": ensemble_command, "sequence": sequence_command}, description=__doc__
        )
    except UserError as error:
        sys.exit(f"error: {error}")
