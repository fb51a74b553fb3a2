"""Several members as one model: mixed by probability, fitted on validation people, attacked as the one model it is.

Every ensemble here is an `nn.Module` by the model contract: raw pixels in [0, 1] in, logits out, differentiable end to
end, and its logits are log-probabilities. So every attack of `attacks.py` and the suite of `robustness.py` act on it as
on a single model. Under `patient` nothing here is fitted on a test person: `refuse_test_people` stands before each fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from utils import metrics
from utils.attacks import ATTACKS
from utils.utils_funcs import CLASSES, UserError

#: How the members' weights are found.
COMBINERS = ("uniform", "weighted", "stacking", "blending")
#: Groups of people that take turns in the out-of-fold fit of `fit_stacking`.
TURNS = 5
#: Strengths of the pull towards the uniform pool that are tried out of fold, weakest first.
STRENGTHS = (0.003, 0.03, 0.3, 3.0)


# -- one model out of several -----------------------------------------------------------------------------------------


class Mixture(nn.Module):
    """The log of the weighted mean of the members' probabilities, (N, 4) from pixels (N, 1, H, W).

    Args:
        members: name → model by the model contract.
        weights: one a member, not negative, summing to 1 (None: uniform).
    """

    def __init__(
        self, members: Mapping[str, nn.Module], weights: Sequence[float] | np.ndarray | None = None
    ) -> None:
        super().__init__()
        self.members = nn.ModuleDict(_at_least_one(members))
        given = (
            np.full(len(members), 1 / len(members))
            if weights is None
            else np.asarray(weights, dtype=np.float64)
        )
        if given.shape != (len(members),) or (given < 0).any() or abs(given.sum() - 1) > 1e-6:
            raise UserError(
                f"A mixture of {len(members)} members needs as many weights, none negative, that sum to 1, not "
                f"{given.tolist()}."
            )
        self.register_buffer(
            "log_weights", torch.as_tensor(np.log(np.maximum(given, 1e-300)), dtype=torch.float32)
        )

    def combine(self, log_probabilities: Tensor) -> Tensor:
        """Logits (N, C) from the members' log-probabilities (M, N, C)."""
        return (log_probabilities + self.log_weights.view(-1, 1, 1)).logsumexp(0)

    def forward(self, images: Tensor) -> Tensor:
        return self.combine(member_log_probabilities(self.members.values(), images)).to(
            images.dtype
        )


