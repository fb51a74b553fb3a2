"""Clean and adversarial fitting of one model: losses, curriculum, checkpoints, resume, choice of the best epoch.

One process, or as many as `torchrun` starts: each takes its share of every batch and of every validation, through
`accelerate`, with the same global batch and the same gradient.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.attacks import perturb_for_training
from utils.backbones import (
    PixelClassifier,
    build_model,
    load_model,
    load_weights,
    read_metadata,
    save_model,
)
from utils.config import RunConfig
from utils.data import (
    ImageSet,
    apply_augmentation,
    draw_augmentation,
    epoch_rows,
    every_nth,
    join_last,
    pixels,
    spread,
)
from utils.utils_funcs import (
    CLASSES,
    UserError,
    atomic_path,
    keep_freed_memory,
    progress,
    say,
    seed_everything,
)

#: PGD steps of the adversarial validation score. More than training uses, so that it can notice a masked gradient.
VALIDATION_STEPS = 5
#: Settings that change the trained weights; a checkpoint of other ones is not silently reused.
TRAINING_FIELDS = (
    "model",
    "protocol",
    "fold",
    "seed",
    "max_train",
    "max_test",
    "slice_stride",
    "input_size",
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
    "weight_decay",
    "schedule",
    "warmup_epochs",
    "augmentation",
    "loss",
    "label_smoothing",
    "class_weights",
    "gradient_clip",
    "patience",
    "ema_decay",
    "pretrained",
    "fine_tune",
    "layer_decay",
    "precision",
)
ADVERSARIAL_FIELDS = (
    "method",
    "train_eps",
    "train_steps",
    "clean_weight",
    "trades_beta",
    "eps_ramp",
    "warm_start",
)
#: Single-step training has collapsed when PGD fells this share more of the training images than one step does.
COLLAPSE_GAP = 0.25
#: bf16 is worth its rounding only from this share of fp32's time down; nearer to 1 the difference is the clock's own noise.
PRECISION_GAIN = 0.9
#: Steps in a row whose gradient is not finite before training gives up; a single one is skipped and counted.
MAX_SKIPPED = 5


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
        return (
            f"best epoch {self.best_epoch} of {len(self.history)} · validation balanced accuracy "
            f"{best['validation_balanced_accuracy']:.3f} · "
            f"{self.precision} · init {self.init} · {self.seconds:.0f} s"
            + (" · ANSWERED ONE CLASS" if self.one_class else "")
        )


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
        groups.setdefault((scale, decay), {"params": [], "weight_decay": decay, "scale": scale})[
            "params"
        ].append(parameter)
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


def ordinal_targets(labels: Tensor, sharpness: float = 2.0) -> Tensor:
    """Soft labels (N, 4), the softmax of −sharpness·distance between ratings (Díaz and Marathe 2019, "Soft labels for
    ordinal regression"): to call a Mild case Moderate costs less than to call it Non."""
    ratings = torch.arange(len(CLASSES), device=labels.device)
    return (-sharpness * (labels[:, None] - ratings).abs().float()).softmax(1)


def classification_loss(
    logits: Tensor, labels: Tensor, config: RunConfig, weights: Tensor | None, whole: Tensor
) -> Tensor:
    """Weighted mean over the batch `whole` (its labels) of the loss of the part of it that these logits are of."""
    total = len(whole) if weights is None else weights[whole].sum()
    if config.loss == "ordinal":
        losses = F.cross_entropy(
            logits.float(),
            ordinal_targets(labels),
            label_smoothing=config.label_smoothing,
            reduction="none",
        )
        return (losses if weights is None else losses * weights[labels]).sum() / total
    return (
        F.cross_entropy(
            logits.float(),
            labels,
            weight=weights,
            label_smoothing=config.label_smoothing,
            reduction="sum",
        )
        / total
    )


def loss_of_batch(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: RunConfig,
    eps: float,
    weights: Tensor | None,
    autocast: Callable,
    *,
    whole: Tensor | None = None,
    forward: Callable | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, logits that training accuracy is counted on) of one batch, by `config.method`; clean models ignore eps.

    PGD-AT: Madry et al. 2018 (arXiv:1706.06083), with `clean_weight` of clean images mixed in; TRADES: Zhang et al. 2019
    (arXiv:1901.08573); fast: Wong et al. 2020 (arXiv:2001.03994). The attack sees the model in eval mode: it must not
    move BatchNorm statistics, and tomorrow's attacker meets the model so.

    Args:
        whole: labels of the whole batch where these images are one process's share of it.
        forward: what the gradient passes through (a distributed wrapper around `model`); the attack asks `model` itself.
    """
    whole, forward = labels if whole is None else whole, forward or model

    def cross_entropy(logits: Tensor) -> Tensor:
        return classification_loss(logits, labels, config, weights, whole)

    if not config.adversarial or eps == 0:
        with autocast():
            logits = forward(images)
        return cross_entropy(logits), logits
    model.eval()
    with autocast():
        budget = (
            dict(steps=1, step_size=1.25 * eps)
            if config.method == "fast"
            else dict(steps=config.train_steps)
        )
        attacked = perturb_for_training(
            model, images, labels, eps, loss="kl" if config.method == "trades" else "ce", **budget
        )
    model.train()
    needs_clean = config.method == "trades" or config.clean_weight > 0
    with autocast():
        # One forward pass over both halves: BatchNorm then sees the mixture, as at test time.
        both = forward(torch.cat([images, attacked]) if needs_clean else attacked)
    if not needs_clean:
        return cross_entropy(both), both
    clean, adversarial = both.chunk(2)
    if config.method == "trades":
        divergence = F.kl_div(
            F.log_softmax(adversarial.float(), 1),
            F.log_softmax(clean.float(), 1),
            log_target=True,
            reduction="sum",
        )
        return cross_entropy(clean) + config.trades_beta * divergence / len(whole), adversarial
    return config.clean_weight * cross_entropy(clean) + (1 - config.clean_weight) * cross_entropy(
        adversarial
    ), adversarial


@torch.no_grad()
def predict(
    model: nn.Module, images: Tensor, device: torch.device | str, batch_size: int = 128
) -> Tensor:
    """Float32 logits (N, 4) on the CPU for `uint8` images; the model must be in eval mode."""
    return torch.cat(
        [model(pixels(chunk, device)).float().cpu() for chunk in images.split(batch_size)]
    )


def attacked_logits(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    device: torch.device | str,
    *,
    steps: int,
    step_size: float | None = None,
    autocast: Callable = contextlib.nullcontext,
    batch_size: int = 64,
) -> Tensor:
    """Float32 logits (N, 4) on the CPU under lean PGD from the clean image, for `uint8` images; the model in eval mode.
    The search runs under `autocast`, its score is always of float32 arithmetic."""
    rows = []
    for chunk, truth in zip(images.split(batch_size), labels.split(batch_size)):
        with autocast():
            moved = perturb_for_training(
                model,
                pixels(chunk, device),
                truth.to(device),
                eps,
                steps=steps,
                step_size=step_size,
                random_start=False,
            )
        with torch.no_grad():
            rows.append(model(moved).float().cpu())
    return torch.cat(rows)


def validate(
    model: nn.Module,
    part: ImageSet,
    config: RunConfig,
    device: torch.device,
    team: Team | None = None,
    autocast: Callable = contextlib.nullcontext,
) -> dict:
    """Validation scores of a model in eval mode; `score` (lower is better) is the macro-averaged cross-entropy, for an
    adversarially trained model under PGD at the full `train_eps`, on every `slice_stride`-th slice of each person.
    Several processes take every image exactly once."""
    team = team or Team()
    logits = team.everyones(predict(model, part.images[team.share], device), len(part))
    scores = {
        "validation_loss": macro_cross_entropy(logits, part.labels),
        "validation_accuracy": float((logits.argmax(1) == part.labels).float().mean()),
        "validation_balanced_accuracy": balanced_accuracy(logits, part.labels),
        "validation_classes": len(logits.argmax(1).unique()),
        "validation_images": len(logits),
    }
    scores["score"] = scores["validation_loss"]
    if config.adversarial:
        few = part.pick(every_nth(part, config.slice_stride))
        attacked = attacked_logits(
            model,
            few.images[team.share],
            few.labels[team.share],
            config.train_eps,
            device,
            steps=VALIDATION_STEPS,
            autocast=autocast,
        )
        attacked = team.everyones(attacked, len(few))
        scores["adversarial_validation_loss"] = scores["score"] = macro_cross_entropy(
            attacked, few.labels
        )
        scores["adversarial_validation_balanced_accuracy"] = balanced_accuracy(attacked, few.labels)
    return scores


class Team:
    """The processes of one training: this one alone, or those that `torchrun` started (then through `accelerate`).

    `share` are the rows of any batch or set that this process works on; every row is in exactly one process's share.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.size, self.rank, self.engine, self.device = 1, 0, None, device
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from accelerate import Accelerator

            self.engine = Accelerator(cpu=device is not None and device.type == "cpu")
            self.size, self.rank, self.device = (
                self.engine.num_processes,
                self.engine.process_index,
                self.engine.device,
            )

    @property
    def share(self) -> slice:
        return slice(self.rank, None, self.size)

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        return model if self.engine is None else self.engine.prepare_model(model)

    def wait(self) -> None:
        if self.engine is not None:
            self.engine.wait_for_everyone()

    def everyones(self, rows: Tensor, count: int) -> Tensor:
        """All `count` rows in their own order, on the CPU, from each process's share of them."""
        if self.engine is None:
            return rows
        longest = math.ceil(count / self.size)
        padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])]).to(
            self.device
        )
        gathered, whole = self.engine.gather(padded).cpu(), rows.new_empty(count, *rows.shape[1:])
        for rank in range(self.size):
            part = whole[rank :: self.size]
            part.copy_(gathered[rank * longest : rank * longest + len(part)])
        return whole

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        if self.engine is None:
            return value
        return float(
            self.engine.reduce(torch.tensor(value, dtype=torch.float64, device=self.device), "sum")
        )


