"""Fitting an aggregator on the frozen features of slices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from utils.sequence.aggregators import build_aggregator
from utils.sequence.scans import Scans
from utils.training.losses import class_weights, macro_cross_entropy
from utils.utils_funcs import UserError


def fit_aggregator(
    name: str,
    train: Scans,
    validation: Scans,
    *,
    epochs: int = 80,
    lr: float = 3e-3,
    weight_decay: float = 0.05,
    batch_size: int = 16,
    seed: int = 0,
) -> tuple[nn.Module, dict]:
    """Trains an aggregator on standardized features.

    The weights are those of the last epoch, where the schedule has reduced the learning rate to
    nothing. No best epoch is chosen: twenty validation patients cannot decide it, and the minimum
    of their noisy curve made two trainings on the same features end 43 epochs apart. So that a
    training is the same on every machine it runs in float64 on one thread, from features rounded to
    float16, which removes the last bits in which two runs of a backbone differ.

    In each epoch a patient loses a random part of the slices, up to half, and the features get
    noise: the backbone has seen its training patients, so their features are cleaner than those of
    other patients.

    Args:
        train, validation: features (P, S, D); the patients of the two must differ.

    Returns:
        The aggregator in float32 and evaluation mode; {"history": one dictionary an epoch,
        "score": class-balanced cross-entropy of the last one on validation patients, for
        information}.

    Raises:
        UserError: a patient is in both sets, or the training diverged.
    """
    shared = np.intersect1d(train.patients.numpy(), validation.patients.numpy())
    if len(shared):
        raise UserError(
            f"Patient {shared[0]} is in training and validation: keep patients apart before a "
            "sequence model is fitted."
        )
    train, validation = (
        replace(part, values=part.values.half().double()) for part in (train, validation)
    )
    with one_seeded_thread(seed):  # weights and dropout
        model = build_aggregator(name, train.values.shape[2]).double()
        history = _train_aggregator(
            model, train, validation, epochs, lr, weight_decay, batch_size, seed
        )
    if not np.isfinite(history[-1]["score"]):
        raise UserError(
            f"The {name} aggregator's validation loss is not finite: lower its learning rate."
        )
    model.zero_grad()
    return model.float().eval(), {"history": history, "score": history[-1]["score"]}


@contextlib.contextmanager
def one_seeded_thread(seed: int) -> Iterator[None]:
    """Inside, PyTorch computes on one thread from this seed; afterwards all is as it was."""
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


def _train_aggregator(
    model: nn.Module,
    train: Scans,
    validation: Scans,
    epochs: int,
    lr: float,
    weight_decay: float,
    batch_size: int,
    seed: int,
) -> list[dict]:
    """Trains in place; returns training loss and validation score of each epoch."""
    generator = torch.Generator().manual_seed(seed)
    weights = class_weights(train.labels).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=epochs * -(-len(train) // batch_size)
    )
    history = []
    for epoch in range(1, epochs + 1):
        model.train()
        for rows in torch.randperm(len(train), generator=generator).split(batch_size):
            part = train.pick(rows)
            noise = torch.randn(part.values.shape, generator=generator)
            logits = model(part.values + 0.3 * noise, drop_slices(part.mask, generator))
            loss = nn.functional.cross_entropy(logits, part.labels, weight=weights)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            logits = model(validation.values, validation.mask)
        score = macro_cross_entropy(logits, validation.labels)
        history.append({"epoch": epoch, "train_loss": float(loss.detach()), "score": score})
    return history


def drop_slices(mask: Tensor, generator: torch.Generator) -> Tensor:
    """The mask (B, S) with up to half of each patient's slices dropped at random, never all."""
    share = 0.5 * torch.rand(len(mask), 1, generator=generator)
    chance = torch.rand(mask.shape, generator=generator).masked_fill(~mask, -1)
    always_kept = chance == chance.amax(1, keepdim=True)
    return mask & ((chance >= share) | always_kept)
