"""The pipeline: a run goes from data to record once; shards share the grid; the phantom is
announced."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from utils import experiment, metrics, training
from utils.backbones import load_model, read_metadata, save_half, save_model
from utils.backbones.checkpoints import write_checkpoint
from utils.config import make_config
from utils.evaluation import records, schema
from utils.pipeline import command, driver, explanations, stages, store
from utils.pipeline import workspace as workspaces
from utils.pipeline.driver import Run
from utils.pipeline.workspace import Workspace, half_of
from utils.utils_funcs import MODELS, ROOT, UserError

TINY = dict(
    max_train=24,
    max_test=8,
    epochs=1,
    trials=0,
    eps=("4/255",),
    pgd_steps=2,
    sample=4,
    input_size=32,
    batch_size=12,
    pretrained=False,
    train_steps=1,
)


@pytest.fixture(scope="module")
def workspace(phantom_raw, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALZHEIMER_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield dataclasses.replace(experiment.open_workspace("demo", phantom_raw), data="phantom")


def tiny(protocol="patient", model="Efficientnet", **changes):
    return make_config("demo", model, protocol=protocol, **{**TINY, **changes})


@pytest.fixture(scope="module")
def record(workspace):
    return Run(workspace, tiny()).save()


def test_a_run_leaves_a_record_with_everything_in_it(workspace, record):
    for key in (
        "schema_version",
        "model",
        "regime",
        "protocol",
        "data",
        "profile",
        "init",
        "search",
        "folds",
        "seeds",
        "cohort_sha256",
        "config",
        "environment",
        "hardware",
        "wall_seconds",
        "git_commit",
        "git_dirty",
        "clean",
        "attacks",
        "worst_case",
        "sanity",
    ):
        assert key in record.to_json(), key
    told = [getattr(record, key) for key in ("model", "data", "init", "folds", "seeds")]
    assert told == ["Efficientnet", "phantom", "random", [0], [0]]
    assert record == records.read_record(workspace.record("Efficientnet", "patient"))
    assert record.metas[0]["explanation"] and record.runs[0].history
    assert json.dumps(record.to_json(), allow_nan=False)


def test_a_record_names_every_machine_that_worked_on_the_run(workspace, record, monkeypatch):
    before = record.runs[0].hardware
    monkeypatch.setattr(store, "hardware", lambda: "two cores")
    again = Run(workspace, tiny(), retrain=True)
    again.fit = Run(workspace, tiny()).trained  # the weights are of before
    assert again.result.meta["hardware"] == f"{before} + two cores"
    monkeypatch.setattr(training, "fit", lambda *_, **__: None)
    assert Run(workspace, tiny(), retrain=True).trained is None
    assert store.add_machine(workspace, tiny()) == "two cores", "a new training starts a new list"


def test_the_record_follows_from_its_predictions(workspace, record):
    rows = schema.read_predictions(workspace.record("Efficientnet", "patient"))
    assert len(rows["labels"]) == record.clean.n_slices
    assert records.summarize(rows, record.metas) == record


@pytest.fixture
def copied(workspace, record, tmp_path):
    """The study with its record and weights in a folder of the test's own, to be changed at
    will."""
    for folder in ("assets", "checkpoints"):
        shutil.copytree(workspace.root / folder, tmp_path / folder)
    (tmp_path / "dataset").symlink_to(workspace.root / "dataset")
    return dataclasses.replace(workspace, root=tmp_path)


def keep_only_a_weak_attack(workspace):
    """Makes the copied record one of a weak evaluation: FGSM at 4/255 alone, under which every
    slice gets its right answer, and the last slice outside its set. Returns the rows."""
    path = workspace.record("Efficientnet", "patient")
    rows, run = schema.read_predictions(path), records.read_record(path).metas[0]
    right = np.where(np.arange(4) == rows["labels"][:, None], 0, -9).astype(np.float16)
    right[-1] = np.nan
    rows = {name: values for name, values in rows.items() if ":" not in name} | {
        "4/255:fgsm": right
    }
    run = {**run, "attacks": {"4/255": {"fgsm": run["attacks"]["4/255"]["fgsm"]}}}
    records.write_record(path, records.summarize(rows, [run]), rows)
    return rows


def attack_the_record_again(workspace, monkeypatch, **options):
    """Record and rows after the command was run on the copied study."""
    monkeypatch.setattr(command, "make_config", lambda *_, **__: tiny())
    monkeypatch.setattr(command, "open_workspace", lambda *_: workspace)
    command.attack_again_command(
        "Efficientnet", **{"eps": ("4/255",), "steps": 4, "profile": "demo", **options}
    )
    path = workspace.record("Efficientnet", "patient")
    return records.read_record(path), schema.read_predictions(path)


def test_a_record_is_attacked_again_where_it_holds_slices_robust(copied, monkeypatch, capsys):
    old = keep_only_a_weak_attack(copied)
    before = records.read_record(copied.record("Efficientnet", "patient"))
    after, rows = attack_the_record_again(copied, monkeypatch)
    assert set(rows) - set(old) == {"4/255:pgd4_again", "4/255:pgd4_again_merged"}
    assert all(np.array_equal(rows[name], values, equal_nan=True) for name, values in old.items())
    printed, inside = (
        capsys.readouterr().out,
        np.arange(len(old["labels"])) < len(old["labels"]) - 1,
    )
    for name, place in (("pgd4_again", 0), ("pgd4_again_merged", 1)):
        meta, column = after.runs[0].attacks["4/255"][name], rows[f"4/255:{name}"]
        right = metrics.correct(old["clean"], old["labels"])[place] & inside
        assert (meta["n_attacked"], meta["n_set"]) == (right.sum(), inside.sum()) and right.any()
        assert np.isnan(column[~inside]).all() and not np.isnan(column[inside]).any()
        assert np.array_equal(column[inside & ~right], old["clean"][inside & ~right]), (
            "a clean error keeps its clean logits"
        )
        wrong = ~metrics.correct(column, old["labels"])[place] & right
        assert meta["misclassified"] == wrong.sum()
        assert f"{wrong.sum()} of {right.sum()} robust slices misclassified" in printed
        assert (meta["steps"], meta["restarts"], meta["norm"], meta["weights"]) == (
            4,
            2,
            "linf",
            "checkpoint",
        )
        assert {"seconds", "kind", "view", "git_commit", "git_dirty"} <= set(meta)
    assert set(after.worst_case["4/255"].attacks) == {
        "fgsm",
        "pgd4_again",
        "pgd4_again_merged",
    }
    assert after.wall_seconds["attack"] >= before.wall_seconds["attack"]
    assert records.summarize(rows, after.metas) == after


def test_what_the_record_misclassified_already_is_not_attacked_again_and_carries_its_logits(
    copied, monkeypatch
):
    rows = keep_only_a_weak_attack(copied)
    path, wrong = copied.record("Efficientnet", "patient"), np.float16([-3, -3, -3, -3])
    first = int(np.flatnonzero(metrics.correct(rows["clean"], rows["labels"])[0])[0])
    rows["4/255:fgsm"][first] = np.where(np.arange(4) == (rows["labels"][first] + 2) % 4, 0, wrong)
    records.write_record(path, records.summarize(rows, records.read_record(path).metas), rows)
    after, again = attack_the_record_again(copied, monkeypatch)
    right = metrics.correct(rows["clean"], rows["labels"])[0] & metrics.scored(rows["4/255:fgsm"])
    assert after.runs[0].attacks["4/255"]["pgd4_again"]["n_attacked"] == right.sum() - 1
    assert np.array_equal(again["4/255:pgd4_again"][first], rows["4/255:fgsm"][first])


def test_a_record_is_attacked_again_once_a_seed_and_at_its_own_eps(copied, monkeypatch):
    attack_the_record_again(copied, monkeypatch)
    with pytest.raises(UserError, match="pgd4_again at eps 4/255 already"):
        attack_the_record_again(copied, monkeypatch)
    after, _ = attack_the_record_again(copied, monkeypatch, attack_seed=2)
    assert {"pgd4_again", "pgd4_again_seed2", "pgd4_again_seed2_merged"} <= set(
        after.runs[0].attacks["4/255"]
    )
    with pytest.raises(UserError, match="no attacks at eps 3/255"):
        attack_the_record_again(copied, monkeypatch, eps=("3/255",))


def test_other_weights_than_the_recorded_ones_are_not_attacked_for_the_record(copied, monkeypatch):
    path = copied.checkpoint(tiny())
    other = load_model(path)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    save_model(other, path, read_metadata(path))
    before = copied.record("Efficientnet", "patient").read_bytes()
    with pytest.raises(UserError, match="are not those of"):
        attack_the_record_again(copied, monkeypatch)
    path.unlink()
    with pytest.raises(UserError, match="not on this machine"):
        attack_the_record_again(copied, monkeypatch)
    assert copied.record("Efficientnet", "patient").read_bytes() == before


def test_the_half_copy_of_the_weights_is_named_as_such(copied, monkeypatch):
    checkpoint = copied.checkpoint(tiny())
    save_half(checkpoint, half_of(checkpoint))
    checkpoint.unlink()
    after, _ = attack_the_record_again(copied, monkeypatch)
    assert after.runs[0].attacks["4/255"]["pgd4_again"]["weights"] == "fp16 copy"


def test_a_finished_run_is_not_run_twice(workspace, record, monkeypatch):
    monkeypatch.setattr(training, "fit", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr(stages, "evaluate_suite", lambda *a, **k: pytest.fail("attacked again"))
    assert Run(workspace, tiny()).save() == record


def write_weights(path: Path, cohort_sha256: str) -> None:
    """A file with the header of a checkpoint, and hardly any weights."""
    write_checkpoint(path, {"weight": torch.zeros(1)}, {"cohort_sha256": cohort_sha256})


def test_a_warm_start_takes_the_clean_counterpart_or_its_half_copy_or_trains_it_first(
    workspace, tmp_path, monkeypatch
):
    workspace = dataclasses.replace(workspace, root=tmp_path)
    config = make_config("cpu", "Efficientnet_atk", warm_start=True, fold=2)
    assert driver.start_of(workspace, dataclasses.replace(config, warm_start=False)) is None
    whole = tmp_path / "checkpoints" / "Efficientnet" / "patient" / "fold2_seed0.safetensors"
    trained = []

    def fit(train, validation, config, checkpoint, device, **rest):
        trained.append(config)
        return training.Fit(checkpoint, [], 1, "random", "fp32", 0.0, False)

    with monkeypatch.context() as patch:
        patch.setattr(driver, "load_sets", lambda *_: {"train": None, "validation": None})
        patch.setattr(training, "fit", fit)
        assert driver.start_of(workspace, config) == whole and trained == [
            make_config("cpu", "Efficientnet", fold=2)
        ]
    half = whole.with_name("fold2_seed0_fp16.safetensors")
    write_weights(half, workspace.cohort_sha256)
    assert driver.start_of(workspace, config) == half
    write_weights(whole, workspace.cohort_sha256)
    assert driver.start_of(workspace, config) == whole


def test_weights_are_the_checkpoint_or_its_half_copy_and_of_this_cohort(tmp_path):
    workspace, config = Workspace(tmp_path, "phantom", "demo", tmp_path, "a" * 64), tiny()
    assert workspace.weights(config) is None
    whole = workspace.checkpoint(config)
    write_weights(half_of(whole), "a" * 64)
    assert workspace.weights(config) == half_of(whole)
    write_weights(whole, "a" * 64)
    assert workspace.weights(config) == whole
    write_weights(whole, "b" * 64)
    with pytest.raises(UserError, match="is of cohort bbbbbbbb, .* are cohort aaaaaaaa"):
        workspace.weights(config)


def test_lost_weights_are_trained_again_and_the_record_stays(workspace, record, monkeypatch):
    checkpoint, config = workspace.checkpoint(tiny()), tiny()
    hidden, path = (
        checkpoint.rename(checkpoint.with_suffix(".hidden")),
        workspace.record("Efficientnet", "patient"),
    )
    before = path.read_bytes()
    monkeypatch.setattr(command, "make_config", lambda *_, **__: config)
    monkeypatch.setattr(command, "open_workspace", lambda *_: workspace)
    try:
        command.train_command("Efficientnet", profile="demo")
        assert checkpoint.is_file() and path.read_bytes() == before
    finally:
        hidden.replace(checkpoint)


def test_a_record_is_shown_without_its_weights(workspace, record, monkeypatch):
    checkpoint = workspace.checkpoint(tiny())
    hidden = checkpoint.rename(checkpoint.with_suffix(".hidden"))
    monkeypatch.setattr(training, "fit", lambda *a, **k: pytest.fail("trained again"))
    try:
        run = Run(workspace, tiny())
        assert run.fit.history == record.runs[0].history and len(run.result.rows["labels"]) == 8
        assert run.explanation == record.metas[0]["explanation"]
        assert run.save() == record
    finally:
        hidden.rename(checkpoint)


def test_other_settings_do_not_pass_as_the_recorded_ones(workspace, record):
    with pytest.raises(UserError, match="epochs 1 instead of 7"):
        Run(workspace, tiny(epochs=7)).save()


def test_folds_are_pooled_and_a_run_replaces_only_itself(workspace, record):
    first = Run(workspace, tiny()).result
    second = store.RunResult(
        {**first.rows, "fold": np.full(8, 1, np.int8)}, {**first.meta, "fold": 1}
    )
    both = store.add_run(workspace, second)
    assert (
        both.folds == [0, 1]
        and len(schema.read_predictions(workspace.record("Efficientnet", "patient"))["labels"])
        == 16
    )
    again = store.add_run(
        workspace, store.RunResult(second.rows, {**second.meta, "hardware": "another machine"})
    )
    assert (
        again.folds == [0, 1]
        and len(schema.read_predictions(workspace.record("Efficientnet", "patient"))["labels"])
        == 16
    )


def test_an_attack_that_one_fold_lacks_is_outside_its_declared_set():
    rows = {"labels": np.zeros(2, np.int8), "clean": np.zeros((2, 4), np.float16)}
    pooled = store.pool_rows({**rows, "4/255:square": np.ones((2, 4), np.float16)}, rows)
    assert (
        np.isnan(pooled["4/255:square"][2:]).all()
        and not np.isnan(pooled["4/255:square"][:2]).any()
    )


def test_the_grid_puts_the_most_valuable_first():
    studied = ("Resnet", "Resnet_atk", "Efficientnet", "Efficientnet_atk", "Dinov2", "Dinov2_atk")
    assert set(driver.GRID_MODELS) == set(MODELS)
    assert tuple(model for model in driver.GRID_MODELS if model in studied) == studied
    runs = driver.grid_configs("cpu", studied, ("patient", "slice"), (0,))
    assert len(runs) == 6 * 6
    assert [run.protocol for run in runs] == ["patient"] * 30 + ["slice"] * 6
    assert runs[0].model == "Resnet" and runs[-1].model == "Dinov2_atk"


@pytest.mark.parametrize("count", [1, 2, 5, 50])
def test_shards_together_do_every_run_once(count):
    runs = driver.grid_configs("cpu", driver.GRID_MODELS, ("patient", "slice"), (0,))
    shared = [
        run for index in range(count) for run in driver.shard_of(runs, f"{index + 1}/{count}")
    ]
    assert sorted(map(repr, shared)) == sorted(map(repr, runs))


@pytest.mark.parametrize("bad", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_a_shard_that_makes_no_sense_is_refused(bad):
    with pytest.raises(UserError, match="i/n"):
        driver.shard_of([], bad)


def test_the_phantom_is_announced(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ALZHEIMER_RUNS", str(tmp_path))
    monkeypatch.setenv("ALZHEIMER_OFFLINE", "1")
    monkeypatch.delenv("ALZHEIMER_RAW", raising=False)
    opened = experiment.open_workspace("demo")
    assert opened.data == "phantom" and opened.root == tmp_path / "demo-phantom"
    assert "data: phantom" in capsys.readouterr().out
    assert experiment.open_workspace("demo") == opened


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["grid", "--help"],
        ["attack", "--help"],
        ["attack-again", "--help"],
    ],
)
def test_help_is_the_documentation(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "utils.experiment", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "usage" in done.stdout.lower()


def test_the_run_command_shows_the_defaults_of_its_profile():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "utils.experiment",
            "run",
            "--profile",
            "cpu",
            "--model",
            "Dinov2",
            "--help",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    shown = " ".join(done.stdout.replace("│", " ").split())  # wherever its lines break
    assert "(default: 12)" in shown and "(default: Dinov2)" in shown


def test_a_users_mistake_is_one_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "utils.experiment", "prepare", "--raw", str(tmp_path / "nothing")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode != 0
        and done.stderr.startswith("error: ")
        and "Traceback" not in done.stderr
    )


def test_anybodys_model_is_attacked_on_anybodys_images(phantom_raw, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    head = torch.nn.Linear(16, 4)\n"
        "    return torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten(), head)\n"
    )
    few = tmp_path / "images"
    for folder in sorted((phantom_raw / "test").iterdir()):
        (few / folder.name).mkdir(parents=True)
        for image in sorted(folder.iterdir())[:3]:
            (few / folder.name / image.name).write_bytes(image.read_bytes())
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "utils.experiment",
            "attack",
            "--model",
            "mine:build",
            "--raw",
            str(few),
            "--suite",
            "quick",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )
    assert done.returncode == 0, done.stderr
    assert "WORST CASE" in done.stdout and "checks" in done.stdout and "12" in done.stdout


def test_what_each_attack_does_is_drawn_once_and_never_without_weights(
    workspace, record, monkeypatch
):
    from PIL import Image

    path = Run(workspace, tiny()).attack_picture
    with Image.open(path) as picture:
        assert picture.width > 1000
    monkeypatch.setattr(
        explanations, "attack_images", lambda *a, **k: pytest.fail("attacked again")
    )
    assert Run(workspace, tiny()).attack_picture == path
    assert not Run(workspace, tiny(model="Dinov2")).attack_picture.is_file()


def test_only_what_a_record_holds_is_shown_unless_the_rest_is_asked_for(
    workspace, monkeypatch, capsys
):
    def find(workspace, config):
        return config if (config.model, config.protocol) == ("Resnet", "patient") else None

    monkeypatch.setattr(driver, "find_matching_run", find)
    runs = experiment.runs_of(workspace, "Resnet", run_missing=False)
    assert [run.requested.protocol for run in runs] == ["patient"]
    assert "1 of 2 runs are in no record yet" in capsys.readouterr().out
    assert len(experiment.runs_of(workspace, "Resnet")) == 2
    assert len(experiment.runs_of(workspace, "Dinov2", run_missing=False)) == 1, (
        "where nothing is held there is nothing to show"
    )


def test_without_images_the_committed_records_are_shown(monkeypatch, capsys):
    monkeypatch.setattr(workspaces, "find_raw", lambda raw: None)
    monkeypatch.setattr(workspaces, "holds_records", lambda profile: True)
    workspace = experiment.open_workspace("cpu", records=True)
    assert (
        workspace.raw is None
        and (workspace.data, workspace.root) == ("real", ROOT)
        and "no images here" in capsys.readouterr().out
    )
    runs = [
        Run(workspace, make_config("cpu", "Resnet", protocol=protocol, fold=fold))
        for protocol, fold in (("patient", 3), ("slice", 0))
    ]
    text = experiment.balance_text(runs)
    lines = {
        " ".join(line.split()[:3]): " ".join(line.split()[3:]) for line in text.splitlines()[1:]
    }
    assert (
        lines["patient fold3_seed0 test"]
        == "20 patients, 640 14 patients, 448 5 patients, 160 1 patients, 32"
    )
    assert (
        lines["slice fold0_seed0 test"]
        == "100 patients, 640 70 patients, 448 28 patients, 179 2 patients, 12"
    )


@pytest.mark.parametrize("model", ["Resnet", "Resnet_atk"])
def test_the_comparison_of_defaults_is_a_table_of_its_file(model):
    workspace = json.loads((ROOT / "assets" / model / "defaults.json").read_text(encoding="utf-8"))
    text = experiment.defaults_text(model)
    assert (
        "validation patients only" in text
        and "n = 20 patients, 640 slices" in text
        and "3 classes present" in text
    )
    assert "patient, fold 0 · data: real · profile: cpu" in text and "init random" in text
    lines = {
        name: next(line for line in text.splitlines() if line.startswith(f"{name}  "))
        for name in workspace["rows"]
    }
    for name, row in workspace["rows"].items():
        assert f"{row['best_epoch']} of {workspace['epochs']}" in lines[name]
        assert (
            f"{row['best']['validation_balanced_accuracy']:.3f}" in lines[name]
            and f"{row['seconds']:,.0f}" in lines[name]
        )
        if model.endswith("_atk"):
            assert f"{row['best']['adversarial_validation_balanced_accuracy']:.3f}" in lines[name]
            assert f"{row['best']['adversarial_validation_loss']:.3f}" in lines[name]
    assert ("attacked" in text) == model.endswith("_atk")
    assert experiment.defaults_text(model, "real") == text


def test_a_notebook_on_phantom_data_shows_no_comparison_on_the_real_cohort():
    text = experiment.defaults_text("Resnet", "phantom")
    assert (
        "data: real" not in text
        and "chosen on the real cohort" in text
        and len(text.splitlines()) == 1
    )


def test_a_line_of_defaults_that_failed_or_answered_one_class_says_so(tmp_path):
    workspace = json.loads(
        (ROOT / "assets" / "Resnet" / "defaults.json").read_text(encoding="utf-8")
    )
    name = next(iter(workspace["rows"]))
    workspace["rows"][name]["one_class"] = True
    workspace["rows"]["learning rate 9"] = {
        "changes": {"lr": 9},
        "failed": "the training loss became nan",
        "hardware": "9 cores, other",
        "threads": 7,
    }
    (tmp_path / "assets" / "Resnet").mkdir(parents=True)
    (tmp_path / "assets" / "Resnet" / "defaults.json").write_text(json.dumps(workspace))
    text = experiment.defaults_text("Resnet", root=tmp_path)
    assert text.count("ANSWERED ONE CLASS") == 1 and "failed: the training loss became nan" in text
    assert (
        f"{workspace['hardware']}, threads: {workspace['threads']}; 9 cores, other, threads: 7"
        in text
    ), "each machine that ran a line is named"


def test_a_model_without_a_comparison_of_defaults_says_so(tmp_path):
    assert (
        experiment.defaults_text("Resnet", root=tmp_path)
        == "No comparison of training defaults was run for Resnet."
    )


def test_several_processes_refuse_to_search_together(monkeypatch, tmp_path):
    """Each would take a trial of its own while every training waits for all processes: they would
    wait for ever."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    workspace = Workspace(tmp_path, "phantom", "demo", tmp_path, "0")
    with pytest.raises(UserError, match="experiment search --model Resnet_atk"):
        Run(workspace, make_config("demo", "Resnet_atk")).config  # noqa: B018


@pytest.mark.parametrize("protocol", ["slice", "patient"])
@pytest.mark.parametrize("model", ["Resnet", "Efficientnet_atk"])
def test_one_run_by_hand_has_the_settings_that_the_grid_gives_it(model, protocol, monkeypatch):
    ran = []
    monkeypatch.setattr(command, "open_workspace", lambda *_: None)
    monkeypatch.setattr(Run, "save", lambda run: ran.append(run.requested))
    command.run_command(["--profile", "cpu", "--model", model, "--protocol", protocol])
    assert ran == driver.grid_configs("cpu", (model,), (protocol,), (0,))[:1]


def test_results_are_shown_where_there_are_no_images(tmp_path, monkeypatch):
    monkeypatch.setattr(workspaces, "find_raw", lambda _: None)
    monkeypatch.setenv("ALZHEIMER_RUNS", str(tmp_path))
    assert experiment.results_root("cpu") == ROOT
    assert experiment.results_root("demo") == tmp_path / "demo-phantom"
    (tmp_path / "cpu-phantom").mkdir()
    (tmp_path / "cpu-phantom" / "assets").symlink_to(
        ROOT / "assets"
    )  # a run of one's own goes first
    assert experiment.results_root("cpu") == tmp_path / "cpu-phantom"
