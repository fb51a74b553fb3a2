"""Patients that two sets share are found in any orientation, strangers never, and none is named."""

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from utils import cohort as c
from utils import metrics
from utils.audit import ages, matching, page
from utils.cohort.linking import middle
from utils.cohort.similarity import features
from utils.evaluation import records
from utils.phantom import draw_cohort, write_phantom
from utils.utils_funcs import CLASSES, ROOT, UserError

PATIENTS = (12, 9, 7, 2)
PHANTOM = {
    "patients": PATIENTS,
    "slices": 10,
    "size": 96,
    "synthetic": 8,
    "duplicates": 3,
    "seed": 4,
}
HALF_TURN = (2, False)


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> c.RawImages:
    folder = tmp_path_factory.mktemp("shared") / "raw"
    return c.read_raw(write_phantom(folder, **PHANTOM))


@pytest.fixture(scope="module")
def cohort(raw) -> c.Cohort:
    return c.build_cohort(raw)[0]


@pytest.fixture(scope="module")
def strangers() -> list[np.ndarray]:
    """One slice each of 14 phantom people who are nobody of the cohort."""
    drawn = draw_cohort(
        patients=(6, 4, 2, 2), slices=10, size=96, synthetic=0, duplicates=0, seed=77
    )
    return [drawn.images[i] for i in np.flatnonzero(drawn.slice_index == 5)]


def seen_elsewhere(
    image: np.ndarray, orientation: tuple[int, bool], quality: int = 85
) -> np.ndarray:
    """The slice as another set would hold it: turned, with another margin and aspect,
    compressed."""
    turns, mirrored = orientation
    image = np.rot90(image[:, ::-1] if mirrored else image, -turns)
    image = np.pad(image, ((9, 4), (2, 13)))
    buffer = io.BytesIO()
    Image.fromarray(image).resize((130, 168), Image.Resampling.BICUBIC).save(
        buffer, "JPEG", quality=quality
    )
    return np.asarray(Image.open(buffer))


def one_slice_each(
    raw: c.RawImages, cohort: c.Cohort, patients: Sequence[int], level: int = 4
) -> list[np.ndarray]:
    at_level = (cohort.kind == "real") & (cohort.slice_index == level)
    return [
        raw.images[np.flatnonzero(at_level & (cohort.patient_id == who))[0]] for who in patients
    ]


def other_set(images: Sequence[np.ndarray]) -> matching.OtherSet:
    number = np.arange(len(images))
    return matching.OtherSet(list(images), number, tuple(f"SUBJ{i:04d}" for i in number))


def shared_half(cohort: c.Cohort) -> np.ndarray:
    """Every second patient, and all of class 1."""
    ids = np.unique(cohort.patient_id[cohort.kind == "real"])
    label = np.array([cohort.label[cohort.patient_id == who][0] for who in ids])
    return ids[(ids % 2 == 0) | (label == 1)]


# ------------------------------------------------------------------------------------- finding


@pytest.mark.parametrize("orientation", matching.ORIENTATIONS)
def test_everybody_shared_is_found_and_no_stranger_in_every_orientation(
    raw, cohort, strangers, orientation
):
    patients = shared_half(cohort)
    images = one_slice_each(raw, cohort, patients) + strangers
    order = np.random.default_rng(1).permutation(len(images))
    other = other_set([seen_elsewhere(images[i], orientation) for i in order])
    found = matching.find_shared(raw, cohort, other)
    # Who is who is checked here, in memory: each patient is found, and as the right image.
    assert dict(zip(found.patient_id.tolist(), order[found.other].tolist(), strict=True)) == {
        int(who): place for place, who in enumerate(patients)
    }
    assert found.orientation == orientation
    assert found.gap[0] < found.gap[1] and found.repeats == 0
    assert (found.n_patients, found.n_other) == (sum(PATIENTS), len(images))


