"""What a record holds, as dataclasses: record, run, check, and scores with their intervals.

Attributes follow the vocabulary of the code, JSON keys those of the committed files (`n_patients`
is the key `n_people`, `runs` is `units`); each field names its key where they differ. What no field
names is kept as it was read.
"""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from utils import metrics
from utils.config import RunConfig, parse_eps
from utils.utils_funcs import UserError

SCHEMA_VERSION = 1

#: What to do about a file that is not what it should be.
REMEDY = "restore that file, or run the model again"

Json = dict[str, Any]
#: Name of an array in a predictions file → the array.
Arrays = dict[str, np.ndarray]
#: From a JSON value and the place where it was found, named in errors, to the value of a field.
Reader = Callable[[Any, str], Any]


# -- reading JSON values ---------------------------------------------------------------------------


def _kind(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), "a number")


def _of_type(expected: str, *types: type) -> Reader:
    def read(value: Any, where: str) -> Any:
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise UserError(f"{where} is {_kind(value)}, expected {expected}; {REMEDY}.")
        return value

    return read


text = _of_type("a text", str)
integer = _of_type("a whole number", int)
number = _of_type("a number", int, float)
truth = _of_type("true or false", bool)
json_object = _of_type("an object", dict)
json_list = _of_type("a list", list)


def anything(value: Any, where: str) -> Any:
    """A reader that takes a value as it is."""
    return value


def or_null(read: Reader) -> Reader:
    """A reader that also takes null, which becomes None."""
    return lambda value, where: None if value is None else read(value, where)


def list_of(read: Reader) -> Reader:
    """A reader of lists whose items are read by `read`."""

    def read_all(value: Any, where: str) -> list:
        items = json_list(value, where)
        return [read(item, f"{where}[{place}]") for place, item in enumerate(items)]

    return read_all


def map_of(read: Reader) -> Reader:
    """A reader of objects whose values are read by `read`."""

    def read_all(value: Any, where: str) -> dict:
        return {
            key: read(item, f"{where}.{key}") for key, item in json_object(value, where).items()
        }

    return read_all


def interval(value: Any, where: str) -> tuple[float, float]:
    """A reader of a list of two numbers, the lower and the upper bound."""
    bounds = list_of(number)(value, where)
    if len(bounds) != 2:
        raise UserError(f"{where} has {len(bounds)} numbers, expected two bounds; {REMEDY}.")
    return bounds[0], bounds[1]


def _as_json(value: Any) -> Any:
    if isinstance(value, JsonObject):
        return value.to_json()
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return value


def key(read: Reader, name: str = "", *, optional: bool = False) -> Any:
    """A field that is read from a JSON key (`name`, if it is not the field's name) and is None
    where an optional one is missing."""
    metadata = {"read": read, "key": name}
    return field(default=None, metadata=metadata) if optional else field(metadata=metadata)


def optional_map(read: Reader, name: str = "") -> Any:
    """A field of an object whose values are read by `read`; empty where the key is missing."""
    return field(default_factory=dict, metadata={"read": map_of(read), "key": name})


def score_keys() -> Any:
    """A field of scores that lie among the other keys of their object, under the names of
    `metrics.METRICS`."""
    return field(metadata={"read": Score.from_json, "among": metrics.METRICS})


