"""Settings of the controls, chosen by cross-validation over patients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from utils import metrics
from utils.controls.images import Slices

#: The number of groups of patients that settings are cross-validated on.
INNER_FOLDS = 4
#: Fitting for a choice of settings takes every so many-th slice: neighbors are nearly the same.
CHOICE_STRIDE = 4

Settings = dict[str, float]
#: (rows to fit on, rows to judge on).
Splits = list[tuple[np.ndarray, np.ndarray]]
#: From rows to logits (n, classes).
Predictor = Callable[[np.ndarray], np.ndarray]


def validation_splits(train: Slices, validation: Slices, folds: int = INNER_FOLDS) -> Splits:
    """How settings are chosen: splits of the rows of `train` followed by `validation`.

    Where the two share no patient, all patients judge once, in `folds` groups stratified by class:
    the twenty validation patients of a fold alone decide nothing. Where they share patients (the
    published split, in which every part does), or some are unknown, the validation part judges.
    """
    patients = np.concatenate([train.patients, validation.patients])
    labels = np.concatenate([train.labels, validation.labels])
    rows = np.arange(len(patients))
    shared = np.intersect1d(train.patients[train.patients >= 0], validation.patients)
    if len(shared) or (patients < 0).any():
        return [(rows[: len(train)], rows[len(train) :])]
    group = np.empty(len(patients), np.int64)
    for label in np.unique(labels):
        in_class = labels == label
        of_class = np.unique(patients[in_class])
        place = np.random.default_rng(0).permutation(len(of_class))
        group[in_class] = (place % folds)[np.searchsorted(of_class, patients[in_class])]
    return [
        (rows[group != k], rows[group == k])
        for k in range(folds)
        if (group == k).any() and (group != k).any()
    ]


def thinned(splits: Splits) -> Splits:
    """The same splits, fitted on every `CHOICE_STRIDE`-th row."""
    return [(fitted[::CHOICE_STRIDE], judged) for fitted, judged in splits]


def grid_of(**values: Sequence[float]) -> list[Settings]:
    """Every combination of the values given for each setting."""
    return [
        dict(zip(values, combination, strict=True))
        for combination in itertools.product(*values.values())
    ]


def choose(
    fit: Callable[[np.ndarray, Settings], Predictor],
    labels: np.ndarray,
    splits: Splits,
    grid: Sequence[Settings],
) -> tuple[Settings, np.ndarray, np.ndarray]:
    """The settings with the least macro-averaged cross-entropy on the rows that judge.

    Args:
        fit: (rows, settings) → a function from rows to logits (n, classes).
        labels: (N,) class numbers that the logits stand for.

    Returns:
        (settings, rows that judged, their logits (n, classes)).
    """
    judged = np.concatenate([rows for _, rows in splits])
    logits = [
        np.concatenate([fit(fitted, settings)(rows) for fitted, rows in splits])
        for settings in grid
    ]
    losses = [macro_cross_entropy(found, labels[judged]) for found in logits]
    best = losses.index(min(losses))
    return grid[best], judged, logits[best]


def macro_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Cross-entropy averaged over the classes present, so that a constant answer does not win."""
    log_probability = np.log(np.maximum(metrics.probabilities(logits), 1e-12))
    of_label = -log_probability[np.arange(len(labels)), labels]
    return float(np.mean([of_label[labels == label].mean() for label in np.unique(labels)]))
