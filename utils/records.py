"""Predictions and unit metadata in, one record of a (model, protocol) out; and reading committed records back.

Arrays of `<protocol>_predictions.npz` (rows pooled over folds and seeds): `labels`, `fold`, `seed`, `patient_id`,
`slice_index`, `file_sha256`, `clean` and one `"<eps>:<attack>"` a run attack. A model with several forms (Baselines,
Ensemble, Sequence) prefixes its logits with the form's name, `"<variant>/clean"` and `"<variant>/<eps>:<attack>"`; its
record then holds `variants`: name → the same `clean`, `attacks`, `worst_case` and `other_norms` that a plain record
holds at its top. A record may have both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from utils import metrics
from utils.config import RunConfig, parse_eps
from utils.utils_funcs import MODELS, PROTOCOLS, UserError, atomic_path, read_json, write_json

SCHEMA_VERSION = 1
#: Everything that can have a record, in the order of tables and figures.
RECORDED = ("Baselines", *MODELS, "Ensemble", "Sequence")
Arrays = dict[str, np.ndarray]
Key = TypeVar("Key")

#: Units of one record must agree on these: their rows are pooled into one score.
AGREED = ("model", "regime", "protocol", "data", "profile", "cohort_sha256")
#: Attack metadata that adds up over units; every other entry is kept once, or as the list of its distinct values.
ADDED = ("n_attacked", "n_set", "n_unchanged", "seconds", "forward_passes", "backward_passes")
#: Attack metadata that units of earlier code do not name, and what it was there.
BEFORE = {"precision": "fp32"}
PATIENT_UNDER_ATTACK = ("balanced_accuracy_3", "balanced_accuracy", "accuracy", "auroc")


# ------------------------------------------------------------------------------------------------- predictions


@dataclass(frozen=True)
class Rows:
    """Who each row of a predictions file is: labels, people and training seeds, each (N,)."""

    labels: np.ndarray
    patients: np.ndarray
    seeds: np.ndarray

    @classmethod
    def of(cls, predictions: Arrays) -> Rows:
        return cls(
            predictions["labels"].astype(np.int64),
            predictions["patient_id"].astype(np.int64),
            predictions["seed"].astype(np.int64),
        )

    def take(self, rows: np.ndarray) -> Rows:
        return Rows(self.labels[rows], self.patients[rows], self.seeds[rows])

    def size(self) -> dict[str, int]:
        return {"n_slices": len(self.labels), "n_people": len(np.unique(self.patients))}


def variants_of(predictions: Arrays) -> list[str | None]:
    """The forms a predictions file holds, in file order; None is the plain one."""
    return [
        name.removesuffix("clean").removesuffix("/") or None
        for name in predictions
        if name == "clean" or name.endswith("/clean")
    ]


def attacks_of(predictions: Arrays, variant: str | None = None) -> dict[str, dict[str, np.ndarray]]:
    """eps → attack → logits (N, 4), eps ascending."""
    prefix = f"{variant}/" if variant else ""
    others = tuple(f"{name}/" for name in variants_of(predictions) if name and name != variant)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, logits in predictions.items():
        if ":" in name and name.startswith(prefix) and not name.startswith(others):
            eps, attack = name.removeprefix(prefix).split(":", 1)
            found.setdefault(eps, {})[attack] = logits
    return dict(sorted(found.items(), key=lambda item: parse_eps(item[0])))


def clean_of(predictions: Arrays, variant: str | None = None) -> np.ndarray:
    return predictions[f"{variant}/clean" if variant else "clean"]


def robust_decisions(
    clean: np.ndarray, attacked: list[np.ndarray], labels: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Whether each image's four-class and three-class decision is right on the clean image and under every attack that
    was run on it, and whether any was: three bool (N,) arrays. The minimum is taken per image, over the attacks."""
    four, three = metrics.correct(clean, labels)
    covered = np.zeros(len(labels), dtype=bool)
    for logits in attacked:
        run = metrics.scored(logits)
        right_four, right_three = metrics.correct(logits, labels)
        four, three, covered = (
            four & (right_four | ~run),
            three & (right_three | ~run),
            covered | run,
        )
    return four, three, covered


