"""Ensembles of one fold: trained members → combined models → attacks → record."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from utils import data, ensemble, training
from utils.attacks.base import ATTACKS
from utils.config import Protocol, RunConfig, parse_eps
from utils.data import ImageSet
from utils.evaluation import records
from utils.evaluation.plan import Stage, headline_of, suite_plan
from utils.evaluation.predictions import model_digest
from utils.evaluation.suite import evaluate_suite
from utils.metrics.clustered import score
from utils.pipeline.members import (
    DEMO_ATTACKED,
    DEMO_BACKBONES,
    DEMO_FORMS,
    FORMS,
    MEMBERSHIPS,
    member_config,
    members_of,
    origin_of,
    state_folder,
    untrained,
    with_more_variants,
)
from utils.pipeline.stages import prediction_rows, spread_out, suite_rows
from utils.pipeline.store import RunResult, add_run, find_run, keep_arrays
from utils.pipeline.workspace import Workspace
from utils.utils_funcs import BACKBONES, CLASSES, UserError, choose_device, progress


def run_ensemble(
    workspace: Workspace,
    protocol: Protocol = "patient",
    fold: int = 0,
    seed: int = 0,
    *,
    backbones: tuple[str, ...] | None = None,
    forms: tuple[str, ...] | None = None,
    retrain: bool = False,
) -> records.Record:
    """Builds, attacks and records every form of `FORMS` of one fold; returns the record.

    Weights are fitted on the fold's validation patients. Each ensemble is attacked as the one model
    that it is, through each of its members and by transfer from every other model; its worst case
    counts all of them. A form that the record holds is not run again, and several processes may
    share the forms.

    Args:
        backbones: whose models are members (None: those of the record's other forms and folds; in a
            new record all three, two of them in a rehearsal).
        forms: which of `FORMS`, as "uniform mixed" (None: all; in a rehearsal `DEMO_FORMS`).

    Raises:
        UserError: an unknown form, or a record whose ensembles are of other backbones.
        MissingMembersError: a member's weights are not here, and the record holds no form of this
            fold.
    """
    config = member_config(workspace, protocol, fold, seed)
    known = None if retrain else find_run(workspace, "Ensemble", config)
    every = _forms_of(_backbones_of(workspace, protocol, backbones))
    if unknown := set(forms or ()) - set(every):
        raise UserError(
            f"Unknown form {sorted(unknown)[0]!r} of an ensemble: expected one of "
            f"{', '.join(every)}."
        )
    names = tuple(dict.fromkeys(name for form in every.values() for name in form.members))
    asked = forms or (DEMO_FORMS if workspace.profile == "demo" else tuple(every))
    wanted = _forms_to_run(workspace, config, asked, known, names)
    if not wanted:
        return records.read_record(workspace.record("Ensemble", protocol))
    config = _attack_settings(config)
    members = members_of(workspace, config, names)
    sets = data.load_sets(
        workspace.sets,
        protocol,
        fold,
        cohort_sha256=workspace.cohort_sha256,
        max_train=config.max_train,
        max_test=config.max_test,
    )
    answers = {part: _answers(members, sets[part]) for part in ("validation", "test")}
    meta = origin_of(workspace, config, "Ensemble", members)
    meta |= _members_alone(answers["test"], sets["test"])
    for form in wanted:
        started = time.perf_counter()
        rows, description, sanity = evaluated_form(
            workspace,
            config,
            form,
            _fitted(every[form], members, answers["validation"], sets, protocol),
            members,
            sets["test"],
            answers["test"],
            _attacked_rows(sets["test"], config),
            relaxed=every[form].combiner == "uniform",
        )
        seconds = {"train": 0.0, "attack": round(time.perf_counter() - started, 1)}
        result = RunResult(
            prediction_rows(sets["test"], config) | rows,
            {
                **meta,
                "variants": {form: description},
                "sanity": sanity,
                "wall_seconds": seconds,
            },
        )
        replace = retrain and form == wanted[0]
        merge = None if replace else functools.partial(with_more_variants, order=tuple(every))
        record = add_run(workspace, result, merge)
    return record


@dataclass(frozen=True)
class Form:
    """How the answers of which models become one: a combiner of `FORMS`, and its members' names."""

    combiner: str
    members: tuple[str, ...]


def _forms_of(backbones: tuple[str, ...]) -> dict[str, Form]:
    """Every form by its name in the record, with members of these backbones."""
    return {
        f"{combiner} {membership}": Form(
            combiner,
            tuple(
                name for name in MEMBERSHIPS[membership] if name.removesuffix("_atk") in backbones
            ),
        )
        for combiner, membership in FORMS
    }


