"""A record is read as it was written, and what does not fit is refused in one sentence that says
what to do."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from utils.evaluation.records import read_record, read_records, write_record
from utils.evaluation.schema import (
    REMEDY,
    Arrays,
    Json,
    Record,
    predictions_path,
    read_predictions,
)
from utils.utils_funcs import ROOT, UserError

#: A committed record with everything in it: clean, attacks, worst case, checks, several runs.
WHOLE = ROOT / "assets" / "Resnet" / "patient.json"
COMMITTED = [record.path for record in read_records(ROOT).values()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A copy of a committed record with its predictions, to be damaged at will."""
    for file in (WHOLE, predictions_path(WHOLE)):
        shutil.copy(file, tmp_path / file.name)
    return tmp_path / WHOLE.name


@pytest.fixture(scope="module")
def written() -> Json:
    return json.loads(WHOLE.read_text(encoding="utf-8"))


def refused(read: Callable[[], object], *words: str) -> None:
    """Reading raises one sentence that holds these words and says what to do."""
    with pytest.raises(UserError) as error:
        read()
    sentence = str(error.value)
    assert all(word in sentence for word in words), sentence
    assert sentence.endswith(".") and not re.search(r"[.!?] [A-Z]", sentence), sentence
    assert REMEDY in sentence or "check out the version" in sentence, sentence


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_committed_record_is_written_as_it_was_read(path: Path, tmp_path: Path) -> None:
    record = read_record(path)
    write_record(tmp_path / "again.json", record, record.predictions)
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_keys_that_this_version_does_not_know_are_kept(written: Json, tmp_path: Path) -> None:
    more = copy.deepcopy(written) | {"remark": [1, {"of": "a later version"}]}
    more["clean"]["slice"]["accuracy"]["width"] = 0.1
    more["units"][0]["weather"] = None
    more["sanity"][0]["author"] = "somebody"
    more["worst_case"]["4/255"]["median"] = 3
    record = Record.from_json(more, "a record")
    assert record.to_json() == more
    assert Record.from_json(record.to_json(), "a record") == record


@pytest.mark.parametrize(
    "value, kind", [([], "a list"), ("text", "a text"), (3, "a number"), (None, "null")]
)
def test_a_file_that_holds_no_object_is_refused(path: Path, value: object, kind: str) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
    refused(lambda: read_record(path), str(path), kind, "expected an object")


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_another_schema_version_is_refused(path: Path, written: Json, version: object) -> None:
    path.write_text(json.dumps(written | {"schema_version": version}), encoding="utf-8")
    refused(lambda: read_record(path), f"schema_version {version}", "reads 1")


@pytest.mark.parametrize("key", ["model", "folds", "constant_answer", "sanity", "units"])
def test_a_missing_key_is_named(written: Json, key: str) -> None:
    rest = {name: value for name, value in written.items() if name != key}
    refused(lambda: Record.from_json(rest, "r.json"), "r.json lacks", key)


@pytest.mark.parametrize("key", ["clean", "attacks", "worst_case", "other_norms"])
def test_a_record_without_one_of_its_blocks_is_refused(written: Json, key: str) -> None:
    rest = {name: value for name, value in written.items() if name != key}
    refused(lambda: Record.from_json(rest, "r.json"), "r.json lacks scores")


def _set(*keys: str | int) -> Callable[[Json, object], None]:
    def change(record: Json, value: object) -> None:
        place = record
        for key in keys[:-1]:
            place = place[key]
        if value is ...:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "keys, value, words",
    [
        (("folds",), "0", ("folds is a text", "expected a list")),
        (("folds", 1), 1.5, ("folds[1] is a number", "expected a whole number")),
        (("git_dirty",), 0, ("git_dirty is a number", "expected true or false")),
        (("clean",), [], ("clean is a list", "expected an object")),
        (("clean", "n_slices"), ..., ("clean lacks n_slices",)),
        (("clean", "slice", "auroc"), 0.7, ("clean.slice.auroc is a number",)),
        (("clean", "slice", "auroc", "value"), ..., ("clean.slice.auroc lacks value",)),
        (("clean", "slice", "auroc", "ci"), [0.1], ("auroc.ci has 1 numbers", "two bounds")),
        (("clean", "slice", "auroc", "ci"), ["a", "b"], ("auroc.ci[0] is a text",)),
        (("attacks", "4/255", "pgd20"), None, ("attacks.4/255.pgd20 is null",)),
        (("attacks", "4/255", "pgd20", "n_attacked"), ..., ("pgd20 lacks n_attacked",)),
        (("worst_case", "4/255", "attacks"), {}, ("worst_case.4/255.attacks is an object",)),
        (("units", 0), "fold 0", ("units[0] is a text", "expected an object")),
        (("units", 1, "fold"), ..., ("units[1] lacks fold", "every run")),
        (("sanity", 0, "passed"), "yes", ("sanity[0].passed is a text",)),
    ],
)
def test_a_value_of_another_kind_is_named_with_its_place(
    written: Json, keys: tuple, value: object, words: tuple[str, ...]
) -> None:
    changed = copy.deepcopy(written)
    _set(*keys)(changed, value)
    refused(lambda: Record.from_json(changed, "r.json"), "r.json", *words)


