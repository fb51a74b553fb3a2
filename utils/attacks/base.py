"""The registry of attacks, the guard around each, and what counts as a success."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from utils.class_groups import Groups, group_of_class
from utils.model_state import frozen
from utils.pixel_range import pixel_fault

Norm = Literal["linf", "l2", "l0"]
Kind = Literal["control", "white-box", "black-box", "transfer"]
Loss = Literal["ce", "margin"]
Precision = Literal["fp32", "bf16"]


# -- the registry and the guard --------------------------------------------------------------------


class AttackError(Exception):
    """An attack that did not do its work: its outcome must never be read as robustness."""


@dataclass(frozen=True)
class Attack:
    """A function that perturbs images, with the guard that every attack is called through.

    Attributes:
        name: its key in `ATTACKS`, and in the columns of predictions.
        unguarded: the function alone, for attacks that are made of others.
        norm: the norm that eps is measured in.
        kind: what the attack may ask of the model.
        package: the package whose code it runs (None: this repository's own).
        targeted: whether it can be aimed at `targets`.
        gray: whether it takes images of one channel only.
    """

    name: str
    unguarded: Callable[..., Tensor]
    norm: Norm
    kind: Kind
    package: str | None
    targeted: bool = True
    gray: bool = False

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        eps: float,
        *,
        seed: int = 0,
        targets: Tensor | None = None,
        precision: Precision = "fp32",
        **budget: Any,
    ) -> Tensor:
        """Adversarial images (N, C, H, W); the model and all random states are left as they were.
        It works inside `torch.no_grad` and `torch.inference_mode` too.

        Args:
            model: pixels (N, C, H, W) in [0, 1] → logits (N, classes); attacked in eval mode.
            images: float32 in [0, 1].
            labels: whole numbers (N,).
            eps: in units of the pixel range [0, 1], so 4/255 for four gray levels.
            targets: whole numbers (N,), the wrong answers wanted (None: any wrong answer).
            precision: `bf16` searches in bfloat16; successes are decided in float32 all the same.
            budget: what the attack itself takes: steps, restarts, a mask.

        Raises:
            ValueError: images, labels, eps, targets or the budget do not fit together, or this
                attack takes no targets, or one channel only.
            AttackError: the outcome is outside of the threat model.
        """
        self._check_input(images, labels, eps, targets, budget)
        if eps == 0 or len(images) == 0:
            return images.clone()
        with torch.inference_mode(False), torch.enable_grad(), untouched_model(model):
            # Copies made here take part in autograd even if the tensors come from inference mode.
            start = images.detach().clone(memory_format=torch.contiguous_format)
            given = (model, start, labels.long().clone(), float(eps))
            targets = None if targets is None else targets.long().clone()
            if precision == "fp32":
                adversarial = self.unguarded(*given, seed=seed, targets=targets, **budget)
            else:
                adversarial = _search_in_bfloat16(
                    self.unguarded, *given, seed=seed, targets=targets, **budget
                )
        return check_result(self.name, self.norm, images, adversarial.detach(), eps)

    def _check_input(
        self,
        images: Tensor,
        labels: Tensor,
        eps: float,
        targets: Tensor | None,
        budget: Mapping[str, Any],
    ) -> None:
        if images.ndim != 4 or len(images) != len(labels):
            raise ValueError(
                f"expected images (N, C, H, W) and N labels, not {tuple(images.shape)} and "
                f"{len(labels)}"
            )
        if fault := pixel_fault(images):
            raise ValueError(fault)
        if self.gray and images.shape[1] != 1:
            raise ValueError(
                f"{self.name} takes images of one channel, not {images.shape[1]}: give gray images"
            )
        for name, values in (("labels", labels), ("targets", targets)):
            if values is not None and (values.is_floating_point() or values.dtype == torch.bool):
                raise ValueError(f"{name} are {values.dtype}, expected whole class numbers")
        if not eps >= 0:
            raise ValueError(f"eps must not be negative, not {eps}")
        if eps > 1 and self.norm != "l2":
            raise ValueError(
                f"eps {eps:g} is more than the whole pixel range of 1: for {eps:g} gray levels "
                f"give {eps:g} / 255"
            )
        if targets is not None and not self.targeted:
            raise ValueError(f"{self.name} cannot be aimed: leave `targets` out")
        if targets is not None and bool((targets == labels).any()):
            raise ValueError("a target must differ from the true label")
        for name in COUNTS & set(budget):
            if budget[name] < 1:
                raise ValueError(f"{name} is {budget[name]}, expected 1 or more")


#: Budgets that count something.
COUNTS = {"steps", "restarts", "queries", "generations", "population", "pixels", "evaluations"}
#: Name → attack.
ATTACKS: dict[str, Attack] = {}


def register(
    name: str,
    norm: Norm = "linf",
    kind: Kind = "white-box",
    package: str | None = None,
    *,
    targeted: bool = True,
    gray: bool = False,
) -> Callable[[Callable[..., Tensor]], Attack]:
    """Decorator that makes a function an `Attack` and adds it to `ATTACKS`; arguments as there.

    The function takes (model, images, labels, eps, *, seed, targets, **budget) as `Attack.__call__`
    describes them, and returns adversarial images. A new attack is a module with such a function,
    which `utils/attacks/__init__.py` imports.
    """

    def wrap(function: Callable[..., Tensor]) -> Attack:
        ATTACKS[name] = Attack(name, function, norm, kind, package, targeted, gray)
        return ATTACKS[name]

    return wrap


@contextlib.contextmanager
def untouched_model(model: nn.Module) -> Iterator[None]:
    """`utils.model_state.frozen`, and afterwards everything else that the code of an attack could
    have changed is as it was: weights, buffers and the global random states of Python, NumPy and
    PyTorch, on the CPU and on the model's device."""
    tensors = [
        (tensor, tensor.detach().clone()) for tensor in [*model.parameters(), *model.buffers()]
    ]
    python_state, numpy_state, torch_state = (
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
    )
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    accelerator = None if device.type == "cpu" else getattr(torch, device.type)
    accelerator_state = accelerator.get_rng_state() if accelerator else None
    try:
        with frozen(model):
            yield
    finally:
        with torch.no_grad():
            # Written only where it differs, so that a graph over these weights stays valid.
            for tensor, value in tensors:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if accelerator:
            accelerator.set_rng_state(accelerator_state)


def check_result(name: str, norm: Norm, images: Tensor, adversarial: Tensor, eps: float) -> Tensor:
    """The adversarial images, or `AttackError` where they are outside of the threat model."""
    if adversarial.shape != images.shape or adversarial.dtype != images.dtype:
        raise AttackError(
            f"{name} returned {tuple(adversarial.shape)} {adversarial.dtype} where images are "
            f"{tuple(images.shape)} {images.dtype}"
        )
    if not bool(adversarial.isfinite().all()):
        raise AttackError(f"{name} returned NaN or infinite pixels")
    if adversarial.min() < 0 or adversarial.max() > 1:
        raise AttackError(f"{name} returned pixels outside [0, 1]")
    size = perturbation_size(images, adversarial, norm)
    if norm != "l0" and size.max() > eps * (1 + 1e-5) + 1e-6:
        raise AttackError(
            f"{name} used a perturbation of {size.max():.6f} where eps is {eps:.6f} ({norm})"
        )
    return adversarial


# -- searching in bfloat16 -------------------------------------------------------------------------


class InBfloat16(nn.Module):
    """The model under bfloat16 autocast, float32 logits: faster on processors that have it, with a
    gradient that is exact enough for a search."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) from pixels (N, C, H, W)."""
        with torch.autocast(images.device.type, torch.bfloat16):
            return self.model(images).float()


def _search_in_bfloat16(
    attack: Callable[..., Tensor],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    targets: Tensor | None,
    mask: Tensor | None = None,
    **budget: Any,
) -> Tensor:
    """What `attack` finds against the model in bfloat16, repeated in float32 where that is too
    coarse.

    An image that is still robust in float32 is attacked again in float32 if its margin is smaller
    than what rounding changed in it, or if it came back as it was: no step then changed its margin
    by as much as bfloat16 resolves (0.008 between 1 and 2).
    """
    masked = {} if mask is None else {"mask": mask.to(images)}
    adversarial = attack(
        InBfloat16(model), images, labels, eps, targets=targets, **masked, **budget
    )
    rounded = succeeded(InBfloat16(model), adversarial, labels, targets)[0]
    remaining, success = succeeded(model, adversarial, labels, targets)
    unmoved = (adversarial == images).flatten(1).all(1)
    doubtful = ~success & (unmoved | ((rounded - remaining).abs() >= remaining))
    rows = doubtful.nonzero().squeeze(1)
    if not len(rows):
        return adversarial
    masked = {name: mask_of_rows(mask, rows) for name, mask in masked.items()}
    adversarial[rows] = attack(
        model,
        images[rows],
        labels[rows],
        eps,
        targets=select_rows(targets, rows),
        **masked,
        **budget,
    )
    return adversarial


# -- grouped classes -------------------------------------------------------------------------------


class GroupedClasses(nn.Module):
    """A model whose classes are merged into groups: log-probabilities (N, groups)."""

    def __init__(self, model: nn.Module, groups: Groups) -> None:
        super().__init__()
        self.model, self.groups = model, groups

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (N, groups) from pixels (N, C, H, W)."""
        return group_logits(self.model(images), self.groups)


def group_logits(logits: Tensor, groups: Groups) -> Tensor:
    """Log-probabilities (N, groups) from logits (N, classes): those of merged classes add up."""
    # In float32 even under autocast: bfloat16 has three digits, too few for near ties.
    log_probabilities = logits.float().log_softmax(1)
    return torch.stack([log_probabilities[:, list(group)].logsumexp(1) for group in groups], dim=1)


def group_labels(labels: Tensor, groups: Groups) -> Tensor:
    """Number of the group that holds each label, `int64` (N,)."""
    return torch.from_numpy(group_of_class(groups)).to(labels.device)[labels]


# -- sizes and successes ---------------------------------------------------------------------------


def perturbation_size(images: Tensor, adversarial: Tensor, norm: Norm) -> Tensor:
    """Norm of each image's perturbation (N,): the largest change, the Euclidean length, or the
    number of changed pixels."""
    delta = (adversarial - images).flatten(1)
    if norm == "linf":
        return delta.abs().amax(1)
    return delta.norm(dim=1) if norm == "l2" else (delta != 0).sum(1).float()


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the label minus the highest other logit (N,): negative where another class wins
    (Carlini and Wagner 2017, arXiv:1608.04644)."""
    truth = logits.gather(1, labels[:, None]).squeeze(1)
    return truth - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def unsaturated_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Soft maximum of the other logits minus the label's logit (N,).

    The cross-entropy is its softplus, so per image both have the same gradient direction, which is
    all that an attack with sign or unit-length steps uses; but this one does not vanish where
    softmax saturates in float32.
    """
    truth = logits.gather(1, labels[:, None]).squeeze(1)
    return logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1) - truth


def distance_to_success(
    logits: Tensor, labels: Tensor, targets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The margin that an attack still has to overcome, float (N,), and its success, bool (N,).

    Success is another answer than the label, or `targets` where they are given, decided by
    `argmax` as every score is. A logit that is not finite is no right answer.
    """
    answers = logits.argmax(1)
    if targets is None:
        distance, success = margin(logits, labels), (answers != labels) | ~logits.isfinite().all(1)
    else:
        distance, success = -margin(logits, targets), answers == targets
    return distance.nan_to_num(nan=torch.inf), success


def succeeded(
    model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`distance_to_success` of images as they are."""
    with torch.no_grad():
        return distance_to_success(model(images).float(), labels, targets)


def count_classes(model: nn.Module, images: Tensor) -> int:
    """How many logits the model returns for an image."""
    with torch.no_grad():
        return model(images[:1]).shape[1]


# -- shapes ----------------------------------------------------------------------------------------


def image_axes(values: Tensor) -> Tensor:
    """(N,) → (N, 1, 1, 1), to multiply images with."""
    return values.view(-1, 1, 1, 1)


def select_rows(values: Tensor | None, rows: Tensor) -> Tensor | None:
    """`values[rows]`, or None where there are no values."""
    return None if values is None else values[rows]


def mask_of_rows(mask: Tensor, rows: Tensor) -> Tensor:
    """The masks of some rows, or the one mask where all images share it."""
    return mask[rows] if mask.ndim == 4 and len(mask) > 1 else mask