def _forms_to_run(
    workspace: Workspace,
    config: RunConfig,
    asked: tuple[str, ...],
    known: RunResult | None,
    names: tuple[str, ...],
) -> list[str]:
    """The forms that no record holds; none, with a line that says why, where there is a record and
    a member's weights are elsewhere."""
    wanted = [form for form in asked if known is None or form not in known.meta["variants"]]
    missing = untrained(workspace, config, names)
    if known is None or not wanted or not missing:
        return wanted
    print(
        f"Ensemble {config.protocol} {config.run_name}: without {', '.join(wanted)}, since "
        f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not trained here.",
        flush=True,
    )
    return []


def _attack_settings(config: RunConfig) -> RunConfig:
    """The settings of the attacks: the headline eps and, but for a rehearsal, which has no time for
    it, the one that the original project trained with."""
    headline = headline_of(config)
    if config.profile == "demo":
        return dataclasses.replace(config, eps=(headline,), sample=4)
    return dataclasses.replace(config, eps=("0.005", headline), suite="standard")


def _attacked_rows(test: ImageSet, config: RunConfig) -> np.ndarray:
    """Sorted rows of the test slices that are attacked."""
    if config.profile == "demo":
        return data.spread(test, DEMO_ATTACKED)
    return data.every_nth(test, config.attack_stride)


def _answers(members: Mapping[str, nn.Module], part: ImageSet) -> dict[str, Tensor]:
    """Each member's log-probabilities (N, 4) on a set."""
    return {
        name: training.predict(member, part.images, choose_device()).log_softmax(1)
        for name, member in members.items()
    }


def _members_alone(answers: Mapping[str, Tensor], test: ImageSet) -> dict:
    """What the record says of the members themselves: how their answers differ, and each one's
    balanced accuracy with its interval."""
    labels, patients = test.labels.numpy(), test.patients.numpy()
    values = {name: answer.cpu().numpy() for name, answer in answers.items()}
    size = {"n_slices": len(test), "n_people": len(test.patients.unique())}
    return {
        "diversity": ensemble.diversity(values, labels, patients),
        "members": {
            name: score(answer, labels, patients)["balanced_accuracy_3"] | size
            for name, answer in values.items()
        },
    }


def _backbones_of(
    workspace: Workspace, protocol: Protocol, given: tuple[str, ...] | None
) -> tuple[str, ...]:
    """Whose models an ensemble is made of: those of the record's ensembles of this profile and
    cohort, if it holds any.

    Raises:
        UserError: `given` are others, whose scores would be pooled with theirs.
    """
    path = workspace.record("Ensemble", protocol)
    for run in records.read_record(path).metas if path.is_file() else ():
        if (run["profile"], run["cohort_sha256"]) == (workspace.profile, workspace.cohort_sha256):
            held = tuple(name for name in BACKBONES if name in run["config"]["members"])
            if given is not None and set(given) != set(held):
                raise UserError(
                    f"{path} holds ensembles of {', '.join(held)}, and these are of "
                    f"{', '.join(given)}: give the same --backbones, or delete that record to "
                    "begin another."
                )
            return held
    if given:
        return tuple(name for name in BACKBONES if name in given)
    return DEMO_BACKBONES if workspace.profile == "demo" else tuple(BACKBONES)


def evaluated_form(
    workspace: Workspace,
    config: RunConfig,
    form: str,
    model: ensemble.Ensemble,
    sources: Mapping[str, nn.Module],
    test: ImageSet,
    answers: Mapping[str, Tensor],
    chosen: np.ndarray,
    *,
    relaxed: bool,
) -> tuple[dict[str, np.ndarray], dict, list[dict]]:
    """One form under every attack: (columns of its predictions, what the record says of it,
    checks).

    Args:
        sources: the models that transfer attacks are made on.
        answers: each member's log-probabilities (N, 4) on `test`.
        chosen: rows of `test` that are attacked.
        relaxed: whether the attacks of `RELAXED` are run as well.
    """
    print(f"{form}: {_weights_text(model)}", flush=True)
    attacked, names = test.pick(chosen), list(model.members)
    folder = state_folder(workspace, "Ensemble", config) / form.replace(" ", "_")
    result = evaluate_suite(
        model,
        attacked.images,
        attacked.labels,
        attacked.patients,
        config,
        stages=_stages(config, tuple(sources), names),
        sources=dict(sources),
        state_dir=folder,
    )
    with torch.no_grad():
        stacked = torch.stack([answers[name] for name in names]).to(choose_device())
        clean = model.combine(stacked).cpu().numpy()
    rows, attacks = suite_rows(test, config, result, chosen, clean)
    if relaxed:
        path = folder / f"relaxation_{model_digest(model)[:12]}.npz"
        found = keep_arrays(path, functools.partial(_relaxations, model, attacked, config))
        for key, logits in found.items():
            eps, name = key.split(":")
            rows[key] = spread_out(logits, chosen, np.full_like(clean, np.nan))
            attacks[eps][name] = {
                "norm": "relaxed",
                "n_attacked": len(chosen),
                "n_set": len(chosen),
                **RELAXED[name](config),
            }
    columns = {
        f"{form}/{name}": values for name, values in rows.items() if name == "clean" or ":" in name
    }
    description = {"attacks": attacks, "members": names, "weights": weights_of(model)}
    return columns, description, [{**check, "variant": form} for check in result.sanity]


