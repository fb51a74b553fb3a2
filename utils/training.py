"""Clean and adversarial fitting of one model: losses, curriculum, checkpoints, resume, choice of the best epoch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.attacks import perturb_for_training
from utils.backbones import PixelClassifier, build_model, load_model, load_weights, read_metadata, save_model
from utils.config import RunConfig
from utils.data import ImageSet, augment, batches, epoch_rows, pixels
from utils.utils_funcs import CLASSES, StudyError, atomic_path, progress, seed_everything

#: PGD steps of the adversarial validation score. More than training uses, so that it can notice a masked gradient.
VALIDATION_STEPS = 5
#: Settings that change the trained weights; a checkpoint of other ones is not silently reused.
TRAINING_FIELDS = ("model", "protocol", "fold", "seed", "max_train", "max_test", "slice_stride", "input_size", "epochs", "batch_size",
                   "optimizer", "lr", "weight_decay", "schedule", "warmup_epochs", "augmentation", "label_smoothing",
                   "class_weights", "gradient_clip", "ema_decay", "pretrained", "fine_tune", "layer_decay", "precision")
ADVERSARIAL_FIELDS = ("method", "train_eps", "train_steps", "clean_weight", "trades_beta", "eps_ramp")


@dataclass(frozen=True)
class Fit:
    """A finished training: where the weights are, and how it went."""

    checkpoint: Path
    history: list[dict]
    best_epoch: int
    init: str
    precision: str
    seconds: float
    one_class: bool
    """Every epoch answered a single class on validation: there is no honest "best", and the last epoch stands in."""

    def load(self) -> PixelClassifier:
        return load_model(self.checkpoint)

    def __str__(self) -> str:
        best = self.history[self.best_epoch - 1]
        return (f"best epoch {self.best_epoch} of {len(self.history)} · validation balanced accuracy {best['validation_balanced_accuracy']:.3f}"
                f" · {self.precision} · init {self.init} · {self.seconds:.0f} s" + (" · ANSWERED ONE CLASS" if self.one_class else ""))


def training_settings(config: RunConfig) -> dict:
    """The settings that decide the weights, as JSON keeps them."""
    fields = TRAINING_FIELDS + (ADVERSARIAL_FIELDS if config.adversarial else ())
    return {name: getattr(config, name) for name in fields}


# ------------------------------------------------------------------------------------------------------------- pieces


def class_weights(labels: Tensor) -> Tensor:
    """Inverse class frequencies, mean 1 over the images (training labels only); an absent class weighs 0."""
    counts = torch.bincount(labels, minlength=len(CLASSES)).float()
    return torch.where(counts > 0, len(labels) / ((counts > 0).sum() * counts.clamp(min=1)), 0.0)


def parameter_groups(model: PixelClassifier, config: RunConfig) -> list[dict]:
    """Parameters by learning rate and weight decay; biases and norms do not decay, frozen ones are left out.

    `fine_tune` freezes what lies below; `layer_decay` multiplies the learning rate of DINOv2 once a block downwards
    (Clark et al. 2020, arXiv:2003.10555). Depth is 0 at the embedding, highest at the head.
    """
    depths = {name: _depth(name) for name, _ in model.named_parameters()}
    top = max(depths.values())
    lowest = {"full": 0, "last_block": top - 1, "head": top}[config.fine_tune]
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(depths[name] >= lowest)
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim < 2 else config.weight_decay
        scale = config.layer_decay ** (top - depths[name]) if config.backbone == "Dinov2" else 1.0
        groups.setdefault((scale, decay), {"params": [], "weight_decay": decay, "scale": scale})["params"].append(parameter)
    return list(groups.values())


def _depth(name: str) -> int:
    """Position of a parameter from the input (0) to the head: block number + 1, heads above all blocks of any backbone."""
    parts = name.split(".")
    if "head" in parts or "fc" in parts or "classifier" in parts:
        return 14
    for position, part in enumerate(parts):
        if part == "layer" and parts[position + 1].isdigit():  # DINOv2: backbone.encoder.layer.<k>
            return int(parts[position + 1]) + 2
        if part == "blocks" and parts[position + 1].isdigit():  # EfficientNet: body.blocks.<k>
            return int(parts[position + 1]) + 7
        if part in ("layer1", "layer2", "layer3", "layer4"):  # ResNet
            return int(part[-1]) + 9
    return 13 if {"layernorm", "bn2", "conv_head"} & set(parts) and len(parts) < 5 else 0


def learning_rate(config: RunConfig, progress_: float) -> float:
    """Factor on `lr` after `progress_` epochs: linear warm-up, then a cosine to 0, or constant."""
    if progress_ < config.warmup_epochs:
        return max(progress_ / config.warmup_epochs, 1e-3)
    if config.schedule == "constant":
        return 1.0
    done = (progress_ - config.warmup_epochs) / max(config.epochs - config.warmup_epochs, 1e-9)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def curriculum(config: RunConfig, progress_: float) -> float:
    """eps after `progress_` epochs: from 0 to `train_eps` over the first `eps_ramp` of the epochs, then constant."""
    ramp = config.eps_ramp * config.epochs
    return config.train_eps * (min(1.0, progress_ / ramp) if ramp > 0 else 1.0)


def macro_cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """Mean over the classes present of their mean cross-entropy: a constant answer does not win it."""
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    return float(torch.stack([losses[labels == label].mean() for label in labels.unique()]).mean())


def balanced_accuracy(logits: Tensor, labels: Tensor) -> float:
    hits = (logits.argmax(1) == labels).float()
    return float(torch.stack([hits[labels == label].mean() for label in labels.unique()]).mean())


def loss_of_batch(model: nn.Module, images: Tensor, labels: Tensor, config: RunConfig, eps: float, weights: Tensor | None,
                  autocast: Callable) -> tuple[Tensor, Tensor]:
    """(loss, logits that training accuracy is counted on) of one batch, by `config.method`; clean models ignore eps.

    PGD-AT: Madry et al. 2018 (arXiv:1706.06083), with `clean_weight` of clean images mixed in; TRADES: Zhang et al. 2019
    (arXiv:1901.08573); fast: Wong et al. 2020 (arXiv:2001.03994). The attack sees the model in eval mode: it must not
    move BatchNorm statistics, and tomorrow's attacker meets the model so.
    """
    def cross_entropy(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, weight=weights, label_smoothing=config.label_smoothing)

    if not config.adversarial or eps == 0:
        with autocast():
            logits = model(images)
        return cross_entropy(logits), logits
    model.eval()
    with autocast():
        budget = dict(steps=1, step_size=1.25 * eps) if config.method == "fast" else dict(steps=config.train_steps)
        attacked = perturb_for_training(model, images, labels, eps, loss="kl" if config.method == "trades" else "ce", **budget)
    model.train()
    needs_clean = config.method == "trades" or config.clean_weight > 0
    with autocast():
        # One forward pass over both halves: BatchNorm then sees the mixture, as at test time.
        both = model(torch.cat([images, attacked]) if needs_clean else attacked)
    if not needs_clean:
        return cross_entropy(both), both
    clean, adversarial = both.chunk(2)
    if config.method == "trades":
        divergence = F.kl_div(F.log_softmax(adversarial.float(), 1), F.log_softmax(clean.float(), 1), log_target=True, reduction="batchmean")
        return cross_entropy(clean) + config.trades_beta * divergence, adversarial
    return config.clean_weight * cross_entropy(clean) + (1 - config.clean_weight) * cross_entropy(adversarial), adversarial


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, device: torch.device | str, batch_size: int = 128) -> Tensor:
    """Float32 logits (N, 4) on the CPU for `uint8` images; the model must be in eval mode."""
    return torch.cat([model(pixels(chunk, device)).float().cpu() for chunk in images.split(batch_size)])


def validate(model: nn.Module, part: ImageSet, config: RunConfig, device: torch.device) -> dict:
    """Validation scores of a model in eval mode; `score` (lower is better) is the macro-averaged cross-entropy, under
    PGD at the full `train_eps` for an adversarially trained model."""
    logits = predict(model, part.images, device)
    scores = {"validation_loss": macro_cross_entropy(logits, part.labels),
              "validation_accuracy": float((logits.argmax(1) == part.labels).float().mean()),
              "validation_balanced_accuracy": balanced_accuracy(logits, part.labels),
              "validation_classes": len(logits.argmax(1).unique())}
    scores["score"] = scores["validation_loss"]
    if config.adversarial:
        attacked = []
        for images, labels in batches(part, torch.arange(len(part)), 64, device):
            moved = perturb_for_training(model, images, labels, config.train_eps, steps=VALIDATION_STEPS, random_start=False)
            with torch.no_grad():
                attacked.append(model(moved).float().cpu())
        adversarial = torch.cat(attacked)
        scores["adversarial_validation_loss"] = scores["score"] = macro_cross_entropy(adversarial, part.labels)
        scores["adversarial_validation_balanced_accuracy"] = balanced_accuracy(adversarial, part.labels)
    return scores


# ------------------------------------------------------------------------------------------------------------- fitting


def probe_precision(model: PixelClassifier, images: Tensor, device: torch.device) -> str:
    """`fp32` or `bf16`: which is faster for a training step of this backbone on this machine *and* agrees with fp32.

    Agreement: the mean distance of the logits is at most 2% of their spread. Weights are left as they were.
    """
    times, outputs = {}, {}
    model.train()
    for precision in ("fp32", "bf16"):
        for attempt in range(3):
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = model(images).float().logsumexp(1).mean()
            torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
            if device.type == "cuda":
                torch.cuda.synchronize()
            elapsed = time.perf_counter() - start
            times[precision] = elapsed if attempt == 1 else min(times.get(precision, math.inf), elapsed) if attempt else math.inf
        model.eval()
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            outputs[precision] = model(images).float()
        model.train()
    spread = float(outputs["fp32"].std()) + 1e-3
    agrees = float((outputs["fp32"] - outputs["bf16"]).abs().mean()) <= 0.02 * spread + 1e-3
    return "bf16" if agrees and times["bf16"] < times["fp32"] else "fp32"


class _Trainer:
    """The state of one training between epochs: all that a resumed run needs to give the same numbers."""

    def __init__(self, train: ImageSet, validation: ImageSet, config: RunConfig, device: torch.device) -> None:
        seed_everything(config.seed)
        self.train, self.validation, self.config, self.device = train, validation, config, device
        self.model = build_model(config.model, pretrained=config.pretrained, input_size=config.input_size)
        self.model.to(device, memory_format=torch.channels_last)
        groups = parameter_groups(self.model, config)
        fused = device.type in ("cpu", "cuda")
        self.optimizer = (torch.optim.AdamW(groups, config.lr, fused=fused) if config.optimizer == "adamw"
                          else torch.optim.SGD(groups, config.lr, momentum=0.9, nesterov=True, fused=fused))
        self.average = None
        if config.ema_decay > 0:
            average = torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema_decay)
            self.average = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self.weights = class_weights(train.labels).to(device) if config.class_weights else None
        self.history: list[dict] = []
        self.precision = config.precision
        if self.precision == "auto":
            state = {key: value.clone() for key, value in self.model.state_dict().items()}
            self.precision = probe_precision(self.model, pixels(train.images[: config.batch_size], device), device)
            self.model.load_state_dict(state)  # the probe's forward passes moved BatchNorm statistics

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @property
    def chosen(self) -> nn.Module:
        """What is validated and saved: the average where there is one."""
        return self.average.module if self.average is not None else self.model

    def epoch(self) -> dict:
        """Trains one epoch and validates. All randomness is drawn from (seed, epoch), so an epoch can be run again."""
        config, number, start = self.config, len(self.history), time.perf_counter()
        seed_everything(config.seed * 100_003 + number + 1)
        generator = torch.Generator().manual_seed(config.seed * 100_003 + number + 1)
        rows = epoch_rows(self.train, config.slice_stride, generator)
        steps = max(1, math.ceil(len(rows) / config.batch_size))
        total_loss = torch.zeros((), dtype=torch.float64)
        hits, seen = 0, 0
        self.model.train()
        for step, (images, labels) in enumerate(progress(batches(self.train, rows, config.batch_size, self.device),
                                                         f"{config.model} epoch {number + 1}/{config.epochs}", steps)):
            position = number + step / steps
            for group in self.optimizer.param_groups:
                group["lr"] = config.lr * group["scale"] * learning_rate(config, position)
            images = augment(images, config.augmentation, generator)
            images = images.contiguous(memory_format=torch.channels_last)
            loss, logits = loss_of_batch(self.model, images, labels, config, curriculum(config, position), self.weights, self.autocast)
            if not torch.isfinite(loss):
                raise StudyError(f"{config.model}: the training loss became {loss.item()} in epoch {number + 1}, step {step + 1}; "
                                 f"lower lr (now {config.lr:g}) and run again: it goes on from the last finished epoch.")
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_clip, error_if_nonfinite=False)
            self.optimizer.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
            total_loss += loss.detach().double().cpu() * len(labels)
            hits += int((logits.detach().argmax(1) == labels[: len(logits)]).sum())
            seen += len(labels)
        self.model.eval()
        scores = validate(self.chosen.eval(), self.validation, config, self.device)
        entry = {"epoch": number + 1, "train_loss": float(total_loss / seen), "train_accuracy": hits / seen,
                 "lr": config.lr * learning_rate(config, float(number + 1)), **scores, "seconds": time.perf_counter() - start}
        if config.adversarial:
            entry["train_eps"] = curriculum(config, float(number + 1))
        self.history.append(entry)
        return entry

    def state(self) -> dict:
        return {"settings": json.dumps(training_settings(self.config)), "history": json.dumps(self.history), "precision": self.precision,
                "init": self.model.init, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "average": None if self.average is None else self.average.state_dict()}

    def restore(self, state: dict, source: Path) -> None:
        load_weights(self.model, state["model"], source)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.history, self.precision, self.model.init = json.loads(state["history"]), state["precision"], state["init"]


def best_epoch(history: list[dict]) -> tuple[int, bool]:
    """(number of the epoch with the lowest score, whether no epoch answered more than one class). An epoch that answers
    one class is refused as best; where all do, the last stands in and the record says so."""
    eligible = [entry for entry in history if entry["validation_classes"] > 1 and math.isfinite(entry["score"])]
    if not eligible:
        return history[-1]["epoch"], True
    return min(eligible, key=lambda entry: entry["score"])["epoch"], False


def finished_fit(path: Path, config: RunConfig) -> Fit | None:
    """The training that `path` holds, None where there is none yet.

    Raises:
        StudyError: the file is of other training settings.
    """
    if not path.is_file():
        return None
    header = read_metadata(path)
    _check_settings(header["settings"], config, path)
    return Fit(path, header["history"], header["best_epoch"], header["init"], header["precision"], header["seconds"], header["one_class"])


def _check_settings(found: dict, config: RunConfig, path: Path) -> None:
    expected = json.loads(json.dumps(training_settings(config)))
    different = [f"{name} {found.get(name)!r} instead of {value!r}" for name, value in expected.items() if found.get(name) != value]
    if different:
        raise StudyError(f"{path} was trained with {'; '.join(different[:4])}: run with these settings, or with retrain to replace it.")


def fit(train: ImageSet, validation: ImageSet, config: RunConfig, checkpoint: Path, device: torch.device, *, retrain: bool = False,
        on_epoch: Callable[[dict], None] | None = None) -> Fit:
    """Trains, or goes on from the last finished epoch, or returns the finished training that `checkpoint` holds.

    Every epoch leaves `<checkpoint>.state.pt` (weights, average, optimiser, history) behind; the best epoch's weights lie
    in `<checkpoint>.best.safetensors` until the end, when they become `checkpoint` and the last epoch's stay beside it as
    `<stem>_last.safetensors`. Only training and validation sets are seen.

    Args:
        on_epoch: called with each epoch's entry of the history; an exception from it ends the training (pruning).
    """
    state_path, best_path = checkpoint.with_suffix(".state.pt"), checkpoint.with_suffix(".best.safetensors")
    if retrain:
        for path in (checkpoint, state_path, best_path):
            path.unlink(missing_ok=True)
    if (done := finished_fit(checkpoint, config)) is not None:
        return done
    trainer = _Trainer(train, validation, config, device)
    if state_path.is_file():
        state = torch.load(state_path, weights_only=True, map_location=device)
        _check_settings(json.loads(state["settings"]), config, state_path)
        trainer.restore(state, state_path)
        print(f"{config.model} {config.protocol} {config.unit}: going on after epoch {len(trainer.history)} of {config.epochs}.")
    while len(trainer.history) < config.epochs:
        entry = trainer.epoch()
        if best_epoch(trainer.history)[0] == entry["epoch"]:
            save_model(trainer.model, best_path, {"epoch": entry["epoch"]}, trainer.chosen.state_dict())
        with atomic_path(state_path) as temporary:
            torch.save(trainer.state(), temporary)
        if on_epoch is not None:
            on_epoch(entry)
    number, one_class = best_epoch(trainer.history)
    if one_class:
        print(f"{config.model} {config.protocol} {config.unit}: every epoch answered a single class on validation; the last epoch stands in.")
    seconds = sum(entry["seconds"] for entry in trainer.history)
    metadata = {"settings": training_settings(config), "history": trainer.history, "best_epoch": number, "precision": trainer.precision,
                "seconds": seconds, "one_class": one_class}
    save_model(trainer.model, checkpoint.with_name(f"{checkpoint.stem}_last.safetensors"), {**metadata, "best_epoch": len(trainer.history)},
               trainer.chosen.state_dict())
    best = load_model(best_path)
    save_model(best, checkpoint, metadata)
    state_path.unlink(missing_ok=True)
    best_path.unlink(missing_ok=True)
    return Fit(checkpoint, trainer.history, number, trainer.model.init, trainer.precision, seconds, one_class)
