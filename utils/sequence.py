"""A person's ordered slices as one study: models over the sequence, attacks on the whole study, and their slice budget.

A `StudyModel` maps the slices of several people, pixels (B, S, 1, H, W) in [0, 1] with a mask (B, S) of the slices that
exist, to logits (B, 4): a frozen backbone turns each slice into features, an aggregator reads them in body order. It is
differentiable end to end, so an adversary may perturb every slice of a study towards another diagnosis of the *person*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from utils.attacks import margin, no_parameter_gradients
from utils.training import class_weights, macro_cross_entropy
from utils.utils_funcs import CLASSES, StudyError

#: How slices become one answer.
AGGREGATORS = ("mean", "attention", "gru", "transformer")


# -- studies ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Studies:
    """P people with up to S slices each, in body order from the most superior one; what is missing is zero and masked.

    `values`: (P, S, …), features or uint8 images; `mask`: bool (P, S), True where a slice exists; `labels`, `people`: (P,).
    """

    values: Tensor
    mask: Tensor
    labels: Tensor
    people: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, rows: np.ndarray | Tensor | Sequence[int]) -> Studies:
        rows = torch.as_tensor(rows)
        return Studies(self.values[rows], self.mask[rows], self.labels[rows], self.people[rows])


def gather_studies(values: Tensor, labels: Tensor, people: Tensor, slices: Tensor) -> Studies:
    """One study a person from rows in any order.

    Args:
        values: (N, …) of each slice; labels, people, slices: (N,).

    Raises:
        StudyError: a slice without a person, a person without slice order (a negative or doubled index) or with two labels.
    """
    if bool((people < 0).any()):
        raise StudyError(f"{int((people < 0).sum())} slices belong to no known person: a study is made of real slices only.")
    identity = people.unique()
    own = [(people == person).nonzero().squeeze(1) for person in identity]
    own = [rows[slices[rows].argsort()] for rows in own]
    for person, rows in zip(identity.tolist(), own, strict=True):
        order = slices[rows]
        if bool((order < 0).any()) or len(order.unique()) < len(order):
            raise StudyError(f"Person {person} has no slice order (an index is missing or doubled): recover it with `python -m "
                             "utils.cohort`, or score this person slice by slice.")
        if len(labels[rows].unique()) > 1:
            raise StudyError(f"Person {person} has slices of {len(labels[rows].unique())} classes: a study has one label.")
    longest = max(map(len, own))
    gathered = values.new_zeros((len(identity), longest, *values.shape[1:]))
    mask = torch.zeros(len(identity), longest, dtype=torch.bool)
    for k, rows in enumerate(own):
        gathered[k, :len(rows)], mask[k, :len(rows)] = values[rows], True
    return Studies(gathered, mask, torch.stack([labels[rows[0]] for rows in own]), identity)


# -- aggregators: features (B, S, D) and mask (B, S) → logits (B, 4) -----------------------------------------------------


class MeanProbability(nn.Module):
    """The log of the mean of the slices' probabilities: what every study without a sequence model does."""

    def __init__(self, features: int, hidden: int = 0) -> None:
        super().__init__()
        self.head = nn.Linear(features, len(CLASSES))

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        each = self.head(features).log_softmax(2).masked_fill(~mask[..., None], -torch.inf)
        return each.logsumexp(1) - mask.sum(1, keepdim=True).log()


class AttentionPooling(nn.Module):
    """Gated attention over the slices, blind to their order (Ilse et al. 2018, arXiv:1802.04712)."""

    def __init__(self, features: int, hidden: int = 64) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(0.25))
        self.tanh, self.gate, self.score = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)
        self.head = nn.Linear(hidden, len(CLASSES))

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        low = self.reduce(features)
        score = self.score(self.tanh(low).tanh() * self.gate(low).sigmoid()).squeeze(2)
        weights = score.masked_fill(~mask, -torch.inf).softmax(1)
        return self.head((weights[..., None] * low).sum(1))