def test_one_patient_among_strangers_is_found(raw, cohort, strangers):
    images = [*strangers, *one_slice_each(raw, cohort, [3])]
    found = matching.find_shared(
        raw, cohort, other_set([seen_elsewhere(image, HALF_TURN) for image in images])
    )
    assert found.patient_id.tolist() == [3] and found.other.tolist() == [len(strangers)]


def test_sets_that_share_nobody_show_no_gap(raw, cohort, strangers):
    other = other_set([seen_elsewhere(image, HALF_TURN) for image in strangers])
    with pytest.raises(matching.NoGapError, match="No gap separates"):
        matching.find_shared(raw, cohort, other)


def test_several_images_of_a_patient_count_once(raw, cohort, strangers):
    images = one_slice_each(raw, cohort, [0, 1, 2], level=3) + one_slice_each(
        raw, cohort, [0, 1, 2], level=6
    )
    images = [seen_elsewhere(image, HALF_TURN) for image in images + strangers]
    apart = matching.find_shared(raw, cohort, other_set(images))
    assert apart.patient_id.tolist() == [0, 1, 2] and apart.repeats == 3
    number = np.concatenate([[0, 1, 2, 0, 1, 2], 3 + np.arange(len(strangers))])
    ids = tuple(str(i) for i in range(number.max() + 1))
    together = matching.find_shared(raw, cohort, matching.OtherSet(images, number, ids))
    assert together.other.tolist() == [0, 1, 2] and together.repeats == 0


def whole_head(image: np.ndarray) -> np.ndarray:
    """A head with a margin, so that the edges are background also when it is moved."""
    return np.pad(matching.head_square(image)[::2, ::2], 24)


def test_scale_and_shift_of_a_slice_are_found(raw, cohort):
    head = whole_head(one_slice_each(raw, cohort, [5])[0])
    moved = Image.fromarray(head).transform(
        head.shape, Image.Transform.AFFINE, (1.06, 0, -1, 0, 0.94, 5), Image.Resampling.BICUBIC
    )
    before = np.prod(features([head, np.asarray(moved)], matching.SIDE), 0).sum()
    after = matching.refined_correlation(np.float32(moved), np.float32(head))
    assert before < 0.85 and after > 0.97


def test_unmoved_heads_correlate_as_the_features_of_the_cohort_do(raw, cohort, monkeypatch):
    monkeypatch.setattr(matching, "ROUNDS", (0,))
    first, second = (whole_head(image) for image in one_slice_each(raw, cohort, [5, 6]))
    expected = np.prod(features([first, second], matching.SIDE), 0).sum()
    assert matching.refined_correlation(np.float32(first), np.float32(second)) == pytest.approx(
        expected, abs=0.03
    )
    assert matching.refined_correlation(np.float32(first), np.float32(first)) == pytest.approx(
        1, abs=1e-5
    )


# ------------------------------------------------------------------------------------- the gap


def test_the_gap_lies_between_the_weakest_right_and_the_strongest_wrong_pair():
    correlations = np.full((5, 6), 0.5)
    correlations[[0, 1, 2], [0, 1, 2]] = 0.97, 0.95, 0.999
    correlations[4, 0] = 0.7  # a second best of somebody who is found
    correlations[3, 5] = 0.68
    low, high = matching.find_shared_gap(correlations)
    assert (low, high) == (0.7, 0.95)
    mine, theirs, repeats = matching.one_to_one(correlations, middle((low, high)))
    assert mine.tolist() == theirs.tolist() == [0, 1, 2] and repeats == 0


@pytest.mark.parametrize(
    "best", [np.linspace(0.6, 0.97, 30), np.full(10, 0.62), np.linspace(0.3, 0.65, 12)]
)
def test_likeness_that_thins_out_evenly_is_no_gap(best):
    correlations = np.full((4, len(best)), 0.58)
    correlations[np.arange(len(best)) % 4, np.arange(len(best))] = best
    correlations[0, -1] = correlations[1, -1] = best.min()
    assert matching.find_shared_gap(correlations) is None