def _most_wrong(clean: np.ndarray, attacked: list[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """Per image the logits, clean or attacked, whose disease margin lies furthest towards the wrong side."""
    worst, wrong = np.array(clean, dtype=np.float64), np.where(labels > 0, -1, 1)
    for logits in attacked:
        run = metrics.scored(logits)
        further = run.copy()
        further[run] = (
            wrong[run] * (metrics.disease_margin(logits[run]) - metrics.disease_margin(worst[run]))
            > 0
        )
        worst[further] = logits[further]
    return worst


# ------------------------------------------------------------------------------------------------------ scoring


def score_rows(logits: np.ndarray, rows: Rows, n_boot: int) -> dict:
    """{"slice": scores, "person": scores, "n_slices", "n_people"} of the rows inside the declared set."""
    declared = metrics.scored(logits)
    who = rows.take(declared)
    options = {"n_boot": n_boot}
    return {
        "slice": metrics.score(logits[declared], who.labels, who.patients, **options),
        "person": metrics.score_patients(
            logits[declared], who.labels, who.patients, seeds=who.seeds, **options
        ),
        **who.size(),
    }


def recalls_of(logits: np.ndarray, rows: Rows, n_boot: int) -> dict:
    """{"slice", "person"}: recall of each of the three classes with its interval. Balanced accuracy is their mean, and
    hides which class a model never answers."""
    declared = metrics.scored(logits)
    who = rows.take(declared)
    by_patient = metrics.by_patient(logits[declared], who.labels, who.patients, who.seeds)
    return {
        "slice": metrics.recalls(logits[declared], who.labels, who.patients, n_boot=n_boot),
        "person": metrics.recalls(*by_patient, n_boot=n_boot),
    }


def _score_attack(logits: np.ndarray, rows: Rows, meta: dict, n_boot: int) -> dict:
    scores = score_rows(logits, rows, n_boot)
    patient = {name: scores["person"][name] for name in PATIENT_UNDER_ATTACK}
    return {
        **scores["slice"],
        "person": patient,
        "n_slices": scores["n_slices"],
        "n_people": scores["n_people"],
        "n_attacked": scores["n_slices"],
        "norm": "linf",
        **{k: v for k, v in meta.items() if k != "n_slices"},
    }


def score_worst_case(
    clean: np.ndarray, attacked: dict[str, np.ndarray], rows: Rows, n_boot: int
) -> dict:
    """Worst case over `attacked` (name → logits, one norm and eps), on the images that any of them was run on.

    AUROC is given where a binary-margin attack (`*_binary`) ran: each image's score is then the most wrong one that any
    attack reached, since an attacker who wants a wrong ranking may choose among them.
    """
    four, three, covered = robust_decisions(clean, list(attacked.values()), rows.labels)
    who = rows.take(covered)
    result = metrics.score_robust(
        four[covered], three[covered], who.labels, who.patients, n_boot=n_boot
    )
    binary = [logits for name, logits in attacked.items() if name.endswith("_binary")]
    if binary:
        ranked = np.any([metrics.scored(logits) for logits in binary], axis=0)
        worst = _most_wrong(clean, list(attacked.values()), rows.labels)[ranked]
        part = rows.take(ranked)
        result["auroc"] = metrics.score(worst, part.labels, part.patients, n_boot=n_boot)["auroc"]
    else:
        result["auroc"] = {"value": None, "ci": None, "n": 0}
    return {**result, **who.size(), "attacks": sorted(attacked)}


def _evaluate(
    predictions: Arrays, variant: str | None, rows: Rows, metas: list[dict], n_boot: int
) -> dict:
    """The `clean`, `attacks`, `worst_case` and `other_norms` blocks of one form of a model."""
    clean = clean_of(predictions, variant)
    blocks: dict = {
        "clean": score_rows(clean, rows, n_boot) | {"recall_3": recalls_of(clean, rows, n_boot)},
        "attacks": {},
        "worst_case": {},
        "other_norms": {},
    }
    so_far: list[np.ndarray] = []
    for eps, attacks in attacks_of(predictions, variant).items():
        within: dict[str, np.ndarray] = {}
        for name, logits in attacks.items():
            block = _score_attack(
                logits,
                rows,
                _merge_meta([meta.get(eps, {}).get(name, {}) for meta in metas]),
                n_boot,
            )
            if block["norm"] == "linf":
                within[name] = logits
                blocks["attacks"].setdefault(eps, {})[name] = block
            else:
                blocks["other_norms"].setdefault(block["norm"], {}).setdefault(eps, {})[name] = (
                    block
                )
        if not within:
            continue
        blocks["worst_case"][eps] = score_worst_case(clean, within, rows, n_boot)
        so_far += within.values()
        four, three, covered = robust_decisions(clean, so_far, rows.labels)
        who = rows.take(covered)
        # A smaller ball lies inside a larger one, so what fell there has fallen here: the curve that never rises.
        blocks["worst_case"][eps]["union"] = metrics.score_robust(
            four[covered], three[covered], who.labels, who.patients, n_boot=n_boot
        )
    return blocks


def _merge_meta(metas: list[dict]) -> dict:
    merged = {}
    for key in dict.fromkeys(key for meta in metas for key in meta):
        values = [meta.get(key, BEFORE.get(key)) for meta in metas if key in meta or key in BEFORE]
        merged[key] = sum(values) if key in ADDED else _one_or_all(values)
    return merged


def _one_or_all(values: list) -> object:
    distinct = [value for index, value in enumerate(values) if value not in values[:index]]
    return distinct[0] if len(distinct) == 1 else distinct


def _joined(values: list) -> str:
    return " + ".join(dict.fromkeys(str(value) for value in values))


# ------------------------------------------------------------------------------------------------------ records


def summarise(predictions: Arrays, runs: list[dict], *, n_boot: int = 2000) -> dict:
    """The record (DESIGN §6) of one (model, protocol) from its pooled predictions and its units' metadata.

    Args:
        predictions: the arrays of `<protocol>_predictions.npz`.
        units: one dictionary a (fold, seed). Read: model, regime, protocol, data, profile, init, search,
            search_people, fold, seed, cohort_sha256, config, environment, hardware, wall_seconds {"train", "attack"},
            git_commit, git_dirty, attacks {eps: {attack: meta}}, variants {name: {"attacks": …}}, sanity, and
            optionally temperature (fitted on that unit's validation logits). They stand whole in the record's `units`,
            so that a later unit can be pooled with them.

    Raises:
        StudyError: the units differ in data, profile, cohort or what they are units of, or rows have no unit.
    """
    runs = sorted(runs, key=lambda run: (run["fold"], run["seed"]))
    _check(predictions, runs)
    rows = Rows.of(predictions)
    first = runs[0]
    record = {
        "schema_version": SCHEMA_VERSION,
        **{key: first.get(key) for key in AGREED[:-1]},
        "init": _joined([run["init"] for run in runs]),
        "search": _joined([run.get("search") for run in runs]),
        "folds": sorted({run["fold"] for run in runs}),
        "seeds": sorted({run["seed"] for run in runs}),
        "cohort_sha256": first.get("cohort_sha256"),
        "config": _merge_meta(
            [
                {k: v for k, v in run.get("config", {}).items() if k not in ("fold", "seed")}
                for run in runs
            ]
        ),
        "environment": _merge_meta([run.get("environment", {}) for run in runs]),
        "hardware": _joined([run.get("hardware") for run in runs]),
        "wall_seconds": {
            phase: round(sum(run.get("wall_seconds", {}).get(phase, 0) for run in runs), 1)
            for phase in ("train", "attack")
        },
        "git_commit": _joined([run.get("git_commit") for run in runs]),
        "git_dirty": any(run.get("git_dirty", True) for run in runs),
    }
    for variant in variants_of(predictions):
        metas = [
            (run.get("variants", {}).get(variant, {}) if variant else run).get("attacks", {})
            for run in runs
        ]
        blocks = _evaluate(predictions, variant, rows, metas, n_boot)
        record.update(
            blocks
            if variant is None
            else {
                "variants": {**record.get("variants", {}), variant: {"variant": variant, **blocks}}
            }
        )
    record["sanity"] = [
        {**check, "fold": run["fold"], "seed": run["seed"]}
        for run in runs
        for check in run.get("sanity", [])
    ]
    if "clean" in predictions:
        record.update(_without_search_patients(predictions, runs, rows, n_boot))
        record.update(_calibrated(predictions, runs, rows, n_boot))
    record["constant_answer"] = constant_answer(rows)
    record["units"] = runs
    return record


def constant_answer(rows: Rows) -> dict:
    """Clean scores of always answering Non on these images: the control of every table. No attack moves it. They are
    known without any sampling, so they have no interval (`"exact": true`)."""
    logits = np.where(np.arange(4) == 0, 0.0, -6e4) + np.zeros((len(rows.labels), 1))
    return score_rows(logits, rows, n_boot=0)


def _check(predictions: Arrays, runs: list[dict]) -> None:
    for key in AGREED:
        values = dict.fromkeys(str(run.get(key)) for run in runs)
        if len(values) > 1:
            raise UserError(
                f"The units of one record differ in {key} ({', '.join(values)}); they cannot be pooled: "
                "run the missing folds with one setting, or remove the older units."
            )
    have = {(run["fold"], run["seed"]) for run in runs}
    rows = set(zip(predictions["fold"].tolist(), predictions["seed"].tolist(), strict=True))
    if rows - have:
        raise UserError(
            f"Predictions hold rows of fold and seed {sorted(rows - have)} for which no unit tells how "
            "they were made; run these units again."
        )


def _without_search_patients(
    predictions: Arrays, runs: list[dict], rows: Rows, n_boot: int
) -> dict:
    """Scores without the people on whom hyperparameters were chosen and who are test people of another fold."""
    patients = sorted({int(patient) for run in runs for patient in run.get("search_people") or ()})
    if not patients or not any(str(run.get("search", "")).startswith("fold") for run in runs):
        return {}
    kept = ~np.isin(rows.patients, patients)
    who, clean = rows.take(kept), predictions["clean"][kept]
    entry = score_rows(clean, who, n_boot) | {"n_people_left_out": len(patients)}
    eps = runs[0].get("config", {}).get("headline_eps", RunConfig.headline_eps)
    norms = {
        name: meta.get("norm", "linf")
        for run in runs
        for name, meta in run.get("attacks", {}).get(eps, {}).items()
    }
    within = {
        name: logits[kept]
        for name, logits in attacks_of(predictions).get(eps, {}).items()
        if norms.get(name, "linf") == "linf"
    }
    if within:
        entry["worst_case"] = {eps: score_worst_case(clean, within, who, n_boot)}
    return {"clean_without_search_people": entry}


def temperatures(predictions: Arrays, runs: list[dict]) -> np.ndarray | None:
    """The validation temperature of each row's unit (N,), or None unless every unit has one."""
    fitted = {(run["fold"], run["seed"]): run.get("temperature") for run in runs}
    if None in fitted.values():
        return None
    return np.array(
        [
            fitted[key]
            for key in zip(predictions["fold"].tolist(), predictions["seed"].tolist(), strict=True)
        ]
    )


def _calibrated(predictions: Arrays, runs: list[dict], rows: Rows, n_boot: int) -> dict:
    scale = temperatures(predictions, runs)
    if scale is None:
        return {}
    scores = metrics.score(
        predictions["clean"] / scale[:, None], rows.labels, rows.patients, n_boot=n_boot
    )
    return {"clean_calibrated": {"ece": scores["ece"], **rows.size()}}


# ------------------------------------------------------------------------------------------------- reading back


@dataclass(frozen=True)
class Entry:
    """One committed record with the predictions that bear it (loaded when asked for)."""

    path: Path
    record: dict

    @property
    def model(self) -> str:
        return self.record["model"]

    @property
    def protocol(self) -> str:
        return self.record["protocol"]

    @property
    def control(self) -> dict:
        return self.record["constant_answer"]

    @cached_property
    def predictions(self) -> Arrays:
        return read_predictions(self.path)

    @cached_property
    def rows(self) -> Rows:
        return Rows.of(self.predictions)


def predictions_path(record: Path | str) -> Path:
    """`<protocol>_predictions.npz` beside `<protocol>.json`."""
    return Path(record).with_name(f"{Path(record).stem}_predictions.npz")


def read_predictions(record: Path | str) -> Arrays:
    """The predictions beside the record at this path."""
    path = predictions_path(record)
    if not path.is_file():
        raise UserError(
            f"{record} has no {path.name} beside it; restore that file or run the model again."
        )
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def write_record(path: Path | str, record: dict, predictions: Arrays) -> None:
    """Predictions, then the record: a kill between the two leaves rows that no record claims, never the reverse."""
    with atomic_path(predictions_path(path)) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **predictions)
    write_json(path, record)


def read_record(path: Path | str) -> dict:
    """A record, refused if another version of this repository wrote it in another shape."""
    record = read_json(path)
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema_version {version}, this version of the repository reads {SCHEMA_VERSION}; "
            "run the model again, or check out the version that wrote the record."
        )
    return record


