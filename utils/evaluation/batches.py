"""One batch of one attack: made now, or taken from the state of an interrupted run."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.attacks.base import ATTACKS, GroupedClasses, perturbation_size
from utils.config import parse_eps
from utils.evaluation.plan import VIEWS, Stage, is_rounded
from utils.evaluation.predictions import misclassified, model_digest, view_labels
from utils.evaluation.suite_run import SuiteRun
from utils.utils_funcs import UserError, atomic_path

#: Bumped when the same settings would give other numbers: older states are then not continued.
STATE_VERSION = 2

#: Distance between the seeds of batches by their first image, a prime.
BATCH_SEED = 7919

#: Distance between the seeds of a stage's rounds, a prime larger than what images and restarts add
#: to a seed.
ROUND_SEED = 15_485_863


class BatchStore:
    """Finished batches on disk, under a name that holds everything that their numbers depend on.

    Each is one `.npz` file, written atomically and read without unpickling. The folder is named by
    weights, images and labels, each file by eps, attack, budget, seed and images: so a state is
    never continued by a run that it does not fit. Without a folder nothing is kept.
    """

    def __init__(self, state_dir: Path | None, run: SuiteRun) -> None:
        self.folder = None
        if state_dir is None:
            return
        identity = hashlib.sha256(f"{STATE_VERSION} {torch.__version__} {run.digest}".encode())
        identity.update(run.pixels.numpy().data)
        identity.update(run.labels.data)
        self.folder = Path(state_dir) / identity.hexdigest()[:16]
        # The same weights under changed code are another model, as their clean answers show.
        stored = self.load("clean.npz")
        if stored is not None:
            if np.allclose(stored["logits"], run.clean, rtol=1e-3, atol=1e-3):
                return
            for path in self.folder.glob("*.npz"):
                path.unlink()
        self.save("clean.npz", {"logits": run.clean})

    def load(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays of a file; None where there is no such file."""
        if self.folder is None or not (self.folder / name).is_file():
            return None
        with np.load(self.folder / name, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    def save(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Writes the arrays to a file, where files are kept."""
        if self.folder is not None:
            with atomic_path(self.folder / name) as temporary, open(temporary, "wb") as file:
                np.savez(file, allow_pickle=False, **arrays)


def attack_batch(
    run: SuiteRun, store: BatchStore, stage: Stage, eps_text: str, rows: np.ndarray, number: int
) -> dict[str, np.ndarray]:
    """Attacks the images `rows`, or loads what the store has of them.

    Args:
        number: of the stage's round, from 0; each round has starting points of its own.

    Returns:
        `logits` and `rounded`, float32 (B, 4), of the adversarial images and of these rounded to 8
        bits; `adversarial`, those images that may be kept; `seconds`, `queries`, `unchanged` (right
        images that came back as they were), `largest` (perturbation) and `flags` (warnings).
    """
    seed = run.config.seed + BATCH_SEED * int(rows[0]) + ROUND_SEED * number
    name = _file_name(run, stage, eps_text, rows, seed)
    if (stored := store.load(name)) is not None:
        return stored
    started = time.perf_counter()
    adversarial, queries, flags = _perturb(run, stage, eps_text, rows, seed)
    seconds = time.perf_counter() - started
    images, labels = run.pixels[rows], run.labels[rows]

    def score(images: Tensor) -> np.ndarray:
        return run.finite(run.predict(images).numpy(), labels)

    logits = rounded = score(adversarial)
    if is_rounded(stage, eps_text):
        # Rounded, not truncated: truncation would shift every perturbation by half a gray level.
        rounded = score((adversarial * 255).round() / 255)
    right = ~misclassified(run.clean[rows], labels, stage.view)
    unchanged = (adversarial == images).flatten(1).all(1).numpy() & right
    keeps = np.isin(rows, run.sample) & run.keeps_images(stage, eps_text)
    done: dict[str, Any] = {
        "logits": logits,
        "rounded": rounded,
        "adversarial": adversarial[keeps].numpy(),
        "seconds": np.float64(seconds),
        "queries": np.int64(queries),
        "unchanged": np.int64(unchanged.sum()),
        "largest": np.float64(
            perturbation_size(images, adversarial, ATTACKS[stage.attack].norm).max()
        ),
        "flags": np.array(flags, dtype=np.str_),
    }
    store.save(name, done)
    return done


def _file_name(run: SuiteRun, stage: Stage, eps_text: str, rows: np.ndarray, seed: int) -> str:
    """Name of a batch's file. Its digest is of all that the batch's numbers depend on besides the
    model and the images: the budget, the seed, and where given precision, source and mask."""
    precision = run.precision_of(stage)
    given: str = "" if precision == "fp32" else precision
    if stage.source:
        given += model_digest(run.sources[stage.source])
    if stage.mask:
        mask = np.ascontiguousarray(torch.as_tensor(run.masks[stage.mask]))
        given += hashlib.sha256(mask.data).hexdigest()
    identity = f"{stage.attack} {stage.view} {sorted(stage.budget.items())} {seed} {given}"
    digest = hashlib.sha256(identity.encode() + rows.tobytes()).hexdigest()[:12]
    return f"{eps_text.replace('/', '-')}_{stage.name}_{digest}.npz"


def _perturb(
    run: SuiteRun, stage: Stage, eps_text: str, rows: np.ndarray, seed: int
) -> tuple[Tensor, int, list[str]]:
    """Adversarial images (B, 1, H, W) on the CPU, the number of images passed through the model,
    and warnings of the attack's own code.

    Raises:
        UserError: the attack raised or ran out of time.
    """

    def in_view(model: nn.Module) -> nn.Module:
        groups = VIEWS[stage.view].groups
        return model if groups is None else GroupedClasses(model, groups)

    budget = dict(stage.budget)
    if stage.source:
        budget["source"] = in_view(run.sources[stage.source])
    if stage.mask:
        budget["mask"] = torch.as_tensor(run.masks[stage.mask])[rows]
    model = _Counted(in_view(run.model), run.time_limit)
    labels = torch.as_tensor(view_labels(run.labels[rows], stage.view)).to(run.device)
    try:
        with _warnings_of_official_code() as flags:
            adversarial = ATTACKS[stage.attack](
                model,
                run.pixels[rows].to(run.device),
                labels,
                parse_eps(eps_text),
                seed=seed,
                precision=run.precision_of(stage),
                **budget,
            ).cpu()
    except Exception as error:
        reason = f"failed ({type(error).__name__}: {error})"
        if isinstance(error, TimeoutError):
            reason = "ran out of time"
        raise UserError(
            f"Attack {stage.name} at eps {eps_text} {reason} on images {rows[0]}-{rows[-1]}: this "
            "is a failed evaluation, not a robust model; correct the attack or the model and run "
            "it again."
        ) from error
    return adversarial, model.images, flags


class _Counted(nn.Module):
    """Counts the images that pass through a model, and stops an attack whose time is over."""

    def __init__(self, model: nn.Module, time_limit: float | None) -> None:
        super().__init__()
        self.model, self.images = model, 0
        self.deadline = time.monotonic() + (time_limit or float("inf"))

    def forward(self, images: Tensor) -> Tensor:
        if time.monotonic() > self.deadline:
            raise TimeoutError("time limit reached")
        self.images += len(images)
        return self.model(images)


class _Collect(logging.Handler):
    """Appends messages to a list."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def _warnings_of_official_code() -> Iterator[list[str]]:
    """Collects what AutoAttack warns of: randomness, zero gradients, a black box that is stronger
    than a white box."""
    flags: list[str] = []
    logger, handler = logging.getLogger("auto-attack"), _Collect(flags)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield flags
        flags += sorted(
            {str(warning.message) for warning in caught if "pyautoattack" in str(warning.filename)}
        )
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