def test_someone_who_is_two_patients_of_this_set_leaves_no_gap():
    correlations = np.full((3, 3), 0.4)
    correlations[[0, 1, 2], [0, 1, 2]] = 0.96
    assert matching.find_shared_gap(correlations) is not None
    correlations[1, 0] = 0.955
    assert matching.find_shared_gap(correlations) is None


# ------------------------------------------------------------------------------------- reading


def write_other(folder: Path, images: Sequence[np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"SUBJ{i:04d}_MR1_a.jpg", quality=90)
    return folder


def test_ids_come_from_file_names_and_are_not_shown(tmp_path, strangers):
    folder = write_other(tmp_path / "other", strangers[:3])
    Image.fromarray(strangers[3]).save(folder / "SUBJ0000_MR2_a.jpg")
    alone = matching.read_other(folder)
    assert len(alone.ids) == 4 and alone.ids[0] == "SUBJ0000_MR1_a"
    grouped = matching.read_other(folder, r"(SUBJ\d+)_MR")
    assert grouped.ids == ("SUBJ0000", "SUBJ0001", "SUBJ0002") and grouped.patient.tolist() == [
        0,
        0,
        1,
        2,
    ]
    assert matching.read_other(folder, r"SUBJ\d+").ids == grouped.ids
    assert "SUBJ" not in repr(alone) + repr(grouped)


def test_a_zip_is_read_like_its_folder(tmp_path, strangers):
    import shutil

    folder = write_other(tmp_path / "other", strangers[:3])
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", folder))
    one, two = matching.read_other(folder), matching.read_other(archive)
    assert one.ids == two.ids
    assert all(np.array_equal(a, b) for a, b in zip(one.images, two.images, strict=True))


def test_what_cannot_be_read_is_counted_and_not_named(tmp_path, strangers):
    folder = write_other(tmp_path / "other", strangers[:2])
    (folder / "SUBJ0009_MR1_a.jpg").write_bytes(b"no image")
    for pattern, message in ((None, "1 files of the other set"), ("(", "no regular expression")):
        with pytest.raises(UserError, match=message) as error:
            matching.read_other(folder, pattern) if pattern is None else matching.ids_of(
                ["SUBJ0009"], pattern
            )
        assert "SUBJ" not in str(error.value)
    with pytest.raises(UserError, match="2 of 2 files"):
        matching.ids_of(["SUBJ0001", "SUBJ0002"], r"P\d+")
    with pytest.raises(UserError, match="nothing at"):
        matching.read_other(tmp_path / "nowhere")


def write_table(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("ID", "Age"), *rows])
    return path


def test_ages_are_read_and_bad_tables_are_refused(tmp_path):
    assert ages.read_ages(write_table(tmp_path / "a.csv", [("P1", "61.5"), ("P2", "")])) == {
        "P1": 61.5
    }
    with pytest.raises(UserError, match="no column 'Years'"):
        ages.read_ages(tmp_path / "a.csv", age_column="Years")
    for rows, message in (
        ([("P1", "old")], "no number"),
        ([("P1", "60"), ("P1", "61")], "two ages"),
    ):
        with pytest.raises(UserError, match=message) as error:
            ages.read_ages(write_table(tmp_path / "b.csv", rows))
        assert "P1" not in str(error.value)


# ------------------------------------------------------------------------------------- ages


@pytest.mark.parametrize(
    ("counts", "groups"),
    [
        ((72, 70, 28, 0), [[0], [1], [2, 3]]),
        ((100, 70, 28, 2), [[0], [1], [2, 3]]),
        ((4, 5, 5, 5), [[0, 1], [2], [3]]),
        ((2, 1, 1, 1), [[0, 1, 2, 3]]),
        ((2, 1, 1, 0), []),
        ((9, 0, 0, 3), [[0, 1, 2, 3]]),
        ((5,), [[0]]),
    ],
)
def test_classes_are_merged_until_no_group_is_small(counts, groups):
    assert ages.class_groups(counts) == groups


