"""Perturbations of a batch of images in pixel space, and the registry of named attacks.

Every attack is `(model, images, labels, eps, *, seed=0, targets=None, precision="fp32", …budget) -> adversarial images`:
images `float32` (N, 1, H, W) in [0, 1], labels `int64` (N,), eps in units of the [0, 1] pixel range and in the attack's
own norm (`ATTACKS[name].norm`). `model` is any `nn.Module` from such images to logits (N, C). What an attack may never do
is ensured here once, by `_untouched`: it leaves weights, buffers, gradients, every module's mode and all global random
states as they were, also when it raises. `precision="bf16"` lets any of them search in bfloat16, faster on processors that
have it; what fell counts in float32 alone (`_search_in_bfloat16`).
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
from collections.abc import Callable, Iterator
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["linf", "l2", "l0"]
Loss = Literal["ce", "margin"]
Precision = Literal["fp32", "bf16"]
Groups = tuple[tuple[int, ...], ...]

#: Mild and Moderate merged: the headline's three classes (a clinical rating of 1 or more is one class).
THREE: Groups = ((0,), (1,), (2, 3))
#: Non against the rest: what AUROC measures.
BINARY: Groups = ((0,), (1, 2, 3))


class Attack(Protocol):
    """A registered attack: `norm` in which eps is measured, `kind` by what it may ask of the model, and the `package`
    whose code it runs (None: ours)."""

    norm: Norm
    kind: Literal["control", "white-box", "black-box", "transfer"]
    package: str | None

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
        **budget: object,
    ) -> Tensor: ...


#: Name → attack.
ATTACKS: dict[str, Attack] = {}


class AttackError(Exception):
    """An attack that did not do its work: its outcome must never be read as robustness."""


# -- views of a model -------------------------------------------------------------------------------------------------


class _InBfloat16(nn.Module):
    """The model under bfloat16 autocast: faster where the processor has it, with a gradient that is good enough."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            return self.model(images).float()


class GroupedClasses(nn.Module):
    """Group log-probabilities (N, len(groups)) of a model's logits (N, C): the probabilities of merged classes add up.

    Args:
        groups: class numbers of each group, e.g. `THREE` or `BINARY`.
    """

    def __init__(self, model: nn.Module, groups: Groups) -> None:
        super().__init__()
        self.model, self.groups = model, groups

    def forward(self, images: Tensor) -> Tensor:
        return group_logits(self.model(images), self.groups)


def group_logits(logits: Tensor, groups: Groups) -> Tensor:
    """Log-probabilities (N, len(groups)) of groups of classes from logits (N, C)."""
    # Computed in float32 whatever the arithmetic outside: bf16 keeps three digits, which is too few for near ties.
    log_probabilities = logits.float().log_softmax(1)
    return torch.stack([log_probabilities[:, list(group)].logsumexp(1) for group in groups], dim=1)


def group_labels(labels: Tensor, groups: Groups) -> Tensor:
    """The number of the group that holds each label, `int64` (N,)."""
    table = torch.empty(
        1 + max(max(group) for group in groups), dtype=torch.int64, device=labels.device
    )
    for number, group in enumerate(groups):
        table[list(group)] = number
    return table[labels]


# -- guards -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Runs the model in eval mode without parameter gradients, then restores everything that an attack could have
    changed: modes, weights, buffers, gradients and the global random states, also when the attack raises."""
    modes = {module: module.training for module in model.modules()}
    parameters = [(p, p.requires_grad, p.grad, p.detach().clone()) for p in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    accelerator = _accelerator_rng(model)
    try:
        model.eval()
        for parameter, *_ in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            # Written only where it differs, so that a graph which a caller holds over these weights stays valid.
            for tensor, value in [(p, value) for p, _, _, value in parameters] + buffers:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
        for parameter, requires_grad, grad, _ in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if accelerator is not None:
            accelerator[0].set_rng_state(accelerator[1])


def _accelerator_rng(model: nn.Module) -> tuple[object, Tensor] | None:
    """The random state of the accelerator that the model lives on, with the module that sets it (None: CPU)."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    if device.type == "cpu":
        return None
    accelerator = getattr(torch, device.type)
    return accelerator, accelerator.get_rng_state()


