"""Predictions and what was done for each run → the record of a (model, protocol); reading and
writing records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from utils import metrics
from utils.config import RunConfig
from utils.evaluation.plan import AttackName
from utils.evaluation.schema import (
    SCHEMA_VERSION,
    Arrays,
    Json,
    Record,
    Rows,
    Run,
    attacks_of,
    clean_of,
    predictions_path,
    variants_of,
)
from utils.utils_funcs import MODELS, PROTOCOLS, UserError, atomic_path, read_json, write_json

#: Everything that can have a record, in the order of tables and figures.
RECORDED = ("Baselines", *MODELS, "Ensemble", "Sequence")

#: (model, protocol) → record.
Records = dict[tuple[str, str], Record]
Key = TypeVar("Key")

#: Runs of one record must agree on these: their rows are pooled into one score.
AGREED = ("model", "regime", "protocol", "data", "profile", "cohort_sha256")

#: Attack metadata that adds up over runs; everything else is kept once, or as the list of its
#: distinct values.
ADDED = ("n_attacked", "n_set", "n_unchanged", "seconds", "forward_passes", "backward_passes")

#: Attack metadata that runs of earlier code do not name, and what it was then.
BEFORE = {"precision": "fp32"}

#: Scores that an attack's block gives by patient.
PATIENT_UNDER_ATTACK = ("balanced_accuracy_3", "balanced_accuracy", "accuracy", "auroc")


# -- scoring ---------------------------------------------------------------------------------------


def robust_decisions(
    clean: np.ndarray, attacked: Iterable[np.ndarray], labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which decisions withstood every attack: the minimum over attacks, taken for each image.

    Args:
        clean: logits (N, 4); attacked: logits (N, 4) of each attack, NaN where it was not run.

    Returns:
        bool (N,) each: whether the four-class and whether the three-class decision is right on the
        clean image and under every attack that was run on it, and whether any was.
    """
    four, three = metrics.correct(clean, labels)
    covered = np.zeros(len(labels), dtype=bool)
    for logits in attacked:
        was_run = metrics.scored(logits)
        right_four, right_three = metrics.correct(logits, labels)
        four &= right_four | ~was_run
        three &= right_three | ~was_run
        covered |= was_run
    return four, three, covered


def _most_wrong(
    clean: np.ndarray, attacked: Iterable[np.ndarray], labels: np.ndarray
) -> np.ndarray:
    """Logits (N, 4), clean or attacked, whose disease margin lies furthest towards the wrong side
    of each image."""
    worst, wrong = np.array(clean, dtype=np.float64), np.where(labels > 0, -1, 1)
    for logits in attacked:
        rows = np.flatnonzero(metrics.scored(logits))
        gain = metrics.disease_margin(logits[rows]) - metrics.disease_margin(worst[rows])
        further = rows[wrong[rows] * gain > 0]
        worst[further] = logits[further]
    return worst


def score_clean(logits: np.ndarray, rows: Rows, n_boot: int) -> Json:
    """A record's `clean` block of logits (N, 4), of the rows inside the declared set (those without
    NaN)."""
    declared = metrics.scored(logits)
    part = rows.take(declared)
    return {
        "slice": metrics.score(logits[declared], part.labels, part.patients, n_boot=n_boot),
        "person": metrics.score_patients(
            logits[declared], part.labels, part.patients, seeds=part.seeds, n_boot=n_boot
        ),
        **part.size(),
    }


def score_recalls(logits: np.ndarray, rows: Rows, n_boot: int) -> Json:
    """{"slice", "person"}: recall of each of the three classes with its interval.

    Balanced accuracy is their mean, and hides which class a model never answers.
    """
    declared = metrics.scored(logits)
    part = rows.take(declared)
    by_patient = metrics.by_patient(logits[declared], part.labels, part.patients, part.seeds)
    return {
        "slice": metrics.recalls(logits[declared], part.labels, part.patients, n_boot=n_boot),
        "person": metrics.recalls(*by_patient, n_boot=n_boot),
    }


def _score_attack(logits: np.ndarray, rows: Rows, meta: Json, n_boot: int) -> Json:
    scores = score_clean(logits, rows, n_boot)
    return {
        **scores["slice"],
        "person": {name: scores["person"][name] for name in PATIENT_UNDER_ATTACK},
        "n_slices": scores["n_slices"],
        "n_people": scores["n_people"],
        "n_attacked": scores["n_slices"],
        "norm": "linf",
        **{key: value for key, value in meta.items() if key != "n_slices"},
    }


def score_worst_case(clean: np.ndarray, attacked: Arrays, rows: Rows, n_boot: int) -> Json:
    """Robust scores, on the images that any attack was run on.

    AUROC is given where an attack on the binary view ran: each image's score is then the
    most wrong one that any attack reached, since an attacker who wants a wrong ranking may choose
    among them.

    Args:
        attacked: attack → logits (N, 4), of one norm and eps.
    """
    four, three, covered = robust_decisions(clean, attacked.values(), rows.labels)
    part = rows.take(covered)
    result = metrics.score_robust(
        four[covered], three[covered], part.labels, part.patients, n_boot=n_boot
    )
    binary = [
        logits for name, logits in attacked.items() if AttackName.parse(name).view == "binary"
    ]
    result["auroc"] = {"value": None, "ci": None, "n": 0}
    if binary:
        ranked = np.any([metrics.scored(logits) for logits in binary], axis=0)
        worst, of_ranked = _most_wrong(clean, attacked.values(), rows.labels), rows.take(ranked)
        result["auroc"] = metrics.score(
            worst[ranked], of_ranked.labels, of_ranked.patients, n_boot=n_boot
        )["auroc"]
    return {**result, **part.size(), "attacks": sorted(attacked)}