def test_ages_by_class_are_those_of_numpy_and_small_groups_are_merged():
    labels, age = np.repeat([0, 1, 2, 3], [6, 5, 4, 2]), np.linspace(60, 90, 17)
    groups = ages.class_groups(np.bincount(labels))
    found = ages.by_class(labels, CLASSES, groups, age)
    assert list(found) == ["Non", "Very mild", "Mild and Moderate"]
    assert found["Mild and Moderate"] == {
        "n": 6,
        "age_mean": round(age[11:].mean(), 1),
        "age_sd": round(age[11:].std(ddof=1), 1),
    }
    assert ages.counts_by_class(np.array([0] * 7 + [3]), CLASSES, groups) == {
        "Non": 7,
        "Very mild": 0,
        "Mild and Moderate": "fewer than 5",
    }


def test_the_part_holds_the_found_patients_within_the_range():
    shared = matching.SharedPatients(
        np.array([4, 7, 9, 11]), np.array([2, 0, 1, 3]), (0.7, 0.9), HALF_TURN, 0, 12, 5
    )
    other = matching.OtherSet([], np.arange(5), ("a", "b", "c", "d", "e"))
    years = {"a": 59.0, "b": 60.0, "c": 80.0}
    part = ages.part_of_age(shared, other, years, age_from=60)
    assert (
        part.patient_id.tolist() == [4, 9]
        and part.age.tolist() == [80, 60]
        and part.without_age == 1
    )
    assert part.range_name == "60 years and more"
    assert ages.part_of_age(shared, other, years, age_to=59).patient_id.tolist() == [7]
    assert "80" not in repr(part) and "patient_id" not in repr(part) + repr(shared)
    with pytest.raises(UserError, match="--id-pattern"):
        ages.part_of_age(shared, other, {"z": 70.0})


# ------------------------------------------------------------------------------------- scores


def simulated(n: Sequence[int] = (40, 30, 20, 2), slices: int = 4, seed: int = 0) -> records.Arrays:
    """Predictions of a weak model on as many patients of each class."""
    rng = np.random.default_rng(seed)
    label = np.repeat(np.arange(4), n)
    base = 0.8 * np.eye(4)[label] + rng.normal(0, 0.7, (len(label), 4))
    logits = np.repeat(base, slices, 0) + rng.normal(0, 0.3, (len(label) * slices, 4))
    patients = np.repeat(np.arange(len(label)), slices)
    return {
        "clean": logits.astype(np.float32),
        "labels": np.repeat(label, slices),
        "patient_id": patients,
        "fold": np.zeros_like(patients),
        "seed": np.zeros_like(patients),
        "slice_index": np.tile(np.arange(slices), len(label)),
        "file_sha256": np.zeros((len(patients), 32), np.uint8),
    }


def write_record(path: Path, predictions: records.Arrays, cohort_sha256: str) -> None:
    """The record of one run on a cohort, at `<model>/<protocol>.json`, with its predictions."""
    run = {
        "model": path.parent.name,
        "protocol": path.stem,
        "data": "phantom",
        "profile": "demo",
        "init": "random",
        "fold": 0,
        "seed": 0,
        "cohort_sha256": cohort_sha256,
    }
    records.write_record(path, records.summarize(predictions, [run], n_boot=10), predictions)


def test_scores_of_the_part_are_those_of_its_patients_alone():
    predictions = simulated()
    part = np.concatenate([np.arange(15, 40), np.arange(40, 90)])
    found = ages.part_scores(predictions, None, part, n_boot=300)
    inside = np.isin(predictions["patient_id"], part)
    assert (found["n_people"], found["n_people_everybody"]) == (75, 92)
    everybody = found["slice_auroc"]["everybody"]
    for rows, place in ((inside, found["slice_auroc"]), (np.ones_like(inside), everybody)):
        margin, sick = (
            metrics.disease_margin(predictions["clean"][rows]),
            predictions["labels"][rows] > 0,
        )
        assert place["value"] == pytest.approx(roc_auc_score(sick, margin), abs=6e-4)
    for name in ("person_auroc", "slice_auroc", "balanced_accuracy_3"):
        score = found[name]
        expected = score["value"] - score["everybody"]["value"]
        assert score["difference"]["value"] == pytest.approx(expected, abs=1.1e-3)
        low, high = score["difference"]["ci"]
        assert low <= score["difference"]["value"] <= high and low < high
    arrays = (predictions[name] for name in ("clean", "labels", "patient_id"))
    patient = metrics.score_patients(*arrays, n_boot=10)["auroc"]["value"]
    assert found["person_auroc"]["everybody"]["value"] == pytest.approx(patient, abs=6e-4)


