"""Sequence models over whole scans: members' features → aggregators → attacks → record."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from utils import data, sequence
from utils.config import RunConfig
from utils.data import ImageSet
from utils.evaluation import records
from utils.evaluation.predictions import model_digest
from utils.metrics.scores import to_half
from utils.pipeline.members import (
    member_config,
    members_of,
    origin_of,
    state_folder,
    untrained,
    with_more_variants,
)
from utils.pipeline.scan_attacks import CURVE_VIEW, attack_metadata, attacked_scans, scan_checks
from utils.pipeline.stages import spread_out
from utils.pipeline.store import RunResult, add_run, find_run, keep_arrays
from utils.pipeline.workspace import Workspace
from utils.sampling import classes_in_turn
from utils.utils_funcs import choose_device

#: What a profile spends on whole scans: patients of each set (None: all), eps in ascending order,
#: steps of an attack and how often they may be doubled, patients attacked and patients of the
#: slice-budget curves in a fold (None: all), slice budgets, epochs of an aggregator.
SCAN_BUDGETS: dict[str, dict[str, Any]] = {
    "demo": {
        "train": 8,
        "validation": 4,
        "test": 6,
        "eps": ("4/255",),
        "steps": 2,
        "doublings": 1,
        "attacked": 3,
        "curve": 2,
        "budgets": (1, 4),
        "epochs": 30,
    },
    "cpu": {
        "train": None,
        "validation": None,
        "test": None,
        "eps": ("4/255",),
        "steps": 10,
        "doublings": 4,
        "attacked": None,
        "curve": 6,
        "budgets": (1, 2, 4, 8, 16),
        "epochs": 80,
    },
    "paper": {
        "train": None,
        "validation": None,
        "test": None,
        "eps": ("1/255", "4/255"),
        "steps": 20,
        "doublings": 4,
        "attacked": None,
        "curve": None,
        "budgets": (1, 2, 4, 8, 16),
        "epochs": 80,
    },
}


#: Whose features the sequence models read; two members are read side by side.
SOURCES: dict[str, tuple[tuple[str, ...], ...]] = {
    "demo": (("Resnet_atk",),),
    "cpu": (("Efficientnet",), ("Resnet",), ("Resnet_atk",), ("Resnet", "Resnet_atk")),
    "paper": (("Resnet",), ("Resnet_atk",), ("Resnet", "Resnet_atk"), ("Dinov2",), ("Dinov2_atk",)),
}


#: How the slices of a scan become one answer.
AGGREGATORS: dict[str, tuple[str, ...]] = {
    "demo": ("mean", "attention"),
    "cpu": sequence.AGGREGATORS,
    "paper": sequence.AGGREGATORS,
}


#: Images (N, 1, H, W) → features (N, D).
Features = Callable[[Tensor], Tensor]


class JoinedFeatures(nn.Module):
    """The penultimate features of several members, concatenated to (N, sum of D): an ensemble that
    a sequence model reads."""

    def __init__(self, members: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleDict(dict(members))
        inits = dict.fromkeys(str(member.init) for member in members.values())
        self.init = " + ".join(inits)

    def features(self, images: Tensor) -> Tensor:
        """Images (N, 1, H, W) → features (N, sum of D)."""
        parts = [cast(Features, member.features)(images) for member in self.members.values()]
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class FoldScans:
    """What every sequence model of a fold shares: the sets, the test scans, and who is attacked.

    chosen, curve: rows of `scans` that are attacked, and of those the ones whose slice-budget
        curves are measured.
    """

    sets: dict[str, ImageSet]
    scans: sequence.Scans
    chosen: np.ndarray
    curve: np.ndarray


def run_sequence(
    workspace: Workspace,
    fold: int = 0,
    seed: int = 0,
    *,
    sources: tuple[tuple[str, ...], ...] | None = None,
    retrain: bool = False,
) -> records.Record:
    """Trains, attacks and records every aggregator over every source of features of one fold;
    returns the record.

    Each row of the record is a *patient*. The backbones stay frozen; aggregators see training
    patients, and their epoch is chosen on validation patients. Sources whose members are not
    trained here are named and left out; once they are trained, the same command adds them to the
    record.

    Raises:
        MissingMembersError: no source is trained here, and the record holds none.
    """
    config = member_config(workspace, "patient", fold, seed)
    every, budget = sources or SOURCES[workspace.profile], SCAN_BUDGETS[workspace.profile]
    aggregators = AGGREGATORS[workspace.profile]
    known = None if retrain else find_run(workspace, "Sequence", config)
    due = _sources_to_run(workspace, config, every, known)
    if not due:
        return records.read_record(workspace.record("Sequence", "patient"))
    names = tuple(dict.fromkeys(name for source in due for name in source))
    members = members_of(workspace, config, names)
    meta = origin_of(workspace, config, "Sequence", members)
    started, train_seconds = time.perf_counter(), 0.0
    fold_scans = _scans_of_fold(workspace, config, budget)
    rows = patient_rows(fold_scans.sets["test"], fold_scans.scans, config)
    meta["variants"], meta["sanity"] = {}, []
    for source in due:
        backbone = (
            members[source[0]]
            if len(source) == 1
            else JoinedFeatures({name: members[name] for name in source}).eval()
        )
        folder = state_folder(workspace, "Sequence", config)
        folder /= f"{'+'.join(source)}_{model_digest(backbone)[:12]}"
        features, mean, deviation = _standardized_features(backbone, fold_scans.sets, folder)
        for aggregator in aggregators:
            fit_started = time.perf_counter()
            reader, fit = sequence.fit_aggregator(
                aggregator,
                features["train"],
                features["validation"],
                epochs=budget["epochs"],
                seed=seed,
            )
            train_seconds += time.perf_counter() - fit_started
            model = sequence.ScanModel(backbone, reader, mean, deviation)
            model = model.to(choose_device()).eval()
            variant = _variant(source, aggregator)
            columns, description, checks = _evaluate(
                model, features["test"], fold_scans, config, budget, folder / aggregator, variant
            )
            rows |= columns
            meta["variants"][variant] = description | {"history": fit["history"]}
            meta["sanity"] += checks
    seconds = time.perf_counter() - started - train_seconds
    meta["wall_seconds"] = {"train": round(train_seconds, 1), "attack": round(seconds, 1)}
    order = tuple(
        _variant(source, aggregator)
        for source in SOURCES[workspace.profile]
        for aggregator in aggregators
    )
    merge = None if retrain else functools.partial(with_more_variants, order=order)
    return add_run(workspace, RunResult(rows, meta), merge)


def _sources_to_run(
    workspace: Workspace,
    config: RunConfig,
    every: tuple[tuple[str, ...], ...],
    known: RunResult | None,
) -> list[tuple[str, ...]]:
    """The sources that no record holds and whose members are trained here; names the others.

    Raises:
        MissingMembersError: there are none, and no record to show instead.
    """
    missing = [
        source
        for source in every
        if known is None
        or _variant(source, AGGREGATORS[workspace.profile][0]) not in known.meta["variants"]
    ]
    trained = [source for source in missing if not untrained(workspace, config, source)]
    if not trained and known is None:
        members_of(workspace, config, missing[-1])  # raises, and names the command that trains them
    if left_out := [" + ".join(source) for source in missing if source not in trained]:
        print(
            f"Sequence patient {config.run_name}: without the features of\n  "
            f"{', '.join(left_out)}, whose models are not trained here.",
            flush=True,
        )
    return trained


def _scans_of_fold(workspace: Workspace, config: RunConfig, budget: dict) -> FoldScans:
    sets = {
        name: few_patients(
            data.load_set(workspace.sets, "patient", config.fold, name), budget[name]
        )
        for name in data.SETS
    }
    data.check_patients_apart(sets)
    test = sets["test"]
    scans = sequence.gather_scans(test.images, test.labels, test.patients, test.slices)
    labels = scans.labels.numpy()
    chosen = _some_patients(labels, budget["attacked"])
    curve = chosen[_some_patients(labels[chosen], budget["curve"])]
    return FoldScans(sets, scans, chosen, curve)


def _standardized_features(
    backbone: nn.Module, sets: Mapping[str, ImageSet], folder: Path
) -> tuple[dict[str, sequence.Scans], Tensor, Tensor]:
    """(set → features (P, S, D) of every slice, mean (D,), standard deviation (D,)), standardized
    by the training slices."""
    features = {
        name: _features(backbone, part, folder / f"{name}.npz") for name, part in sets.items()
    }
    seen = features["train"].values[features["train"].mask]
    mean, deviation = seen.mean(0), seen.std(0).clamp_min(1e-6)
    standardized = {
        name: dataclasses.replace(
            part, values=((part.values - mean) / deviation) * part.mask[..., None]
        )
        for name, part in features.items()
    }
    return standardized, mean, deviation


def _features(backbone: nn.Module, part: ImageSet, path: Path, batch: int = 64) -> sequence.Scans:
    """Features (P, S, D) of every slice of a set, kept on disk."""

    def compute() -> dict[str, np.ndarray]:
        device = choose_device()
        with torch.no_grad():
            values = [
                cast(Features, backbone.features)(data.pixels(images, device)).float().cpu()
                for images in part.images.split(batch)
            ]
        return {"values": torch.cat(values).numpy()}

    values = torch.from_numpy(keep_arrays(path, compute)["values"])
    return sequence.gather_scans(values, part.labels, part.patients, part.slices)


def _evaluate(
    model: sequence.ScanModel,
    features: sequence.Scans,
    fold_scans: FoldScans,
    config: RunConfig,
    budget: dict,
    state: Path,
    variant: str,
) -> tuple[dict[str, np.ndarray], dict, list[dict]]:
    """One sequence model, clean and attacked: (columns of its predictions, what the record says of
    it, checks).

    Args:
        features: standardized features of the test scans.
        state: path without suffix of the files that keep weights and results.
    """
    scans, chosen, curve = fold_scans.scans, fold_scans.chosen, fold_scans.curve
    device = choose_device()
    with torch.no_grad():
        clean = model.aggregator(features.values.to(device), features.mask.to(device)).cpu().numpy()
    found = attacked_scans(
        model, scans, chosen, curve, config, budget, state.with_suffix(".npz"), variant
    )
    columns = {f"{variant}/clean": to_half(clean)}
    attacks: dict[str, dict] = {}
    for (eps, name), metadata in attack_metadata(found, len(chosen)).items():
        columns[f"{variant}/{eps}:{name}"] = spread_out(
            found[f"{eps}:{name}"], chosen, np.full_like(clean, np.nan)
        )
        attacks.setdefault(eps, {})[name] = metadata
    slice_budget = {
        "eps": budget["eps"][-1],
        "view": CURVE_VIEW,
        "budgets": [0, *budget["budgets"], int(scans.mask.sum(1).max())],
        "people": scans.patients[curve].tolist(),
        "labels": scans.labels[curve].tolist(),
        "least": {choice: found[f"least_{choice}"].tolist() for choice in ("gradient", "random")},
    }
    checks = scan_checks(variant, scans, chosen, curve, clean, found, budget)
    return columns, {"attacks": attacks, "slice_budget": slice_budget}, checks


def _variant(source: tuple[str, ...], aggregator: str) -> str:
    return f"{' + '.join(source)} {aggregator}"


def few_patients(part: ImageSet, count: int | None) -> ImageSet:
    """All slices of `count` patients, the classes taking turns (None: of every patient)."""
    if count is None:
        return part
    patients, first = np.unique(part.patients.numpy(), return_index=True)
    kept = patients[_some_patients(part.labels.numpy()[first], count)]
    return part.pick(np.flatnonzero(np.isin(part.patients.numpy(), kept)))


def _some_patients(labels: np.ndarray, count: int | None) -> np.ndarray:
    """Sorted rows of `count` patients, the classes taking turns (None: all). Nothing is random."""
    return np.sort(classes_in_turn(labels)[:count])


def patient_rows(test: ImageSet, scans: sequence.Scans, config: RunConfig) -> dict[str, np.ndarray]:
    """The columns that say which patient each row is; a patient's hash is that of the hashes of the
    slices in order."""
    digests = []
    for patient in scans.patients.tolist():
        rows = np.flatnonzero(test.patients.numpy() == patient)
        files = [test.files[row] for row in rows[np.argsort(test.slices.numpy()[rows])]]
        digests.append(hashlib.sha256("".join(files).encode()).digest())
    count = len(scans)
    return {
        "labels": scans.labels.numpy().astype(np.int8),
        "fold": np.full(count, config.fold, np.int8),
        "seed": np.full(count, config.seed, np.int8),
        "patient_id": scans.patients.numpy().astype(np.int32),
        "slice_index": np.full(count, -1, np.int16),
        "file_sha256": np.frombuffer(b"".join(digests), np.uint8).reshape(count, 32),
    }