def read_entries(root: Path | str) -> dict[tuple[str, str], Entry]:
    """(model, protocol) → entry, for every record under `root`/assets that exists, in the order of tables."""
    paths = {
        (model, protocol): Path(root) / "assets" / model / f"{protocol}.json"
        for model in RECORDED
        for protocol in PROTOCOLS
    }
    return {key: Entry(path, read_record(path)) for key, path in paths.items() if path.is_file()}


def without_rehearsals(entries: dict[Key, Entry]) -> dict[Key, Entry]:
    """The entries of more than a `demo` run, once a trained model has one: a rehearsal beside results would be read as one."""
    earnest = {key: entry for key, entry in entries.items() if entry.record["profile"] != "demo"}
    return earnest if any(entry.model in MODELS for entry in earnest.values()) else entries


# ----------------------------------------------------------------------------------------------- rows of a study

CONSTANT = "Constant answer"
#: A member with more weight than this leaves the others no say.
ONLY_MEMBER = 0.995


@dataclass(frozen=True)
class TableRow:
    """One line of every table and figure: a model, a form of one, or the constant answer.

    `blocks` and `entries`: protocol → its {"clean", "worst_case", …} and the entry these come from.
    """

    number: int
    model: str
    variant: str | None
    blocks: dict[str, dict]
    entries: dict[str, Entry]

    @property
    def name(self) -> str:
        if self.model == "Baselines" and self.variant:
            return self.variant.replace("_", " ")
        return f"{self.model} · {self.variant}{self._only_member}" if self.variant else self.model

    @property
    def _only_member(self) -> str:
        """What an ensemble is whose fitted weights all lie on one member: no ensemble, and its name says so."""
        mixed = [
            run["variants"][self.variant].get("weights", {}).get("weights", {})
            for entry in self.entries.values()
            for run in entry.record["units"]
            if self.variant in run.get("variants", {})
        ]
        alone = [
            max(weights, key=weights.get)
            for weights in mixed
            if max(weights.values(), default=0) > ONLY_MEMBER
        ]
        return (
            f" (all weight on {' or '.join(dict.fromkeys(alone))})"
            if mixed and len(alone) == len(mixed)
            else ""
        )

    @property
    def trained(self) -> bool:
        return self.model not in (CONSTANT, "Baselines")

    @property
    def counts_patients(self) -> bool:
        """Whether a decision of this row is a person's, not a slice's."""
        return self.model == "Sequence"

    def checks(self, protocol: str) -> list[dict]:
        """The sanity checks of this row's evaluation, and of no other form in the same record."""
        return [
            check
            for check in self.entries[protocol].record["sanity"]
            if self.variant is None or check.get("variant") == self.variant
        ]

    def folds(self, protocol: str) -> list[int]:
        """The folds that this row was scored on: a form may be missing from some of its record's."""
        return sorted(
            {
                run["fold"]
                for run in self.entries[protocol].record["units"]
                if self.variant is None or self.variant in run.get("variants", {})
            }
        )