def constant_answer(rows: Rows) -> Json:
    """Clean scores of always answering Non on these images: the control of every table. No attack
    moves it. They are known without any sampling, so they have no interval (`"exact": true`)."""
    logits = np.where(np.arange(4) == 0, 0.0, -6e4) + np.zeros((len(rows.labels), 1))
    return score_clean(logits, rows, n_boot=0)


# -- from predictions to a record ------------------------------------------------------------------


def summarize(predictions: Arrays, metas: Sequence[Json], *, n_boot: int = 2000) -> Record:
    """The record (DESIGN §6) of one (model, protocol) from its pooled predictions and what was done
    for each run.

    Args:
        predictions: the arrays of `<protocol>_predictions.npz`.
        metas: one JSON object a fold and seed (`schema.Run`). They are kept whole in the record's
            `units`, so that a later run can be pooled with them.

    Raises:
        UserError: the runs differ in data, profile, cohort or what they are runs of, or rows have
            no run.
    """
    metas = sorted(metas, key=lambda meta: (meta["fold"], meta["seed"]))
    runs = [Run.from_json(meta, f"run {number}") for number, meta in enumerate(metas)]
    _check_pooling(predictions, runs)
    rows = Rows.of(predictions)
    record = _origin(runs)
    for variant in variants_of(predictions):
        budgets = [run.of_variant(variant).get("attacks", {}) for run in runs]
        blocks = _evaluate(predictions, variant, rows, budgets, n_boot)
        if variant is None:
            record |= blocks
        else:
            record.setdefault("variants", {})[variant] = {"variant": variant, **blocks}
    record["sanity"] = [
        {**check.to_json(), "fold": run.fold, "seed": run.seed}
        for run in runs
        for check in run.sanity or []
    ]
    if "clean" in predictions:
        record |= _without_search_patients(predictions, runs, rows, n_boot)
        record |= _calibrated(predictions, runs, rows, n_boot)
    record["constant_answer"] = constant_answer(rows)
    record["units"] = metas
    return Record.from_json(record, f"the record of {runs[0].model}")


def _check_pooling(predictions: Arrays, runs: Sequence[Run]) -> None:
    for name in AGREED:
        values = dict.fromkeys(str(getattr(run, name)) for run in runs)
        if len(values) > 1:
            raise UserError(
                f"The runs of one record differ in {name} ({', '.join(values)}); they cannot be "
                "pooled: run the missing folds with one setting, or remove the older runs."
            )
    have = {(run.fold, run.seed) for run in runs}
    rows = set(zip(predictions["fold"].tolist(), predictions["seed"].tolist(), strict=True))
    if rows - have:
        raise UserError(
            f"Predictions hold rows of fold and seed {sorted(rows - have)} for which no run says "
            "how they were made; do these runs again."
        )


def _origin(runs: Sequence[Run]) -> Json:
    """Where a record comes from: what its runs agree on, and what they differ in, joined."""
    first = runs[0]
    settings = [
        {key: value for key, value in (run.config or {}).items() if key not in ("fold", "seed")}
        for run in runs
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        **{name: getattr(first, name) for name in AGREED if name != "cohort_sha256"},
        "init": _joined(run.init for run in runs),
        "search": _joined(run.search for run in runs),
        "folds": sorted({run.fold for run in runs}),
        "seeds": sorted({run.seed for run in runs}),
        "cohort_sha256": first.cohort_sha256,
        "config": merge_meta(settings),
        "environment": merge_meta([run.environment or {} for run in runs]),
        "hardware": _joined(run.hardware for run in runs),
        "wall_seconds": {
            phase: round(sum((run.wall_seconds or {}).get(phase, 0) for run in runs), 1)
            for phase in ("train", "attack")
        },
        "git_commit": _joined(run.git_commit for run in runs),
        "git_dirty": any(run.git_dirty is not False for run in runs),
    }


