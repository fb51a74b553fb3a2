"""A training from its data to its checkpoint: started, resumed, or found finished."""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.backbones import PixelClassifier, load_model, read_metadata, save_model
from utils.config import RunConfig
from utils.data import ImageSet, check_cohort
from utils.provenance import images_seen
from utils.training.settings import TRAIN_AGAIN, check_settings, training_settings
from utils.training.trainer import Trainer
from utils.training.validation import VALIDATION_STEPS, best_epoch, epoch_to_keep
from utils.utils_funcs import UserError, atomic_path, say


@dataclass(frozen=True)
class Fit:
    """A finished training: where the weights are, and how it went."""

    checkpoint: Path
    history: list[dict]
    """Scores of each epoch, in order."""
    best_epoch: int
    """Number (from 1) of the epoch whose weights the checkpoint holds: the best one, or the last
    where `kept_epoch` says so."""
    init: str
    """Which weights it started from: `imagenet1k`, `lvd142m` or `random`."""
    precision: str
    seconds: float
    one_class: bool
    """No epoch could be called best (see `best_epoch`), and the last one was taken."""

    def load(self) -> PixelClassifier:
        """The trained model, in evaluation mode."""
        return load_model(self.checkpoint)

    def __str__(self) -> str:
        best = self.history[self.best_epoch - 1]
        parts = [
            f"epoch {self.best_epoch} of {len(self.history)} kept",
            f"validation balanced accuracy {best['validation_balanced_accuracy']:.3f}",
            self.precision,
            f"init {self.init}",
            f"{self.seconds:.0f} s",
        ]
        return " · ".join([*parts, *(["ANSWERED ONE CLASS"] if self.one_class else [])])