def test_the_difference_is_surer_than_two_separate_intervals():
    found = ages.part_scores(simulated(), None, np.arange(10, 92), n_boot=500)["person_auroc"]
    width = {name: np.ptp(found[name]["ci"]) for name in ("everybody", "difference")}
    assert 0 < width["difference"] < width["everybody"] / 2


def test_everybody_in_the_part_makes_no_difference():
    found = ages.part_scores(simulated(), None, np.arange(92), n_boot=50)
    assert found["person_auroc"]["difference"] == {"value": 0.0, "ci": None}


def test_no_score_tells_of_a_handful_of_patients():
    predictions = simulated()
    assert (
        "outside the part"
        in ages.part_scores(predictions, None, np.arange(3, 92), n_boot=10)["reason"]
    )
    assert "in the part" in ages.part_scores(predictions, None, np.arange(3), n_boot=10)["reason"]
    few_non = ages.part_scores(predictions, None, np.arange(36, 92), n_boot=10)
    assert few_non["person_auroc"]["value"] is few_non["slice_auroc"]["difference"] is None
    few_mild = ages.part_scores(predictions, None, np.arange(74), n_boot=10)
    assert (
        few_mild["balanced_accuracy_3"]["value"] is None
        and few_mild["person_auroc"]["value"] is not None
    )


def test_records_of_another_cohort_are_refused_and_small_parts_too(tmp_path):
    path = tmp_path / "assets" / "Resnet" / "patient.json"
    write_record(path, simulated(), "a" * 64)
    found = list(records.read_records(tmp_path).values())
    part = np.arange(20, 92)
    assert list(ages.score_rows(found, part, "a" * 64, n_boot=10)) == ["Resnet/patient"]
    with pytest.raises(UserError, match="aaaaaaaa.*bbbbbbbb"):
        ages.score_rows(found, part, "b" * 64)
    with pytest.raises(UserError, match="fewer than 5"):
        ages.score_rows(found, part[:4], "a" * 64)


def test_every_variant_has_a_row(tmp_path):
    predictions = simulated()
    predictions["soft/clean"] = predictions["clean"] / 2
    write_record(tmp_path / "assets" / "Ensemble" / "slice.json", predictions, "a")
    found = ages.score_rows(
        records.read_records(tmp_path).values(), np.arange(20, 92), "a", n_boot=10
    )
    assert list(found) == ["Ensemble/slice", "Ensemble/slice/soft"]
    assert found["Ensemble/slice"]["slice_auroc"]["value"] is not None


# ------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def case(raw, cohort, strangers, tmp_path_factory) -> dict:
    """Phantom images as folder, another set with ages, and a record of the phantom's cohort."""
    root = tmp_path_factory.mktemp("command")
    folder = write_phantom(root / "raw", **PHANTOM)
    patients = shared_half(cohort)
    images = [
        seen_elsewhere(image, HALF_TURN)
        for image in one_slice_each(raw, cohort, patients) + strangers
    ]
    other = write_other(root / "other", images)
    years = [55 if i == 0 else 60 + i for i in range(len(images))]
    table = write_table(
        root / "ages.csv", [(f"SUBJ{i:04d}", str(age)) for i, age in enumerate(years)]
    )
    real = np.flatnonzero(cohort.kind == "real")
    rng = np.random.default_rng(0)
    predictions = {
        "clean": rng.normal(size=(len(real), 4)).astype(np.float32),
        "labels": cohort.label[real],
        "patient_id": cohort.patient_id[real],
        "fold": np.zeros(len(real), np.int64),
        "seed": np.zeros(len(real), np.int64),
        "slice_index": cohort.slice_index[real],
        "file_sha256": np.zeros((len(real), 32), np.uint8),
    }
    path = root / "assets" / "Resnet" / "patient.json"
    write_record(path, predictions, c.cohort_identity(cohort))
    return {"root": root, "raw": folder, "other": other, "ages": table, "n": len(patients) - 1}


