"""Several members as one model: mixed by probability, fitted on validation patients.

Every ensemble here is an `nn.Module` by the model contract: raw pixels in [0, 1] in, logits out,
differentiable end to end, and its logits are log-probabilities. So the attacks of `utils.attacks`
and the suite of `utils.evaluation` act on it as on a single model. Under `patient` nothing here is
fitted on a test patient: each fit calls `refuse_test_patients` first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils import metrics
from utils.attacks.base import ATTACKS
from utils.utils_funcs import CLASSES, UserError

#: How the members' weights are found.
COMBINERS = ("uniform", "weighted", "stacking", "blending")
#: Groups of patients that take turns in the out-of-fold fit of `fit_stacking`.
TURNS = 5
#: Strengths of the regularization towards the uniform pool that are tried out of fold, weakest
#: first.
STRENGTHS = (0.003, 0.03, 0.3, 3.0)


# -- one model out of several ------------------------------------------------------------------


class Ensemble(nn.Module):
    """Members that see the same pixels (N, 1, H, W), and a rule that combines their answers.

    Args:
        members: name → model by the model contract; at least one.
    """

    def __init__(self, members: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not members:
            raise UserError(
                "An ensemble needs at least one member: train the models of its membership first."
            )
        self.members = nn.ModuleDict(dict(members))

    def combine(self, log_probabilities: Tensor) -> Tensor:
        """Logits (N, C), which are log-probabilities, from those of the members (M, N, C)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Pixels (N, 1, H, W) in [0, 1] → logits (N, 4)."""
        answers = member_log_probabilities(self.members.values(), images)
        return self.combine(answers).to(images.dtype)


class Mixture(Ensemble):
    """The log of the weighted mean of the members' probabilities, (N, 4) from pixels (N, 1, H, W).

    Args:
        members: name → model by the model contract.
        weights: one a member, not negative, summing to 1 (None: uniform).
    """

    log_weights: Tensor

    def __init__(
        self, members: Mapping[str, nn.Module], weights: Sequence[float] | np.ndarray | None = None
    ) -> None:
        super().__init__(members)
        count = len(members)
        given = np.full(count, 1 / count) if weights is None else np.asarray(weights, np.float64)
        if given.shape != (count,) or (given < 0).any() or abs(given.sum() - 1) > 1e-6:
            raise UserError(
                f"A mixture of {count} members needs as many weights, none negative, that sum to "
                f"1, not {given.tolist()}."
            )
        logs = np.log(np.maximum(given, 1e-300))
        self.register_buffer("log_weights", torch.as_tensor(logs, dtype=torch.float32))

    def combine(self, log_probabilities: Tensor) -> Tensor:
        """Members' log-probabilities (M, N, 4) → log-probabilities (N, 4)."""
        return (log_probabilities + self.log_weights.view(-1, 1, 1)).logsumexp(0)


class LogLinearPool(Ensemble):
    """A multinomial model of the members' logits: log p(c) = sum over m of a_m log p_m(c) + b_c.

    The result is normalized. One coefficient a member and one bias a class, so that a class without
    any calibration image (Moderate under `patient`) is still answered from the members (Satopää et
    al. 2014, doi:10.1016/j.ijforecast.2013.09.009).

    Args:
        members: name → model by the model contract.
        coefficients: a (M,).
        bias: b (4,).
    """

    coefficients: Tensor
    bias: Tensor

    def __init__(
        self,
        members: Mapping[str, nn.Module],
        coefficients: Sequence[float] | np.ndarray,
        bias: Sequence[float] | np.ndarray,
    ) -> None:
        super().__init__(members)
        if len(coefficients) != len(members) or len(bias) != len(CLASSES):
            raise UserError(
                f"A pool of {len(members)} members needs as many coefficients and {len(CLASSES)} "
                f"biases, not {len(coefficients)} and {len(bias)}."
            )
        for name, values in (("coefficients", coefficients), ("bias", bias)):
            tensor = torch.as_tensor(np.asarray(values), dtype=torch.float32)
            self.register_buffer(name, tensor)

    def combine(self, log_probabilities: Tensor) -> Tensor:
        """Members' log-probabilities (M, N, 4) → log-probabilities (N, 4)."""
        weighted = (log_probabilities * self.coefficients.view(-1, 1, 1)).sum(0)
        return (weighted + self.bias).log_softmax(1)


