"""One training, epoch by epoch, and the state from which a killed one goes on."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from utils.backbones import PixelClassifier, build_model, load_model, load_weights
from utils.config import RunConfig
from utils.data import (
    ImageSet,
    apply_augmentation,
    draw_augmentation,
    epoch_rows,
    join_last,
    pixels,
    spread,
)
from utils.training.losses import class_weights, loss_of_batch
from utils.training.precision import probe_precision
from utils.training.processes import Team
from utils.training.schedule import (
    build_optimizer,
    curriculum,
    freeze_lower_layers,
    learning_rate,
    parameter_groups,
)
from utils.training.settings import training_settings
from utils.training.validation import attacked_logits, validate
from utils.utils_funcs import UserError, progress, say, seed_everything

#: Single-step training has collapsed where one step leaves this share more of the training images
#: correctly classified than PGD does.
COLLAPSE_GAP = 0.25
#: Training images on which a collapse is looked for.
COLLAPSE_IMAGES = 64
#: Training gives up after so many steps in a row whose gradient is not finite; a single one is
#: skipped and counted.
MAX_SKIPPED = 5


def initial_model(config: RunConfig, start: Path | None) -> PixelClassifier:
    """The model that a training starts from.

    Its weights are those of the checkpoint `start`; None takes pretrained or random ones.
    """
    model = build_model(
        config.model,
        pretrained=config.pretrained and start is None,
        input_size=config.input_size,
    )
    if start is not None:
        counterpart = load_model(start)
        load_weights(model, counterpart.state_dict(), start)
        model.init = counterpart.init
    return model


class Trainer:
    """All that one training needs between epochs.

    All randomness of an epoch is drawn from (seed, epoch), so an epoch can be run again, and a
    resumed training gives the same numbers. The global random states are set.
    """

    def __init__(
        self,
        train: ImageSet,
        validation: ImageSet,
        config: RunConfig,
        device: torch.device,
        start: Path | None = None,
    ) -> None:
        self.train, self.validation, self.config = train, validation, config
        self.team = Team(device)
        self.device = self.team.device
        #: The settings now in force: single-step training that collapsed goes on with PGD.
        self.recipe = config
        self.history: list[dict] = []
        self.skipped_in_a_row = 0

        seed_everything(config.seed)
        self.model = initial_model(config, start).to(self.device)
        freeze_lower_layers(self.model, config.fine_tune)
        groups = parameter_groups(self.model, config)
        self.optimizer = build_optimizer(groups, config, self.device)
        self.average = None
        if config.ema_decay > 0:
            self.average = AveragedModel(
                self.model,
                multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay),
                use_buffers=True,
            )
        self.weights = class_weights(train.labels).to(self.device) if config.class_weights else None
        self.precision = self._probe() if config.precision == "auto" else config.precision
        self.forward = self.team.wrap(self.model)

    def _probe(self) -> str:
        # The probe's forward passes move BatchNorm statistics, so the weights are put back.
        weights = {key: value.clone() for key, value in self.model.state_dict().items()}
        batch = self.train.pick(spread(self.train, self.config.batch_size))
        images, labels = pixels(batch.images, self.device), batch.labels.to(self.device)
        precision = probe_precision(self.model, images, labels, self.device)
        self.model.load_state_dict(weights)
        return precision

    def autocast(self) -> torch.autocast:
        """The arithmetic of training: bfloat16 where the precision is `bf16`, else float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @property
    def chosen(self) -> nn.Module:
        """What is validated and saved: the moving average of the weights where there is one."""
        return self.model if self.average is None else self.average.module

    def epoch(self) -> dict:
        """Trains one epoch, validates, and returns the epoch's entry of the history."""
        config, number, start = self.config, len(self.history), time.perf_counter()
        single_step = config.adversarial and self.recipe.method == "fast"
        before = copy.deepcopy(self.weights_and_optimizer()) if single_step else None
        scores = {
            "epoch": number + 1,
            **self.train_pass(number),
            "lr": config.lr * learning_rate(config, float(number + 1)),
        }
        self.model.eval()
        if before is not None:
            scores |= self.look_for_collapse()
            if scores["collapsed"]:
                say(
                    f"{config.model}: single-step training collapsed in epoch {number + 1} (of the "
                    f"training images {scores['train_fgsm_accuracy']:.0%} are robust to one step, "
                    f"{scores['train_pgd_accuracy']:.0%} to PGD); it goes on with PGD from the "
                    "epoch before."
                )
                self.load_weights_and_optimizer(before, "the epoch before")
                self.recipe = dataclasses.replace(
                    config, method="pgd", train_steps=max(2, config.train_steps)
                )
        scores |= validate(
            self.chosen.eval(), self.validation, config, self.device, self.team, self.autocast
        )
        if config.adversarial:
            scores["train_eps"] = curriculum(config, float(number + 1))
        scores["seconds"] = time.perf_counter() - start
        self.history.append(scores)
        return scores

    def train_pass(self, number: int) -> dict:
        """One pass over the rows of epoch `number` (from 0), this process's share of each batch.

        Returns:
            Loss and accuracy on the training images as they were seen, attacked and augmented, and
            the number of skipped steps.

        Raises:
            UserError: the loss, or `MAX_SKIPPED` gradients in a row, were not finite.
        """
        config, team = self.config, self.team
        epoch_seed = config.seed * 100_003 + number + 1
        seed_everything(epoch_seed)
        generator = torch.Generator().manual_seed(epoch_seed)
        rows = epoch_rows(self.train, config.slice_stride, generator)
        # BatchNorm cannot train on a last batch of one image, and every process needs a part.
        chunks = join_last(rows.split(config.batch_size), 2 * team.size)
        total_loss = torch.zeros((), dtype=torch.float64)
        correct, skipped = 0, 0
        self.model.train()
        title = f"{config.model} epoch {number + 1}/{config.epochs}"
        for step, chunk in enumerate(progress(chunks, title, len(chunks))):
            where = f"epoch {number + 1}, step {step + 1}"
            epochs_done = number + step / len(chunks)
            for group in self.optimizer.param_groups:
                group["lr"] = config.lr * group["scale"] * learning_rate(config, epochs_done)
            whole = self.train.labels[chunk].to(self.device, non_blocking=True)
            labels = whole[team.share]
            loss, logits = loss_of_batch(
                self.model,
                self._augmented(chunk, generator),
                labels,
                self.recipe,
                curriculum(config, epochs_done),
                self.weights,
                self.autocast,
                whole=whole,
                forward=self.forward,
            )
            if not torch.isfinite(loss):
                raise UserError(
                    f"{config.model}: the training loss became {loss.item()} in {where}; lower lr "
                    f"(now {config.lr:g}) and run again: it goes on from the last finished epoch."
                )
            skipped += not self._step(loss, where)
            total_loss += loss.detach().double().cpu() * len(chunk)
            correct += int((logits.detach().argmax(1) == labels[: len(logits)]).sum())
        seen = sum(len(chunk) for chunk in chunks)
        return {
            "train_loss": team.total(float(total_loss)) / seen,
            "train_accuracy": team.total(correct) / seen,
            "skipped_steps": skipped,
        }

    def _augmented(self, chunk: Tensor, generator: torch.Generator) -> Tensor:
        """This process's images of a batch, augmented; what is drawn does not depend on it."""
        share = self.team.share
        drawn = draw_augmentation(len(chunk), self.config.augmentation, generator)
        images = apply_augmentation(
            pixels(self.train.images_at(chunk[share]), self.device),
            None if drawn is None else drawn[share],
        )
        return images.contiguous(memory_format=torch.channels_last)

    def _step(self, loss: Tensor, where: str) -> bool:
        """One optimizer step; False where the gradient was not finite and the step was skipped."""
        config = self.config
        self.optimizer.zero_grad(set_to_none=True)
        # Gradients are averaged over processes, but the loss is already this one's part of a mean.
        (loss * self.team.size).backward()
        norm = nn.utils.clip_grad_norm_(
            self.model.parameters(), config.gradient_clip, error_if_nonfinite=False
        )
        finite = bool(torch.isfinite(norm))
        if finite:
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row == MAX_SKIPPED:
                raise UserError(
                    f"{config.model}: the gradient was not finite in {MAX_SKIPPED} steps in a row "
                    f"({where}); lower lr (now {config.lr:g}) and run again: it goes on from the "
                    "last finished epoch."
                )
        if self.average is not None:
            self.average.update_parameters(self.model)
        return finite

    def look_for_collapse(self) -> dict[str, float | bool]:
        """Accuracy on training images under one step and under PGD, and whether they differ much.

        Catastrophic overfitting of single-step training (Wong et al. 2020, arXiv:2001.03994): its
        images are robust to one step and not to PGD. Measured at the full `train_eps` on
        `COLLAPSE_IMAGES` training images spread over classes and patients.
        """
        sample = self.train.pick(spread(self.train, COLLAPSE_IMAGES))
        eps = self.config.train_eps

        def accuracy(steps: int, step_size: float | None) -> float:
            logits = attacked_logits(
                self.model,
                sample.images,
                sample.labels,
                eps,
                self.device,
                autocast=self.autocast,
                steps=steps,
                step_size=step_size,
            )
            return float((logits.argmax(1) == sample.labels).float().mean())

        fgsm, pgd = accuracy(steps=1, step_size=eps), accuracy(steps=10, step_size=None)
        return {
            "train_fgsm_accuracy": fgsm,
            "train_pgd_accuracy": pgd,
            "collapsed": fgsm - pgd > COLLAPSE_GAP,
        }

    def weights_and_optimizer(self) -> dict:
        """State of the model, the optimizer and the moving average; the tensors are not copied."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_weights_and_optimizer(self, state: dict, source: Path | str) -> None:
        """Takes over such a state; `source` is what an error says that it came from."""
        load_weights(self.model, state["model"], source)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def state(self) -> dict:
        """All that `restore` needs, of types that `torch.load` reads with `weights_only`."""
        return {
            "settings": json.dumps(training_settings(self.config)),
            "cohort_sha256": self.train.cohort_sha256,
            "history": json.dumps(self.history),
            "precision": self.precision,
            "recipe": [self.recipe.method, self.recipe.train_steps],
            "init": self.model.init,
            **self.weights_and_optimizer(),
        }

    def restore(self, state: dict, source: Path) -> None:
        """Goes on from a `state()` that the file `source` held.

        Raises:
            UserError: the state is of another backbone.
        """
        self.load_weights_and_optimizer(state, source)
        method, train_steps = state["recipe"]
        self.recipe = dataclasses.replace(self.config, method=method, train_steps=train_steps)
        self.history = json.loads(state["history"])
        self.precision = state["precision"]
        self.model.init = state["init"]
