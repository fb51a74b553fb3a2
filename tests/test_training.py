"""training: honest choice of the best epoch, resuming to the same numbers, clear failures."""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from utils import training
from utils.backbones import build_model, load_model, save_model
from utils.config import RunConfig, make_config
from utils.data import ImageSet
from utils.training import fitting, losses, trainer
from utils.utils_funcs import ROOT, UserError, atomic_path

COHORT = "c0ffee00" * 8


def striped(count: int, seed: int, cohort_sha256: str = COHORT) -> ImageSet:
    """Images of 32 px whose class is the position of a bright bar."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = torch.rand(count, 1, 32, 32, generator=generator) * 40
    for row, label in enumerate(labels.tolist()):
        images[row, 0, 8:24, 2 + 8 * label : 6 + 8 * label] += 180
    patients = torch.arange(count) // 4 + 1000 * seed
    return ImageSet(
        images.to(torch.uint8),
        torch.arange(count),
        labels,
        patients,
        torch.arange(count) % 4,
        [f"{seed:02d}{row:062d}" for row in range(count)],
        "bars",
        pixels=[f"{seed:02x}{row:014x}".ljust(64, "0") for row in range(count)],
        cohort_sha256=cohort_sha256,
    )


TRAIN, VALIDATION = striped(32, 1), striped(16, 2)
DEVICE = torch.device("cpu")


def small(model: str = "Efficientnet", **changes) -> RunConfig:
    defaults = {
        "input_size": None,
        "epochs": 2,
        "batch_size": 16,
        "pretrained": False,
        "train_steps": 1,
    }
    return make_config("demo", model, **{**defaults, **changes})


class TinyNet(nn.Module):
    """A network of the model contract that trains in milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self.init, self.input_size = "Resnet", "random", None
        self.body = TinyBody()

    def forward(self, images):
        return self.body(images)


class TinyBody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 5, 2)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 16, 4)

    def forward(self, images):
        features = torch.relu(self.norm(self.conv(images)))
        return self.fc(nn.functional.adaptive_avg_pool2d(features, 4).flatten(1))

    def group_matcher(self, coarse=False):
        return {"stem": "^conv|^norm"}


def build_tiny(name, *, pretrained=True, input_size=None):
    return TinyNet().eval()