def _evaluate(
    predictions: Arrays, variant: str | None, rows: Rows, budgets: Sequence[Json], n_boot: int
) -> Json:
    """The `clean`, `attacks`, `worst_case` and `other_norms` blocks of one variant of a model.

    Args:
        budgets: for each run, eps → attack → its budget and cost.
    """
    clean = clean_of(predictions, variant)
    clean_block = score_clean(clean, rows, n_boot)
    clean_block["recall_3"] = score_recalls(clean, rows, n_boot)
    blocks: Json = {"clean": clean_block, "attacks": {}, "worst_case": {}, "other_norms": {}}
    up_to_here: list[np.ndarray] = []
    for eps, attacks in attacks_of(predictions, variant).items():
        linf: Arrays = {}
        for name, logits in attacks.items():
            meta = merge_meta([budget.get(eps, {}).get(name, {}) for budget in budgets])
            block = _score_attack(logits, rows, meta, n_boot)
            if block["norm"] == "linf":
                linf[name] = logits
                blocks["attacks"].setdefault(eps, {})[name] = block
            else:
                other = blocks["other_norms"].setdefault(block["norm"], {})
                other.setdefault(eps, {})[name] = block
        if not linf:
            continue
        blocks["worst_case"][eps] = score_worst_case(clean, linf, rows, n_boot)
        # A smaller ball lies inside a larger one, so what an attack misclassified there counts
        # here: the curve over eps never rises.
        up_to_here += linf.values()
        four, three, covered = robust_decisions(clean, up_to_here, rows.labels)
        part = rows.take(covered)
        blocks["worst_case"][eps]["union"] = metrics.score_robust(
            four[covered], three[covered], part.labels, part.patients, n_boot=n_boot
        )
    return blocks


def merge_meta(metas: Sequence[Json]) -> Json:
    """Metadata of one attack (or settings) in several runs as one: sums of `ADDED`, else the value
    or the list of distinct values."""
    merged: Json = {}
    for key in dict.fromkeys(key for meta in metas for key in meta):
        values: list[Any] = [
            meta.get(key, BEFORE.get(key)) for meta in metas if key in meta or key in BEFORE
        ]
        distinct = [value for place, value in enumerate(values) if value not in values[:place]]
        if key in ADDED:
            merged[key] = sum(values)
        else:
            merged[key] = distinct[0] if len(distinct) == 1 else distinct
    return merged


def _joined(values: Iterable[str | None]) -> str:
    return " + ".join(dict.fromkeys(str(value) for value in values))


def _without_search_patients(
    predictions: Arrays, runs: Sequence[Run], rows: Rows, n_boot: int
) -> Json:
    """Scores without the patients on whom hyperparameters were chosen and who are test patients of
    another fold; empty where no search looked at any."""
    patients = sorted({patient for run in runs for patient in run.search_patients or ()})
    if not patients or not any((run.search or "").startswith("fold") for run in runs):
        return {}
    kept = ~np.isin(rows.patients, patients)
    part, clean = rows.take(kept), predictions["clean"][kept]
    block = score_clean(clean, part, n_boot) | {"n_people_left_out": len(patients)}
    eps = (runs[0].config or {}).get("headline_eps", RunConfig.headline_eps)
    norms = {
        name: meta.get("norm", "linf")
        for run in runs
        for name, meta in (run.attacks or {}).get(eps, {}).items()
    }
    linf = {
        name: logits[kept]
        for name, logits in attacks_of(predictions).get(eps, {}).items()
        if norms.get(name, "linf") == "linf"
    }
    if linf:
        block["worst_case"] = {eps: score_worst_case(clean, linf, part, n_boot)}
    return {"clean_without_search_people": block}


def temperatures(predictions: Arrays, runs: Sequence[Run]) -> np.ndarray | None:
    """The validation temperature of each row's run (N,), or None unless every run has one."""
    fitted = {(run.fold, run.seed): run.temperature for run in runs}
    if None in fitted.values():
        return None
    of_rows = zip(predictions["fold"].tolist(), predictions["seed"].tolist(), strict=True)
    return np.array([fitted[fold_and_seed] for fold_and_seed in of_rows])


def _calibrated(predictions: Arrays, runs: Sequence[Run], rows: Rows, n_boot: int) -> Json:
    scale = temperatures(predictions, runs)
    if scale is None:
        return {}
    scores = metrics.score(
        predictions["clean"] / scale[:, None], rows.labels, rows.patients, n_boot=n_boot
    )
    return {"clean_calibrated": {"ece": scores["ece"], **rows.size()}}


# -- files -----------------------------------------------------------------------------------------


def write_record(path: Path | str, record: Record, predictions: Arrays) -> None:
    """Predictions, then the record: a kill between the two leaves rows that no record claims, never
    the reverse."""
    with atomic_path(predictions_path(path)) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **predictions)
    write_json(path, record.to_json())


def read_record(path: Path | str) -> Record:
    """The record at a path; its predictions are read when first asked for.

    Raises:
        UserError: the file does not fit `schema.Record`, or is of another schema version.
    """
    return Record.from_json(read_json(path), str(path), Path(path))


def read_records(root: Path | str) -> Records:
    """(model, protocol) → record, for every record under `root`/assets that exists, in the order of
    tables."""
    paths = {
        (model, protocol): Path(root) / "assets" / model / f"{protocol}.json"
        for model in RECORDED
        for protocol in PROTOCOLS
    }
    return {key: read_record(path) for key, path in paths.items() if path.is_file()}


def without_rehearsals(records: dict[Key, Record]) -> dict[Key, Record]:
    """The records of more than a `demo` run, once a trained model has one: a rehearsal among
    results would be read as one."""
    results = {key: record for key, record in records.items() if record.profile != "demo"}
    return results if any(record.model in MODELS for record in results.values()) else records