# ------------------------------------------------------------------------------------------------------------- fitting


def probe_precision(
    model: PixelClassifier, images: Tensor, labels: Tensor, device: torch.device
) -> str:
    """`fp32` or `bf16`: which is faster for a training step of this backbone on this machine *and* agrees with fp32.

    Agreement: what the arithmetic moves the batch's gradient by is at most a quarter of what the choice of the batch moves
    it by, which half the distance between the gradients of its two halves estimates. BatchNorm's statistics move.
    """

    def gradient(precision: str, rows: slice = slice(None)) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images[rows])
        loss = F.cross_entropy(logits.float(), labels[rows])
        return torch.cat(
            [
                part.flatten()
                for part in torch.autograd.grad(
                    loss, [p for p in model.parameters() if p.requires_grad]
                )
            ]
        )

    model.train()
    gradients = {
        precision: gradient(precision) for precision in ("fp32", "bf16")
    }  # untimed: the first pass also lays out memory
    seconds = dict.fromkeys(gradients, math.inf)
    for _ in range(3):  # in turns, so that another process's load falls on both
        for precision in seconds:
            start = time.perf_counter()
            gradient(precision)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[precision] = min(seconds[precision], time.perf_counter() - start)
    noise = (gradient("fp32", slice(0, None, 2)) - gradient("fp32", slice(1, None, 2))).norm() / 2
    agrees = bool((gradients["bf16"] - gradients["fp32"]).norm() <= 0.25 * noise)
    return "bf16" if agrees and seconds["bf16"] < PRECISION_GAIN * seconds["fp32"] else "fp32"