def load_tiny(path):
    model = TinyNet().eval()
    model.load_state_dict(weights(path))
    return model


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Training with `TinyNet` in place of the backbones; `load_model` likewise."""
    monkeypatch.setattr(trainer, "build_model", build_tiny)
    monkeypatch.setattr(trainer, "load_model", load_tiny)
    monkeypatch.setattr(fitting, "load_model", load_tiny)
    return tmp_path / "fold0_seed0.safetensors"


def weights(path):
    from safetensors.torch import load_file

    return load_file(path)


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )


@pytest.mark.parametrize("model", ["Efficientnet", "Efficientnet_atk"])
def test_a_backbone_trains_and_leaves_best_and_last(model, tmp_path):
    fit = training.fit(
        TRAIN, VALIDATION, small(model), tmp_path / "fold0_seed0.safetensors", DEVICE
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fold0_seed0.safetensors",
        "fold0_seed0_last.safetensors",
    ]
    assert [entry["epoch"] for entry in fit.history] == [1, 2] and fit.init == "random"
    assert ("adversarial_validation_loss" in fit.history[0]) == model.endswith("_atk")
    restored = load_model(fit.checkpoint)
    scores = training.validate(restored, VALIDATION, small(model), DEVICE)
    assert scores["validation_loss"] == pytest.approx(
        fit.history[fit.best_epoch - 1]["validation_loss"], rel=1e-4
    )


@pytest.mark.parametrize(
    "method,extra", [("pgd", {}), ("pgd", {"clean_weight": 0.5}), ("trades", {}), ("fast", {})]
)
def test_every_adversarial_method_makes_the_model_robust(tiny, method, extra):
    config = small(
        "Resnet_atk",
        method=method,
        epochs=14,
        lr=0.02,
        train_eps=0.1,
        augmentation=0.0,
        train_steps=2,
        weight_decay=0.0,
        ema_decay=0.0,
        **extra,
    )
    fit = training.fit(TRAIN, VALIDATION, config, tiny, DEVICE)
    assert fit.history[fit.best_epoch - 1]["adversarial_validation_balanced_accuracy"] > 0.8


def test_the_curriculum_grows_and_then_stays():
    config = small("Resnet_atk", epochs=10, eps_ramp=0.5)
    assert training.curriculum(config, 0) == 0
    assert training.curriculum(config, 2.5) == pytest.approx(config.train_eps / 2)
    assert training.curriculum(config, 5) == training.curriculum(config, 9.9) == config.train_eps


def without_seconds(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in history]


@pytest.mark.parametrize("model", ["Resnet", "Resnet_atk"])
@pytest.mark.parametrize("extra", [{}, {"ema_decay": 0.9, "optimizer": "sgd"}])
def test_a_killed_training_goes_on_to_the_same_numbers(tiny, model, extra):
    config = small(model, epochs=4, augmentation=0.7, **extra)
    whole = training.fit(TRAIN, VALIDATION, config, tiny, DEVICE)
    broken = tiny.with_name("broken.safetensors")

    def kill(entry):
        if entry["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.fit(TRAIN, VALIDATION, config, broken, DEVICE, on_epoch=kill)
    assert not broken.exists(), "an unfinished training is not a checkpoint"
    resumed = training.fit(TRAIN, VALIDATION, config, broken, DEVICE)
    assert without_seconds(resumed.history) == without_seconds(whole.history)
    assert equal(weights(tiny), weights(broken))
    assert equal(
        weights(tiny.with_name("fold0_seed0_last.safetensors")),
        weights(broken.with_name("broken_last.safetensors")),
    )


@pytest.mark.parametrize("damage", ["cut short", "a pickle"])
def test_a_damaged_training_state_is_named_and_never_unpickled(tiny, damage):
    class Stop(Exception):
        pass

    def stop(scores):
        raise Stop

    with pytest.raises(Stop):
        training.fit(TRAIN, VALIDATION, small("Resnet"), tiny, DEVICE, on_epoch=stop)
    state = tiny.with_suffix(".state.pt")
    content = state.read_bytes()
    whole = pickle.dumps(Path.home) if damage == "a pickle" else content[: len(content) // 2]
    state.write_bytes(whole)
    with pytest.raises(UserError, match=r"state\.pt cannot be read.*delete it"):
        training.fit(TRAIN, VALIDATION, small("Resnet"), tiny, DEVICE)


def test_a_warm_start_begins_at_the_weights_of_the_clean_counterpart(tiny):
    training.fit(TRAIN, VALIDATION, small("Resnet"), tiny, DEVICE)
    config = small("Resnet_atk", warm_start=True, epochs=1, lr=1e-12)
    robust = tiny.with_name("robust.safetensors")
    with pytest.raises(UserError, match="clean counterpart"):
        training.fit(TRAIN, VALIDATION, config, robust, DEVICE)
    training.fit(TRAIN, VALIDATION, config, robust, DEVICE, start=tiny)
    assert all(
        torch.equal(weights(tiny)[name], weights(robust)[name])
        for name, _ in TinyNet().named_parameters()
    )


def test_a_finished_training_is_not_run_again(tiny):
    first = training.fit(TRAIN, VALIDATION, small("Resnet"), tiny, DEVICE)
    stamp = tiny.stat().st_mtime_ns
    again = training.fit(TRAIN, VALIDATION, small("Resnet"), tiny, DEVICE)
    assert again.history == first.history and tiny.stat().st_mtime_ns == stamp


def test_a_checkpoint_of_other_settings_is_an_error_until_retrained(tiny):
    training.fit(TRAIN, VALIDATION, small("Resnet"), tiny, DEVICE)
    with pytest.raises(UserError, match="lr 0.0003 instead of 0.01"):
        training.fit(TRAIN, VALIDATION, small("Resnet", lr=0.01), tiny, DEVICE)
    assert training.fit(
        TRAIN, VALIDATION, small("Resnet", lr=0.01), tiny, DEVICE, retrain=True
    ).history


def test_an_exploding_loss_is_a_clear_error_and_loses_nothing(tiny, monkeypatch):
    config = small("Resnet", epochs=3)
    original, seen = trainer.loss_of_batch, []

    def poisoned(*arguments, **options):
        seen.append(1)
        loss, logits = original(*arguments, **options)
        return (loss * float("nan") if len(seen) == 4 else loss), logits

    monkeypatch.setattr(trainer, "loss_of_batch", poisoned)
    with pytest.raises(UserError, match="loss became nan in epoch 2"):
        training.fit(TRAIN, VALIDATION, config, tiny, DEVICE)
    monkeypatch.setattr(trainer, "loss_of_batch", original)
    assert len(training.fit(TRAIN, VALIDATION, config, tiny, DEVICE).history) == 3


def test_a_model_that_answers_one_class_is_refused_as_best():
    history = [
        {"epoch": 1, "score": 1.30, "validation_classes": 1},
        {"epoch": 2, "score": 1.38, "validation_classes": 3},
        {"epoch": 3, "score": 1.45, "validation_classes": 4},
    ]
    assert training.best_epoch(history) == (2, False)
    assert training.best_epoch(history[:1]) == (1, True)


def test_the_score_is_not_won_by_a_constant_answer():
    labels = torch.tensor([0] * 90 + [1] * 5 + [2] * 5)
    constant = torch.zeros(100, 4)
    constant[:, 0] = 6.0
    unsure = torch.zeros(100, 4)
    assert nn.functional.cross_entropy(constant, labels) < nn.functional.cross_entropy(
        unsure, labels
    )
    assert training.macro_cross_entropy(constant, labels) > training.macro_cross_entropy(
        unsure, labels
    )


def test_class_weights_balance_the_training_set():
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    weight = training.class_weights(labels)
    assert weight[labels].mean() == pytest.approx(1.0)
    assert weight[0] * 6 == pytest.approx(float(weight[1] * 3)) and weight[3] == 0


@pytest.mark.parametrize("name", ["Resnet", "Efficientnet", "Dinov2"])
def test_fine_tuning_freezes_what_lies_below(name):
    model = build_model(name, pretrained=False)
    counts = {}
    for what in ("full", "last_block", "head"):
        training.freeze_lower_layers(model, what)
        groups = training.parameter_groups(model, RunConfig(model=name, fine_tune=what))
        counts[what] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert counts[what] == sum(p.numel() for group in groups for p in group["params"])
    assert counts["full"] == sum(p.numel() for p in model.parameters())
    assert 0 < counts["head"] < counts["last_block"] < counts["full"]


def test_layer_decay_slows_lower_blocks_of_dinov2():
    model = build_model("Dinov2", pretrained=False)
    groups = training.parameter_groups(model, RunConfig(model="Dinov2", layer_decay=0.8))
    scale_of = {id(p): group["scale"] for group in groups for p in group["params"]}
    scales = [
        scale_of[id(p)]
        for name, p in model.named_parameters()
        if name.endswith("attention.query.weight") or "q_proj.weight" in name
    ]
    assert len(scales) == 12 and scales == sorted(scales) and scales[0] < 0.2
    assert scales == [pytest.approx(0.8**below) for below in range(12, 0, -1)]
    embeddings = model.body.backbone.embeddings.cls_token
    assert scale_of[id(embeddings)] == pytest.approx(0.8**14)
    assert scale_of[id(model.body.head.weight)] == 1.0


def test_nothing_is_trained_in_the_attack_and_batchnorm_does_not_move(monkeypatch):
    model = TinyNet()
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images, labels = torch.rand(8, 1, 32, 32), torch.arange(8) % 4
    modes = []
    original = losses.perturb_for_training

    def watched(network, *arguments, **options):
        modes.append(network.training)
        return original(network, *arguments, **options)

    config = small("Resnet_atk", train_steps=3)
    monkeypatch.setattr(losses, "perturb_for_training", watched)
    training.loss_of_batch(
        model, images, labels, config, 0.1, None, lambda: torch.autocast("cpu", enabled=False)
    )
    assert modes == [False] and model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model.state_dict()["body.conv.weight"], before["body.conv.weight"])
    assert int(model.body.norm.num_batches_tracked) == 1, (
        "one forward pass in train mode: the one that is learned from"
    )


class Probed(nn.Module):
    """A linear model that is slow in one precision and, where asked, has the opposite gradient in
    bf16."""

    def __init__(self, slow: str, wrong: bool) -> None:
        super().__init__()
        self.head, self.slow, self.wrong = nn.Linear(64, 4), slow, wrong

    def forward(self, images):
        precision = "bf16" if torch.is_autocast_enabled("cpu") else "fp32"
        if precision == self.slow:
            time.sleep(0.05)
        logits = self.head(images.flatten(1))
        return -logits if self.wrong and precision == "bf16" else logits


@pytest.mark.parametrize(
    ("slow", "wrong", "expected"),
    [("fp32", False, "bf16"), ("bf16", False, "fp32"), ("fp32", True, "fp32")],
)
def test_the_probe_takes_the_faster_precision_only_if_its_gradient_agrees(slow, wrong, expected):
    torch.manual_seed(0)
    images = torch.rand(32, 1, 8, 8)
    assert (
        training.probe_precision(Probed(slow, wrong), images, torch.arange(32) % 4, DEVICE)
        == expected
    )


def test_the_probe_leaves_training_as_if_it_had_not_run(tiny):
    states = []
    for precision in ("auto", "fp32"):
        config = small("Resnet", precision=precision)
        probed = training.Trainer(TRAIN, VALIDATION, config, DEVICE)
        states.append({key: value.clone() for key, value in probed.model.state_dict().items()})
        assert probed.precision in ("fp32", "bf16")
    assert equal(*states)


def test_settings_survive_json():
    config = small("Resnet_atk")
    assert json.loads(json.dumps(training.training_settings(config))) == training.training_settings(
        dataclasses.replace(config)
    )


def test_a_state_of_another_backbone_does_not_load(tiny):
    config = small("Resnet", epochs=3)

    def stop(entry):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.fit(TRAIN, VALIDATION, config, tiny, DEVICE, on_epoch=stop)
    path = tiny.with_suffix(".state.pt")
    state = torch.load(path, weights_only=True)
    state["model"]["body.conv.weight"] = torch.zeros(8, 1, 3, 3)
    torch.save(state, path)
    with pytest.raises(UserError, match="does not fit"):
        training.fit(TRAIN, VALIDATION, config, tiny, DEVICE)


def test_save_model_is_what_load_model_reads(tmp_path):
    model = build_model("Efficientnet", pretrained=False, input_size=64)
    save_model(model, tmp_path / "a.safetensors")
    assert load_model(tmp_path / "a.safetensors").input_size == 64


def test_an_exploding_gradient_costs_its_step_and_many_in_a_row_end_the_training(tiny, monkeypatch):
    original, broken = trainer.loss_of_batch, {3}
    seen = []

    class Exploding(torch.autograd.Function):
        @staticmethod
        def forward(context, loss):
            return loss.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * float("inf")

    def exploding(*arguments, **options):
        seen.append(1)
        loss, logits = original(*arguments, **options)
        return (Exploding.apply(loss) if len(seen) in broken else loss), logits

    monkeypatch.setattr(trainer, "loss_of_batch", exploding)
    fit = training.fit(TRAIN, VALIDATION, small("Resnet", epochs=3), tiny, DEVICE)
    assert [entry["skipped_steps"] for entry in fit.history] == [0, 1, 0]
    assert all(torch.isfinite(tensor.float()).all() for tensor in weights(tiny).values())
    broken.update(range(1, 99))
    with pytest.raises(UserError, match="gradient was not finite in 5 steps"):
        training.fit(
            TRAIN,
            VALIDATION,
            small("Resnet", epochs=9),
            tiny.with_name("other.safetensors"),
            DEVICE,
        )


def test_single_step_training_that_collapses_goes_on_with_pgd(tiny, monkeypatch):
    """Collapse is simulated: in the second epoch alone, images robust to one step are shown as not
    robust to PGD."""
    original, calls = trainer.attacked_logits, []

    def simulated(model, images, labels, eps, device, *, steps, **options):
        if steps in (1, 10):
            calls.append(steps)
            right = torch.nn.functional.one_hot(labels, 4).float()
            return -right if steps == 10 and len(calls) == 4 else right
        return original(model, images, labels, eps, device, steps=steps, **options)

    monkeypatch.setattr(trainer, "attacked_logits", simulated)
    used, inner = [], losses.perturb_for_training

    def counted(*arguments, **options):
        used.append(options["steps"])
        return inner(*arguments, **options)

    monkeypatch.setattr(losses, "perturb_for_training", counted)
    fit = training.fit(
        TRAIN,
        VALIDATION,
        small("Resnet_atk", method="fast", epochs=4, eps_ramp=0.0, train_steps=2),
        tiny,
        DEVICE,
    )
    assert [entry.get("collapsed") for entry in fit.history] == [False, True, None, None]
    assert fit.best_epoch != 2
    assert set(used) == {1, 2}, "one step before the collapse, PGD after it"


def test_a_healthy_single_step_training_is_not_called_collapsed(tiny):
    fit = training.fit(
        TRAIN, VALIDATION, small("Resnet_atk", method="fast", epochs=3, lr=0.02), tiny, DEVICE
    )
    assert all(entry["collapsed"] is False for entry in fit.history)


def test_ordinal_labels_charge_more_for_a_graver_error():
    targets = training.ordinal_targets(torch.tensor([2]))
    assert targets.sum().item() == pytest.approx(1) and targets.argmax().item() == 2
    assert targets[0, 3] == targets[0, 1] > targets[0, 0]
    config, labels = small("Resnet", loss="ordinal"), torch.tensor([2])
    near, far = (
        training.classification_loss(torch.tensor([row]), labels, config, None, labels).item()
        for row in ([0.0, 0.0, 0.0, 3.0], [3.0, 0.0, 0.0, 0.0])
    )
    assert near < far


def test_patience_ends_a_training_that_gets_no_better(tiny, monkeypatch):
    scores = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    original = trainer.validate
    monkeypatch.setattr(
        trainer,
        "validate",
        lambda *arguments: {**original(*arguments), "validation_classes": 4, "score": next(scores)},
    )
    fit = training.fit(TRAIN, VALIDATION, small("Resnet", epochs=6, patience=2), tiny, DEVICE)
    assert len(fit.history) == 4 and fit.best_epoch == 2


def test_tensorboard_events_hold_every_epoch(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit = training.fit(
        TRAIN, VALIDATION, small("Resnet", epochs=3), tiny, DEVICE, logs=tmp_path / "logs"
    )
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert events.Scalars("validation/loss")[-1].value == pytest.approx(
        fit.history[-1]["validation_loss"]
    )


def test_a_full_disk_is_a_clear_error_and_the_old_file_stays(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with (
        pytest.raises(UserError, match="the disk is full"),
        atomic_path(tmp_path / "a.json") as temporary,
    ):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert (tmp_path / "a.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def mount_namespace() -> list[str]:
    """The command with which a program may mount a disk only for itself; empty where it cannot."""
    for command in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        if shutil.which(command[0]):
            mount = [*command, "sh", "-c", "mount -t tmpfs none /mnt"]
            if subprocess.run(mount, capture_output=True).returncode == 0:
                return command
    return []


def test_a_disk_that_is_really_full_is_a_clear_error_and_every_old_file_stays(tmp_path):
    """A memory disk of 2 MiB, filled to the last byte, to a part of the new file, or to the last
    file name; and once while a training runs."""
    if not (namespace := mount_namespace()):
        pytest.skip("no mount namespace (Linux, as root or with user namespaces)")
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        [*namespace, sys.executable, "-m", "tests.full_disk", str(disk)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "ALZHEIMER_QUIET": "1", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout)
    assert len(results) == 13
    for name, result in results.items():
        kind, message = result["error"] or ("nothing", "")
        assert kind == "UserError" and "could not be written: the disk is full" in message, (
            f"{name}: {kind}: {message}"
        )
        assert result["whole"], f"{name}: the old file is not what it was"
        assert result["left"] == [], f"{name}: {result['left']} is left behind"
    assert not list(disk.iterdir()), "the disk disappears with its process"
