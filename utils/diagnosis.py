"""Units made of trained models: ensembles of members, and the diagnosis of whole persons, from checkpoints to record.

    python -m utils.diagnosis ensemble --profile cpu --backbones Efficientnet Resnet --fold 0
    python -m utils.diagnosis sequence --profile cpu --fold 0

Both need the members' weights of the same protocol, fold and seed on this machine (`python -m utils.experiment train`), and
leave a part of `assets/Ensemble/<protocol>.json` or `assets/Sequence/patient.json`, in which each form is a variant. Each
form is recorded as it finishes, and what is finished of one is kept under checkpoints/, so that a killed command goes on
where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from utils import data, ensemble, report, sequence, training
from utils.attacks import ATTACKS
from utils.backbones import load_model
from utils.config import RunConfig, folds_of, make_config, parse_eps
from utils.data import ImageSet
from utils.experiment import (
    Workspace,
    Run,
    describe,
    open_workspace,
    recorded_as,
    save,
    spread_out,
    suite_rows,
    prediction_rows,
)
from utils.metrics import score, to_half
from utils.robustness import VIEWS, Stage, evaluate_suite, headline_of, model_digest, suite_plan
from utils.utils_funcs import BACKBONES, CLASSES, UserError, atomic_path, choose_device, progress

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
#: What a rehearsal has time for.
DEMO = dict(
    forms=(
        ("uniform", "clean"),
        ("uniform", "robust"),
        ("uniform", "mixed"),
        ("stacking", "mixed"),
    ),
    backbones=("Efficientnet", "Resnet"),
    attacked=8,
)
#: What a profile spends on whole scans: patients of each set (None: all), eps ascending, steps of an ascent, how often they may be
#: doubled, patients attacked and patients of the slice-budget curves a fold (None: all), slice budgets, epochs of an aggregator.
SCAN_BUDGETS = {
    "demo": dict(
        train=16,
        validation=8,
        test=10,
        eps=("4/255",),
        steps=3,
        doublings=1,
        attacked=4,
        curve=4,
        budgets=(1, 4, 16),
        epochs=30,
    ),
    "cpu": dict(
        train=None,
        validation=None,
        test=None,
        eps=("4/255",),
        steps=10,
        doublings=4,
        attacked=None,
        curve=6,
        budgets=(1, 2, 4, 8, 16),
        epochs=80,
    ),
    "paper": dict(
        train=None,
        validation=None,
        test=None,
        eps=("1/255", "4/255"),
        steps=20,
        doublings=4,
        attacked=None,
        curve=None,
        budgets=(1, 2, 4, 8, 16),
        epochs=80,
    ),
}
#: Whose features the sequence models read; two members are read side by side.
SOURCES = {
    "demo": (("Resnet_atk",), ("Resnet", "Resnet_atk")),
    "cpu": (("Efficientnet",), ("Resnet",), ("Resnet_atk",), ("Resnet", "Resnet_atk")),
    "paper": (("Resnet",), ("Resnet_atk",), ("Resnet", "Resnet_atk"), ("Dinov2",), ("Dinov2_atk",)),
}


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
            f"{', '.join(missing)} {'has' if len(missing) == 1 else 'have'} no checkpoint of {config.protocol} "
            f"{config.run_name} here: run `python -m utils.experiment train --profile "
            f"{config.profile} --model {missing[0]} --protocol {config.protocol} "
            f"--fold {config.fold}` first."
        )
    return {
        name: load_model(workspace.weights(dataclasses.replace(config, model=name))).to(
            choose_device()
        )
        for name in names
    }


def untrained(workspace: Workspace, config: RunConfig, names: tuple[str, ...]) -> list[str]:
    """Which of these models have no weights of this protocol, fold and seed here."""
    return [
        name for name in names if workspace.weights(dataclasses.replace(config, model=name)) is None
    ]


def run_available(
    workspace: Workspace,
    model: Literal["Ensemble", "Sequence"],
    protocol: Literal["slice", "patient"] = "patient",
    *,
    retrain: bool = False,
) -> dict | None:
    """Every fold whose members are trained on this machine, or that the record holds; says which are not. Returns the
    record, None where there is nothing."""
    record = None
    for fold in folds_of(workspace.profile, protocol):
        try:
            record = (
                run_ensemble(workspace, protocol, fold, retrain=retrain)
                if model == "Ensemble"
                else run_sequence(workspace, fold, retrain=retrain)
            )
        except MissingMembersError as error:
            print(f"{model} · {protocol} fold {fold} is left out: {error}")
    return record


def protocols_of(profile: str) -> tuple[str, ...]:
    """The protocols that ensembles are scored under: both, but for a rehearsal, whose time is short."""
    return ("patient",) if profile == "demo" else ("patient", "slice")


def _config(workspace: Workspace, protocol: str, fold: int, seed: int) -> RunConfig:
    """The settings that ensembles and sequences share with the models of their fold."""
    return make_config(workspace.profile, "Resnet", protocol=protocol, fold=fold, seed=seed)


def _origin(
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
    inits = dict.fromkeys(member.init for member in members.values())
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


def _folder(workspace: Workspace, model: str, config: RunConfig) -> Path:
    return workspace.root / "checkpoints" / model / config.protocol / config.run_name


# ----------------------------------------------------------------------------------------------------------- ensembles


def run_ensemble(
    workspace: Workspace,
    protocol: Literal["slice", "patient"] = "patient",
    fold: int = 0,
    seed: int = 0,
    *,
    backbones: tuple[str, ...] | None = None,
    forms: tuple[str, ...] | None = None,
    retrain: bool = False,
) -> dict:
    """Builds, attacks and records every form of `FORMS` of one fold; returns the record.

    Weights are fitted on the fold's validation people. Each ensemble is attacked as the one model it is, through each of
    its members and by transfer from every other model, and its worst case counts all of them. A form that the record holds
    is not run again, and several processes may share the forms.

    Args:
        backbones: whose models are members (None: those of the record's other forms and folds; in a new record all three,
            two of them in a rehearsal).
        forms: which of `FORMS`, as "uniform mixed" (None: all).

    Raises:
        StudyError: an unknown form, or a record whose ensembles are of other backbones.
        MissingMembersError: a member's weights are not here, and the record holds no form of this fold.
    """
    config = _config(workspace, protocol, fold, seed)
    known = None if retrain else recorded_as(workspace, "Ensemble", config)
    backbones = _backbones_of(workspace, protocol, backbones)
    every = {
        f"{combiner} {membership}": (
            combiner,
            tuple(
                name for name in MEMBERSHIPS[membership] if name.removesuffix("_atk") in backbones
            ),
        )
        for combiner, membership in (DEMO["forms"] if workspace.profile == "demo" else FORMS)
    }
    if unknown := set(forms or ()) - set(every):
        raise UserError(
            f"Unknown form {sorted(unknown)[0]!r} of an ensemble: expected one of {', '.join(every)}."
        )
    wanted = [
        form for form in forms or every if known is None or form not in known.meta["variants"]
    ]
    names = tuple(dict.fromkeys(name for _, own in every.values() for name in own))
    if known is not None and wanted and (missing := untrained(workspace, config, names)):
        print(
            f"Ensemble {protocol} {config.run_name}: without {', '.join(wanted)}, since {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not trained here.",
            flush=True,
        )
        wanted = []
    if known is not None and not wanted:
        return report.read_record(workspace.record("Ensemble", protocol))
    headline = headline_of(config)
    # The eps that the original project trained with beside the headline one; a rehearsal has time for one alone.
    config = (
        dataclasses.replace(config, eps=(headline,), sample=4)
        if workspace.profile == "demo"
        else dataclasses.replace(config, eps=("0.005", headline), suite="standard")
    )
    members = members_of(workspace, config, names)
    meta = _origin(workspace, config, "Ensemble", members)
    sets = data.load_sets(
        workspace.sets, protocol, fold, max_train=config.max_train, max_test=config.max_test
    )
    test = sets["test"]
    answers = {
        part: {
            name: training.predict(member, sets[part].images, choose_device()).log_softmax(1)
            for name, member in members.items()
        }
        for part in ("validation", "test")
    }
    chosen = (
        data.spread(test, DEMO["attacked"])
        if workspace.profile == "demo"
        else data.every_nth(test, config.attack_stride)
    )
    meta["diversity"] = ensemble.diversity(
        {name: values.cpu().numpy() for name, values in answers["test"].items()},
        test.labels.numpy(),
        test.patients.numpy(),
    )
    size = {"n_slices": len(test), "n_people": len(test.patients.unique())}
    meta["members"] = {
        name: score(values.cpu().numpy(), test.labels.numpy(), test.patients.numpy())[
            "balanced_accuracy_3"
        ]
        | size
        for name, values in answers["test"].items()
    }
    record, grow = {}, functools.partial(with_more_variants, order=tuple(every))
    for form in wanted:
        combiner, own = every[form][0], {name: members[name] for name in every[form][1]}
        started = time.perf_counter()
        rows, told, sanity = _evaluated_form(
            workspace,
            config,
            form,
            _fitted(combiner, own, answers["validation"], sets, protocol).to(choose_device()),
            members,
            test,
            answers["test"],
            chosen,
            relaxed=combiner == "uniform",
        )
        seconds = {"train": 0.0, "attack": round(time.perf_counter() - started, 1)}
        record = save(
            workspace,
            Run(
                prediction_rows(test, config) | rows,
                {**meta, "variants": {form: told}, "sanity": sanity, "wall_seconds": seconds},
            ),
            None if retrain and form == wanted[0] else grow,
        )
    return record


def _backbones_of(
    workspace: Workspace, protocol: str, given: tuple[str, ...] | None
) -> tuple[str, ...]:
    """Whose models an ensemble is made of: those of the record's ensembles of this profile and cohort, if it holds any.

    Raises:
        StudyError: `given` are others, whose scores would be pooled with theirs.
    """
    path = workspace.record("Ensemble", protocol)
    for run in report.read_record(path)["units"] if path.is_file() else ():
        if (run["profile"], run["cohort_sha256"]) == (workspace.profile, workspace.cohort_sha256):
            held = tuple(name for name in BACKBONES if name in run["config"]["members"])
            if given is not None and set(given) != set(held):
                raise UserError(
                    f"{path} holds ensembles of {', '.join(held)}, and these are of {', '.join(given)}: give the same "
                    "--backbones, or delete that record to begin another."
                )
            return held
    return (
        tuple(name for name in BACKBONES if name in given)
        if given
        else DEMO["backbones"]
        if workspace.profile == "demo"
        else BACKBONES
    )


def _evaluated_form(
    workspace: Workspace,
    config: RunConfig,
    form: str,
    model: nn.Module,
    sources: Mapping[str, nn.Module],
    test: ImageSet,
    answers: Mapping[str, Tensor],
    chosen: np.ndarray,
    *,
    relaxed: bool,
) -> tuple[dict[str, np.ndarray], dict, list[dict]]:
    """One form under every attack: (columns of its predictions, what was done, sanity checks)."""
    print(f"{form}: {_weights_text(model)}", flush=True)
    attacked, names = test.pick(chosen), list(model.members)
    folder = _folder(workspace, "Ensemble", config) / form.replace(" ", "_")
    stages = suite_plan(config, () if config.suite == "quick" else tuple(sources))
    if config.suite == "quick":
        stages += [
            Stage(
                "transfer",
                f"transfer_{name}",
                eps="headline",
                budget=dict(steps=config.pgd_steps),
                source=name,
            )
            for name in names
        ]
    result = evaluate_suite(
        model,
        attacked.images,
        attacked.labels,
        attacked.patients,
        config,
        stages=stages,
        sources=dict(sources),
        state_dir=folder,
    )
    with torch.no_grad():
        clean = (
            model.combine(torch.stack([answers[name] for name in names]).to(choose_device()))
            .cpu()
            .numpy()
        )
    rows, attacks = suite_rows(test, config, result, chosen, clean)
    if relaxed:
        for eps, found in _relaxations(model, attacked, config, folder).items():
            for name, logits in found.items():
                rows[f"{eps}:{name}"] = spread_out(logits, chosen, np.full_like(clean, np.nan))
                attacks[eps][name] = {
                    "norm": "relaxed",
                    "n_attacked": len(chosen),
                    "n_set": len(chosen),
                    **RELAXED[name](config),
                }
    rows = {
        f"{form}/{name}": values for name, values in rows.items() if name == "clean" or ":" in name
    }
    told = {"attacks": attacks, "members": names, "weights": _weights_of(model)}
    return rows, told, [{**check, "variant": form} for check in result.sanity]


#: How the infeasible attacks of `_relaxations` were run, and what they are.
RELAXED: dict[str, Callable[[RunConfig], dict]] = {
    "one_image": lambda config: {"steps": config.pgd_steps, "loss": "margin"},
    "separate_images": lambda config: {"steps": config.pgd_steps, "loss": "margin"},
    "original_project": lambda config: {"steps": 10, "step_size": 1e-4},
}


def _relaxations(
    model: nn.Module, attacked: ImageSet, config: RunConfig, folder: Path
) -> dict[str, dict[str, np.ndarray]]:
    """eps → logits (N, 4) under one image, under a separate image a member at the same strength, and as in the original project."""
    path, device = folder / f"relaxation_{model_digest(model)[:12]}.npz", choose_device()
    if not path.is_file():
        found: dict[str, list[np.ndarray]] = {}
        for rows in progress(
            torch.arange(len(attacked)).split(config.attack_batch), "one image and several"
        ):
            images, labels = (
                data.pixels(attacked.images[rows], device),
                attacked.labels[rows].to(device),
            )
            for eps_text in config.eps:
                eps, budget = parse_eps(eps_text), dict(seed=config.seed, steps=config.pgd_steps)
                one = ATTACKS["pgd"](model, images, labels, eps, loss="margin", **budget)
                with torch.no_grad():
                    logits = {"one_image": model(one)}
                logits["separate_images"] = ensemble.attack_separately(
                    model, images, labels, eps, shared=one, **budget
                )
                logits["original_project"] = ensemble.attack_like_the_original_project(
                    model, images, labels, eps
                )
                for name, values in logits.items():
                    found.setdefault(f"{eps_text}:{name}", []).append(values.cpu().numpy())
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **{key: np.concatenate(parts) for key, parts in found.items()})
    with np.load(path, allow_pickle=False) as file:
        return {
            eps: {key.split(":")[1]: file[key] for key in file.files if key.startswith(f"{eps}:")}
            for eps in config.eps
        }


def _fitted(
    combiner: str,
    members: Mapping[str, nn.Module],
    validation: Mapping[str, Tensor],
    sets: Mapping[str, ImageSet],
    protocol: str,
) -> nn.Module:
    part = sets["validation"]
    # Under `slice` everybody is on both sides, which is that protocol's fault and not the weights'.
    test_patients = (
        sets["test"].patients.numpy() if protocol == "patient" else np.array([], dtype=np.int64)
    )
    z = torch.stack([validation[name].cpu() for name in members]).double().numpy()
    return ensemble.build_ensemble(
        combiner,
        members,
        z,
        part.labels.numpy(),
        part.patients.numpy(),
        test_patients=test_patients,
    )


def _weights_of(model: nn.Module) -> dict:
    names = list(model.members)
    if isinstance(model, ensemble.Mixture):
        return {"weights": dict(zip(names, model.log_weights.exp().tolist(), strict=True))}
    return {
        "coefficients": dict(zip(names, model.coefficients.tolist(), strict=True)),
        "bias": dict(zip(CLASSES, model.bias.tolist(), strict=True)),
    }


def _weights_text(model: nn.Module) -> str:
    weights = _weights_of(model)
    return ", ".join(
        f"{name} {value:.2f}"
        for name, value in weights.get("weights", weights.get("coefficients", {})).items()
    )


# ------------------------------------------------------------------------------------------------------- whole persons


class JoinedFeatures(nn.Module):
    """Several members' penultimate features side by side, (N, sum of D): an ensemble that a sequence model reads."""

    def __init__(self, members: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleDict(dict(members))
        self.init = " + ".join(dict.fromkeys(member.init for member in members.values()))

    def features(self, images: Tensor) -> Tensor:
        return torch.cat([member.features(images) for member in self.members.values()], dim=1)


def run_sequence(
    workspace: Workspace,
    fold: int = 0,
    seed: int = 0,
    *,
    sources: tuple[tuple[str, ...], ...] | None = None,
    retrain: bool = False,
) -> dict:
    """Trains, attacks and records every aggregator over every source of features of one fold; returns the record.

    Each row is a *person*. The backbones stay frozen; aggregators see training people, and their epoch is chosen on
    validation people. Sources whose members are not trained here are named and left out; once they are, the same command adds
    them to the record.

    Raises:
        MissingMembersError: no source is trained here, and the record holds none.
    """
    config, sources = (
        _config(workspace, "patient", fold, seed),
        sources or SOURCES[workspace.profile],
    )
    known = None if retrain else recorded_as(workspace, "Sequence", config)
    wanted = [
        names
        for names in sources
        if known is None or _variant(names, sequence.AGGREGATORS[0]) not in known.meta["variants"]
    ]
    sources = [names for names in wanted if not untrained(workspace, config, names)]
    if not sources and known is None:
        members_of(workspace, config, wanted[-1])  # raises, and names the command that trains them
    if left := [" + ".join(names) for names in wanted if names not in sources]:
        print(
            f"Sequence patient {config.run_name}: without the features of {', '.join(left)}, whose models are not trained here.",
            flush=True,
        )
    if not sources:
        return report.read_record(workspace.record("Sequence", "patient"))
    budget = SCAN_BUDGETS[workspace.profile]
    members = members_of(
        workspace, config, tuple(dict.fromkeys(name for names in sources for name in names))
    )
    meta = _origin(workspace, config, "Sequence", members)
    started, device = time.perf_counter(), choose_device()
    parts = {
        name: few_patients(data.load_set(workspace.sets, "patient", fold, name), budget[name])
        for name in data.SETS
    }
    data.check_patients_apart(parts)
    test = parts["test"]
    patients = sequence.gather_scans(test.images, test.labels, test.patients, test.slices)
    chosen = _some_patients(patients.labels.numpy(), budget["attacked"])
    curve = chosen[_some_patients(patients.labels.numpy()[chosen], budget["curve"])]
    rows, meta["variants"], meta["sanity"] = _patient_rows(test, patients, config), {}, []
    seconds = {"train": 0.0}
    for names in sources:
        source = (
            members[names[0]]
            if len(names) == 1
            else JoinedFeatures({name: members[name] for name in names}).eval()
        )
        folder = (
            _folder(workspace, "Sequence", config)
            / f"{'+'.join(names)}_{model_digest(source)[:12]}"
        )
        features = {
            name: _features(source, part, folder / f"{name}.npz") for name, part in parts.items()
        }
        seen = features["train"].values[features["train"].mask]
        centre, scale = seen.mean(0), seen.std(0).clamp_min(1e-6)
        standard = {
            name: dataclasses.replace(
                part, values=((part.values - centre) / scale) * part.mask[..., None]
            )
            for name, part in features.items()
        }
        for aggregator in sequence.AGGREGATORS:
            variant, fit_started = _variant(names, aggregator), time.perf_counter()
            reader, told = sequence.fit_aggregator(
                aggregator,
                standard["train"],
                standard["validation"],
                epochs=budget["epochs"],
                seed=seed,
            )
            seconds["train"] += time.perf_counter() - fit_started
            model = sequence.ScanModel(
                source, reader.to(device), centre.to(device), scale.to(device)
            ).eval()
            with torch.no_grad():
                clean = (
                    reader(standard["test"].values.to(device), standard["test"].mask.to(device))
                    .cpu()
                    .numpy()
                )
            found = _attacked_scans(
                model,
                patients,
                chosen,
                curve,
                config,
                budget,
                folder / f"{aggregator}.npz",
                variant,
            )
            rows[f"{variant}/clean"] = to_half(clean)
            attacks: dict[str, dict] = {}
            for (eps, name), told_of in _scan_attacks(found, budget, len(chosen)).items():
                rows[f"{variant}/{eps}:{name}"] = spread_out(
                    found[f"{eps}:{name}"], chosen, np.full_like(clean, np.nan)
                )
                attacks.setdefault(eps, {})[name] = told_of
            meta["variants"][variant] = {
                "attacks": attacks,
                "history": told["history"],
                "slice_budget": {
                    "eps": budget["eps"][-1],
                    "view": CURVE_VIEW,
                    "budgets": [0, *budget["budgets"], int(patients.mask.sum(1).max())],
                    "people": patients.patients[curve].tolist(),
                    "labels": patients.labels[curve].tolist(),
                    "least": {
                        choice: found[f"least_{choice}"].tolist()
                        for choice in ("gradient", "random")
                    },
                },
            }
            meta["sanity"] += _scan_checks(variant, patients, chosen, curve, clean, found, budget)
    meta["wall_seconds"] = {
        "train": round(seconds["train"], 1),
        "attack": round(time.perf_counter() - started - seconds["train"], 1),
    }
    order = tuple(
        _variant(names, aggregator)
        for names in SOURCES[workspace.profile]
        for aggregator in sequence.AGGREGATORS
    )
    return save(
        workspace,
        Run(rows, meta),
        None if retrain else functools.partial(with_more_variants, order=order),
    )


def _variant(names: tuple[str, ...], aggregator: str) -> str:
    return f"{' + '.join(names)} {aggregator}"


def with_more_variants(known: Run, more: Run, order: tuple[str, ...] = ()) -> Run:
    """One unit that holds the variants of both, which are of the same people and, where they share members, of the same
    weights; those of `order` first and in this order.

    Raises:
        StudyError: the people differ, or a member was trained again since.
    """
    old, new = known.meta["weights_sha256"], more.meta["weights_sha256"]
    if not np.array_equal(known.rows["file_sha256"], more.rows["file_sha256"]):
        raise UserError(
            f"The record of {more.meta['model']} holds other people for fold {more.meta['fold']} than its test set now: run "
            "it with --retrain to replace the unit."
        )
    if changed := [name for name in new if old.get(name, new[name]) != new[name]]:
        raise UserError(
            f"{' and '.join(changed)} {'has' if len(changed) == 1 else 'have'} other weights now than when "
            f"{more.meta['model']} fold {more.meta['fold']} was recorded: run it with --retrain to replace the unit."
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
    return Run(
        {
            name: columns[name]
            for name in sorted(
                columns, key=lambda name: place[name.split("/")[0]] if "/" in name else -1
            )
        },
        meta,
    )


def few_patients(part: ImageSet, count: int | None) -> ImageSet:
    """All slices of `count` people, the classes taking turns (None: of everybody)."""
    if count is None:
        return part
    patients, first = np.unique(part.patients.numpy(), return_index=True)
    kept = patients[_some_patients(part.labels.numpy()[first], count)]
    return part.pick(np.flatnonzero(np.isin(part.patients.numpy(), kept)))


def _some_patients(labels: np.ndarray, count: int | None) -> np.ndarray:
    """Sorted rows of `count` people spread over the classes in turn (None: all). No randomness."""
    if count is None or count >= len(labels):
        return np.arange(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        place[own] = np.arange(len(own))
    return np.sort(np.lexsort((labels, place))[:count])


def _features(source: nn.Module, part: ImageSet, path: Path, batch: int = 64) -> sequence.Scans:
    """Features (P, S, D) of every slice of a set, kept on disk."""
    if not path.is_file():
        device = choose_device()
        with torch.no_grad():
            values = torch.cat(
                [
                    source.features(data.pixels(images, device)).float().cpu()
                    for images in part.images.split(batch)
                ]
            )
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, values=values.numpy())
    with np.load(path, allow_pickle=False) as file:
        return sequence.gather_scans(
            torch.from_numpy(file["values"]), part.labels, part.patients, part.slices
        )


#: The decision that the slice-budget curves count: the headline's.
CURVE_VIEW = "three"


def _attacked_scans(
    model: sequence.ScanModel,
    patients: sequence.Scans,
    chosen: np.ndarray,
    curve: np.ndarray,
    config: RunConfig,
    budget: dict,
    path: Path,
    variant: str,
) -> dict[str, np.ndarray]:
    """What the attacks on the `chosen` patients' scans leave, kept on disk under everything it depends on.

    Returns:
        "<eps>:<attack>" → logits (len(chosen), 4); "<eps>:rounds_<view>" → (rounds, 3) of steps, robust before and robust
        after; "least_<choice>" → the least number of slices that flips each patient of `curve`.
    """
    settings = [
        model_digest(model),
        patients.patients[chosen].tolist(),
        patients.patients[curve].tolist(),
        config.seed,
        SCAN_STATE,
        {key: value for key, value in budget.items() if key not in ("train", "validation", "test")},
    ]
    identity = np.frombuffer(hashlib.sha256(json.dumps(settings).encode()).digest(), np.uint8)
    part, found, device = patients.pick(chosen), {}, choose_device()
    if path.is_file():
        with np.load(path, allow_pickle=False) as file:
            if np.array_equal(file["identity"], identity):
                found = {key: file[key] for key in file.files}
    if found.get("curve_state", 0) == CURVE_STATE:
        return found
    given = model, data.pixels(part.values, device), part.mask.to(device), part.labels.to(device)
    if not found:
        found = {"identity": identity}
        seeds = part.patients.numpy() + config.seed
        made: dict[str, Tensor] = {}
        for eps in progress(budget["eps"], f"attack on scans, {variant}"):
            for view in VIEWS:
                found |= _attacked_in_view(given, eps, view, budget, seeds, made)
    few = np.searchsorted(chosen, curve)
    given = model, *(values[torch.from_numpy(few).to(device)] for values in given[1:])
    last = budget["eps"][-1]
    full = torch.from_numpy(_worst_in_view(found, last, CURVE_VIEW, part.labels)[few]).to(device)
    for choice in ("gradient", "random"):
        found[f"least_{choice}"] = (
            sequence.slice_budgets(
                *given,
                parse_eps(last),
                budget["budgets"],
                steps=budget["steps"],
                choice=choice,
                view=CURVE_VIEW,
                seed=config.seed,
                full=full,
            )
            .cpu()
            .numpy()
        )
    found["curve_state"] = np.array(CURVE_STATE)
    _save_reader(model, path.with_suffix(".safetensors"))
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **found)
    return found


#: Bumped when slice-budget curves of the same attacks would come out otherwise: they alone are then measured again.
CURVE_STATE = 1
#: Bumped when the same settings would give other numbers: what older code left is then not taken.
SCAN_STATE = 2


def _attacked_in_view(
    given: tuple, eps: str, view: str, budget: dict, seeds: np.ndarray, made: dict[str, Tensor]
) -> dict[str, np.ndarray]:
    """Both attacks in one view at one eps: to the end, with restarts, and again with twice the steps until that misclassifies
    no further patient. `made` holds the strongest scans found so far, by view, and is added to: points of a smaller ball and
    what another view's attack found are tried before any step is spent."""
    model, pixels, mask, labels = given
    truth, attempts, suffix = (
        sequence.scan_labels(labels, view),
        VIEW_CLASSES[view] - 1,
        VIEWS[view][1],
    )
    push = view == "binary"
    steps = max(budget["steps"] // 2, min(budget["steps"], 5)) if push else budget["steps"]
    scans, logits, found = (
        pixels.clone(),
        torch.zeros(len(labels), len(CLASSES), device=pixels.device),
        {},
    )
    rounds, name = [], f"scan_pgd{steps}{suffix}"
    rows = torch.arange(len(labels), device=pixels.device)

    def run(rows: Tensor, steps: int, momentum: float | None, number: int) -> tuple[Tensor, Tensor]:
        attack = sequence.ScanAttack(view, steps, 1 if push else attempts, momentum, push)
        candidates = [before[rows] for before in made.values()] + [scans[rows]] * (number > 0)
        own = seeds[rows.cpu().numpy()] + 104729 * number
        return sequence.attack_scan(
            model,
            pixels[rows],
            mask[rows],
            labels[rows],
            parse_eps(eps),
            attack,
            candidates=candidates,
            seeds=own,
        )

    def robust() -> Tensor:
        return (sequence.scan_decisions(logits, view) == truth).nonzero().squeeze(1)

    scans[rows], logits[rows] = run(rows, steps, None, 0)
    left, before, own = robust(), len(labels), steps
    rounds.append((own, before, len(left)))
    for number in range(1, 0 if push else budget["doublings"] + 1):
        if not len(left):
            break
        own *= 2
        scans[left], logits[left] = run(left, own, None, number)
        before, left = len(left), robust()
        rounds.append((own, before, len(left)))
        if len(left) == before:
            break
    found[f"{eps}:{name}"], found[f"{eps}:rounds_{view}"] = (
        logits.cpu().numpy().copy(),
        np.array(rounds),
    )
    if not push:
        if len(left):
            scans[left], logits[left] = run(left, steps, sequence.MOMENTUM, 100)
        found[f"{eps}:scan_mpgd{steps}{suffix}"] = logits.cpu().numpy()
    made[view] = scans
    return found


#: Classes of each view.
VIEW_CLASSES = {
    view: len(groups) if groups else len(CLASSES) for view, (groups, _) in VIEWS.items()
}


def _worst_in_view(found: dict[str, np.ndarray], eps: str, view: str, labels: Tensor) -> np.ndarray:
    """Logits (P, 4) of each patient that are wrong in a view under any attack at that eps; of the last one where none are."""
    every = [
        torch.from_numpy(values) for key, values in found.items() if key.startswith(f"{eps}:scan_")
    ]
    worst, truth = every[-1].clone(), sequence.scan_labels(labels.cpu(), view)
    for logits in every:
        wrong = sequence.scan_decisions(logits, view) != truth
        worst[wrong] = logits[wrong]
    return worst.numpy()


def _scan_attacks(
    found: dict[str, np.ndarray], budget: dict, count: int
) -> dict[tuple[str, str], dict]:
    """(eps, attack) → what the record says of it."""
    told = {}
    for key in found:
        eps, _, name = key.partition(":")
        if not name.startswith("scan_"):
            continue
        view = next(view for view, (_, suffix) in reversed(VIEWS.items()) if name.endswith(suffix))
        rounds = found[f"{eps}:rounds_{view}"]
        momentum = name.startswith("scan_mpgd")
        told[eps, name] = {
            "norm": "linf",
            "kind": "white-box",
            "view": view,
            "n_set": count,
            "n_attacked": int(rounds[-1, 2]) if momentum else count,
            "steps": int(rounds[0, 0]) if momentum else rounds[:, 0].tolist(),
            "attempts": 1 if view == "binary" else VIEW_CLASSES[view] - 1,
        }
    return told


def _save_reader(model: sequence.ScanModel, path: Path) -> None:
    """The aggregator's weights with the standardisation of its features; the backbone has its own checkpoint."""
    from safetensors.torch import save_file

    tensors = {
        key: value.detach().cpu().contiguous()
        for key, value in model.state_dict().items()
        if not key.startswith("backbone.")
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def _scan_checks(
    variant: str,
    patients: sequence.Scans,
    chosen: np.ndarray,
    curve: np.ndarray,
    clean: np.ndarray,
    found: dict,
    budget: dict,
) -> list[dict]:
    """What an evaluation of whole scans must satisfy, each with its figure."""
    labels, checks, sweep = patients.labels[chosen], [], budget["eps"]
    for view in ("four", "three"):
        truth = sequence.scan_labels(labels, view)
        right = (sequence.scan_decisions(torch.from_numpy(clean[chosen]), view) == truth).numpy()
        left = [
            (
                sequence.scan_decisions(
                    torch.from_numpy(_worst_in_view(found, eps, view, labels)), view
                )
                == truth
            ).numpy()
            for eps in sweep
        ]
        counts = [int(flags.sum()) for flags in left]
        checks += [
            (
                f"scan_attack_le_clean_{view}",
                all((flags <= right).all() for flags in left),
                counts,
                "nobody is robust who was not diagnosed",
            ),
            (
                f"falls_with_eps_{view}",
                counts == sorted(counts, reverse=True),
                counts,
                "no more patients are robust at a larger eps",
            ),
        ]
        last = [found[f"{eps}:rounds_{view}"][-1] for eps in sweep]
        done = all(before == after or after == 0 for _, before, after in last)
        checks.append(
            (
                f"converged_in_steps_{view}",
                done,
                np.array(last).ravel(),
                "twice the steps misclassify no further patient"
                if done
                else "more steps still misclassify patients: raise the cap",
            )
        )
    few = np.searchsorted(chosen, curve)
    truth = sequence.scan_labels(patients.labels[curve], CURVE_VIEW)
    right = (sequence.scan_decisions(torch.from_numpy(clean[curve]), CURVE_VIEW) == truth).numpy()
    worst = _worst_in_view(found, sweep[-1], CURVE_VIEW, labels)[few]
    full = (sequence.scan_decisions(torch.from_numpy(worst), CURVE_VIEW) == truth).numpy()
    curves = {
        choice: [
            int(step.sum())
            for step in sequence.robust_curve(
                found[f"least_{choice}"], [0, *budget["budgets"], patients.mask.shape[1]]
            )
        ]
        for choice in ("gradient", "random")
    }
    checks += [
        (
            "no_slice_is_clean",
            all(own[0] == right.sum() for own in curves.values()),
            int(right.sum()),
            "a budget of no slice changes nobody",
        ),
        (
            "all_slices_are_the_full_attack",
            all(own[-1] == full.sum() for own in curves.values()),
            int(full.sum()),
            "a budget of every slice is the full attack",
        ),
        (
            "curve_does_not_rise",
            all(own == sorted(own, reverse=True) for own in curves.values()),
            curves["gradient"],
            "more slices never leave more patients robust",
        ),
    ]
    return [
        {
            "check": check,
            "passed": bool(passed),
            "figure": [int(value) for value in np.atleast_1d(figure)],
            "note": note,
            "variant": variant,
        }
        for check, passed, figure, note in checks
    ]


def _patient_rows(
    test: ImageSet, patients: sequence.Scans, config: RunConfig
) -> dict[str, np.ndarray]:
    """The columns that say which person each row is; a person's hash is that of the slices' hashes in order."""
    own = {
        patient: np.flatnonzero(test.patients.numpy() == patient)
        for patient in patients.patients.tolist()
    }
    digests = [
        hashlib.sha256(
            "".join(test.files[row] for row in rows[np.argsort(test.slices.numpy()[rows])]).encode()
        ).digest()
        for rows in own.values()
    ]
    count = len(patients)
    return {
        "labels": patients.labels.numpy().astype(np.int8),
        "fold": np.full(count, config.fold, np.int8),
        "seed": np.full(count, config.seed, np.int8),
        "patient_id": patients.patients.numpy().astype(np.int32),
        "slice_index": np.full(count, -1, np.int16),
        "file_sha256": np.frombuffer(b"".join(digests), np.uint8).reshape(count, 32),
    }


# ---------------------------------------------------------------------------------------------------------- command line


def ensemble_command(
    profile: Literal["demo", "cpu", "paper"] = "cpu",
    protocol: Literal["slice", "patient"] = "patient",
    fold: int = 0,
    seed: int = 0,
    backbones: tuple[str, ...] | None = None,
    forms: tuple[str, ...] | None = None,
    raw: str | None = None,
) -> None:
    """Ensembles of one fold's trained models; `--forms "uniform mixed" "stacking mixed"` takes some of the forms, so that several
    processes share them."""
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
    profile: Literal["demo", "cpu", "paper"] = "cpu",
    fold: int = 0,
    seed: int = 0,
    raw: str | None = None,
    retrain: bool = False,
) -> None:
    """Sequence models over one fold's people."""
    print(
        report.results_text(
            [run_sequence(open_workspace(profile, raw), fold, seed, retrain=retrain)]
        )
    )


def main() -> None:
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"ensemble": ensemble_command, "sequence": sequence_command}, description=__doc__
        )
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