@dataclass(frozen=True, kw_only=True)
class JsonObject:
    """A dataclass whose fields are keys of one JSON object.

    source: the object that it was read from; keys that no field names are kept in it.
    """

    source: Json = field(default_factory=dict, repr=False)

    @classmethod
    def from_json(cls, found: Any, where: str) -> Self:
        """Reads and checks a JSON value.

        Args:
            where: what an error calls it, such as `assets/Resnet/patient.json: clean`.

        Raises:
            UserError: it is no object, lacks a key, or a value is of another kind than its field.
        """
        json_object(found, where)
        values, missing = {}, []
        for one in cls._fields():
            read, among = one.metadata["read"], one.metadata.get("among")
            if among:
                values[one.name] = {
                    name: read(found[name], f"{where}.{name}") for name in among if name in found
                }
            elif (name := one.metadata["key"] or one.name) in found:
                values[one.name] = read(found[name], f"{where}.{name}")
            elif one.default is one.default_factory is dataclasses.MISSING:
                missing.append(name)
        if missing:
            raise UserError(
                f"{where} lacks {', '.join(missing)}, which every {cls._title()} has; {REMEDY}."
            )
        return cls(**values, source=found)

    def to_json(self) -> Json:
        """The JSON object, in the order of keys in which it was read."""
        found = dict(self.source)
        for one in self._fields():
            value = getattr(self, one.name)
            name = one.metadata.get("key") or one.name
            if one.metadata.get("among"):
                found |= _as_json(value)
            elif value is not None and (value or name in found or one.default_factory is not dict):
                found[name] = _as_json(value)
            elif found.get(name) is not None:
                del found[name]
        return found

    @classmethod
    def _fields(cls) -> list[dataclasses.Field]:
        return [one for one in dataclasses.fields(cls) if "read" in one.metadata]

    @classmethod
    def _title(cls) -> str:
        return cls.__name__.lower()