class SeparateImages(nn.Module):
    """An ensemble whose members see different images: pixels (N, M, H, W), a channel a member.

    The original project, from which this repository grew, attacked its ensembles so. It is a
    relaxation, since no single input is several images: an ensemble misclassified here may still be
    robust, and one that is robust here is robust to one shared image as well.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__()
        self.ensemble = ensemble

    def forward(self, images: Tensor) -> Tensor:
        """One image a member, as channels (N, M, H, W) → logits (N, 4)."""
        parts = images.split(1, dim=1)
        members = list(self.ensemble.members.values())
        if len(parts) != len(members):
            raise UserError(f"{len(members)} members need as many images each, not {len(parts)}.")
        answers = [
            log_probabilities(member(part)) for member, part in zip(members, parts, strict=True)
        ]
        return self.ensemble.combine(torch.stack(answers)).to(images.dtype)


def member_log_probabilities(members: Iterable[nn.Module], images: Tensor) -> Tensor:
    """Log-probabilities (M, N, C) of every member on the same images."""
    return torch.stack([log_probabilities(member(images)) for member in members])


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-probabilities in float64 (float32 on MPS, which has no other).

    For four numbers an image float64 costs nothing, and the mixture stays exact where
    probabilities are tiny.
    """
    return (logits.float() if logits.device.type == "mps" else logits.double()).log_softmax(1)


# -- weights, from validation patients only ----------------------------------------------------


def refuse_test_patients(patients: np.ndarray, test_patients: np.ndarray, what: str) -> None:
    """Raises `UserError` where a patient that weights are fitted on is a test patient.

    Args:
        what: what would be fitted, the beginning of the message.
    """
    shared = np.intersect1d(patients, test_patients)
    if len(shared):
        raise UserError(
            f"{what} would be fitted on {len(shared)} test patients (patient {shared[0]} first): "
            "fit on validation patients, who are in no test set of this fold."
        )


def fit_weights(
    log_probabilities: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    test_patients: np.ndarray,
    steps: int = 500,
) -> np.ndarray:
    """Mixture weights (M,) of the greatest likelihood, by expectation maximization.

    The problem is convex. Each class counts alike.

    Args:
        log_probabilities: (M, N, 4) of the members on *validation* images.
        labels, patients: (N,).
        test_patients: whom `patients` must not contain, see `refuse_test_patients`.
    """
    refuse_test_patients(patients, test_patients, "The weights of a mixture")
    balance = balanced_weights(labels)
    likelihood = np.exp(
        np.asarray(log_probabilities, dtype=np.float64)[:, np.arange(len(labels)), labels]
    )
    weights = np.full(len(likelihood), 1 / len(likelihood))
    for _ in range(steps):
        share = weights[:, None] * likelihood
        share /= np.maximum(share.sum(0), 1e-300)
        weights = share @ balance
        weights /= weights.sum()
    return weights