class LogLinearPool(nn.Module):
    """A multinomial model upon the members' logits: log p(c) = sum over members of a_m log p_m(c) + b_c, normalised.

    One coefficient a member and one bias a class, so that a class nobody could be calibrated on (Moderate under
    `patient`) is still answered from the members (Satopää et al. 2014, doi:10.1016/j.ijforecast.2013.09.009).
    """

    def __init__(
        self,
        members: Mapping[str, nn.Module],
        coefficients: Sequence[float] | np.ndarray,
        bias: Sequence[float] | np.ndarray,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleDict(_at_least_one(members))
        if len(coefficients) != len(members) or len(bias) != len(CLASSES):
            raise UserError(
                f"A pool of {len(members)} members needs as many coefficients and {len(CLASSES)} biases, "
                f"not {len(coefficients)} and {len(bias)}."
            )
        self.register_buffer(
            "coefficients", torch.as_tensor(np.asarray(coefficients), dtype=torch.float32)
        )
        self.register_buffer("bias", torch.as_tensor(np.asarray(bias), dtype=torch.float32))

    def combine(self, log_probabilities: Tensor) -> Tensor:
        """Logits (N, C), which are log-probabilities, from the members' log-probabilities (M, N, C)."""
        return (
            (log_probabilities * self.coefficients.view(-1, 1, 1)).sum(0) + self.bias
        ).log_softmax(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.combine(member_log_probabilities(self.members.values(), images)).to(
            images.dtype
        )


class SeparateImages(nn.Module):
    """The ensemble shown one image *a member*: pixels (N, M, H, W), the k-th channel to the k-th member.

    This is what the project attacked from which this repository grew, and it is a relaxation: no single input is several
    images. An ensemble that falls here need not fall; what the relaxation leaves standing, one shared image leaves
    standing too.
    """

    def __init__(self, ensemble: Mixture | LogLinearPool) -> None:
        super().__init__()
        self.ensemble = ensemble

    def forward(self, images: Tensor) -> Tensor:
        parts = images.split(1, dim=1)
        members = list(self.ensemble.members.values())
        if len(parts) != len(members):
            raise UserError(f"{len(members)} members need as many images each, not {len(parts)}.")
        answers = torch.stack(
            [_log_probabilities(member(part)) for member, part in zip(members, parts, strict=True)]
        )
        return self.ensemble.combine(answers).to(images.dtype)


def _at_least_one(members: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    if not members:
        raise UserError(
            "An ensemble needs at least one member: train the models of its membership first."
        )
    return dict(members)


def member_log_probabilities(members: Iterable[nn.Module], images: Tensor) -> Tensor:
    """Log-probabilities (M, N, C) of every member on the same images."""
    return torch.stack([_log_probabilities(member(images)) for member in members])


def _log_probabilities(logits: Tensor) -> Tensor:
    # Four numbers an image: float64 costs nothing and keeps the mixture exact far out in the tails (MPS has none).
    return (logits.float() if logits.device.type == "mps" else logits.double()).log_softmax(1)


# -- weights, from validation people only -----------------------------------------------------------------------------


def refuse_test_patients(patients: np.ndarray, test_patients: np.ndarray, what: str) -> None:
    """Raises `StudyError` where a person that weights are fitted on is a test person."""
    shared = np.intersect1d(patients, test_patients)
    if len(shared):
        raise UserError(
            f"{what} would be fitted on {len(shared)} test people (person {shared[0]} first): fit on validation people, "
            "who are in no test set of this fold."
        )


def fit_weights(
    log_probabilities: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    test_patients: np.ndarray,
    steps: int = 500,
) -> np.ndarray:
    """Mixture weights (M,) of the greatest likelihood, by expectation maximisation: the problem is convex.

    Args:
        log_probabilities: (M, N, 4) of the members on *validation* images.
        labels, people: (N,).
        test_people: whom these must not be; see `refuse_test_people`.
    """
    refuse_test_patients(patients, test_patients, "The weights of a mixture")
    balance = _balance(labels)
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
    """(coefficients (M,), biases (4,)) of a `LogLinearPool`, its strength of regularisation and its temperature chosen out
    of fold by person (Wolpert 1992, doi:10.1016/S0893-6080(05)80023-1).

    The people take turns in `TURNS` groups: each is predicted by a pool fitted on the others. The strength with the least
    loss of these predictions is kept, and the temperature that calibrates *them* is applied to the pool of everybody.
    """
    refuse_test_patients(patients, test_patients, "A stacked ensemble")
    z = np.asarray(log_probabilities, dtype=np.float64)
    turns = _turns(labels, patients)
    out_of_fold = {}
    for strength in STRENGTHS:
        found = np.full(z.shape[1:], np.nan)
        for turn in np.unique(turns):
            held = turns == turn
            found[held] = _pooled(z[:, held], *_fit_pool(z[:, ~held], labels[~held], strength))
        out_of_fold[strength] = found
    best = min(STRENGTHS, key=lambda strength: _loss(out_of_fold[strength], labels))
    temperature = metrics.fit_temperature(out_of_fold[best], labels)
    coefficients, bias = _fit_pool(z, labels, best)
    return coefficients / temperature, bias / temperature


def fit_blending(
    log_probabilities: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    test_patients: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(coefficients (M,), biases (4,)) of a `LogLinearPool` fitted once on one half of the held-out people, its
    temperature on the other half. Cheaper than `fit_stacking`, and it spends half of the people on each."""
    refuse_test_patients(patients, test_patients, "A blended ensemble")
    z = np.asarray(log_probabilities, dtype=np.float64)
    first = _turns(labels, patients) % 2 == 0
    if first.all() or not first.any():
        raise UserError(
            f"Blending needs people for two halves, not {len(np.unique(patients))}: use stacking or uniform weights."
        )
    coefficients, bias = _fit_pool(z[:, first], labels[first], STRENGTHS[1])
    temperature = metrics.fit_temperature(_pooled(z[:, ~first], coefficients, bias), labels[~first])
    return coefficients / temperature, bias / temperature


def build_ensemble(
    combiner: str,
    members: Mapping[str, nn.Module],
    log_probabilities: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    test_patients: np.ndarray,
) -> Mixture | LogLinearPool:
    """The members as one model in eval mode; what is fitted is fitted on the given validation rows.

    Args:
        combiner: one of `COMBINERS`.
        log_probabilities: (M, N, 4), members in the order of `members`, on validation images; labels, people: (N,).
    """
    if combiner not in COMBINERS:
        raise UserError(f"Unknown combiner {combiner!r}: expected one of {', '.join(COMBINERS)}.")
    given = dict(test_patients=test_patients)
    if combiner == "uniform":
        return Mixture(members).eval()
    if combiner == "weighted":
        return Mixture(members, fit_weights(log_probabilities, labels, patients, **given)).eval()
    fit = fit_stacking if combiner == "stacking" else fit_blending
    return LogLinearPool(members, *fit(log_probabilities, labels, patients, **given)).eval()


def _balance(labels: np.ndarray) -> np.ndarray:
    """Weights (N,) that give every class present the same say and sum to 1."""
    counts = np.bincount(labels, minlength=len(CLASSES))
    return 1 / (counts[labels] * (counts > 0).sum())


def _turns(labels: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """A turn in 0 … TURNS − 1 for each row (N,): everybody's rows together, classes spread evenly over the turns."""
    identity, first = np.unique(patients, return_index=True)
    if len(identity) < 2:
        raise UserError(f"An out-of-fold fit needs at least two people, not {len(identity)}.")
    line = identity[np.lexsort((identity, labels[first]))]
    turn = {patient: place % min(TURNS, len(line)) for place, patient in enumerate(line.tolist())}
    return np.array([turn[patient] for patient in patients.tolist()])


def _pooled(z: np.ndarray, coefficients: np.ndarray, bias: np.ndarray) -> np.ndarray:
    logits = np.tensordot(coefficients, z, axes=1) + bias
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def _loss(log_probabilities: np.ndarray, labels: np.ndarray) -> float:
    return float(-(_balance(labels) * log_probabilities[np.arange(len(labels)), labels]).sum())


def _fit_pool(z: np.ndarray, labels: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients and biases of the least class-balanced cross-entropy plus a quadratic pull to the uniform pool.

    A class that is absent shares the bias of the rating below it: with no example of its own there is no other evidence.
    """
    from scipy.optimize import minimize

    members, present = len(z), np.unique(labels)
    owner = np.array(
        [present[max(0, np.searchsorted(present, c, "right") - 1)] for c in range(len(CLASSES))]
    )
    spread = (owner[:, None] == present).astype(float)  # (4, biases)
    weight, rows = _balance(labels), np.arange(len(labels))

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        a, b = values[:members], values[members:]
        answer = _pooled(z, a, spread @ b)
        slope = np.exp(answer) * weight[:, None]
        slope[rows, labels] -= weight
        pull = np.concatenate([a - 1 / members, b])
        gradient = np.concatenate(
            [np.tensordot(z, slope, axes=([1, 2], [0, 1])), spread.T @ slope.sum(0)]
        )
        return _loss(answer, labels) + strength / 2 * float(pull @ pull), gradient + strength * pull

    start = np.concatenate([np.full(members, 1 / members), np.zeros(len(present))])
    bounds = [(0, None)] * members + [(None, None)] * len(
        present
    )  # a member is never believed the other way round
    found = minimize(objective, start, jac=True, bounds=bounds, method="L-BFGS-B").x
    return found[:members], spread @ found[members:]


# -- how unlike the members are ---------------------------------------------------------------------------------------


def diversity(
    logits: Mapping[str, np.ndarray],
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    n_boot: int = 2000,
) -> dict[str, dict]:
    """`"A / B"` → {"disagreement", "error_correlation"} of every pair of members, each with its interval over people.

    Disagreement is the share of images with different answers; error correlation is Pearson's between the two members'
    errors (1: they fail on the same images; Kuncheva and Whitaker 2003, doi:10.1023/A:1022859003006).

    Args:
        logits: member → (N, 4) on the same rows.
    """
    answers = {name: np.asarray(values).argmax(1) for name, values in logits.items()}
    names, found = list(answers), {}
    for k, first in enumerate(names):
        for second in names[k + 1 :]:
            a, b = answers[first], answers[second]
            found[f"{first} / {second}"] = metrics.pair_scores(
                a != b, a != labels, b != labels, labels, patients, n_boot=n_boot
            )
    return found


# -- the relaxation of the original project -----------------------------------------------------------------------------


def attack_separately(
    ensemble: Mixture | LogLinearPool,
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
    """Logits (N, 4) of the ensemble when each member is shown its own image: PGD over all members' images together.

    Args:
        shared: one-image adversarials (N, 1, H, W). Every one of them is also a point of the relaxation, so a row that
            only they fell counts as fallen here.
        step_size: None for 2.5 eps / steps.
    """
    relaxed = SeparateImages(ensemble)
    wide = images.expand(-1, len(ensemble.members), -1, -1).contiguous()
    made = ATTACKS["pgd"](
        relaxed, wide, labels, eps, seed=seed, steps=steps, step_size=step_size, loss=loss
    )
    with torch.no_grad():
        logits = relaxed(made)
        if shared is not None:
            own = ensemble(shared)
            better = (logits.argmax(1) == labels) & (own.argmax(1) != labels)
            logits = torch.where(better[:, None], own, logits)
    return logits


def attack_like_the_original_project(
    ensemble: Mixture | LogLinearPool,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    steps: int = 10,
    step_size: float = 1e-4,
) -> Tensor:
    """Logits (N, 4) of the ensemble as the original project attacked it: each member alone is attacked with plain PGD of few
    steps (how many is not reported) of 0.0001, and shown its own image. Two errors at once: no single input does this, and
    `steps * step_size` never reaches the edge of the eps ball (0.001 of 0.005)."""
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
