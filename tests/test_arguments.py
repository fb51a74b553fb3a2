"""No hour of work before an argument is checked, and no traceback for what a user can cause."""

import dataclasses
import sys

import pytest

from utils import experiment
from utils.config import CHOICES, RANGES, RunConfig, make_config
from utils.utils_funcs import UserError, check_output, choose_device


@pytest.mark.parametrize(
    "name, value",
    [
        ("fold", 9),
        ("fold", -1),
        ("batch_size", 0),
        ("epochs", 0),
        ("epochs", -3),
        ("lr", float("nan")),
        ("lr", -1.0),
        ("lr", 0.0),
        ("lr", float("inf")),
        ("trials", -3),
        ("protocol", "slicee"),
        ("profile", "gpu"),
        ("optimizer", "lion"),
        ("method", "free"),
        ("suite", "all"),
        ("precision", "fp16"),
        ("augmentation", 1.5),
        ("label_smoothing", 1.0),
        ("ema_decay", 1.0),
        ("train_eps", 4.0),
        ("clean_weight", -0.1),
        ("input_size", 0),
        ("max_train", -5),
        ("attack_batch", 0),
        ("pgd_steps", 0),
        ("seed", -1),
        ("weight_decay", float("nan")),
    ],
)
def test_a_setting_outside_its_range_is_refused_with_what_is_expected(name, value):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is .*: expected") as caught:
        dataclasses.replace(make_config("demo"), **{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("eps", [(), ("abc",), ("4",), ("4/255", "-1/255"), ("1/0",), ("",)])
def test_a_budget_that_is_none_is_refused_before_anything_runs(eps):
    with pytest.raises(UserError, match="eps"):
        make_config("demo", eps=eps)
    with pytest.raises(UserError, match="eps"):
        make_config("demo", headline_eps="eight")


def test_the_published_split_has_no_folds():
    with pytest.raises(UserError, match="no folds"):
        make_config("demo", protocol="slice", fold=2)


def test_every_number_and_every_choice_has_a_range():
    kinds = {field.name: field.type for field in dataclasses.fields(RunConfig)}
    numbers = {name for name, kind in kinds.items() if kind.split(" ")[0] in ("int", "float")}
    assert numbers == set(RANGES)
    assert {name for name, kind in kinds.items() if "Literal" in kind} <= set(CHOICES)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--protocol", "slicee"],
        ["run", "--fold", "9"],
        ["run", "--eps", "abc"],
        ["run", "--lr", "nan"],
        ["run", "--model", "Vgg"],
        ["train", "--model", "Resnet", "--fold", "7"],
        ["grid", "--models", "Vgg", "--profile", "demo"],
        ["grid", "--shard", "5/2", "--profile", "demo"],
        ["attack", "--model", "Resnet", "--eps"],
        ["attack", "--model", "Vgg"],
        ["attack", "--model", "tests.own_models:right", "--limit", "0"],
        ["attack", "--model", "tests.own_models:right", "--size", "-1"],
        ["search", "--model", "Resnet", "--trials", "0", "--profile", "demo"],
        ["search", "--model", "Resnet", "--trials", "-3", "--profile", "demo"],
        ["search", "--model", "Resnet", "--storage", "nonsense", "--profile", "demo"],
        ["search", "--model", "Resnet", "--storage", "sqlite:////no/such/folder/x.db"],
    ],
)
def test_a_wrong_argument_ends_a_command_with_one_sentence_and_no_work(
    arguments, tmp_path, monkeypatch
):
    monkeypatch.setenv("ALZHEIMER_RUNS", str(tmp_path))
    monkeypatch.setenv("ALZHEIMER_RAW", str(tmp_path))  # an empty folder: reading it would fail
    monkeypatch.setattr(sys, "argv", ["experiment", *arguments])
    with pytest.raises(SystemExit) as caught:
        experiment.main()
    assert "holds no image" not in str(caught.value), "the data were read first"
    assert str(caught.value).startswith("error: ") or caught.value.code == 2  # 2: tyro's own


@pytest.mark.parametrize("name", ["foo", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_here_is_named(name, monkeypatch):
    monkeypatch.setenv("ALZHEIMER_DEVICE", name)
    with pytest.raises(UserError, match="ALZHEIMER_DEVICE is"):
        choose_device()


def test_a_place_that_cannot_be_written_is_refused_and_an_input_is_kept(tmp_path):
    archive = tmp_path / "only_copy.zip"
    archive.write_bytes(b"PK")
    (tmp_path / "link.zip").symlink_to(archive)
    for path, words in (
        (tmp_path, "is a folder"),
        (archive, "would be overwritten"),
        (tmp_path / "link.zip", "would be overwritten"),
        (archive / "below.csv", "Nothing can be written"),
        ("/proc/x.csv", "Nothing can be written"),
    ):
        with pytest.raises(UserError, match=words):
            check_output(path, archive)
    assert archive.read_bytes() == b"PK"
    check_output(None)
    check_output(tmp_path / "new" / "out.csv", archive)


def test_the_commands_on_images_check_their_output_first(tmp_path):
    from utils.audit import page
    from utils.cohort import table

    archive = tmp_path / "only_copy.zip"
    archive.write_bytes(b"no archive: reading it would fail otherwise")
    for main in (table.main, page.main):
        for out in (archive, tmp_path):
            with pytest.raises(UserError, match="is a folder|would be overwritten"):
                main(archive, out)