@contextlib.contextmanager
def no_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, autograd follows only the pixels: activations that only weight gradients need are not kept."""
    followed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in followed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in followed:
            parameter.requires_grad_(True)


def _register(
    name: str, norm: Norm = "linf", kind: str = "white-box", package: str | None = None
) -> Callable[[Callable[..., Tensor]], Attack]:
    """Adds a function to `ATTACKS` with the guard around it and its outcome checked for shape, range and NaN."""

    def wrap(function: Callable[..., Tensor]) -> Attack:
        @functools.wraps(function)
        def guarded(
            model: nn.Module,
            images: Tensor,
            labels: Tensor,
            eps: float,
            *,
            seed: int = 0,
            targets: Tensor | None = None,
            precision: Precision = "fp32",
            **budget: object,
        ) -> Tensor:
            _check_input(images, labels, eps, targets)
            if eps == 0 or len(images) == 0:
                return images.clone()
            attack = (
                function
                if precision == "fp32"
                else functools.partial(_search_in_bfloat16, function)
            )
            with _untouched(model):
                adversarial = attack(
                    model, images.detach(), labels, float(eps), seed=seed, targets=targets, **budget
                )
            return _checked(name, norm, images, adversarial.detach(), eps)

        guarded.norm, guarded.kind, guarded.package = norm, kind, package
        ATTACKS[name] = guarded
        return guarded

    return wrap


def _search_in_bfloat16(
    attack: Callable[..., Tensor],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    targets: Tensor | None,
    mask: Tensor | None = None,
    **budget: object,
) -> Tensor:
    """What `attack` finds against the model computed in bfloat16. An image that still stands in float32 is attacked again, in
    float32, where bfloat16 is too coarse to be trusted about it: it stands by less than what rounding moved its margin, or it
    came back as it was, because no step changed its margin by as much as bfloat16 can tell (0.008 between 1 and 2)."""
    mask = None if mask is None else mask.to(images)
    masked = {} if mask is None else {"mask": mask}
    adversarial = attack(
        _InBfloat16(model), images, labels, eps, targets=targets, **masked, **budget
    )
    rounded = _succeeded(_InBfloat16(model), adversarial, labels, targets)[0]
    remaining, fell = _succeeded(model, adversarial, labels, targets)
    unmoved = (adversarial == images).flatten(1).all(1)
    rows = (~fell & (unmoved | ((rounded - remaining).abs() >= remaining))).nonzero().squeeze(1)
    if len(rows):
        masked = {} if mask is None else {"mask": _of_rows(mask, rows)}
        adversarial[rows] = attack(
            model, images[rows], labels[rows], eps, targets=_rows(targets, rows), **masked, **budget
        )
    return adversarial


def _check_input(images: Tensor, labels: Tensor, eps: float, targets: Tensor | None) -> None:
    if images.ndim != 4 or len(images) != len(labels):
        raise ValueError(
            f"expected images (N, C, H, W) and N labels, not {tuple(images.shape)} and {len(labels)}"
        )
    if len(images) and not (0 <= images.min() and images.max() <= 1):
        raise ValueError(
            "images must lie in [0, 1]: an attack acts on raw pixels, before any normalisation"
        )
    if eps < 0:
        raise ValueError(f"eps must not be negative, not {eps}")
    if targets is not None and bool((targets == labels).any()):
        raise ValueError("a target must differ from the true label")


def _checked(name: str, norm: Norm, images: Tensor, adversarial: Tensor, eps: float) -> Tensor:
    """The adversarial images, or `AttackError` where they break the threat model."""
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


def perturbation_size(images: Tensor, adversarial: Tensor, norm: Norm) -> Tensor:
    """Norm of each image's perturbation (N,): largest change, Euclidean length, or number of changed pixels."""
    delta = (adversarial - images).flatten(1)
    if norm == "linf":
        return delta.abs().amax(1)
    return delta.norm(dim=1) if norm == "l2" else (delta != 0).sum(1).float()


# -- losses -----------------------------------------------------------------------------------------------------------


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the label minus the highest other logit (N,): negative where another class wins (Carlini and Wagner
    2017, arXiv:1608.04644)."""
    truth = logits.gather(1, labels[:, None]).squeeze(1)
    return truth - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def unsaturated_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Soft maximum of the other logits minus the label's logit (N,).

    The cross-entropy is its softplus, so per image both have the same gradient direction, which is all that an attack
    with sign or unit-length steps uses; but this one does not vanish where softmax has saturated in float32.
    """
    truth = logits.gather(1, labels[:, None]).squeeze(1)
    return logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1) - truth


def _objective(logits: Tensor, labels: Tensor, targets: Tensor | None, loss: Loss) -> Tensor:
    """What an attack climbs, per image: away from the label, or towards the target."""
    if targets is None:
        return (
            -margin(logits, labels)
            if loss == "margin"
            else unsaturated_cross_entropy(logits, labels)
        )
    if loss == "margin":  # the pair alone: the same direction whichever third class is ahead
        return (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)
    return -unsaturated_cross_entropy(logits, targets)