# -- predictions -----------------------------------------------------------------------------------


def save(path: Path, arrays: Arrays) -> None:
    np.savez(predictions_path(path), **arrays)


def test_missing_predictions_are_refused(path: Path) -> None:
    predictions_path(path).unlink()
    refused(lambda: read_record(path).predictions, "patient_predictions.npz")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_predictions_are_refused(path: Path, share: float) -> None:
    file = predictions_path(path)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    refused(lambda: read_predictions(path), str(file), "damaged")


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_predictions_with_wrong_bytes_inside_are_refused(path: Path, place: float) -> None:
    file = predictions_path(path)
    whole = bytearray(file.read_bytes())
    start = int(place * len(whole))
    whole[start : start + 64] = bytes(64)
    file.write_bytes(whole)
    refused(lambda: read_predictions(path), str(file), "damaged")


@pytest.mark.parametrize("name", ["labels", "clean", "something"])
def test_predictions_that_hold_objects_are_never_unpickled(path: Path, name: str) -> None:
    save(path, {**read_predictions(path), name: np.array([{"a": 1}], dtype=object)})
    refused(lambda: read_predictions(path), "plain arrays")


def test_a_file_that_is_no_archive_of_arrays_is_refused(path: Path) -> None:
    with open(predictions_path(path), "wb") as file:
        np.save(file, np.zeros(3))
    refused(lambda: read_predictions(path), "plain arrays")


@pytest.mark.parametrize("name", ["labels", "fold", "patient_id", "file_sha256"])
def test_predictions_without_a_column_are_refused(path: Path, name: str) -> None:
    rows = {key: values for key, values in read_predictions(path).items() if key != name}
    save(path, rows)
    refused(lambda: read_record(path).predictions, f"lacks {name}")


@pytest.mark.parametrize("name", ["seed", "patient_id", "clean"])
def test_columns_of_other_lengths_are_refused(path: Path, name: str) -> None:
    rows = read_predictions(path)
    save(path, rows | {name: rows[name][:-1]})
    refused(lambda: read_record(path).predictions, name, f"expected {len(rows['labels'])} rows")


def test_logits_of_another_number_of_classes_are_refused(path: Path) -> None:
    rows = read_predictions(path)
    save(path, rows | {"clean": rows["clean"][:, :3]})
    refused(lambda: read_record(path).predictions, "clean of shape", "four logits")


def test_rows_that_are_not_those_of_the_record_are_refused(path: Path) -> None:
    rows = read_predictions(path)
    count = len(rows["labels"])
    save(path, {name: values[:-1] for name, values in rows.items()})
    refused(lambda: read_record(path).predictions, f"{count - 1} rows", f"the {count} slices")
    save(path, rows | {"fold": rows["fold"] + 1})
    refused(lambda: read_record(path).predictions, "fold and seed", "expected those of")
    save(path, rows | {"seed": rows["seed"] + 1})
    refused(lambda: read_record(path).predictions, "fold and seed", "expected those of")


@pytest.mark.parametrize("name", ["clean", "4/255:pgd20"])
def test_scores_without_their_logits_are_refused(path: Path, name: str) -> None:
    save(path, {key: values for key, values in read_predictions(path).items() if key != name})
    refused(lambda: read_record(path).predictions, f"lacks the logits of {name}")


def test_a_record_that_was_never_written_has_no_predictions(written: Json) -> None:
    with pytest.raises(ValueError, match="never written"):
        _ = Record.from_json(written, "r.json").predictions
