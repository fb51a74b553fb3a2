"""A patient's ordered slices as one scan: models over the sequence, attacks on the whole scan, and their slice budget.

A `StudyModel` maps the slices of several people, pixels (B, S, 1, H, W) in [0, 1] with a mask (B, S) of the slices that
exist, to logits (B, 4): a frozen backbone turns each slice into features, an aggregator reads them in body order. It is
differentiable end to end, so an adversary may perturb every slice of a scan towards another diagnosis of the *patient*.
Each decision (four classes, three, Non against the rest) is attacked in its own right: one that withstands an attack on
another has not been attacked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from utils.attacks import group_labels, group_logits, margin, no_parameter_gradients
from utils.robustness import VIEWS
from utils.training import class_weights, macro_cross_entropy
from utils.utils_funcs import CLASSES, UserError

#: How slices become one answer.
AGGREGATORS = ("mean", "attention", "gru", "transformer")


# -- studies ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scans:
    """P people with up to S slices each, in body order from the most superior one; what is missing is zero and masked.

    `values`: (P, S, …), features or uint8 images; `mask`: bool (P, S), True where a slice exists; `labels`, `people`: (P,).
    """

    values: Tensor
    mask: Tensor
    labels: Tensor
    patients: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, rows: np.ndarray | Tensor | Sequence[int]) -> Scans:
        rows = torch.as_tensor(rows)
        return Scans(self.values[rows], self.mask[rows], self.labels[rows], self.patients[rows])


def gather_scans(values: Tensor, labels: Tensor, patients: Tensor, slices: Tensor) -> Scans:
    """One study a person from rows in any order.

    Args:
        values: (N, …) of each slice; labels, people, slices: (N,).

    Raises:
        StudyError: a slice without a person, a person without slice order (a negative or doubled index) or with two labels.
    """
    if bool((patients < 0).any()):
        raise UserError(
            f"{int((patients < 0).sum())} slices belong to no known person: a study is made of real slices only."
        )
    identity = patients.unique()
    own = [(patients == patient).nonzero().squeeze(1) for patient in identity]
    own = [rows[slices[rows].argsort()] for rows in own]
    for patient, rows in zip(identity.tolist(), own, strict=True):
        order = slices[rows]
        if bool((order < 0).any()) or len(order.unique()) < len(order):
            raise UserError(
                f"Person {patient} has no slice order (an index is missing or doubled): recover it with `python -m "
                "utils.cohort`, or score this person slice by slice."
            )
        if len(labels[rows].unique()) > 1:
            raise UserError(
                f"Person {patient} has slices of {len(labels[rows].unique())} classes: a study has one label."
            )
    longest = max(map(len, own))
    gathered = values.new_zeros((len(identity), longest, *values.shape[1:]))
    mask = torch.zeros(len(identity), longest, dtype=torch.bool)
    for k, rows in enumerate(own):
        gathered[k, : len(rows)], mask[k, : len(rows)] = values[rows], True
    return Scans(gathered, mask, torch.stack([labels[rows[0]] for rows in own]), identity)


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
        self.tanh, self.gate, self.score = (
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, 1),
        )
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
        order = (
            (~mask)
            .int()
            .argsort(dim=1, stable=True)[..., None]
            .expand_as(low := self.reduce(features))
        )  # existing slices first
        packed = nn.utils.rnn.pack_padded_sequence(
            low.gather(1, order), mask.sum(1).cpu(), batch_first=True, enforce_sorted=False
        )
        # cuDNN has no backward pass through a recurrent network in eval mode, which an attack needs.
        with torch.backends.cudnn.flags(enabled=self.training):
            states = self.gru(packed)[0]
        states, _ = nn.utils.rnn.pad_packed_sequence(
            states, batch_first=True, total_length=mask.shape[1]
        )
        return self.head(states.sum(1) / mask.sum(1, keepdim=True))  # what is padded is 0


class SmallTransformer(nn.Module):
    """One pre-norm encoder layer over the slices with sinusoidal positions (Vaswani et al. 2017, arXiv:1706.03762)."""

    def __init__(self, features: int, hidden: int = 64) -> None:
        super().__init__()
        self.hidden = hidden
        self.reduce = nn.Linear(features, hidden)
        self.encoder = nn.TransformerEncoderLayer(
            hidden,
            nhead=4,
            dim_feedforward=2 * hidden,
            dropout=0.25,
            batch_first=True,
            norm_first=True,
        )
        self.head = nn.Linear(hidden, len(CLASSES))

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        low = self.reduce(features)
        place = torch.arange(low.shape[1], device=low.device, dtype=low.dtype)[:, None]
        pace = torch.exp(
            torch.arange(0, self.hidden, 2, device=low.device, dtype=low.dtype)
            * (-np.log(1e4) / self.hidden)
        )
        positions = torch.stack([(place * pace).sin(), (place * pace).cos()], dim=2).flatten(1)
        states = self.encoder(low + positions, src_key_padding_mask=~mask)
        return self.head((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


_AGGREGATORS = {
    "mean": MeanProbability,
    "attention": AttentionPooling,
    "gru": RecurrentReader,
    "transformer": SmallTransformer,
}


def build_aggregator(name: str, features: int) -> nn.Module:
    """A fresh aggregator in eval mode, one of `AGGREGATORS`, of `features` numbers a slice."""
    if name not in _AGGREGATORS:
        raise UserError(f"Unknown aggregator {name!r}: expected one of {', '.join(AGGREGATORS)}.")
    return _AGGREGATORS[name](features).eval()


class ScanModel(nn.Module):
    """Pixels (B, S, 1, H, W) in [0, 1] and mask (B, S) → logits (B, 4) of the people.

    Args:
        backbone: a model by the model contract, with `features(images) -> (N, D)`.
        centre, scale: (D,), applied to the features before the aggregator (of training slices).
    """

    def __init__(
        self, backbone: nn.Module, aggregator: nn.Module, centre: Tensor, scale: Tensor
    ) -> None:
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
    """An aggregator trained on standardised features, and the history of its training.

    The weights are those of the last epoch, where the schedule has annealed the learning rate to nothing. No epoch is
    chosen: twenty validation patients decide nothing, and the minimum of their noisy curve made two fits of the same
    features end 43 epochs apart. So that a fit is the same on every machine it runs in float64 on one thread, from
    features rounded to float16, which takes away the last bits in which two runs of a backbone differ.

    Each epoch a patient loses a random part of the slices, up to half, and the features carry noise: the backbone has
    seen its training patients, so their features are cleaner than anybody else's.

    Args:
        train, validation: features (P, S, D); the patients of the two must differ.

    Returns:
        The aggregator in float32 and eval mode; {"history": one entry an epoch, "score": class-balanced cross-entropy
        of the last one on validation patients, for information}.

    Raises:
        StudyError: a patient is in both sets, or the training diverged.
    """
    shared = np.intersect1d(train.patients.numpy(), validation.patients.numpy())
    if len(shared):
        raise UserError(
            f"Person {shared[0]} is in training and validation: keep people apart before a sequence model is fitted."
        )
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.manual_seed(seed)  # weights and dropout
    torch.set_num_threads(1)
    try:
        model, history = _fit_in_float64(
            name, _rounded(train), _rounded(validation), epochs, lr, weight_decay, batch_size, seed
        )
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    if not np.isfinite(history[-1]["score"]):
        raise UserError(
            f"The {name} aggregator's validation loss is not finite: lower its learning rate."
        )
    model.zero_grad()
    return model.float().eval(), {"history": history, "score": history[-1]["score"]}


def _rounded(part: Scans) -> Scans:
    return replace(part, values=part.values.half().double())


def _fit_in_float64(
    name: str,
    train: Scans,
    validation: Scans,
    epochs: int,
    lr: float,
    weight_decay: float,
    batch_size: int,
    seed: int,
) -> tuple[nn.Module, list[dict]]:
    generator = torch.Generator().manual_seed(seed)
    model = build_aggregator(name, train.values.shape[2]).double()
    weights = class_weights(train.labels).double()
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, lr, total_steps=epochs * -(-len(train) // batch_size)
    )
    history = []
    for epoch in range(1, epochs + 1):
        model.train()
        for rows in torch.randperm(len(train), generator=generator).split(batch_size):
            part = train.pick(rows)
            noise = torch.randn(part.values.shape, generator=generator)
            logits = model(part.values + 0.3 * noise, _thinned(part.mask, generator))
            loss = nn.functional.cross_entropy(logits, part.labels, weight=weights)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            score = macro_cross_entropy(
                model(validation.values, validation.mask), validation.labels
            )
        history.append({"epoch": epoch, "train_loss": float(loss.detach()), "score": score})
    return model, history


def _thinned(mask: Tensor, generator: torch.Generator) -> Tensor:
    """The mask with up to half of each person's slices dropped at random, never all."""
    share = 0.5 * torch.rand(len(mask), 1, generator=generator)
    chance = torch.rand(mask.shape, generator=generator).masked_fill(~mask, -1)
    first = chance == chance.amax(1, keepdim=True)
    return mask & ((chance >= share) | first)