def run_tool(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "utils.audit", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_tells_counts_ages_and_scores_and_nobody_s_name(case, cohort, tmp_path):
    out, scores = tmp_path / "page.html", tmp_path / "age.json"
    done = run_tool(
        case["raw"],
        "--against",
        case["other"],
        "--other-name",
        "Set B",
        "--ages",
        case["ages"],
        "--id-pattern",
        r"SUBJ\d+",
        "--age-from",
        60,
        "--scores",
        scores,
        "--out",
        out,
        "--records-root",
        case["root"],
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(scores.read_text(encoding="utf-8"))
    assert set(written) == {
        "schema_version",
        "other",
        "age_range",
        "n_patients",
        "n_other",
        "n_found",
        "n_part",
        "by_class",
        "not_found_by_class",
        "gap",
        "rows",
        "cohort_sha256",
    }
    assert written["n_found"] == case["n"] + 1 and written["n_part"] == case["n"]
    assert sum(entry["n"] for entry in written["by_class"].values()) == case["n"]
    assert all(entry["n"] >= ages.LEAST_GROUP for entry in written["by_class"].values())
    assert written["other"] == "Set B" and written["gap"][0] < written["gap"][1]
    assert written["rows"]["Resnet/patient"]["n_people"] == case["n"]
    page = out.read_text(encoding="utf-8")
    assert f"{case['n'] + 1} of {sum(PATIENTS)} patients are also in Set B" in page
    assert "Not found: either" in page
    everything = scores.read_text(encoding="utf-8") + page + done.stdout + done.stderr
    assert "SUBJ" not in everything
    hashes = set(re.findall(r"[0-9a-f]{16,}", everything))
    assert hashes == {written["cohort_sha256"]} and not hashes & {
        *cohort.file_sha256,
        *cohort.pixel_sha256,
    }


def lists(value: object) -> list[list]:
    if isinstance(value, dict):
        return [found for part in value.values() for found in lists(part)]
    return [value] if isinstance(value, list) else []


def test_no_list_in_the_file_is_longer_than_an_interval(case, tmp_path):
    scores = tmp_path / "all.json"
    page.main(case["raw"], against=case["other"], scores=scores, records_root=case["root"])
    written = json.loads(scores.read_text(encoding="utf-8"))
    assert written["age_range"] is None and written["n_part"] == case["n"] + 1
    assert all("age_mean" not in entry for entry in written["by_class"].values())
    assert lists(written) and all(len(found) == 2 for found in lists(written))


def test_sets_without_shared_patients_end_with_3_and_a_sentence(case, strangers, tmp_path, capsys):
    other = write_other(tmp_path / "strangers", strangers)
    with pytest.raises(SystemExit) as stopped:
        page.main(case["raw"], against=other, out=tmp_path / "page.html")
    printed = capsys.readouterr()
    assert (
        stopped.value.code == page.NO_PATIENTS == 3 and "No gap separates patients" in printed.err
    )
    assert not (tmp_path / "page.html").exists() and "SUBJ" not in printed.out + printed.err


def test_scores_of_other_patients_records_are_refused(case, tmp_path):
    with pytest.raises(UserError, match="is a record of the cohort"):
        page.main(case["raw"], against=case["other"], scores=tmp_path / "age.json")
    assert not (tmp_path / "age.json").exists()