def _stages(config: RunConfig, sources: tuple[str, ...], members: list[str]) -> list[Stage]:
    """The attacks on an ensemble; a rehearsal's transfer attacks are made on its members alone."""
    if config.suite != "quick":
        return suite_plan(config, sources)
    return suite_plan(config, ()) + [
        Stage(
            "transfer",
            f"transfer_{name}",
            eps="headline",
            budget={"steps": config.pgd_steps},
            source=name,
        )
        for name in members
    ]


#: How the infeasible attacks of `_relaxations` were run, and what they are.
RELAXED: dict[str, Callable[[RunConfig], dict]] = {
    "one_image": lambda config: {"steps": config.pgd_steps, "loss": "margin"},
    "separate_images": lambda config: {"steps": config.pgd_steps, "loss": "margin"},
    "original_project": lambda config: {"steps": 10, "step_size": 1e-4},
}


def _relaxations(
    model: ensemble.Ensemble, attacked: ImageSet, config: RunConfig
) -> dict[str, np.ndarray]:
    """Logits (N, 4) by `<eps>:<name in RELAXED>`: under one image for all members, under a separate
    image for each member at the same strength, and as in the original project."""
    device = choose_device()
    found: dict[str, list[np.ndarray]] = {}
    for rows in progress(
        torch.arange(len(attacked)).split(config.attack_batch), "one image and several"
    ):
        images = data.pixels(attacked.images[rows], device)
        labels = attacked.labels[rows].to(device)
        for text in config.eps:
            eps = parse_eps(text)
            one = ATTACKS["pgd"](
                model,
                images,
                labels,
                eps,
                loss="margin",
                seed=config.seed,
                steps=config.pgd_steps,
            )
            separate = ensemble.attack_separately(
                model, images, labels, eps, shared=one, seed=config.seed, steps=config.pgd_steps
            )
            original = ensemble.attack_like_the_original_project(model, images, labels, eps)
            with torch.no_grad():
                shared = model(one)
            logits = dict(zip(RELAXED, (shared, separate, original), strict=True))
            for name, values in logits.items():
                found.setdefault(f"{text}:{name}", []).append(values.cpu().numpy())
    return {key: np.concatenate(parts) for key, parts in found.items()}


def _fitted(
    form: Form,
    members: Mapping[str, nn.Module],
    validation: Mapping[str, Tensor],
    sets: Mapping[str, ImageSet],
    protocol: str,
) -> ensemble.Ensemble:
    """The ensemble, its weights fitted on the validation set, on the device."""
    part = sets["validation"]
    # Under `slice` every patient is on both sides, which is that protocol's fault and not the
    # weights'.
    test_patients = (
        sets["test"].patients.numpy() if protocol == "patient" else np.array([], dtype=np.int64)
    )
    z = torch.stack([validation[name].cpu() for name in form.members]).double().numpy()
    model = ensemble.build_ensemble(
        form.combiner,
        {name: members[name] for name in form.members},
        z,
        part.labels.numpy(),
        part.patients.numpy(),
        test_patients=test_patients,
    )
    return model.to(choose_device())


def weights_of(model: ensemble.Ensemble) -> dict[str, dict[str, float]]:
    """The weights of an ensemble as the record holds them: a mixture's `weights` by member, else
    the pool's `coefficients` by member and `bias` by class."""
    names = list(model.members)
    if isinstance(model, ensemble.Mixture):
        return {"weights": dict(zip(names, model.log_weights.exp().tolist(), strict=True))}
    assert isinstance(model, ensemble.LogLinearPool)
    return {
        "coefficients": dict(zip(names, model.coefficients.tolist(), strict=True)),
        "bias": dict(zip(CLASSES, model.bias.tolist(), strict=True)),
    }


def _weights_text(model: ensemble.Ensemble) -> str:
    weights = weights_of(model)
    by_member = weights.get("weights", weights.get("coefficients", {}))
    return ", ".join(f"{name} {value:.2f}" for name, value in by_member.items())