# -- attacks on whole scans --------------------------------------------------------------------------------------------

#: Decay of the accumulated gradient in the second attack (momentum iterative FGSM, Dong et al. 2018, arXiv:1710.06081).
MOMENTUM = 1.0


@dataclass(frozen=True)
class ScanAttack:
    """What one attack on scans does.

    `view`: the decision that is attacked, one of `robustness.VIEWS`; a patient is given up only where *that* decision is
    wrong. `steps`: of each ascent. `attempts`: ascents; the first starts at the scan itself and climbs towards the nearest
    other class, the k-th starts at random and climbs towards the k-th nearest. `momentum`: None for plain PGD. `push`: go
    on after success to the lowest margin, which is what a rank statistic like AUROC asks of an attacker.
    """

    view: str = "four"
    steps: int = 20
    attempts: int = 1
    momentum: float | None = None
    push: bool = False


def attack_scan(
    model: ScanModel,
    pixels: Tensor,
    mask: Tensor,
    labels: Tensor,
    eps: float,
    attack: ScanAttack = ScanAttack(),
    *,
    allowed: Tensor | None = None,
    candidates: Sequence[Tensor] = (),
    seeds: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Changes all slices of each scan at once, within eps and [0, 1], towards another diagnosis of the patient, and keeps the
    best iterate. One patient at a time: 32 images fill a processor, and nobody's answer depends on the others'.

    Args:
        pixels: (B, S, 1, H, W) in [0, 1]; mask: (B, S); labels: (B,) in 0..3.
        eps: L-infinity budget a pixel.
        allowed: (B, S), the slices that may be changed (None: every slice that exists).
        candidates: scans (B, S, 1, H, W) within the same ball, found by other attacks, that are tried first.
        seeds: (B,), of each patient's random starts (None: 0 for everybody).

    Returns:
        Adversarial scans (B, S, 1, H, W) and their logits (B, 4). A patient whose decision in this view is wrong already
        (unless `push`), or with no slice that may be changed, comes back unchanged.
    """
    changed = mask if allowed is None else mask & allowed
    with _evaluating(model), no_parameter_gradients(model):
        parts = [
            _attack_one(
                model,
                pixels[k : k + 1],
                mask[k : k + 1],
                changed[k : k + 1],
                labels[k : k + 1],
                eps,
                attack,
                [found[k : k + 1] for found in candidates],
                0 if seeds is None else int(seeds[k]),
            )
            for k in range(len(labels))
        ]
    return torch.cat([made for made, _ in parts]), torch.cat([logits for _, logits in parts])


class _Best:
    """The iterate of one scan that lies lowest in a view, with its logits."""

    def __init__(self, scan: Tensor, logits: Tensor, label: Tensor, view: str) -> None:
        self.view, self.label = view, scan_labels(label, view)
        self.scan, self.logits = scan, logits
        self.margin, self.wrong = self._judge(logits)

    def grouped(self, logits: Tensor) -> Tensor:
        return _in_view(logits, self.view)

    def _judge(self, logits: Tensor) -> tuple[float, bool]:
        """Margin in the view, and whether the answer is wrong, decided by `argmax` as every score is."""
        grouped = self.grouped(logits)
        return float(margin(grouped, self.label)), int(grouped.argmax(1)) != int(self.label)

    def offer(self, scan: Tensor, logits: Tensor) -> None:
        lowest, wrong = self._judge(logits)
        if (wrong, -lowest) > (self.wrong, -self.margin):
            self.scan, self.logits, self.margin, self.wrong = scan, logits, lowest, wrong


def _attack_one(
    model: ScanModel,
    pixels: Tensor,
    mask: Tensor,
    changed: Tensor,
    label: Tensor,
    eps: float,
    attack: ScanAttack,
    candidates: Sequence[Tensor],
    seed: int,
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        clean = model.features(pixels, mask)
        best = _Best(pixels, model.aggregator(clean, mask), label, attack.view)
        if eps == 0 or not bool(changed.any()) or best.wrong and not attack.push:
            return best.scan, best.logits
        for found in candidates:
            best.offer(found, model.reread(found, mask, changed, clean))
    order = (
        best.grouped(best.logits)
        .scatter(1, best.label[:, None], -torch.inf)
        .argsort(1, descending=True)[0, :-1]
    )
    generator = torch.Generator().manual_seed(seed)
    for attempt in range(attack.attempts):
        if best.wrong and not attack.push:
            break
        start = best.scan if attempt == 0 else _random_scan(pixels, changed, eps, generator)
        aim = None if attempt == 0 else int(order[attempt % len(order)])
        _climb(model, pixels, mask, changed, eps, attack, best, clean, start, aim)
    return best.scan, best.logits


def _random_scan(pixels: Tensor, changed: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    noise = torch.empty(pixels.shape).uniform_(-eps, eps, generator=generator).to(pixels)
    return (pixels + noise * changed[..., None, None, None]).clamp(0, 1)


def _climb(
    model: ScanModel,
    pixels: Tensor,
    mask: Tensor,
    changed: Tensor,
    eps: float,
    attack: ScanAttack,
    best: _Best,
    clean: Tensor,
    current: Tensor,
    aim: int | None,
) -> None:
    """One ascent from `current`; every iterate is offered to `best`."""
    lower, upper = (pixels - eps).clamp_min(0), (pixels + eps).clamp_max(1)
    truth, velocity = int(best.label), torch.zeros_like(pixels)
    for step in range(attack.steps + 1):
        current = current.detach().requires_grad_(step < attack.steps)
        with torch.set_grad_enabled(step < attack.steps):
            logits = model.reread(current, mask, changed, clean)
            grouped = best.grouped(logits)
            gap = (
                margin(grouped, best.label) if aim is None else grouped[:, truth] - grouped[:, aim]
            )
        best.offer(current.detach(), logits.detach())
        if step == attack.steps or best.wrong and not attack.push:
            return
        gradient = torch.autograd.grad(-gap.sum(), current)[0].nan_to_num(0.0, 0.0, 0.0)
        if attack.momentum is not None:
            velocity = attack.momentum * velocity + gradient / gradient.abs().mean().clamp_min(
                1e-20
            )
            gradient = velocity
        # Slices that may not change have no gradient here.
        current = torch.clamp(
            current.detach() + (2.5 * eps / attack.steps) * gradient.sign(), lower, upper
        )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _in_view(logits: Tensor, view: str) -> Tensor:
    """Logits (B, groups of the view) from (B, 4)."""
    groups = VIEWS[view][0]
    return logits if groups is None else group_logits(logits, groups)


def scan_decisions(logits: Tensor, view: str) -> Tensor:
    """Answers (B,) in a view, as numbers of its groups."""
    return _in_view(logits, view).argmax(1)


def scan_labels(labels: Tensor, view: str) -> Tensor:
    groups = VIEWS[view][0]
    return labels if groups is None else group_labels(labels, groups)


def slice_gains(
    model: ScanModel, pixels: Tensor, mask: Tensor, labels: Tensor, *, view: str = "three"
) -> Tensor:
    """What each slice offers an attacker of a view to first order: the L1 norm of the gradient of that view's margin (B, S),
    0 where there is no slice."""
    truth, found = scan_labels(labels, view), []
    with torch.enable_grad(), no_parameter_gradients(model):
        for row in range(len(labels)):
            part = slice(row, row + 1)
            at = pixels[part].detach().requires_grad_(True)
            gap = margin(_in_view(model(at, mask[part]), view), truth[part])
            gradient = torch.autograd.grad(-gap.sum(), at)[0].nan_to_num(0.0, 0.0, 0.0)
            found.append(gradient.abs().flatten(2).sum(2) * mask[part])
    return torch.cat(found)


def slice_budgets(
    model: ScanModel,
    pixels: Tensor,
    mask: Tensor,
    labels: Tensor,
    eps: float,
    budgets: Sequence[int],
    *,
    steps: int = 20,
    choice: str = "gradient",
    view: str = "three",
    seed: int = 0,
    full: Tensor | None = None,
) -> Tensor:
    """The least of `budgets` with which each patient's diagnosis in a view is flipped, int64 (B,): 0 for a clean error, −1
    where even the attack on every slice fails.

    The attack on all slices comes first, and only whom it flips is tried with fewer: so the curve ends where the full
    attack does, starts at the clean answers, and never rises.

    Args:
        budgets: numbers of slices, ascending; one as large as the scan is the full attack itself.
        choice: `gradient`, the slices with the largest `slice_gains`; `random`, the control.
        view: the decision, one of `robustness.VIEWS`.
        full: logits (B, 4) under the attack on every slice at the same eps in this view, where they are known already.
    """
    if choice not in ("gradient", "random"):
        raise UserError(f"Unknown choice of slices {choice!r}: expected gradient or random.")
    attack, truth = ScanAttack(view, steps), scan_labels(labels, view)
    least, most = torch.full_like(labels, -1), int(mask.sum(1).max())
    if full is None:
        full = attack_scan(model, pixels, mask, labels, eps, attack)[1]
    wrong = scan_decisions(attack_scan(model, pixels, mask, labels, 0.0, attack)[1], view) != truth
    rows = ((scan_decisions(full, view) != truth) & ~wrong).nonzero().squeeze(1)
    least[rows], least[wrong] = most, 0
    if not len(rows):
        return least
    if choice == "gradient":
        rank = slice_gains(model, pixels[rows], mask[rows], labels[rows], view=view)
    else:  # drawn for everybody, so that nobody's ranks depend on who else was flipped
        rank = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)).to(pixels)[
            rows
        ]
    order = rank.masked_fill(~mask[rows], -1).argsort(1, descending=True).argsort(1)
    open_ = torch.ones_like(rows, dtype=torch.bool)
    for budget in [budget for budget in sorted(budgets) if 0 < budget < most]:
        here = open_.nonzero().squeeze(1)
        if not len(here):
            break
        now = rows[here]
        answers = attack_scan(
            model, pixels[now], mask[now], labels[now], eps, attack, allowed=order[here] < budget
        )[1]
        flipped = scan_decisions(answers, view) != truth[now]
        least[now[flipped]] = budget
        open_[here[flipped]] = False
    return least


def robust_curve(least: np.ndarray, budgets: Sequence[int]) -> list[np.ndarray]:
    """Whom each budget leaves standing, bool (P,) a budget, from `slice_budgets`."""
    least = np.asarray(least)
    return [(least < 0) | (least > budget) for budget in budgets]
