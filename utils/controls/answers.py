"""What each control answers on the test slices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from utils import metrics
from utils.config import parse_eps
from utils.controls.choice import (
    Predictor,
    Settings,
    Splits,
    choose,
    grid_of,
    thinned,
    validation_splits,
)
from utils.controls.images import (
    Slices,
    along_the_scan,
    as_rows,
    block_means,
    intensity_statistics,
    nearest_rows,
    scan_statistics,
    standardized,
)
from utils.controls.robust_linear import (
    exact_worst_images,
    fit_robust_linear,
    four_logits,
    moderate_share,
    slack,
    worst_logits,
)
from utils.evaluation.plan import VIEWS, AttackName
from utils.utils_funcs import CLASSES

#: Control → what it is, in the order of tables.
CONTROLS = {
    "constant": "always the most frequent training class",
    "nearest_neighbour": "nearest training image, raw pixels",
    "nearest_neighbour_permuted": "nearest training image, patients' labels permuted at random",
    "linear_32": "multinomial regression on 32×32 pixels",
    "robust_linear_32": (
        "multinomial regression on 32×32 block means, trained on its exact worst case under "
        "L-infinity"
    ),
    "atrophy": (
        "logistic regression on five intensity statistics of the slice at its place in the scan"
    ),
    "atrophy_scan": (
        "logistic regression on the same statistics of the whole ordered scan; every slice carries "
        "its patient's answer"
    ),
    "kernel_ridge_16": (
        "Gaussian kernel ridge on 16×16 pixels, the mean image of each slice position removed"
    ),
}
#: Controls that answer a patient from the whole scan: none where a split divides scans.
OF_SCANS = ("atrophy_scan",)
LOG_FLOOR = 1e-6


@dataclass(frozen=True)
class Answers:
    """What a control answers on the test slices.

    Attributes:
        logits: (N, 4).
        settings: those that were chosen.
        exact: where the worst case is exact, (eps as written, attack) → logits (N, 4) at each
            image's worst image, for the decision among four classes and among three.
    """

    logits: np.ndarray
    settings: Settings
    exact: dict[tuple[str, AttackName], np.ndarray]


def control_answers(
    train: Slices,
    validation: Slices,
    test: Slices,
    *,
    sweep: Sequence[str],
    headline: str,
    seed: int = 0,
    thorough: bool = True,
) -> Iterator[tuple[str, Answers]]:
    """Control → its answers on `test`, one after another, in the order of `CONTROLS` without the
    constant answer.

    Every control is fitted on training and validation slices together once its settings are chosen.
    Those that ask for a slice's place in the scan leave images of unknown patients out.
    `atrophy_scan` is left out where a test patient is also fitted on: the split divides scans.

    Args:
        sweep: L-infinity eps, as written, at which the exact worst case is wanted.
        headline: the eps at which settings of the robust model are chosen.
        thorough: choose them at all; each one costs a training.
    """
    fit = Slices.joined([train, validation])
    splits = validation_splits(train, validation)
    plain, permuted = nearest_neighbor_answers(fit, test, seed)
    yield "nearest_neighbour", plain
    yield "nearest_neighbour_permuted", permuted
    yield "linear_32", linear_answers(fit, test, splits)
    robust = robust_linear_answers(fit, test, splits, sweep, headline, thorough=thorough)
    yield "robust_linear_32", robust
    parts = [part.pick(np.flatnonzero(part.positions >= 0)) for part in (train, validation)]
    known, splits = Slices.joined(parts), validation_splits(parts[0], parts[1])
    yield "atrophy", atrophy_answers(known, test, splits)
    if not np.isin(test.patients, known.patients).any():
        yield "atrophy_scan", atrophy_scan_answers(known, test, splits)
    yield "kernel_ridge_16", kernel_ridge_answers(known, test, splits)


# -- the nearest image -----------------------------------------------------------------------------


def nearest_neighbor_answers(fit: Slices, test: Slices, seed: int) -> tuple[Answers, Answers]:
    """The label of the nearest image, and the same learned from permuted labels of patients."""
    rows = as_rows([*fit.images, *test.images])
    known, queries = np.flatnonzero(fit.patients >= 0), rows[len(fit) :]
    nearest = nearest_rows(queries, rows[: len(fit)])
    nearest_known = known[nearest_rows(queries, rows[known])] if len(known) < len(fit) else nearest
    permuted = _permuted_answers(fit, test, nearest_known, seed)
    return (
        Answers(_certain_logits(fit.labels[nearest]), {}, {}),
        Answers(_certain_logits(permuted), {}, {}),
    )


def _certain_logits(answers: np.ndarray, classes: int = len(CLASSES)) -> np.ndarray:
    """Logits of a rule that gives only an answer (N,): probability 0.97 on it, so that none is
    ever zero."""
    rest = 0.03 / (classes - 1)
    return np.log(np.full((len(answers), classes), rest) + (0.97 - rest) * np.eye(classes)[answers])


def _permuted_answers(fit: Slices, test: Slices, nearest: np.ndarray, seed: int) -> np.ndarray:
    """Answers (N,) learned from permuted labels and scored on the true ones.

    The answers for a test patient are scored on the images of the patient whose label that patient
    was given (in turn, where the two have different numbers of test images). Images of unknown
    patients keep theirs.

    Args:
        nearest: row of `fit` that is nearest to each test image, of a known patient.
    """
    labels = np.concatenate([fit.labels, test.labels])
    patients = np.concatenate([fit.patients, test.patients])
    donor = permuted_patients(patients, np.arange(len(fit), len(labels)), seed)
    label_of = {
        patient: int(np.bincount(labels[patients == patient]).argmax()) for patient in donor
    }
    learned = np.array([label_of[donor[int(patient)]] for patient in fit.patients[nearest]])
    answers = learned.copy()
    for patient, other in donor.items():
        answered = np.flatnonzero(test.patients == patient)
        scored = np.flatnonzero(test.patients == other)
        if len(answered):
            answers[scored] = np.resize(learned[answered], len(scored))
    return answers


def permuted_patients(patients: np.ndarray, test: np.ndarray, seed: int = 0) -> dict[int, int]:
    """Patient → the patient whose label is given to it, at random: the patients of the test images
    among themselves, all others among themselves. What is left to learn is the patient's identity.

    Args:
        patients: (N,), -1 where unknown; test: rows of the test images.
    """
    rng = np.random.default_rng(seed)
    every, tested = (set(rows[rows >= 0].tolist()) for rows in (patients, patients[test]))
    return {
        int(patient): int(donor)
        for part in (tested, every - tested)
        for patient, donor in zip(sorted(part), rng.permutation(sorted(part)), strict=True)
    }


# -- regression on pixels --------------------------------------------------------------------------


def logistic_regression(
    rows: np.ndarray, labels: np.ndarray, regularization: float, classes: int
) -> Predictor:
    """Class-balanced multinomial regression on rows (N, D): a function from rows to logits
    (n, classes). Classes without a label have the probability `LOG_FLOOR`."""
    from sklearn.linear_model import LogisticRegression

    mean, scale = rows.mean(0), rows.std() + 1e-6
    model = LogisticRegression(C=regularization, max_iter=200, class_weight="balanced")
    model.fit((rows - mean) / scale, labels)

    def predict(queries: np.ndarray) -> np.ndarray:
        probability = np.full((len(queries), classes), LOG_FLOOR)
        probability[:, model.classes_] = np.maximum(
            model.predict_proba((queries - mean) / scale), LOG_FLOOR
        )
        return np.log(probability / probability.sum(1, keepdims=True))

    return predict


def linear_answers(fit: Slices, test: Slices, splits: Splits) -> Answers:
    """Regression on the pixels of images shrunk to 32×32."""
    rows, queries = as_rows(fit.images, 32), as_rows(test.images, 32)

    def fitted(chosen: np.ndarray, settings: Settings) -> Predictor:
        model = logistic_regression(rows[chosen], fit.labels[chosen], settings["C"], len(CLASSES))
        return lambda wanted: model(rows[wanted])

    settings = choose(fitted, fit.labels, thinned(splits), grid_of(C=(1e-3, 1e-2, 1e-1)))[0]
    model = logistic_regression(rows, fit.labels, settings["C"], len(CLASSES))
    return Answers(model(queries), settings, {})


def robust_linear_answers(
    fit: Slices,
    test: Slices,
    splits: Splits,
    sweep: Sequence[str],
    headline: str,
    *,
    thorough: bool = True,
) -> Answers:
    """Settings by the macro-averaged cross-entropy of the exact worst case at the headline eps;
    unless `thorough`, it is trained at that eps and nothing is chosen."""
    eps = parse_eps(headline)

    def fitted(chosen: np.ndarray, settings: Settings) -> Predictor:
        model = fit_robust_linear(
            fit.images[chosen],
            fit.labels[chosen],
            settings["eps"],
            weight_decay=settings["weight_decay"],
        )

        def worst(rows: np.ndarray) -> np.ndarray:
            images, labels = fit.images[rows], torch.from_numpy(fit.three[rows])
            means = torch.from_numpy(block_means(images, model.side))
            lower, upper = slack(images, eps, model.side)
            with torch.no_grad():
                return worst_logits(model.weight, model.bias, means, lower, upper, labels).numpy()

        return worst

    grid = grid_of(eps=[level / 255 for level in (2, 4, 8, 16)], weight_decay=(1e-4, 1e-2))
    if thorough:
        settings = choose(fitted, fit.three, thinned(splits), grid)[0]
    else:
        settings = {"eps": eps, "weight_decay": 1e-4}
    model = fit_robust_linear(
        fit.images, fit.labels, settings["eps"], weight_decay=settings["weight_decay"]
    )
    pixels = torch.from_numpy(np.ascontiguousarray(test.images)).float()[:, None] / 255
    labels = torch.from_numpy(test.labels.astype(np.int64))
    exact = {}
    with torch.no_grad():
        for text in sweep:
            for view in ("four", "three"):
                groups = VIEWS[view].groups
                worst = exact_worst_images(model, pixels, labels, parse_eps(text), groups)
                exact[text, AttackName("exact", view)] = model(worst).numpy()
        clean = model(pixels).numpy()
    return Answers(clean, settings, exact)


# -- regression on statistics ----------------------------------------------------------------------


def atrophy_answers(fit: Slices, test: Slices, splits: Splits) -> Answers:
    """Regression on `intensity_statistics` of each slice, relative to fitted slices at its place in
    the scan."""
    every = Slices.joined([fit, test])
    statistics = intensity_statistics(every.images)

    def fitted(chosen: np.ndarray, settings: Settings) -> Predictor:
        relative = standardized(statistics, every.positions, chosen)
        rows = along_the_scan(relative, every.positions)
        model = logistic_regression(rows[chosen], fit.three[chosen], settings["C"], 3)
        return lambda wanted: model(rows[wanted])

    settings = choose(fitted, fit.three, splits, grid_of(C=(1e-3, 1e-2, 1e-1, 1.0)))[0]
    logits = fitted(np.arange(len(fit)), settings)(np.arange(len(fit), len(every)))
    return Answers(four_logits(logits, moderate_share(fit.labels)), settings, {})


def atrophy_scan_answers(fit: Slices, test: Slices, splits: Splits) -> Answers:
    """Regression on `intensity_statistics` of whole scans; every slice carries the answer of its
    patient."""
    length = int(np.median(np.unique(fit.patients, return_counts=True)[1]))
    patients, labels, scans = scan_statistics(fit, length)
    asked, _, queries = scan_statistics(test, length)
    three = metrics.THREE[labels]

    def rows_of(slices: np.ndarray) -> np.ndarray:
        return np.flatnonzero(np.isin(patients, fit.patients[slices]))

    of_patients = [(rows_of(fitted), rows_of(judged)) for fitted, judged in splits]

    def fitted(chosen: np.ndarray, settings: Settings) -> Predictor:
        mean, scale = scans[chosen].mean(0), scans[chosen].std(0) + 1e-6
        rows = (scans[chosen] - mean) / scale
        model = logistic_regression(rows, three[chosen], settings["C"], 3)
        return lambda wanted: model((wanted - mean) / scale)

    def fitted_by_row(chosen: np.ndarray, settings: Settings) -> Predictor:
        model = fitted(chosen, settings)
        return lambda rows: model(scans[rows])

    settings = choose(fitted_by_row, three, of_patients, grid_of(C=(1e-3, 1e-2, 1e-1)))[0]
    logits = fitted(np.arange(len(patients)), settings)(queries)
    of_slices = logits[np.searchsorted(asked, test.patients)]
    return Answers(four_logits(of_slices, moderate_share(fit.labels)), settings, {})


# -- kernel ridge ----------------------------------------------------------------------------------


def kernel_ridge_answers(fit: Slices, test: Slices, splits: Splits) -> Answers:
    """Kernel ridge regression on the three classes' indicators, class-balanced.

    The kernel's width is a multiple of the median distance. One temperature, fitted where the
    settings were chosen, turns the scores into logits.
    """
    every = Slices.joined([fit, test])
    positions = every.positions
    means = block_means(every.images, 16).astype(np.float64)

    def fitted(chosen: np.ndarray, settings: Settings) -> Predictor:
        rows = np.empty_like(means)
        for position in np.unique(positions):
            reference = chosen[positions[chosen] == position]
            here = positions == position
            rows[here] = means[here] - means[reference if len(reference) else chosen].mean(0)
        some = chosen[:: max(1, len(chosen) // 500)]
        width = settings["width"] * np.median(_squared_distances(rows[some], rows[chosen]))
        three = fit.three[chosen]
        counts = np.bincount(three, minlength=3)
        kernel = np.exp(-_squared_distances(rows[chosen], rows[chosen]) / width)
        penalty = settings["alpha"] * 3 * counts[three] / len(chosen)
        kernel[np.diag_indices_from(kernel)] += penalty
        weights = np.linalg.solve(kernel, np.eye(3)[three] - 1 / 3)

        def predict(wanted: np.ndarray) -> np.ndarray:
            return np.exp(-_squared_distances(rows[wanted], rows[chosen]) / width) @ weights

        return predict

    grid = grid_of(width=(0.5, 1.0, 2.0), alpha=(0.1, 1.0, 10.0))
    settings, judged, scores = choose(fitted, fit.three, thinned(splits), grid)
    temperature = metrics.fit_temperature(scores, fit.three[judged])
    scores = fitted(np.arange(len(fit)), settings)(np.arange(len(fit), len(every)))
    return Answers(four_logits(scores / temperature, moderate_share(fit.labels)), settings, {})


def _squared_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances (N, M) between rows (N, D) and (M, D)."""
    return np.maximum((first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * first @ second.T, 0)