# -- scores ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Score(JsonObject):
    """One score.

    value: None where it is undefined, such as AUROC with one side empty.
    ci: 95 % interval over resampled patients; None where undefined or known without sampling.
    p: of a difference: the two-sided p-value of 0.
    n_slices, n_patients: what a recall or a share was counted on.
    """

    value: float | None = key(or_null(number))
    ci: tuple[float, float] | None = key(or_null(interval), optional=True)
    p: float | None = key(number, optional=True)
    n_slices: int | None = key(integer, optional=True)
    n_patients: int | None = key(integer, "n_people", optional=True)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The interval; the value twice where it is known without sampling; None where
        undefined."""
        return self.ci or (None if self.value is None else (self.value, self.value))


#: Name of a metric → its score.
Scores = dict[str, Score]
read_scores: Reader = map_of(Score.from_json)


@dataclass(frozen=True, kw_only=True)
class CleanScores(JsonObject):
    """Scores of unattacked images.

    slice, patient: one decision a slice; one a patient, by the mean of its slices' probabilities.
    recalls: `slice` and `person` → recall of Non, of Very mild, and of Mild or Moderate.
    worst_case: eps → scores under attack of the same images, where they are a part of the record's.
    """

    slice: Scores = key(read_scores)
    patient: Scores = key(read_scores, "person")
    n_slices: int = key(integer)
    n_patients: int = key(integer, "n_people")
    recalls: dict[str, list[Score]] | None = key(
        map_of(list_of(Score.from_json)), "recall_3", optional=True
    )
    worst_case: dict[str, WorstCase] | None = key(
        lambda value, where: map_of(WorstCase.from_json)(value, where), optional=True
    )


@dataclass(frozen=True, kw_only=True)
class Calibrated(JsonObject):
    """The expected calibration error after temperature scaling on validation images."""

    ece: Score = key(Score.from_json)
    n_slices: int = key(integer)
    n_patients: int = key(integer, "n_people")


@dataclass(frozen=True, kw_only=True)
class AttackScores(JsonObject):
    """Scores under one attack at one eps.

    n_slices: images of the declared set; an image that was not attacked again keeps its wrong
        answer.
    n_attacked: images that the attack was run on.
    """

    scores: Scores = score_keys()
    n_slices: int = key(integer)
    n_patients: int = key(integer, "n_people")
    n_attacked: int = key(integer)
    norm: str = key(text)

    @property
    def view(self) -> str:
        """How the attack groups the logits: `four`, `three` or `binary`."""
        return self.source.get("view", "four")

    @property
    def seconds(self) -> float | None:
        """What the attack took on all runs; None where only some of them say so."""
        seconds = self.source.get("seconds")
        return seconds if isinstance(seconds, int | float) else None


@dataclass(frozen=True, kw_only=True)
class WorstCase(JsonObject):
    """Robust scores at one eps: an image counts as right if its decision withstood every attack.

    attacks: their names.
    union: the same over all attacks at this and at every smaller eps, whose balls lie inside this
        one.
    """

    scores: Scores = score_keys()
    n_slices: int = key(integer)
    n_patients: int = key(integer, "n_people")
    attacks: list[str] = key(list_of(text))
    union: Scores | None = key(read_scores, optional=True)


Attacks = dict[str, dict[str, AttackScores]]
read_attacks: Reader = map_of(map_of(AttackScores.from_json))


@dataclass(frozen=True, kw_only=True)
class Evaluation(JsonObject):
    """A model, or one variant of it, clean and under attack.

    attacks: eps → name → scores, of the L-infinity norm; worst_case: eps → scores.
    other_norms: norm → eps → name → scores.
    """

    clean: CleanScores = key(CleanScores.from_json)
    attacks: Attacks = key(read_attacks)
    worst_case: dict[str, WorstCase] = key(map_of(WorstCase.from_json))
    other_norms: dict[str, Attacks] = key(map_of(read_attacks))


# -- runs and records ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Check(JsonObject):
    """One line of the sanity table.

    name: of the check; figure: what it measured; note: what that means, in words.
    variant: of the ensemble or sequence model that was checked.
    """

    name: str = key(text, "check")
    passed: bool = key(truth)
    figure: Any = key(anything, optional=True)
    note: str | None = key(text, optional=True)
    fold: int | None = key(integer, optional=True)
    seed: int | None = key(integer, optional=True)
    variant: str | None = key(text, optional=True)


@dataclass(frozen=True, kw_only=True)
class Run(JsonObject):
    """What was done for one fold and seed.

    search_patients: ids of those on whom hyperparameters were chosen.
    attacks: eps → attack → its budget and cost; variants: name → what was done for it, with
        `attacks` likewise.
    temperature: fitted on this run's validation logits.
    history: one object an epoch. measures, leak_probe: of a fixed sample of the test images.
    """

    model: str = key(text)
    protocol: str = key(text)
    data: str = key(text)
    profile: str = key(text)
    init: str = key(text)
    fold: int = key(integer)
    seed: int = key(integer)
    regime: str | None = key(text, optional=True)
    search: str | None = key(or_null(text), optional=True)
    search_patients: list[int] | None = key(
        or_null(list_of(integer)), "search_people", optional=True
    )
    cohort_sha256: str | None = key(or_null(text), optional=True)
    config: Json | None = key(json_object, optional=True)
    environment: Json | None = key(json_object, optional=True)
    hardware: str | None = key(text, optional=True)
    wall_seconds: Json | None = key(json_object, optional=True)
    git_commit: str | None = key(text, optional=True)
    git_dirty: bool | None = key(truth, optional=True)
    attacks: Json | None = key(json_object, optional=True)
    variants: dict[str, Json] = optional_map(json_object)
    sanity: list[Check] | None = key(list_of(Check.from_json), optional=True)
    temperature: float | None = key(or_null(number), optional=True)
    history: list[Json] | None = key(or_null(list_of(json_object)), optional=True)
    best_epoch: int | None = key(or_null(integer), optional=True)
    measures: Json | None = key(or_null(json_object), optional=True)
    leak_probe: Json | None = key(or_null(json_object), optional=True)
    members: dict[str, Score] = optional_map(Score.from_json)
    diversity: dict[str, Scores] = optional_map(read_scores)

    def of_variant(self, name: str | None) -> Json:
        """What was done for a variant; the run's JSON for None; empty where it has no such
        variant."""
        return self.source if name is None else self.variants.get(name, {})


@dataclass(frozen=True)
class Rows:
    """Whose each row of a predictions file is: labels, patient ids and training seeds, each
    (N,)."""

    labels: np.ndarray
    patients: np.ndarray
    seeds: np.ndarray

    @classmethod
    def of(cls, predictions: Arrays) -> Rows:
        """The rows of a predictions file."""
        return cls(
            predictions["labels"].astype(np.int64),
            predictions["patient_id"].astype(np.int64),
            predictions["seed"].astype(np.int64),
        )

    def take(self, rows: np.ndarray) -> Rows:
        """Some of the rows, by number or by a bool (N,)."""
        return Rows(self.labels[rows], self.patients[rows], self.seeds[rows])

    @property
    def n_slices(self) -> int:
        """The number of rows."""
        return len(self.labels)

    @property
    def n_patients(self) -> int:
        """The number of different patients."""
        return len(np.unique(self.patients))

    def size(self) -> dict[str, int]:
        """Both counts under the keys that they have in records."""
        return {"n_slices": self.n_slices, "n_people": self.n_patients}


@dataclass(frozen=True, kw_only=True)
class Record(JsonObject):
    """Everything that was found of one model under one protocol, with the predictions that bear it.

    folds, seeds: those of its runs. config, environment: of its runs, with a list where they
        differ.
    clean, attacks, worst_case, other_norms: as in `Evaluation`; None in a record that has only
        variants.
    constant_answer: the scores of always answering Non on the same images.
    path: of the JSON file; None for a record that was never written.
    """

    schema_version: int = key(integer)
    model: str = key(text)
    regime: str | None = key(or_null(text))
    protocol: str = key(text)
    data: str = key(text)
    profile: str = key(text)
    init: str = key(text)
    search: str = key(text)
    folds: list[int] = key(list_of(integer))
    seeds: list[int] = key(list_of(integer))
    cohort_sha256: str | None = key(or_null(text))
    config: Json = key(json_object)
    environment: Json = key(json_object)
    hardware: str = key(text)
    wall_seconds: dict[str, float] = key(map_of(number))
    git_commit: str = key(text)
    git_dirty: bool = key(truth)
    clean: CleanScores | None = key(CleanScores.from_json, optional=True)
    attacks: Attacks | None = key(read_attacks, optional=True)
    worst_case: dict[str, WorstCase] | None = key(map_of(WorstCase.from_json), optional=True)
    other_norms: dict[str, Attacks] | None = key(map_of(read_attacks), optional=True)
    variants: dict[str, Evaluation] = optional_map(Evaluation.from_json)
    sanity: list[Check] = key(list_of(Check.from_json))
    clean_without_search_patients: CleanScores | None = key(
        CleanScores.from_json, "clean_without_search_people", optional=True
    )
    clean_calibrated: Calibrated | None = key(Calibrated.from_json, optional=True)
    constant_answer: CleanScores = key(CleanScores.from_json)
    runs: list[Run] = key(list_of(Run.from_json), "units")
    path: Path | None = field(default=None, compare=False)

    @classmethod
    def from_json(cls, found: Any, where: str, path: Path | None = None) -> Self:
        """As in `JsonObject`; a record of another schema version is refused before anything else is
        asked of it."""
        version = json_object(found, where).get("schema_version")
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{where} has schema_version {version}, this version of the repository reads "
                f"{SCHEMA_VERSION}; run the model again, or check out the version that wrote the "
                "record."
            )
        record = dataclasses.replace(super().from_json(found, where), path=path)
        blocks = (record.clean, record.attacks, record.worst_case, record.other_norms)
        if None in blocks and (not record.variants or any(block is not None for block in blocks)):
            raise UserError(
                f"{where} lacks scores: expected clean, attacks, worst_case and other_norms, or "
                f"variants that have them; {REMEDY}."
            )
        return record

    @property
    def evaluations(self) -> dict[str | None, Evaluation]:
        """Variant → its evaluation, that of the model itself (None) first."""
        found: dict[str | None, Evaluation] = {}
        if self.clean is not None:  # then none of the other blocks is missing (`from_json`)
            found[None] = Evaluation(
                clean=self.clean,
                attacks=self.attacks or {},
                worst_case=self.worst_case or {},
                other_norms=self.other_norms or {},
            )
        for name, evaluation in self.variants.items():
            found[name] = evaluation
        return found

    @property
    def evaluation(self) -> Evaluation:
        """The model's evaluation.

        Raises:
            ValueError: the record has only variants.
        """
        try:
            return self.evaluations[None]
        except KeyError:
            raise ValueError(f"The record of {self.model} has only variants.") from None

    @property
    def headline_eps(self) -> str:
        """The eps of the headline, such as `4/255`."""
        eps = self.config.get("headline_eps", RunConfig.headline_eps)
        return eps if isinstance(eps, str) else RunConfig.headline_eps

    @property
    def metas(self) -> list[Json]:
        """The runs as JSON, as `records.summarize` takes them."""
        return [run.to_json() for run in self.runs]

    @cached_property
    def predictions(self) -> Arrays:
        """The arrays of the predictions file, read when first asked for.

        Raises:
            UserError: the file is missing or damaged, or its rows are not those of the record.
        """
        if self.path is None:
            raise ValueError("A record that was never written has no predictions file.")
        found = read_predictions(self.path)
        _check_rows(self, self.path, found)
        return found

    @cached_property
    def rows(self) -> Rows:
        """Whose each row of the predictions is."""
        return Rows.of(self.predictions)


# -- predictions -----------------------------------------------------------------------------------

#: Arrays of every predictions file that say what a row is.
COLUMNS = ("labels", "fold", "seed", "patient_id", "slice_index", "file_sha256")


def predictions_path(record: Path | str) -> Path:
    """`<protocol>_predictions.npz` in the folder of `<protocol>.json`."""
    return Path(record).with_name(f"{Path(record).stem}_predictions.npz")


def read_predictions(record: Path | str) -> Arrays:
    """The predictions of the record at this path, never unpickled.

    Raises:
        UserError: the file is missing, cut short, or holds something else than arrays of numbers.
    """
    path = predictions_path(record)
    if not path.is_file():
        raise UserError(
            f"{record} comes without {path.name}, which holds its predictions; {REMEDY}."
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} is damaged or holds something else than plain arrays ({error}); {REMEDY}."
        ) from error


def _check_rows(record: Record, record_path: Path, found: Arrays) -> None:
    """Refuses predictions that are not those that a record was computed from, as far as their sizes
    and names show."""
    path = predictions_path(record_path)
    if missing := [name for name in COLUMNS if name not in found]:
        raise UserError(f"{path} lacks {', '.join(missing)}, which say what each row is; {REMEDY}.")
    count = len(found["labels"])
    for name, values in found.items():
        if len(values) != count or (name not in COLUMNS and values.shape != (count, 4)):
            raise UserError(
                f"{path} has {name} of shape {values.shape}, expected {count} rows as in labels, "
                f"and four logits a row; {REMEDY}."
            )
    if count != record.constant_answer.n_slices:
        raise UserError(
            f"{path} has {count} rows, expected the {record.constant_answer.n_slices} slices of "
            f"{record_path.name}; {REMEDY}."
        )
    rows = set(zip(found["fold"].tolist(), found["seed"].tolist(), strict=True))
    if rows != (runs := {(run.fold, run.seed) for run in record.runs}):
        raise UserError(
            f"{path} has rows of fold and seed {sorted(rows)}, expected those of "
            f"{record_path.name}, {sorted(runs)}; {REMEDY}."
        )
    for variant, evaluation in record.evaluations.items():
        prefix = f"{variant}/" if variant else ""
        sweeps = (evaluation.attacks, *evaluation.other_norms.values())
        claimed = [f"{prefix}clean"] + [
            f"{prefix}{eps}:{name}"
            for sweep in sweeps
            for eps, attacks_at in sweep.items()
            for name in attacks_at
        ]
        if absent := [name for name in claimed if name not in found]:
            raise UserError(
                f"{path} lacks the logits of {', '.join(absent[:3])}, which {record_path.name} "
                f"scores; {REMEDY}."
            )


def variants_of(predictions: Arrays) -> list[str | None]:
    """The variants that a predictions file holds, in file order; None is the model itself."""
    return [
        name.removesuffix("clean").removesuffix("/") or None
        for name in predictions
        if name == "clean" or name.endswith("/clean")
    ]


def attacks_of(predictions: Arrays, variant: str | None = None) -> dict[str, Arrays]:
    """eps → attack → logits (N, 4) of one variant, eps ascending."""
    prefix = f"{variant}/" if variant else ""
    others = tuple(f"{name}/" for name in variants_of(predictions) if name and name != variant)
    found: dict[str, Arrays] = {}
    for name, logits in predictions.items():
        if ":" in name and name.startswith(prefix) and not name.startswith(others):
            eps, attack = name.removeprefix(prefix).split(":", 1)
            found.setdefault(eps, {})[attack] = logits
    return dict(sorted(found.items(), key=lambda item: parse_eps(item[0])))


def clean_of(predictions: Arrays, variant: str | None = None) -> np.ndarray:
    """Logits (N, 4) of one variant on clean images."""
    return predictions[f"{variant}/clean" if variant else "clean"]