def finished_fit(path: Path, config: RunConfig, cohort_sha256: str) -> Fit | None:
    """The training that the checkpoint `path` holds, None where there is none yet.

    Raises:
        UserError: the checkpoint was trained with other settings, or on another cohort.
    """
    if not path.is_file():
        return None
    header = read_metadata(path)
    check_cohort(header.get("cohort_sha256"), cohort_sha256, path, TRAIN_AGAIN)
    check_settings(header["settings"], config, path)
    return Fit(
        checkpoint=path,
        history=header["history"],
        best_epoch=header["best_epoch"],
        init=header["init"],
        precision=header["precision"],
        seconds=header["seconds"],
        one_class=header["one_class"],
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
    """Trains, or resumes after the last finished epoch, or returns what `checkpoint` holds.

    After every epoch but the last `<checkpoint>.state.pt` holds weights, average, optimizer and
    history, and `<checkpoint>.best.safetensors` the best epoch's weights. At the end the best
    weights become `checkpoint`, and the last epoch's are kept as `<stem>_last.safetensors`: a
    process killed while it writes them repeats the last epoch. Only training and
    validation sets are seen. The global random states are set.

    Args:
        retrain: train anew even where there is a checkpoint.
        on_epoch: called with each epoch's scores, those of a resumed training first; an exception
            from it ends the training (as pruning does).
        logs: folder for TensorBoard event files (None: none).
        start: checkpoint whose weights a new training starts from (None: those of
            `config.pretrained`).

    Raises:
        UserError: the checkpoint is of other settings or another cohort, `start` is of another
            cohort, `warm_start` without `start`, or a loss or gradients that are not finite.
    """
    state_path = checkpoint.with_suffix(".state.pt")
    best_path = checkpoint.with_suffix(".best.safetensors")
    report = on_epoch or (lambda scores: None)
    if retrain:
        for path in (checkpoint, state_path, best_path):
            path.unlink(missing_ok=True)
    if (done := finished_fit(checkpoint, config, train.cohort_sha256)) is not None:
        for scores in done.history:
            report(scores)
        return done
    if config.adversarial and config.warm_start and start is None:
        raise UserError(
            "warm_start is on and no checkpoint of the clean counterpart was given to start from: "
            "give `start`, or turn it off."
        )
    if start is not None:
        found = read_metadata(start).get("cohort_sha256")
        remedy = "start from a model that was trained on the same cohort"
        check_cohort(found, train.cohort_sha256, start, remedy)
    trainer = Trainer(train, validation, config, device, start)
    if state_path.is_file():
        resume(trainer, state_path)
    # Again: the process may have been killed between the end of an epoch and its report.
    for scores in trainer.history:
        report(scores)
    with event_log(logs if trainer.team.leads else None, len(trainer.history)) as log:
        while not is_over(trainer.history, config):
            scores = trainer.epoch()
            if trainer.team.leads:
                if not is_over(trainer.history, config):
                    keep_epoch(trainer, best_path, state_path)
                log(scores)
                say(epoch_line(trainer.history, config))
            trainer.team.wait()
            report(scores)
    return finish(trainer, checkpoint, best_path, state_path)


def is_over(history: list[dict], config: RunConfig) -> bool:
    """Whether a training ends after these epochs."""
    return len(history) >= config.epochs or patience_is_over(history, config.patience)


def keep_epoch(trainer: Trainer, best_path: Path, state_path: Path) -> None:
    """Writes what a killed training needs to go on after its last epoch."""
    number = len(trainer.history)
    if epoch_to_keep(trainer.history, trainer.config)[0] == number:
        save_model(trainer.model, best_path, {"epoch": number}, trainer.chosen.state_dict())
    with atomic_path(state_path) as temporary:
        torch.save(trainer.state(), temporary)


def resume(trainer: Trainer, state_path: Path) -> None:
    """Puts a new trainer into the state that a killed training left."""
    config = trainer.config
    try:
        state = torch.load(state_path, weights_only=True, map_location=trainer.device)
    except (RuntimeError, ValueError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{state_path} cannot be read ({str(error).splitlines()[0][:120]}): delete it, and the "
            "training begins again."
        ) from error
    check_cohort(state.get("cohort_sha256"), trainer.train.cohort_sha256, state_path, TRAIN_AGAIN)
    check_settings(json.loads(state["settings"]), config, state_path)
    trainer.restore(state, state_path)
    say(
        f"{config.model} {config.protocol} {config.run_name}: going on after epoch "
        f"{len(trainer.history)} of {config.epochs}."
    )


def patience_is_over(history: list[dict], patience: int) -> bool:
    """Whether the last `patience` epochs brought no better one (0: never)."""
    return patience > 0 and bool(history) and len(history) - best_epoch(history)[0] >= patience


def finish(trainer: Trainer, checkpoint: Path, best_path: Path, state_path: Path) -> Fit:
    """Writes the checkpoints of the best and the last epoch, and removes what resuming needed."""
    config, history = trainer.config, trainer.history
    number, one_class = epoch_to_keep(history, config)
    if one_class:
        say(
            f"{config.model} {config.protocol} {config.run_name}: every epoch answered a single "
            "class on validation, so the last epoch is kept."
        )
    seconds = sum(epoch["seconds"] for epoch in history)
    metadata = {
        "settings": training_settings(config),
        **images_seen(trainer.train, trainer.validation),
        "history": history,
        "best_epoch": number,
        "precision": trainer.precision,
        "seconds": seconds,
        "one_class": one_class,
    }
    if trainer.team.leads:
        last, of_last = trainer.chosen.state_dict(), {**metadata, "best_epoch": len(history)}
        last_path = checkpoint.with_name(f"{checkpoint.stem}_last.safetensors")
        save_model(trainer.model, last_path, of_last, last)
        if number == len(history):
            save_model(trainer.model, checkpoint, metadata, last)
        else:
            save_model(load_model(best_path), checkpoint, metadata)
        state_path.unlink(missing_ok=True)
        best_path.unlink(missing_ok=True)
    trainer.team.wait()
    return Fit(
        checkpoint=checkpoint,
        history=history,
        best_epoch=number,
        init=trainer.model.init,
        precision=trainer.precision,
        seconds=seconds,
        one_class=one_class,
    )


def epoch_line(history: list[dict], config: RunConfig) -> str:
    """The last epoch in one line, with the time left if epochs take as long as the last ones."""
    last = history[-1]
    scores = [
        f"train loss {last['train_loss']:.3f}",
        f"validation loss {last['validation_loss']:.3f}",
        f"balanced accuracy {last['validation_balanced_accuracy']:.3f}",
    ]
    if config.adversarial:
        scores += [
            f"under PGD-{VALIDATION_STEPS}: loss {last['adversarial_validation_loss']:.3f}",
            f"balanced accuracy {last['adversarial_validation_balanced_accuracy']:.3f}",
        ]
    recent = [epoch["seconds"] for epoch in history[-3:]]
    left = sum(recent) / len(recent) * (config.epochs - len(history))
    best = " (best)" if best_epoch(history)[0] == last["epoch"] else ""
    return " · ".join(
        [
            f"{config.model} {config.protocol} {config.run_name} "
            f"epoch {last['epoch']}/{config.epochs}{best}",
            *scores,
            f"{last['seconds']:.0f} s, about {left / 60:.0f} min to go",
        ]
    )


@contextlib.contextmanager
def event_log(folder: Path | None, done: int) -> Iterator[Callable[[dict], None]]:
    """A function that writes an epoch's scores as TensorBoard events into `folder` (None: nowhere).

    Events of epochs after `done`, which a killed training may have left, are dropped.
    """
    if folder is None:
        yield lambda scores: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder, purge_step=done + 1) as writer:

        def log(scores: dict) -> None:
            for name, value in scores.items():
                if name != "epoch":
                    group, _, rest = name.partition("_")
                    tag = f"{group}/{rest}" if rest else name
                    writer.add_scalar(tag, float(value), scores["epoch"])
            writer.flush()

        yield log