class RecurrentReader(nn.Module):
    """A bidirectional GRU along the body axis, its states averaged over the slices (Cho et al. 2014, arXiv:1406.1078)."""

    def __init__(self, features: int, hidden: int = 64) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(0.25))
        self.gru = nn.GRU(hidden, hidden // 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(hidden, len(CLASSES))

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        # Packed, so that the backward direction starts at each person's own last slice, whoever else is in the batch.
        order = (~mask).int().argsort(dim=1, stable=True)[..., None].expand_as(low := self.reduce(features))  # existing slices first
        packed = nn.utils.rnn.pack_padded_sequence(low.gather(1, order), mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        # cuDNN has no backward pass through a recurrent network in eval mode, which an attack needs.
        with torch.backends.cudnn.flags(enabled=self.training):
            states = self.gru(packed)[0]
        states, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True, total_length=mask.shape[1])
        return self.head(states.sum(1) / mask.sum(1, keepdim=True))  # what is padded is 0


class SmallTransformer(nn.Module):
    """One pre-norm encoder layer over the slices with sinusoidal positions (Vaswani et al. 2017, arXiv:1706.03762)."""

    def __init__(self, features: int, hidden: int = 64) -> None:
        super().__init__()
        self.hidden = hidden
        self.reduce = nn.Linear(features, hidden)
        self.encoder = nn.TransformerEncoderLayer(hidden, nhead=4, dim_feedforward=2 * hidden, dropout=0.25, batch_first=True,
                                                  norm_first=True)
        self.head = nn.Linear(hidden, len(CLASSES))

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        low = self.reduce(features)
        place = torch.arange(low.shape[1], device=low.device, dtype=low.dtype)[:, None]
        pace = torch.exp(torch.arange(0, self.hidden, 2, device=low.device, dtype=low.dtype) * (-np.log(1e4) / self.hidden))
        positions = torch.stack([(place * pace).sin(), (place * pace).cos()], dim=2).flatten(1)
        states = self.encoder(low + positions, src_key_padding_mask=~mask)
        return self.head((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


_AGGREGATORS = {"mean": MeanProbability, "attention": AttentionPooling, "gru": RecurrentReader, "transformer": SmallTransformer}


def build_aggregator(name: str, features: int) -> nn.Module:
    """A fresh aggregator in eval mode, one of `AGGREGATORS`, of `features` numbers a slice."""
    if name not in _AGGREGATORS:
        raise StudyError(f"Unknown aggregator {name!r}: expected one of {', '.join(AGGREGATORS)}.")
    return _AGGREGATORS[name](features).eval()


class StudyModel(nn.Module):
    """Pixels (B, S, 1, H, W) in [0, 1] and mask (B, S) → logits (B, 4) of the people.

    Args:
        backbone: a model by the model contract, with `features(images) -> (N, D)`.
        centre, scale: (D,), applied to the features before the aggregator (of training slices).
    """

    def __init__(self, backbone: nn.Module, aggregator: nn.Module, centre: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.backbone, self.aggregator = backbone, aggregator
        self.register_buffer("centre", centre)
        self.register_buffer("scale", scale)

    def features(self, pixels: Tensor, mask: Tensor) -> Tensor:
        """Standardised features (B, S, D), 0 where a slice does not exist."""
        seen = (self.backbone.features(pixels[mask]) - self.centre) / self.scale
        features = seen.new_zeros((*mask.shape, seen.shape[1]))
        features[mask] = seen
        return features

    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
        return self.aggregator(self.features(pixels, mask), mask)

    def reread(self, pixels: Tensor, mask: Tensor, changed: Tensor, features: Tensor) -> Tensor:
        """Logits (B, 4) where only the `changed` slices (B, S) differ from those that gave `features`: only these pass
        through the backbone, so that an attack on k slices costs k slices."""
        features = features.clone()
        features[changed] = (self.backbone.features(pixels[changed]) - self.centre) / self.scale
        return self.aggregator(features, mask)


# -- training an aggregator on frozen features -------------------------------------------------------------------------


def fit_aggregator(name: str, train: Studies, validation: Studies, *, epochs: int = 80, lr: float = 3e-3, weight_decay: float = 0.05,
                   batch_size: int = 16, seed: int = 0) -> tuple[nn.Module, dict]:
    """An aggregator trained on standardised features and the history of its training; the epoch with the least
    class-balanced validation cross-entropy is kept.

    Each epoch a person loses a random part of the slices, up to half, and the features carry noise: the backbone has seen
    its training people, so their features are cleaner than anybody else's.

    Args:
        train, validation: features (P, S, D); the people of the two must differ.

    Raises:
        StudyError: a person is in both sets.
    """
    shared = np.intersect1d(train.people.numpy(), validation.people.numpy())
    if len(shared):
        raise StudyError(f"Person {shared[0]} is in training and validation: keep people apart before a sequence model is fitted.")
    generator = torch.Generator().manual_seed(seed)
    state = torch.get_rng_state()
    torch.manual_seed(seed)  # weights and dropout
    try:
        model = build_aggregator(name, train.values.shape[2])
        weights = class_weights(train.labels)
        optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=epochs * -(-len(train) // batch_size))
        best, kept, history = float("inf"), {}, []
        for epoch in range(1, epochs + 1):
            model.train()
            for rows in torch.randperm(len(train), generator=generator).split(batch_size):
                part = train.pick(rows)
                features = part.values + 0.3 * torch.randn(part.values.shape, generator=generator)
                loss = nn.functional.cross_entropy(model(features, _thinned(part.mask, generator)), part.labels, weight=weights)
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                schedule.step()
            model.eval()
            with torch.no_grad():
                score = macro_cross_entropy(model(validation.values, validation.mask), validation.labels)
            history.append({"epoch": epoch, "train_loss": float(loss.detach()), "score": score})
            if score < best:
                best, kept = score, {key: value.clone() for key, value in model.state_dict().items()}
    finally:
        torch.set_rng_state(state)
    if not kept:
        raise StudyError(f"No epoch of the {name} aggregator gave a finite validation loss: lower its learning rate.")
    model.load_state_dict(kept)
    model.zero_grad()
    return model.eval(), {"history": history, "best_epoch": 1 + min(range(epochs), key=lambda k: history[k]["score"]), "score": best}


def _thinned(mask: Tensor, generator: torch.Generator) -> Tensor:
    """The mask with up to half of each person's slices dropped at random, never all."""
    share = 0.5 * torch.rand(len(mask), 1, generator=generator)
    chance = torch.rand(mask.shape, generator=generator).masked_fill(~mask, -1)
    first = chance == chance.amax(1, keepdim=True)
    return mask & ((chance >= share) | first)


# -- attacks on the whole study ----------------------------------------------------------------------------------------


def attack_study(model: StudyModel, pixels: Tensor, mask: Tensor, labels: Tensor, eps: float, *, steps: int = 20,
                 allowed: Tensor | None = None, batch: int = 1) -> tuple[Tensor, Tensor]:
    """PGD on all slices of each study at once, towards another diagnosis of the person, keeping the best iterate.

    Args:
        pixels: (B, S, 1, H, W) in [0, 1]; mask: (B, S); labels: (B,).
        eps: L-infinity budget a pixel.
        allowed: (B, S), the slices that may be changed (None: every slice that exists).
        batch: people attacked at a time. One at a time, 32 images fill a processor, and nobody's answer depends on the others'.

    Returns:
        Adversarial studies (B, S, 1, H, W) and their logits (B, 4). The ascent climbs the margin towards the nearest other
        class; there is no random start, so the same study gives the same answer whoever else is attacked. A person fallen
        already, or with no slice that may be changed, comes back unchanged.
    """
    changed = mask if allowed is None else mask & allowed
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with no_parameter_gradients(model):
            parts = [_attack_part(model, pixels[rows], mask[rows], changed[rows], labels[rows], eps, steps)
                     for rows in torch.arange(len(labels), device=labels.device).split(batch)]
    finally:
        for module, training in modes.items():
            module.training = training
    return torch.cat([made for made, _ in parts]), torch.cat([logits for _, logits in parts])


def _attack_part(model: StudyModel, pixels: Tensor, mask: Tensor, changed: Tensor, labels: Tensor, eps: float,
                 steps: int) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        clean = model.features(pixels, mask)
        logits = model.aggregator(clean, mask)
    best, current, lowest = pixels.clone(), pixels.clone(), margin(logits, labels)
    open_ = (logits.argmax(1) == labels) & changed.any(1) & (eps > 0)
    for step in range(steps + 1):
        rows = open_.nonzero().squeeze(1)
        if not len(rows):
            break
        y, at = labels[rows], current[rows].requires_grad_(step < steps)
        with torch.set_grad_enabled(step < steps):
            answer = model.reread(at, mask[rows], changed[rows], clean[rows])
            if step < steps:
                gradient = torch.autograd.grad(-margin(answer, y).sum(), at)[0].nan_to_num(0.0, 0.0, 0.0)
        answer, at = answer.detach(), at.detach()
        reached, fell = margin(answer, y), answer.argmax(1) != y
        better = fell | (reached < lowest[rows])
        best[rows[better]], logits[rows[better]], lowest[rows[better]] = at[better], answer[better], reached[better]
        open_[rows[fell]] = False
        if step < steps:
            moved = at + (2.5 * eps / steps) * gradient.sign()  # slices that may not change have no gradient here
            current[rows] = torch.minimum(torch.maximum(moved, pixels[rows] - eps), pixels[rows] + eps).clamp(0, 1)
    return best, logits


def slice_gains(model: StudyModel, pixels: Tensor, mask: Tensor, labels: Tensor, *, batch: int = 1) -> Tensor:
    """What each slice offers an attacker to first order: the L1 norm of the margin's gradient (B, S), 0 where none is."""
    found = []
    with torch.enable_grad(), no_parameter_gradients(model):
        for rows in torch.arange(len(labels), device=labels.device).split(batch):
            at = pixels[rows].detach().requires_grad_(True)
            gradient = torch.autograd.grad(-margin(model(at, mask[rows]), labels[rows]).sum(), at)[0].nan_to_num(0.0, 0.0, 0.0)
            found.append(gradient.abs().flatten(2).sum(2) * mask[rows])
    return torch.cat(found)


def slice_budgets(model: StudyModel, pixels: Tensor, mask: Tensor, labels: Tensor, eps: float, budgets: Sequence[int], *, steps: int = 20,
                  choice: str = "gradient", seed: int = 0, full: Tensor | None = None) -> Tensor:
    """The least of `budgets` with which each person's diagnosis is flipped, int64 (B,): 0 for a clean error, −1 where even
    the attack on every slice fails.

    The attack on all slices comes first, and only whom it flips is tried with fewer: so the curve ends where the full
    attack does, starts at the clean answers, and never rises.

    Args:
        budgets: numbers of slices, ascending; one as large as the study is the full attack itself.
        choice: `gradient`, the slices with the largest `slice_gains`; `random`, the control.
        full: logits (B, 4) of `attack_study` on every slice at the same eps and steps, where they are known already.
    """
    if choice not in ("gradient", "random"):
        raise StudyError(f"Unknown choice of slices {choice!r}: expected gradient or random.")
    least, most = torch.full_like(labels, -1), int(mask.sum(1).max())
    if full is None:
        full = attack_study(model, pixels, mask, labels, eps, steps=steps)[1]
    wrong = attack_study(model, pixels, mask, labels, 0.0)[1].argmax(1) != labels
    rows = ((full.argmax(1) != labels) & ~wrong).nonzero().squeeze(1)
    least[rows], least[wrong] = most, 0
    if not len(rows):
        return least
    if choice == "gradient":
        rank = slice_gains(model, pixels[rows], mask[rows], labels[rows])
    else:
        rank = torch.rand(len(rows), mask.shape[1], generator=torch.Generator().manual_seed(seed)).to(pixels)
    order = rank.masked_fill(~mask[rows], -1).argsort(1, descending=True).argsort(1)
    open_ = torch.ones_like(rows, dtype=torch.bool)
    for budget in [budget for budget in sorted(budgets) if 0 < budget < most]:
        here = open_.nonzero().squeeze(1)
        if not len(here):
            break
        now = rows[here]
        answers = attack_study(model, pixels[now], mask[now], labels[now], eps, steps=steps, allowed=order[here] < budget)[1]
        flipped = answers.argmax(1) != labels[now]
        least[now[flipped]] = budget
        open_[here[flipped]] = False
    return least


def standing_curve(least: np.ndarray, budgets: Sequence[int]) -> list[np.ndarray]:
    """Whom each budget leaves standing, bool (P,) a budget, from `slice_budgets`."""
    least = np.asarray(least)
    return [(least < 0) | (least > budget) for budget in budgets]