def headline_eps(record: dict) -> str:
    eps = record.get("config", {}).get("headline_eps", RunConfig.headline_eps)
    return eps if isinstance(eps, str) else RunConfig.headline_eps


def _constant_blocks(entry: Entry) -> dict:
    scores = entry.control["slice"]
    size = {key: entry.control[key] for key in ("n_slices", "n_people")}
    worst = {**{name: scores[name] for name in PATIENT_UNDER_ATTACK}, **size, "attacks": []}
    return {
        "clean": entry.control,
        "attacks": {},
        "worst_case": {headline_eps(entry.record): worst},
        "other_norms": {},
    }


def table_rows(entries: dict[tuple[str, str], Entry]) -> list[TableRow]:
    """The constant answer, then every record and variant, numbered from 1 in the order of `RECORDED`."""
    if not entries:
        return []
    largest = {
        protocol: max(
            (e for e in entries.values() if e.protocol == protocol),
            key=lambda e: e.control["n_slices"],
        )
        for protocol in PROTOCOLS
        if any(name == protocol for _, name in entries)
    }
    rows = [
        TableRow(1, CONSTANT, None, {p: _constant_blocks(e) for p, e in largest.items()}, largest)
    ]
    for model in RECORDED:
        own = {protocol: entry for (name, protocol), entry in entries.items() if name == model}
        forms = dict.fromkeys(
            form
            for entry in own.values()
            for form in ([None] if "clean" in entry.record else [])
            + [*entry.record.get("variants", {})]
        )
        for form in forms:
            blocks = {
                protocol: entry.record["variants"][form] if form else entry.record
                for protocol, entry in own.items()
                if (form in entry.record.get("variants", {}) if form else "clean" in entry.record)
            }
            rows.append(TableRow(len(rows) + 1, model, form, blocks, {p: own[p] for p in blocks}))
    return rows


def provenance(entries: list[Entry]) -> str:
    """What every figure and table must say: `data: real · profile cpu · random init`."""

    def distinct(key: str) -> str:
        return " + ".join(dict.fromkeys(str(entry.record[key]) for entry in entries))

    trained = [entry for entry in entries if entry.model != "Baselines"]
    init = " + ".join(dict.fromkeys(str(entry.record["init"]) for entry in trained))
    return f"data: {distinct('data')} · profile {distinct('profile')}" + (
        f" · {init} init" if trained else ""
    )