class _Trainer:
    """The state of one training between epochs: all that a resumed run needs to give the same numbers."""

    def __init__(
        self,
        train: ImageSet,
        validation: ImageSet,
        config: RunConfig,
        device: torch.device,
        start: Path | None = None,
    ) -> None:
        self.team = Team(device)
        device = self.team.device
        seed_everything(config.seed)
        self.train, self.validation, self.config, self.device = train, validation, config, device
        #: The config as it is trained by now: single-step training that collapsed goes on with PGD.
        self.recipe = config
        self.model = build_model(
            config.model,
            pretrained=config.pretrained and start is None,
            input_size=config.input_size,
        )
        if start is not None:
            counterpart = load_model(start)
            load_weights(self.model, counterpart.state_dict(), start)
            self.model.init = counterpart.init
        self.model.to(device)
        groups = parameter_groups(self.model, config)
        fused = device.type in ("cpu", "cuda")
        self.optimizer = (
            torch.optim.AdamW(groups, config.lr, fused=fused)
            if config.optimizer == "adamw"
            else torch.optim.SGD(groups, config.lr, momentum=0.9, nesterov=True, fused=fused)
        )
        self.average = None
        if config.ema_decay > 0:
            average = torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema_decay)
            self.average = torch.optim.swa_utils.AveragedModel(
                self.model, multi_avg_fn=average, use_buffers=True
            )
        self.weights = class_weights(train.labels).to(device) if config.class_weights else None
        self.history: list[dict] = []
        self.skipped_in_a_row = 0
        if device.type == "cpu":
            keep_freed_memory()
        self.precision = config.precision
        if self.precision == "auto":
            state = {key: value.clone() for key, value in self.model.state_dict().items()}
            batch = train.pick(spread(train, config.batch_size))
            self.precision = probe_precision(
                self.model, pixels(batch.images, device), batch.labels.to(device), device
            )
            self.model.load_state_dict(
                state
            )  # the probe's forward passes moved BatchNorm statistics
        self.forward = self.team.wrap(self.model)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @property
    def chosen(self) -> nn.Module:
        """What is validated and saved: the average where there is one."""
        return self.average.module if self.average is not None else self.model

    def epoch(self) -> dict:
        """Trains one epoch and validates. All randomness is drawn from (seed, epoch), so an epoch can be run again."""
        config, number, start = self.config, len(self.history), time.perf_counter()
        before = self._snapshot() if config.adversarial and self.recipe.method == "fast" else None
        entry = {
            "epoch": number + 1,
            **self._pass(number),
            "lr": config.lr * learning_rate(config, float(number + 1)),
        }
        self.model.eval()
        if before is not None:
            entry |= self._collapse()
            if entry["collapsed"]:
                say(
                    f"{config.model}: single-step training collapsed in epoch {number + 1} (one step leaves "
                    f"{entry['train_fgsm_accuracy']:.0%} of training images standing, PGD {entry['train_pgd_accuracy']:.0%}); "
                    "it goes on with PGD from the epoch before."
                )
                self._load(before)
                self.recipe = dataclasses.replace(
                    config, method="pgd", train_steps=max(2, config.train_steps)
                )
        entry |= validate(
            self.chosen.eval(), self.validation, config, self.device, self.team, self.autocast
        )
        if config.adversarial:
            entry["train_eps"] = curriculum(config, float(number + 1))
        entry["seconds"] = time.perf_counter() - start
        self.history.append(entry)
        return entry

    def _pass(self, number: int) -> dict:
        """One pass over the epoch's rows; this process's share of each batch."""
        config, team = self.config, self.team
        seed_everything(config.seed * 100_003 + number + 1)
        generator = torch.Generator().manual_seed(config.seed * 100_003 + number + 1)
        rows = epoch_rows(self.train, config.slice_stride, generator)
        # BatchNorm cannot train on a last batch of one image, and every process needs a part of each batch.
        chunks = join_last(rows.split(config.batch_size), 2 * team.size)
        total_loss = torch.zeros((), dtype=torch.float64)
        hits, skipped = 0, 0
        self.model.train()
        for step, chunk in enumerate(
            progress(chunks, f"{config.model} epoch {number + 1}/{config.epochs}", len(chunks))
        ):
            position = number + step / len(chunks)
            for group in self.optimizer.param_groups:
                group["lr"] = config.lr * group["scale"] * learning_rate(config, position)
            whole = self.train.labels[chunk].to(self.device, non_blocking=True)
            labels, drawn = (
                whole[team.share],
                draw_augmentation(len(chunk), config.augmentation, generator),
            )
            images = apply_augmentation(
                pixels(self.train.images[chunk[team.share]], self.device),
                None if drawn is None else drawn[team.share],
            ).contiguous(memory_format=torch.channels_last)
            loss, logits = loss_of_batch(
                self.model,
                images,
                labels,
                self.recipe,
                curriculum(config, position),
                self.weights,
                self.autocast,
                whole=whole,
                forward=self.forward,
            )
            if not torch.isfinite(loss):
                raise UserError(
                    f"{config.model}: the training loss became {loss.item()} in epoch {number + 1}, step {step + 1}; "
                    f"lower lr (now {config.lr:g}) and run again: it goes on from the last finished epoch."
                )
            self.optimizer.zero_grad(set_to_none=True)
            (
                loss * team.size
            ).backward()  # the engine averages over processes; the loss is already a part of the mean
            length = nn.utils.clip_grad_norm_(
                self.model.parameters(), config.gradient_clip, error_if_nonfinite=False
            )
            if torch.isfinite(length):
                self.optimizer.step()
                self.skipped_in_a_row = 0
            else:
                skipped, self.skipped_in_a_row = skipped + 1, self.skipped_in_a_row + 1
                if self.skipped_in_a_row == MAX_SKIPPED:
                    raise UserError(
                        f"{config.model}: the gradient was not finite in {MAX_SKIPPED} steps in a row (epoch {number + 1}, "
                        "step "
                        f"{step + 1}); lower lr (now {config.lr:g}) and run again: it goes on from the last finished epoch."
                    )
            if self.average is not None:
                self.average.update_parameters(self.model)
            total_loss += loss.detach().double().cpu() * len(chunk)
            hits += int((logits.detach().argmax(1) == labels[: len(logits)]).sum())
        seen = sum(len(chunk) for chunk in chunks)
        return {
            "train_loss": team.total(float(total_loss)) / seen,
            "train_accuracy": team.total(hits) / seen,
            "skipped_steps": skipped,
        }

    def _snapshot(self) -> dict:
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
            }
        )

    def _load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def _collapse(self) -> dict:
        """Catastrophic overfitting of single-step training (Wong et al. 2020): training images withstand one step and fall
        to PGD. On 64 training images spread over classes and people, at the full `train_eps`."""
        sample = self.train.pick(spread(self.train, 64))
        shares = {}
        for name, budget in (
            ("fgsm", dict(steps=1, step_size=self.config.train_eps)),
            ("pgd", dict(steps=10)),
        ):
            logits = attacked_logits(
                self.model,
                sample.images,
                sample.labels,
                self.config.train_eps,
                self.device,
                autocast=self.autocast,
                **budget,
            )
            shares[f"train_{name}_accuracy"] = float(
                (logits.argmax(1) == sample.labels).float().mean()
            )
        return {
            **shares,
            "collapsed": shares["train_fgsm_accuracy"] - shares["train_pgd_accuracy"]
            > COLLAPSE_GAP,
        }

    def state(self) -> dict:
        return {
            "settings": json.dumps(training_settings(self.config)),
            "history": json.dumps(self.history),
            "precision": self.precision,
            "recipe": [self.recipe.method, self.recipe.train_steps],
            "init": self.model.init,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def restore(self, state: dict, source: Path) -> None:
        load_weights(self.model, state["model"], source)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.recipe = dataclasses.replace(
            self.config, method=state["recipe"][0], train_steps=state["recipe"][1]
        )
        self.history, self.precision, self.model.init = (
            json.loads(state["history"]),
            state["precision"],
            state["init"],
        )


def best_epoch(history: list[dict]) -> tuple[int, bool]:
    """(number of the epoch with the lowest score, whether no epoch answered more than one class). An epoch that answers
    one class, or in which single-step training collapsed, is refused as best; where all do, the last stands in and the
    record says so."""
    eligible = [
        entry
        for entry in history
        if entry["validation_classes"] > 1
        and math.isfinite(entry["score"])
        and not entry.get("collapsed")
    ]
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
    return Fit(
        path,
        header["history"],
        header["best_epoch"],
        header["init"],
        header["precision"],
        header["seconds"],
        header["one_class"],
    )


def different_settings(found: dict, config: RunConfig, ignore: Collection[str] = ()) -> list[str]:
    """Training settings in which `found` is not `config`, in words. One that did not exist yet had its default."""
    default = {field.name: field.default for field in dataclasses.fields(RunConfig)}
    expected = json.loads(json.dumps(training_settings(config)))
    return [
        f"{name} {found.get(name, default[name])!r} instead of {value!r}"
        for name, value in expected.items()
        if name not in ignore and found.get(name, default[name]) != value
    ]


def _check_settings(found: dict, config: RunConfig, path: Path) -> None:
    different = different_settings(found, config)
    if different:
        raise UserError(
            f"{path} was trained with {'; '.join(different[:4])}: run with these settings, or with retrain to replace it."
        )


def fit(
    train: ImageSet,
    validation: ImageSet,
    config: RunConfig,
    checkpoint: Path,
    device: torch.device,
    *,
    retrain: bool = False,
    on_epoch: Callable[[dict], None] | None = None,
    logs: Path | None = None,
    start: Path | None = None,
) -> Fit:
    """Trains, or goes on from the last finished epoch, or returns the finished training that `checkpoint` holds.

    Every epoch leaves `<checkpoint>.state.pt` (weights, average, optimiser, history) behind; the best epoch's weights lie
    in `<checkpoint>.best.safetensors` until the end, when they become `checkpoint` and the last epoch's stay beside it as
    `<stem>_last.safetensors`. Only training and validation sets are seen.

    Args:
        on_epoch: called with each epoch's entry of the history, past ones first; an exception from it ends the training (pruning).
        logs: folder for TensorBoard event files (None: none).
        start: checkpoint whose weights a new training starts from (None: those of `config.pretrained`).
    """
    state_path, best_path = (
        checkpoint.with_suffix(".state.pt"),
        checkpoint.with_suffix(".best.safetensors"),
    )
    if retrain:
        for path in (checkpoint, state_path, best_path):
            path.unlink(missing_ok=True)
    tell = on_epoch or (lambda entry: None)
    if (done := finished_fit(checkpoint, config)) is not None:
        for entry in done.history:
            tell(entry)
        return done
    if config.adversarial and config.warm_start and start is None:
        raise UserError(
            "warm_start is on and no checkpoint of the clean twin was given to start from: give `start`, or turn it off."
        )
    trainer = _Trainer(train, validation, config, device, start)
    if state_path.is_file():
        state = torch.load(state_path, weights_only=True, map_location=trainer.device)
        _check_settings(json.loads(state["settings"]), config, state_path)
        trainer.restore(state, state_path)
        say(
            f"{config.model} {config.protocol} {config.run_name}: going on after epoch {len(trainer.history)} of {config.epochs}."
        )
    for entry in trainer.history:
        tell(entry)  # again: the kill may have come between an epoch and its telling
    with _event_log(logs if trainer.team.leads else None, len(trainer.history)) as log:
        while len(trainer.history) < config.epochs and not _out_of_patience(
            trainer.history, config.patience
        ):
            entry = trainer.epoch()
            if trainer.team.leads:
                if best_epoch(trainer.history)[0] == entry["epoch"]:
                    save_model(
                        trainer.model,
                        best_path,
                        {"epoch": entry["epoch"]},
                        trainer.chosen.state_dict(),
                    )
                with atomic_path(state_path) as temporary:
                    torch.save(trainer.state(), temporary)
                log(entry)
                say(_epoch_line(trainer.history, config))
            trainer.team.wait()
            tell(entry)
    number, one_class = best_epoch(trainer.history)
    if one_class:
        say(
            f"{config.model} {config.protocol} {config.run_name}: every epoch answered a single class on validation; the last epoch stands in."
        )
    seconds = sum(entry["seconds"] for entry in trainer.history)
    metadata = {
        "settings": training_settings(config),
        "history": trainer.history,
        "best_epoch": number,
        "precision": trainer.precision,
        "seconds": seconds,
        "one_class": one_class,
    }
    if trainer.team.leads:
        save_model(
            trainer.model,
            checkpoint.with_name(f"{checkpoint.stem}_last.safetensors"),
            {**metadata, "best_epoch": len(trainer.history)},
            trainer.chosen.state_dict(),
        )
        save_model(load_model(best_path), checkpoint, metadata)
        state_path.unlink(missing_ok=True)
        best_path.unlink(missing_ok=True)
    trainer.team.wait()
    return Fit(
        checkpoint,
        trainer.history,
        number,
        trainer.model.init,
        trainer.precision,
        seconds,
        one_class,
    )


def _out_of_patience(history: list[dict], patience: int) -> bool:
    return patience > 0 and bool(history) and len(history) - best_epoch(history)[0] >= patience


def _epoch_line(history: list[dict], config: RunConfig) -> str:
    """One line an epoch, with the time that the rest takes if every epoch takes as long as the last ones did."""
    entry = history[-1]
    scores = [
        f"train loss {entry['train_loss']:.3f}",
        f"validation loss {entry['validation_loss']:.3f}",
        f"balanced accuracy {entry['validation_balanced_accuracy']:.3f}",
    ]
    if config.adversarial:
        scores += [
            f"under PGD-{VALIDATION_STEPS}: loss {entry['adversarial_validation_loss']:.3f}",
            f"balanced accuracy {entry['adversarial_validation_balanced_accuracy']:.3f}",
        ]
    recent = [past["seconds"] for past in history[-3:]]
    left = sum(recent) / len(recent) * (config.epochs - len(history))
    best = " (best)" if best_epoch(history)[0] == entry["epoch"] else ""
    return (
        f"{config.model} {config.protocol} {config.run_name} epoch {entry['epoch']}/{config.epochs}{best} · "
        + " · ".join(scores)
        + f" · {entry['seconds']:.0f} s, about {left / 60:.0f} min to go"
    )


@contextlib.contextmanager
def _event_log(folder: Path | None, done: int) -> Iterator[Callable[[dict], None]]:
    """A function that writes an epoch's numbers as TensorBoard events; epochs after `done`, of a killed run, are dropped."""
    if folder is None:
        yield lambda entry: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder, purge_step=done + 1) as writer:

        def log(entry: dict) -> None:
            for name, value in entry.items():
                if name != "epoch":
                    group, _, rest = name.partition("_")
                    writer.add_scalar(
                        f"{group}/{rest}" if rest else name, float(value), entry["epoch"]
                    )
            writer.flush()

        yield log
