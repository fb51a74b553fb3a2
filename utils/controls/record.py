"""The record and the predictions of `Baselines`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from utils import metrics
from utils.cohort.raw import RawImages
from utils.cohort.table import Cohort
from utils.config import RunConfig
from utils.controls.answers import CONTROLS, Answers, control_answers
from utils.controls.images import Slices
from utils.data import Folds, split_patients, split_slices, stack_images
from utils.evaluation import records
from utils.utils_funcs import environment, git_state, hardware, progress


def baseline_record(
    raw: RawImages,
    cohort: Cohort,
    folds: Folds,
    protocol: str,
    *,
    data: str,
    profile: str,
    cohort_sha256: str,
    test_folds: Sequence[int] = (0, 1, 2, 3, 4),
    seed: int = 0,
    thorough: bool = True,
) -> tuple[records.Record, dict[str, np.ndarray]]:
    """Record and predictions of `Baselines` under one protocol (`records.write_record` takes both).

    Args:
        data, profile, cohort_sha256: as the record keeps them.
        test_folds, seed, thorough: see `control_runs` and `control_answers`.
    """
    start = time.monotonic()
    runs = control_runs(
        raw, cohort, folds, protocol, test_folds=test_folds, seed=seed, thorough=thorough
    )
    seconds = round(time.monotonic() - start, 1)
    common: dict[str, Any] = {
        "model": "Baselines",
        "regime": "clean",
        "protocol": protocol,
        "data": data,
        "profile": profile,
        "init": "none",
        "search": "validation patients" if protocol == "patient" else "validation part",
        "search_people": [],
        "seed": 0,
        "cohort_sha256": cohort_sha256,
        "config": {"controls": CONTROLS, "headline_eps": RunConfig.headline_eps},
        "environment": environment(),
        "hardware": hardware(),
        **git_state(),
        "attacks": {},
        "sanity": [],
    }
    metas = [
        {
            **common,
            "fold": int(predictions["fold"][0]),
            "variants": variants,
            "wall_seconds": {"train": seconds if number == 0 else 0, "attack": 0},
        }
        for number, (predictions, variants) in enumerate(runs)
    ]
    pooled = {
        name: np.concatenate([predictions[name] for predictions, _ in runs]) for name in runs[0][0]
    }
    return records.summarize(pooled, metas), pooled


def control_runs(
    raw: RawImages,
    cohort: Cohort,
    folds: Folds,
    protocol: str,
    *,
    test_folds: Sequence[int] = (0, 1, 2, 3, 4),
    seed: int = 0,
    thorough: bool = True,
) -> list[tuple[dict[str, np.ndarray], dict[str, dict]]]:
    """The controls' predictions on every test fold.

    Under `slice` the published train folder trains and its test folder tests; under `patient` each
    test fold is answered from the patients of the others. The constant answer is left out: every
    record holds it.

    Returns:
        One (predictions, variants) a fold: arrays with one row a test image, as in the predictions
        file of `Baselines`, and control → {"attacks", "settings"}.
    """
    images = stack_images(raw)[:, 0].numpy()
    every = Slices(images, cohort.label, cohort.patient_id, cohort.slice_index)
    runs = []
    for fold in (0,) if protocol == "slice" else test_folds:
        rows = split_slices(cohort) if protocol == "slice" else split_patients(cohort, folds, fold)
        parts = {name: every.pick(chosen) for name, chosen in rows.items()}
        answers = control_answers(
            **parts,
            sweep=RunConfig.eps,
            headline=RunConfig.headline_eps,
            seed=seed,
            thorough=thorough,
        )
        predictions = _columns(cohort, rows["test"], fold, seed)
        variants = {}
        total = len(CONTROLS) - 1  # without the constant answer
        for name, answer in progress(answers, f"controls, {protocol} fold {fold}", total):
            predictions[f"{name}/clean"] = metrics.to_half(answer.logits)
            for (eps, attack), logits in answer.exact.items():
                predictions[f"{name}/{eps}:{attack}"] = metrics.to_half(logits)
            variants[name] = {"attacks": _exact_attacks(answer), "settings": answer.settings}
        runs.append((predictions, variants))
    return runs


def _columns(cohort: Cohort, test: np.ndarray, fold: int, seed: int) -> dict[str, np.ndarray]:
    """What the predictions file says about the test images (N,) themselves."""
    digests = bytes.fromhex("".join(cohort.file_sha256[test]))
    return {
        "labels": cohort.label[test].astype(np.int8),
        "fold": np.full(len(test), fold, np.int8),
        "seed": np.full(len(test), seed, np.int8),
        "patient_id": cohort.patient_id[test].astype(np.int32),
        "slice_index": cohort.slice_index[test].astype(np.int16),
        "file_sha256": np.frombuffer(digests, np.uint8).reshape(-1, 32),
    }


def _exact_attacks(answer: Answers) -> dict[str, dict]:
    """eps → attack → what the record says about it, for the exact worst cases of a control."""
    attacks: dict[str, dict] = {}
    count = len(answer.logits)
    for eps, attack in answer.exact:
        attacks.setdefault(eps, {})[str(attack)] = {
            "norm": "linf",
            "kind": "exact",
            "n_attacked": count,
            "n_set": count,
        }
    return attacks