def fit_stacking(
    log_probabilities: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    test_patients: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients (M,) and biases (4,) of a `LogLinearPool`, calibrated out of fold.

    The patients take turns in `TURNS` groups: each is predicted by a pool fitted on the others
    (Wolpert 1992, doi:10.1016/S0893-6080(05)80023-1). The strength of regularization with the
    smallest loss of these predictions is kept, and the temperature that calibrates *them* is
    applied to the pool of all patients.

    Args:
        log_probabilities, labels, patients, test_patients: see `fit_weights`.
    """
    refuse_test_patients(patients, test_patients, "A stacked ensemble")
    members = np.asarray(log_probabilities, dtype=np.float64)
    turns = patient_turns(labels, patients)
    out_of_fold = {}
    for strength in STRENGTHS:
        predicted = np.full(members.shape[1:], np.nan)
        for turn in np.unique(turns):
            held_out = turns == turn
            pool = fit_pool(members[:, ~held_out], labels[~held_out], strength)
            predicted[held_out] = pooled(members[:, held_out], *pool)
        out_of_fold[strength] = predicted
    best = min(STRENGTHS, key=lambda strength: balanced_loss(out_of_fold[strength], labels))
    temperature = metrics.fit_temperature(out_of_fold[best], labels)
    coefficients, bias = fit_pool(members, labels, best)
    return coefficients / temperature, bias / temperature


def fit_blending(
    log_probabilities: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    test_patients: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients (M,) and biases (4,) of a `LogLinearPool` fitted on half of the patients.

    Its temperature is fitted on the other half. Cheaper than `fit_stacking`, but each fit sees only
    half of the patients.

    Args:
        log_probabilities, labels, patients, test_patients: see `fit_weights`.
    """
    refuse_test_patients(patients, test_patients, "A blended ensemble")
    members = np.asarray(log_probabilities, dtype=np.float64)
    first = patient_turns(labels, patients) % 2 == 0
    if first.all() or not first.any():
        raise UserError(
            f"Blending needs patients for two halves, not {len(np.unique(patients))}: use stacking "
            "or uniform weights."
        )
    coefficients, bias = fit_pool(members[:, first], labels[first], STRENGTHS[1])
    second = pooled(members[:, ~first], coefficients, bias)
    temperature = metrics.fit_temperature(second, labels[~first])
    return coefficients / temperature, bias / temperature


def build_ensemble(
    combiner: str,
    members: Mapping[str, nn.Module],
    log_probabilities: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    test_patients: np.ndarray,
) -> Ensemble:
    """The members as one model in evaluation mode, fitted on the given validation images.

    Args:
        combiner: one of `COMBINERS`.
        log_probabilities: (M, N, 4), members in the order of `members`, on validation images.
        labels, patients, test_patients: see `fit_weights`.
    """
    if combiner not in COMBINERS:
        raise UserError(f"Unknown combiner {combiner!r}: expected one of {', '.join(COMBINERS)}.")
    if combiner == "uniform":
        return Mixture(members).eval()
    fits: dict[str, Callable[..., Any]] = {
        "weighted": fit_weights,
        "stacking": fit_stacking,
        "blending": fit_blending,
    }
    fit = fits[combiner]
    fitted = fit(log_probabilities, labels, patients, test_patients=test_patients)
    if combiner == "weighted":
        return Mixture(members, fitted).eval()
    return LogLinearPool(members, *fitted).eval()


def balanced_weights(labels: np.ndarray) -> np.ndarray:
    """Weights (N,) with which every class present counts alike; they sum to 1."""
    counts = np.bincount(labels, minlength=len(CLASSES))
    return 1 / (counts[labels] * (counts > 0).sum())


def balanced_loss(log_probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Class-balanced cross-entropy of log-probabilities (N, 4)."""
    of_labels = log_probabilities[np.arange(len(labels)), labels]
    return float(-(balanced_weights(labels) * of_labels).sum())


def patient_turns(labels: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """The turn of each row in 0 … `TURNS` − 1, (N,).

    All rows of a patient have the same turn, and the patients of a class are spread evenly.

    Raises:
        UserError: there are fewer than two patients.
    """
    identity, first = np.unique(patients, return_index=True)
    if len(identity) < 2:
        raise UserError(f"An out-of-fold fit needs at least two patients, not {len(identity)}.")
    by_class = identity[np.lexsort((identity, labels[first]))]
    turns = min(TURNS, len(by_class))
    turn = {patient: place % turns for place, patient in enumerate(by_class.tolist())}
    return np.array([turn[patient] for patient in patients.tolist()])


def pooled(members: np.ndarray, coefficients: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Log-probabilities (N, 4) of a pool, from those of its members (M, N, 4)."""
    logits = np.tensordot(coefficients, members, axes=1) + bias
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def fit_pool(
    members: np.ndarray, labels: np.ndarray, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients (M,) and biases (4,) of the pool with the smallest penalized loss.

    The loss is the class-balanced cross-entropy; the penalty, times `strength`/2, is the squared
    distance to the uniform pool. A class that is absent shares the bias of the next better rating
    that is present: without an example of it there is no other evidence.

    Args:
        members: log-probabilities (M, N, 4); labels: (N,).
    """
    from scipy.optimize import minimize

    count, present = len(members), np.unique(labels)
    shares_bias_of = np.array(
        [
            present[max(0, int(np.searchsorted(present, label, "right")) - 1)]
            for label in range(len(CLASSES))
        ]
    )
    spread = (shares_bias_of[:, None] == present).astype(float)  # (4, biases)
    weight, rows = balanced_weights(labels), np.arange(len(labels))

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        coefficients, bias = values[:count], values[count:]
        answer = pooled(members, coefficients, spread @ bias)
        slope = np.exp(answer) * weight[:, None]
        slope[rows, labels] -= weight
        distance = np.concatenate([coefficients - 1 / count, bias])
        gradient = np.concatenate(
            [np.tensordot(members, slope, axes=([1, 2], [0, 1])), spread.T @ slope.sum(0)]
        )
        loss = balanced_loss(answer, labels) + strength / 2 * float(distance @ distance)
        return loss, gradient + strength * distance

    start = np.concatenate([np.full(count, 1 / count), np.zeros(len(present))])
    # No negative coefficient: a member's answer is never taken for its opposite.
    bounds = [(0, None)] * count + [(None, None)] * len(present)
    found = minimize(objective, start, jac=True, bounds=bounds, method="L-BFGS-B").x
    return found[:count], spread @ found[count:]


# -- how different the members are -------------------------------------------------------------


def diversity(
    logits: Mapping[str, np.ndarray],
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    n_boot: int = 2000,
) -> dict[str, dict]:
    """`"A / B"` → {"disagreement", "error_correlation"} of every pair of members.

    Disagreement is the share of images with different answers; error correlation is Pearson's
    between the two members' errors (1: they fail on the same images; Kuncheva and Whitaker 2003,
    doi:10.1023/A:1022859003006). Each has its interval over patients.

    Args:
        logits: member → (N, 4) on the same rows.
        labels, patients: (N,).
        n_boot: samples of the bootstrap over patients.
    """
    answers = {name: np.asarray(values).argmax(1) for name, values in logits.items()}
    found = {}
    for first, second in itertools.combinations(answers, 2):
        a, b = answers[first], answers[second]
        found[f"{first} / {second}"] = metrics.pair_scores(
            a != b, a != labels, b != labels, labels, patients, n_boot=n_boot
        )
    return found


# -- attacks on separate images, the relaxation of the original project ------------------------


def attack_separately(
    ensemble: Ensemble,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    seed: int = 0,
    steps: int = 20,
    step_size: float | None = None,
    shared: Tensor | None = None,
    loss: str = "margin",
) -> Tensor:
    """Logits (N, 4) of the ensemble under PGD over the images of all members together.

    Each member is shown a different image (`SeparateImages`).

    Args:
        images: (N, 1, H, W) in [0, 1]; labels: (N,).
        step_size: None for 2.5 eps / steps.
        shared: adversarial images (N, 1, H, W) for all members alike. They are also points of the
            relaxation, so an image that only they misclassify counts as misclassified here.
        loss: see `utils.attacks`.
    """
    relaxed = SeparateImages(ensemble)
    wide = images.expand(-1, len(ensemble.members), -1, -1).contiguous()
    adversarial = ATTACKS["pgd"](
        relaxed, wide, labels, eps, seed=seed, steps=steps, step_size=step_size, loss=loss
    )
    with torch.no_grad():
        logits = relaxed(adversarial)
        if shared is not None:
            of_shared = ensemble(shared)
            only_shared = (logits.argmax(1) == labels) & (of_shared.argmax(1) != labels)
            logits = torch.where(only_shared[:, None], of_shared, logits)
    return logits


def attack_like_the_original_project(
    ensemble: Ensemble,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    steps: int = 10,
    step_size: float = 1e-4,
) -> Tensor:
    """Logits (N, 4) of the ensemble as the original project attacked it.

    Each member is attacked alone, by plain PGD with few steps of 0.0001 (how many is not reported),
    and is shown its adversarial image. This has two errors: no single input does this, and
    `steps * step_size` never reaches the edge of the eps ball (0.001 of 0.005).

    Args:
        images: (N, 1, H, W) in [0, 1]; labels: (N,).
    """
    parts = [
        ATTACKS["pgd"](
            member,
            images,
            labels,
            eps,
            steps=steps,
            step_size=step_size,
            random_start=False,
            push=True,
        )
        for member in ensemble.members.values()
    ]
    with torch.no_grad():
        return SeparateImages(ensemble)(torch.cat(parts, dim=1))