def _distance_to_success(
    logits: Tensor, labels: Tensor, targets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Margin that an attack still has to overcome (N,), and whether it succeeded (N,): another answer than the label,
    or the target itself. Decided by `argmax`, as every score is; a logit that is not finite is no right answer."""
    answers = logits.argmax(1)
    if targets is None:
        distance, done = margin(logits, labels), (answers != labels) | ~logits.isfinite().all(1)
    else:
        distance, done = -margin(logits, targets), answers == targets
    return distance.nan_to_num(nan=torch.inf), done


def _pixel_gradient(
    model: nn.Module, images: Tensor, objective: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradient of the summed objective with respect to the pixels, and the logits. What is not finite counts as 0."""
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        logits = model(images)
        value = objective(logits.float()).sum()
        # A model whose output does not depend on its input has no gradient at all: zero, and found out as such.
        gradient = (
            torch.autograd.grad(value, images, allow_unused=True)[0]
            if value.requires_grad
            else None
        )
    gradient = torch.zeros_like(images) if gradient is None else gradient.nan_to_num(0.0, 0.0, 0.0)
    return gradient.detach(), logits.detach().float()


# -- one ascent: the loop under every iterative attack of ours ---------------------------------------------------------


def _axes(values: Tensor) -> Tensor:
    """(N,) → (N, 1, 1, 1), to multiply images."""
    return values.view(-1, 1, 1, 1)


def _project(adversarial: Tensor, images: Tensor, eps: float, norm: Norm) -> Tensor:
    """Back into the eps ball around `images`, then into [0, 1], which keeps it inside the ball."""
    if norm == "linf":
        adversarial = torch.minimum(torch.maximum(adversarial, images - eps), images + eps)
    else:
        delta = adversarial - images
        length = delta.flatten(1).norm(dim=1).clamp_min(1e-12)
        adversarial = images + delta * _axes((eps / length).clamp_max(1.0))
    return adversarial.clamp(0.0, 1.0)


def _direction(gradient: Tensor, norm: Norm) -> Tensor:
    """Steepest ascent within the norm's unit ball."""
    if norm == "linf":
        return gradient.sign()
    return gradient / _axes(gradient.flatten(1).norm(dim=1).clamp_min(1e-20))


def _random_start(images: Tensor, eps: float, norm: Norm, seed: int) -> Tensor:
    """A random point of the eps ball. Drawn on the CPU from its own generator: the same on every device, and no global
    random state moves."""
    generator = torch.Generator().manual_seed(seed)
    if norm == "linf":
        noise = torch.empty(images.shape).uniform_(-eps, eps, generator=generator)
    else:
        noise = torch.empty(images.shape).normal_(generator=generator)
        radius = eps * torch.rand(len(images), generator=generator)
        noise *= _axes(radius / noise.flatten(1).norm(dim=1))
    return (images + noise.to(images)).clamp(0.0, 1.0)


def _ascend(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    start: Tensor,
    *,
    steps: int,
    step_size: float,
    targets: Tensor | None = None,
    norm: Norm = "linf",
    loss: Loss = "ce",
    momentum: float | None = None,
    mask: Tensor | None = None,
    push: bool = False,
    aim: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Projected gradient ascent from `start`, keeping each image's best iterate.

    An image leaves the batch at its first success, so that later steps cost only the images that still stand; with
    `push` all images stay and go on to the lowest margin.

    Args:
        targets: success means hitting them (None: any wrong answer).
        aim: class to climb towards while any wrong answer is a success.
        momentum: decay of the accumulated gradient (None: no accumulation).
        mask: 1 where a pixel may change, broadcastable to `images`.

    Returns:
        Best iterate (N, 1, H, W), its distance to success (N,), and whether it succeeded (N,).
    """
    goal = targets if aim is None else aim
    best, distance = start.clone(), torch.full_like(labels, torch.inf, dtype=torch.float32)
    done = torch.zeros_like(labels).bool()
    rows, current = torch.arange(len(images), device=images.device), start
    velocity = torch.zeros_like(images) if momentum is not None else None
    for step in range(steps + 1):
        y, t, g = labels[rows], _rows(targets, rows), _rows(goal, rows)
        if step < steps:
            gradient, logits = _pixel_gradient(
                model, current, lambda logits: _objective(logits, y, g, loss)
            )
        else:
            with torch.no_grad():
                logits = model(current).float()
        remaining, hit = _distance_to_success(logits, y, t)
        better = (hit & ~done[rows]) | (remaining < distance[rows])
        if step == 0 and start is images:
            # The image itself is no iterate: where no step helps, the best of them comes back all the same. A wrong answer to it
            # ends the matter, but not with `push`, where the model that is attacked may not be the one that answers.
            better = hit & (not push)
        best[rows[better]], distance[rows[better]] = current[better], remaining[better]
        done[rows[hit]] = True
        if step == steps:
            break
        if not push and bool(hit.any()):
            stay = ~hit
            rows, current, gradient = rows[stay], current[stay], gradient[stay]
            velocity = _rows(velocity, stay)
            if not len(rows):
                break
        if velocity is not None:
            velocity = momentum * velocity + gradient / _axes(
                gradient.flatten(1).abs().mean(1).clamp_min(1e-20)
            )
            gradient = velocity
        move = step_size * _direction(
            gradient if mask is None else gradient * _of_rows(mask, rows), norm
        )
        current = _project(current + move, images[rows], eps, norm)
    return best, distance, done


def _classes_of(model: nn.Module, images: Tensor) -> int:
    """How many logits the model returns."""
    with torch.no_grad():
        return model(images[:1]).shape[1]


def _rows(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else values[rows]


def _of_rows(mask: Tensor, rows: Tensor) -> Tensor:
    """A mask of one image for all, or the rows' own."""
    return mask[rows] if mask.ndim == 4 and len(mask) > 1 else mask


def _succeeded(
    model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Distance to success and success of unperturbed images (N,)."""
    with torch.no_grad():
        return _distance_to_success(model(images).float(), labels, targets)


def _restarted(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int,
    targets: Tensor | None,
    steps: int,
    attempts: int,
    step_size: float | None,
    norm: Norm,
    loss: Loss,
    random_start: bool,
    momentum: float | None = None,
    mask: Tensor | None = None,
    push: bool = False,
) -> Tensor:
    """`attempts` ascents, each on the images that still stand after those before. With a margin loss and no targets the
    k-th climbs towards the k-th nearest class."""
    aims = None
    if loss == "margin" and targets is None:
        aims, logits = nearest_classes(model, images, labels, norm)
    else:
        with torch.no_grad():
            logits = model(images).float()
    adversarial = images.clone()
    distance, done = _distance_to_success(logits, labels, targets)
    if not push:
        # A clean error is a success at no cost. Other images never come back unchanged: their best *iterate* does.
        distance = torch.full_like(distance, torch.inf)
    for attempt in range(attempts):
        rows = (
            torch.arange(len(images), device=images.device)
            if push
            else (~done).nonzero().squeeze(1)
        )
        if not len(rows):
            break
        part, own_mask = images[rows], None if mask is None else _of_rows(mask, rows)
        start = _random_start(part, eps, norm, seed + 1009 * attempt) if random_start else part
        if own_mask is not None:
            start = torch.where(own_mask > 0, start, part)
        found, remaining, hit = _ascend(
            model,
            part,
            labels[rows],
            eps,
            start,
            steps=steps,
            step_size=step_size or 2.5 * eps / steps,
            targets=_rows(targets, rows),
            norm=norm,
            loss=loss,
            momentum=momentum,
            mask=own_mask,
            push=push,
            aim=None if aims is None else aims[rows, attempt % aims.shape[1]],
        )
        better = (hit & ~done[rows]) | (remaining < distance[rows])
        adversarial[rows[better]], distance[rows[better]] = found[better], remaining[better]
        done[rows[hit]] = True
    return adversarial


def nearest_classes(
    model: nn.Module, images: Tensor, labels: Tensor, norm: Norm = "linf"
) -> tuple[Tensor, Tensor]:
    """Every class but the label, the nearest first, `int64` (N, C − 1), and the logits (N, C).

    Nearest in pixels, not in logits: the gap divided by its gradient's dual norm, the distance to that class's boundary
    if the model were linear (Moosavi-Dezfooli et al. 2016, arXiv:1511.04599).
    """
    if _classes_of(model, images) == 2:
        with torch.no_grad():
            return (1 - labels)[:, None], model(images).float()
    classes, gaps, slopes, logits = class_gaps(model, images, labels)
    steepness = slopes.flatten(2).norm(1 if norm == "linf" else 2, dim=2).clamp_min(1e-12)
    return classes.gather(1, (gaps / steepness).nan_to_num(torch.inf).argsort(1)), logits


def class_gaps(
    model: nn.Module, images: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The other classes, the likeliest first (N, C − 1); by how much the label's logit leads each of them (N, C − 1);
    the pixel gradients of that (N, C − 1, 1, H, W); and the logits (N, C)."""
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        logits = model(images).float()
        classes = (
            logits.detach()
            .scatter(1, labels[:, None], -torch.inf)
            .argsort(1, descending=True)[:, :-1]
        )
        gaps = logits.gather(1, labels[:, None]) - logits.gather(1, classes)
        slopes = [
            torch.autograd.grad(gap.sum(), images, retain_graph=True, allow_unused=True)[0]
            if gap.requires_grad
            else None
            for gap in gaps.unbind(1)
        ]
    slopes = [
        torch.zeros_like(images) if slope is None else slope.nan_to_num(0.0, 0.0, 0.0)
        for slope in slopes
    ]
    return classes, gaps.detach(), torch.stack(slopes, 1).detach(), logits.detach()


def clinical_targets(labels: Tensor, classes: int = 4) -> Tensor:
    """The clinically worst answer: healthy (0) for the sicker half of the classes, the sickest for the healthier
    half."""
    return torch.where(2 * labels >= classes, 0, classes - 1)


# -- for the training loop ---------------------------------------------------------------------------------------------


def perturb_for_training(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    steps: int,
    loss: Literal["ce", "kl"] = "ce",
    step_size: float | None = None,
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Lean PGD for the inner maximisation of adversarial training: last iterate, no checks, no parameter gradients.

    The caller owns the model's mode and autocast; in train mode BatchNorm statistics see every iterate. Give the plain
    module, not a distributed wrapper around it.

    Args:
        steps: 1 with `step_size = 1.25 * eps` is the fast single-step method (Wong et al. 2020, arXiv:2001.03994).
        loss: `ce` for PGD adversarial training (Madry et al. 2018, arXiv:1706.06083); `kl` for TRADES (Zhang et al.
            2019, arXiv:1901.08573), the divergence from the clean answer, where the label is not used.
        step_size: None takes eps for one step, else 2.5·eps/steps.
    """
    if eps == 0 or steps == 0:
        return images.detach()
    step_size = step_size or (eps if steps == 1 else 2.5 * eps / steps)
    lower, upper = (images - eps).clamp_min(0.0), (images + eps).clamp_max(1.0)
    with no_parameter_gradients(model):
        if loss == "kl":
            with torch.no_grad():
                clean = model(images).float().softmax(1)
        noise = (
            torch.empty_like(images).uniform_(-eps, eps, generator=generator)
            if random_start
            else 0.0
        )
        current = (images.detach() + noise).clamp(0.0, 1.0)
        for _ in range(steps):
            current.requires_grad_(True)
            with torch.enable_grad():
                logits = model(current).float()
                if loss == "kl":
                    value = F.kl_div(logits.log_softmax(1), clean, reduction="sum")
                else:
                    value = unsaturated_cross_entropy(logits, labels).sum()
                gradient = torch.autograd.grad(value, current)[0]
            current = torch.clamp(current.detach() + step_size * gradient.sign(), lower, upper)
    return current.detach()


# -- the registry: gradient attacks in L-infinity ----------------------------------------------------------------------


@_register("noise", kind="control")
def noise(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
) -> Tensor:
    """Uniform noise in the eps ball: the control that any attack must beat."""
    return _random_start(images, eps, "linf", seed)


@_register("fgsm")
def fgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
) -> Tensor:
    """One step of length eps along the sign of the cross-entropy's gradient (Goodfellow et al. 2015, arXiv:1412.6572);
    towards `targets` where they are given. An image with no gradient at all gets random signs: still an attack, and the
    evaluation reports the missing gradient."""
    gradient, _ = _pixel_gradient(
        model, images, lambda logits: _objective(logits, labels, targets, "ce")
    )
    blind = (gradient == 0).flatten(1).all(1)
    direction = torch.where(
        _axes(blind), _random_start(images, eps, "linf", seed) - images, gradient
    ).sign()
    return _project(images + eps * direction, images, eps, "linf")


@_register("fgsm_targeted")
def fgsm_targeted(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
) -> Tensor:
    """FGSM towards `targets`; without them towards each other class, keeping the step that went furthest."""
    return _towards_each(
        functools.partial(fgsm.__wrapped__, seed=seed), model, images, labels, eps, targets
    )


def _towards_each(
    attack: Callable[..., Tensor],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    targets: Tensor | None,
) -> Tensor:
    """Runs a targeted attack towards `targets`, or towards every other class in turn, on images that still stand."""
    if targets is not None:
        return attack(model, images, labels, eps, targets=targets)
    adversarial, distance = images.clone(), torch.full_like(labels, torch.inf, dtype=torch.float32)
    done = _succeeded(model, images, labels)[1]
    for aim in nearest_classes(model, images, labels)[0].unbind(1):
        rows = (~done).nonzero().squeeze(1)
        if not len(rows):
            break
        found = attack(model, images[rows], labels[rows], eps, targets=aim[rows])
        remaining, hit = _succeeded(model, found, labels[rows])
        better = hit | (remaining < distance[rows])
        adversarial[rows[better]], distance[rows[better]] = found[better], remaining[better]
        done[rows[hit]] = True
    return adversarial


@_register("ifgsm")
def ifgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 10,
    step_size: float | None = None,
    loss: Loss = "ce",
) -> Tensor:
    """Iterative FGSM, also called BIM (Kurakin et al. 2017, arXiv:1607.02533): from the image itself, no random start.
    Towards `targets` where they are given."""
    return _restarted(
        model,
        images,
        labels,
        eps,
        seed=seed,
        targets=targets,
        steps=steps,
        attempts=1,
        step_size=step_size,
        norm="linf",
        loss=loss,
        random_start=False,
    )


ATTACKS["bim"] = ifgsm


@_register("ifgsm_targeted")
def ifgsm_targeted(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 10,
    step_size: float | None = None,
) -> Tensor:
    """Iterative FGSM towards `targets`; without them towards each other class in turn."""
    attack = functools.partial(ifgsm.__wrapped__, seed=seed, steps=steps, step_size=step_size)
    return _towards_each(attack, model, images, labels, eps, targets)


@_register("mifgsm")
def mifgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 10,
    step_size: float | None = None,
    momentum: float = 1.0,
    loss: Loss = "ce",
) -> Tensor:
    """Momentum iterative FGSM (Dong et al. 2018, arXiv:1710.06081): made to transfer between models."""
    return _restarted(
        model,
        images,
        labels,
        eps,
        seed=seed,
        targets=targets,
        steps=steps,
        attempts=1,
        step_size=step_size,
        norm="linf",
        loss=loss,
        random_start=False,
        momentum=momentum,
    )


@_register("pgd")
def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 20,
    restarts: int = 1,
    step_size: float | None = None,
    loss: Loss = "ce",
    random_start: bool = True,
    push: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Projected gradient descent (Madry et al. 2018, arXiv:1706.06083), keeping the best iterate: any successful one
    counts, and an image is left alone once it fell. Towards `targets` where they are given.

    Args:
        step_size: None takes 2.5·eps/steps, so that the ball's edge is in reach from any start.
        loss: `ce`, or `margin`, which climbs towards the nearest other class (the next nearest at each restart).
        push: go on after success to the lowest margin (what a rank statistic like AUROC asks of an attacker).
        mask: 1 where a pixel may change.
    """
    return _restarted(
        model,
        images,
        labels,
        eps,
        seed=seed,
        targets=targets,
        steps=steps,
        attempts=restarts,
        step_size=step_size,
        norm="linf",
        loss=loss,
        random_start=random_start,
        push=push,
        mask=mask,
    )


@_register("pgd_targeted")
def pgd_targeted(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 20,
    restarts: int = 1,
    step_size: float | None = None,
) -> Tensor:
    """PGD towards `targets` (success means hitting them); without them towards each other class in turn, the likeliest
    first, where any wrong answer is a success (multi-targeted, Gowal et al. 2019, arXiv:1910.09338)."""
    attempts = restarts if targets is not None else restarts * (_classes_of(model, images) - 1)
    return _restarted(
        model,
        images,
        labels,
        eps,
        seed=seed,
        targets=targets,
        steps=steps,
        attempts=attempts,
        step_size=step_size,
        norm="linf",
        loss="margin",
        random_start=True,
    )


@_register("pgd_clinical")
def pgd_clinical(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 20,
    restarts: int = 1,
) -> Tensor:
    """PGD towards the clinically worst answer: Mild and Moderate made Non, Non and Very mild made Moderate."""
    return pgd_targeted.__wrapped__(
        model,
        images,
        labels,
        eps,
        seed=seed,
        steps=steps,
        restarts=restarts,
        targets=clinical_targets(labels, _classes_of(model, images)),
    )


@_register("pgd_l2", norm="l2")
def pgd_l2(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 20,
    restarts: int = 1,
    step_size: float | None = None,
    loss: Loss = "margin",
) -> Tensor:
    """PGD in the Euclidean norm (Madry et al. 2018): steps along the gradient itself, not its sign."""
    return _restarted(
        model,
        images,
        labels,
        eps,
        seed=seed,
        targets=targets,
        steps=steps,
        attempts=restarts,
        step_size=step_size,
        norm="l2",
        loss=loss,
        random_start=True,
    )


# -- the registry: minimal perturbations -------------------------------------------------------------------------------


@_register("deepfool", norm="l2")
def deepfool(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 50,
    overshoot: float = 0.02,
) -> Tensor:
    """Minimal Euclidean perturbation by repeated linearisation (Moosavi-Dezfooli et al. 2016, arXiv:1511.04599), drawn
    back to the boundary by bisection. Where the nearest adversarial image found lies beyond eps, its projection onto
    the ball comes back. Towards `targets` where they are given."""
    nearest = _deepfool(model, images, labels, targets, steps, overshoot)
    return _project(nearest, images, eps, "l2")


def _deepfool(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    steps: int,
    overshoot: float,
) -> Tensor:
    """Nearest adversarial images that DeepFool finds, at any distance."""
    current = images.clone()
    done = torch.zeros_like(labels).bool()
    for _ in range(steps):
        rows = (~done).nonzero().squeeze(1)
        if not len(rows):
            break
        classes, gaps, slopes, logits = class_gaps(model, current[rows], labels[rows])
        hit = _distance_to_success(logits, labels[rows], _rows(targets, rows))[1]
        done[rows[hit]] = True
        rows, classes, gaps, slopes = rows[~hit], classes[~hit], gaps[~hit].abs(), slopes[~hit]
        length = slopes.flatten(2).norm(dim=2).clamp_min(1e-12)
        at = torch.arange(len(rows), device=rows.device)
        chosen = (
            (gaps / length).argmin(1)
            if targets is None
            else (classes == targets[rows, None]).int().argmax(1)
        )
        step = -slopes[at, chosen] * _axes((gaps[at, chosen] + 1e-6) / length[at, chosen] ** 2)
        current[rows] = (current[rows] + (1 + overshoot) * step).clamp(0.0, 1.0)
    return _bisect(model, images, current, labels, targets)


def _bisect(
    model: nn.Module,
    images: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    halvings: int = 10,
) -> Tensor:
    """The point nearest to `images` on the way to `adversarial` that is still adversarial (bisection)."""
    low, high = (
        torch.zeros(len(images), device=images.device),
        torch.ones(len(images), device=images.device),
    )
    for _ in range(halvings):
        middle = (low + high) / 2
        hit = _succeeded(model, images + _axes(middle) * (adversarial - images), labels, targets)[1]
        low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)
    return (images + _axes(high) * (adversarial - images)).clamp(0.0, 1.0)


@_register("fab_t", package="pyautoattack")
def fab_t(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 100,
) -> Tensor:
    """FAB-T, minimal perturbation towards each other class (Croce and Hein 2020, arXiv:1907.02044), official code.
    Where the nearest adversarial image found lies beyond eps, its projection onto the ball comes back."""
    nearest = nearest_adversarial(
        model, images, labels, norm="linf", steps=steps, seed=seed, eps=eps
    )
    return _or_noise(_project(nearest, images, eps, "linf"), model, images, labels, eps, seed)


def nearest_adversarial(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    norm: Norm = "linf",
    steps: int = 100,
    seed: int = 0,
    eps: float | None = None,
) -> Tensor:
    """Nearest adversarial images that official FAB-T finds at any distance (N, 1, H, W); unchanged where it finds none,
    and for clean errors. With `eps` an image counts as done once it fell within eps, as in AutoAttack.

    The loop over target classes is ours because the official one throws away what it found beyond eps.
    """
    from pyautoattack.fab_pt import FABAttack_PT

    norms = {"linf": "Linf", "l2": "L2"}
    with _untouched(model):
        fab = FABAttack_PT(
            model,
            norm=norms[norm],
            n_iter=steps,
            eps=eps or 1.0,
            seed=seed,
            targeted=True,
            device=images.device,
        )
        adversarial, distance = (
            images.clone(),
            torch.full_like(labels, torch.inf, dtype=torch.float32),
        )
        distance[_succeeded(model, images, labels)[1]] = 0.0
        torch.manual_seed(seed)
        for rank in range(2, _classes_of(model, images) + 1):
            rows = (distance > (eps or 0.0)).nonzero().squeeze(1)
            if not len(rows):
                break
            fab.target_class = rank
            found = fab.attack_single_run(
                images[rows], labels[rows], use_rand_start=False, is_targeted=True
            )
            size = perturbation_size(images[rows], found, norm)
            better = _succeeded(model, found, labels[rows])[1] & (size < distance[rows])
            adversarial[rows[better]], distance[rows[better]] = found[better], size[better]
    return adversarial.detach()


# -- the registry: official AutoAttack ---------------------------------------------------------------------------------


class _AtLeastFour(nn.Module):
    """A view with fewer than four classes, with constant losers added: the targeted DLR loss reads the four highest
    logits. The losers lie below every real class, so that they are never a target."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        missing = 4 - logits.shape[1]
        if missing <= 0:
            return logits
        below = torch.arange(1, missing + 1, device=logits.device, dtype=logits.dtype)
        return torch.cat([logits, logits.amin(1, keepdim=True) - below], dim=1)


@_register("apgd_ce", package="pyautoattack")
def apgd_ce(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 100,
    restarts: int = 1,
) -> Tensor:
    """Auto-PGD on the cross-entropy (Croce and Hein 2020, arXiv:2003.01690), official code."""
    from pyautoattack.autopgd_base import APGDAttack

    attack = APGDAttack(
        model,
        n_iter=steps,
        n_restarts=restarts,
        eps=eps,
        loss="ce",
        seed=seed,
        device=images.device,
    )
    return _or_noise(attack.perturb(images, labels), model, images, labels, eps, seed)


@_register("apgd_t", package="pyautoattack")
def apgd_t(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 100,
    restarts: int = 1,
) -> Tensor:
    """Auto-PGD on the targeted difference-of-logits ratio, towards each other class (Croce and Hein 2020,
    arXiv:2003.01690), official code with as many targets as there are other classes."""
    from pyautoattack.autopgd_base import APGDAttack_targeted

    attack = APGDAttack_targeted(
        _AtLeastFour(model),
        n_iter=steps,
        n_restarts=restarts,
        eps=eps,
        seed=seed,
        n_target_classes=_classes_of(model, images) - 1,
        device=images.device,
    )
    return _or_noise(attack.perturb(images, labels), model, images, labels, eps, seed)


@_register("square", kind="black-box", package="pyautoattack")
def square(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    queries: int = 5000,
) -> Tensor:
    """Square Attack, a random search that needs only the logits (Andriushchenko et al. 2020, arXiv:1912.00049),
    official code with AutoAttack's settings."""
    from pyautoattack.square import SquareAttack

    attack = SquareAttack(
        model,
        p_init=0.8,
        n_queries=queries,
        eps=eps,
        seed=seed,
        resc_schedule=False,
        device=images.device,
    )
    return _or_noise(attack.perturb(images, labels), model, images, labels, eps, seed)


def _or_noise(
    adversarial: Tensor, model: nn.Module, images: Tensor, labels: Tensor, eps: float, seed: int
) -> Tensor:
    """The official code hands the clean image back where it found nothing; a random point of the ball stands in for it,
    so that a clean image that comes back from any attack always means that the attack did not run."""
    lost = (adversarial == images).flatten(1).all(1) & ~_succeeded(model, images, labels)[1]
    return torch.where(_axes(lost), _random_start(images, eps, "linf", seed), adversarial)


@_register("autoattack", package="pyautoattack")
def autoattack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    batch: int = 64,
) -> Tensor:
    """Official AutoAttack `standard` in L-infinity: APGD-CE, APGD-T, FAB-T and Square, 100 steps and 5,000 queries
    (Croce and Hein 2020, arXiv:2003.01690), set to the model's number of classes (its default of ten fails with
    four)."""
    from pyautoattack import AutoAttack

    tracer = sys.gettrace()
    try:
        attack = AutoAttack(
            _AtLeastFour(model),
            norm="Linf",
            eps=eps,
            version="standard",
            seed=seed,
            device=images.device,
        )
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = (
            _classes_of(model, images) - 1
        )
        adversarial = attack.run_standard_evaluation(images, labels, batch_size=batch)[0]
    finally:
        sys.settrace(
            tracer
        )  # its check for adaptive models switches off whatever tracer (coverage, debugger) was on
    return _or_noise(adversarial, model, images, labels, eps, seed)


# -- the registry: few pixels, decisions alone, other models, a region -------------------------------------------------


@_register("few_pixel", norm="l0", kind="black-box")
def few_pixel(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    pixels: int = 5,
    generations: int = 30,
    population: int = 40,
) -> Tensor:
    """Changes a few pixels by at most eps each (1: any value), found by differential evolution on the logits alone (Su,
    Vargas and Sakurai 2019, arXiv:1710.08864), for all images at once and from its own seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(images.device)

    genes = draw(len(images), population, pixels, 3)  # row, column, new value, each in [0, 1)
    fitness = _pixel_fitness(model, images, labels, targets, eps, genes)
    for _ in range(generations):
        rows = (fitness.amin(1) >= 0).nonzero().squeeze(1)
        if not len(rows):
            break
        partners = draw(len(rows), population, population).argsort(2)[:, :, :3]
        first, second, third = (genes[rows[:, None], partners[:, :, k]] for k in range(3))
        children = (first + 0.5 * (second - third)) % 1.0
        score = _pixel_fitness(
            model, images[rows], labels[rows], _rows(targets, rows), eps, children
        )
        better = score < fitness[rows]
        genes[rows] = torch.where(better[:, :, None, None], children, genes[rows])
        fitness[rows] = torch.where(better, score, fitness[rows])
    best = genes[torch.arange(len(images), device=images.device), fitness.argmin(1)]
    return _with_pixels(images, best[:, None], eps)[:, 0]


@_register("one_pixel", norm="l0", kind="black-box")
def one_pixel(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    generations: int = 30,
    population: int = 40,
) -> Tensor:
    """One pixel changed by at most eps (1: any value), by differential evolution (Su et al. 2019, arXiv:1710.08864)."""
    return few_pixel.__wrapped__(
        model,
        images,
        labels,
        eps,
        seed=seed,
        targets=targets,
        pixels=1,
        generations=generations,
        population=population,
    )


def _with_pixels(images: Tensor, genes: Tensor, eps: float) -> Tensor:
    """Images (N, P, 1, H, W) with each candidate's pixels set; genes (N, P, pixels, 3) in [0, 1)."""
    (count, candidates), (height, width) = genes.shape[:2], images.shape[-2:]
    changed = images[:, None].expand(-1, candidates, -1, -1, -1).clone()
    flat = changed.view(count, candidates, -1)
    place = (genes[..., 0] * height).long() * width + (genes[..., 1] * width).long()
    old = images.flatten(1)[:, None].expand(-1, candidates, -1).gather(2, place)
    flat.scatter_(
        2, place, torch.minimum(torch.maximum(genes[..., 2], old - eps), old + eps).clamp(0.0, 1.0)
    )
    return changed


def _pixel_fitness(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    eps: float,
    genes: Tensor,
) -> Tensor:
    """Distance to success of each candidate (N, P): negative once it fools the model."""
    candidates = genes.shape[1]
    changed = _with_pixels(images, genes, eps).flatten(0, 1)
    repeated = None if targets is None else targets.repeat_interleave(candidates)
    with torch.no_grad():
        logits = torch.cat([model(part) for part in changed.split(256)]).float()
    distance, hit = _distance_to_success(logits, labels.repeat_interleave(candidates), repeated)
    return torch.where(hit, distance.clamp_max(-1e-6), distance.clamp_min(0.0)).view(-1, candidates)


@_register("hopskipjump", kind="black-box", package="adversarial-robustness-toolbox")
def hopskipjump(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 10,
    evaluations: int = 1000,
) -> Tensor:
    """HopSkipJump, which sees the model's decision alone (Chen, Jordan and Wainwright 2020, arXiv:1904.02144), by the
    Adversarial Robustness Toolbox. What lies beyond eps comes back projected onto the ball."""
    from art.attacks.evasion import HopSkipJump
    from art.estimators.classification import BlackBoxClassifierNeuralNetwork

    def answers(batch: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return (
                model(torch.as_tensor(batch, dtype=images.dtype, device=images.device))
                .float()
                .cpu()
                .numpy()
            )

    np.random.seed(
        seed % 2**32
    )  # the toolbox draws from the global state, which the guard restores
    classes, aims = _classes_of(model, images), labels if targets is None else targets
    starts, rows = _adversarial_starts(model, images, labels, targets, seed)
    found = _random_start(images, eps, "linf", seed)
    if len(rows):
        oracle = BlackBoxClassifierNeuralNetwork(
            answers, images.shape[1:], classes, channels_first=True, clip_values=(0.0, 1.0)
        )
        attack = HopSkipJump(
            oracle,
            targeted=targets is not None,
            norm=np.inf,
            max_iter=steps,
            max_eval=evaluations,
            init_eval=min(100, evaluations),
            init_size=1,
            verbose=False,
        )
        made = attack.generate(
            images[rows].cpu().numpy(),
            y=np.eye(classes, dtype=np.float32)[aims[rows].cpu().numpy()],
            x_adv_init=starts.cpu().numpy(),
        )
        found[rows] = _project(torch.as_tensor(made).to(images), images[rows], eps, "linf")
    return _or_noise(found, model, images, labels, eps, seed)


def _adversarial_starts(
    model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None, seed: int
) -> tuple[Tensor, Tensor]:
    """For a decision-based attack: the nearest image of the batch, or of 64 of noise, that the model already answers as
    the attacker wishes, and the rows that have one. Ours, because the toolbox draws its starts without a seed."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.cat([images, torch.rand(64, *images.shape[1:], generator=generator).to(images)])
    with torch.no_grad():
        given = torch.cat([model(part).float().argmax(1) for part in pool.split(256)])
    useful = given != labels[:, None] if targets is None else given == targets[:, None]
    distance = torch.cdist(images.flatten(1), pool.flatten(1)).masked_fill(~useful, torch.inf)
    rows = useful.any(1).nonzero().squeeze(1)
    return pool[distance[rows].argmin(1)], rows


@_register("transfer", kind="transfer")
def transfer(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    source: nn.Module,
    seed: int = 0,
    targets: Tensor | None = None,
    steps: int = 20,
) -> Tensor:
    """Images made against `source`, another model, by momentum PGD that goes on after success (Dong et al. 2018,
    arXiv:1710.06081), and shown to `model` without a look at its gradient."""
    with _untouched(source):
        return _ascend(
            source,
            images,
            labels,
            eps,
            images,
            steps=steps,
            step_size=2.5 * eps / steps,
            targets=targets,
            momentum=1.0,
            push=True,
        )[0]


@_register("kryptonite")
def kryptonite(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    targets: Tensor | None = None,
    mask: Tensor | None = None,
    steps: int = 20,
    restarts: int = 1,
) -> Tensor:
    """Perturbation confined to the region of interest (Kulkarni and Bhambani 2021, "Kryptonite: an adversarial attack
    using regional focus"): PGD inside `mask`.

    Args:
        mask: 1 inside the region, (N, 1, H, W) or (1, 1, H, W), e.g. where Grad-CAM is high; None takes the brain.
    """
    mask = brain_mask(images) if mask is None else mask.to(images)
    return _restarted(
        model,
        images,
        labels,
        eps,
        seed=seed,
        targets=targets,
        steps=steps,
        attempts=restarts,
        step_size=None,
        norm="linf",
        loss="margin",
        random_start=True,
        mask=mask,
    )


def brain_mask(images: Tensor) -> Tensor:
    """1 where the brain is, float (N, 1, H, W), from the image alone: above half of Otsu's threshold, the largest
    connected piece, holes filled. All 1 where nothing stands out."""
    from scipy import ndimage

    masks = np.ones(images.shape, np.float32)
    for index, image in enumerate(images[:, 0].cpu().numpy()):
        pieces, count = ndimage.label(image > _otsu(image) / 2)
        if count:
            largest = 1 + np.argmax(
                ndimage.sum_labels(np.ones_like(image), pieces, range(1, count + 1))
            )
            masks[index, 0] = ndimage.binary_fill_holes(pieces == largest)
    return torch.as_tensor(masks).to(images)


def _otsu(image: np.ndarray) -> float:
    """The threshold that best parts dark from bright (Otsu 1979)."""
    counts, edges = np.histogram(image, bins=64, range=(0.0, 1.0))
    centres = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts), counts.sum()
    dark, whole = np.cumsum(counts * centres), (counts * centres).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (whole * below / total - dark) ** 2 / (below * (total - below))
    return float(centres[np.nanargmax(np.where(np.isfinite(between), between, -1))])
