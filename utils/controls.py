"""Controls: what simple rules and small linear models score, so that a network's score has something to beat.

A network that is no better than these has not shown that it needs its depth. `robust_linear_32` is the control of
robust accuracy: under L-infinity its worst case has a closed form, so its robust accuracy is exact, and no attack can
be too weak to find it. Settings are chosen on validation patients, never on a test image.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from utils import cohort as recovery
from utils import metrics, records
from utils.attacks import THREE, Groups, group_labels
from utils.cohort import Cohort, RawImages
from utils.config import RunConfig, parse_eps
from utils.data import Folds, split_patients, split_slices, stack_images
from utils.utils_funcs import CLASSES, environment, git_state, hardware, progress

#: Control → what it is, in the order of tables.
CONTROLS = {
    "constant": "always the most frequent training class",
    "nearest_neighbour": "nearest training image, raw pixels",
    "nearest_neighbour_permuted": "nearest training image, patients' labels permuted at random",
    "linear_32": "multinomial regression on 32×32 pixels",
    "robust_linear_32": "multinomial regression on 32×32 block means, trained on its exact worst case under L-infinity",
    "atrophy": "logistic regression on five intensity statistics of the slice at its place in the scan",
    "atrophy_scan": "logistic regression on the same statistics of the whole ordered scan; every slice carries its patient's answer",
    "kernel_ridge_16": "Gaussian kernel ridge on 16×16 pixels, the mean image of each slice position removed",
}
#: Controls that answer a patient from the whole scan: a split that divides a scan has none.
OF_SCANS = ("atrophy_scan",)
#: The number of patients' groups that settings are cross-validated on.
INNER_FOLDS = 4
#: Fitting for a choice of settings takes every so many-th slice: neighbours are nearly the same image.
CHOICE_STRIDE = 4
LOG_FLOOR = 1e-6

Settings = dict[str, float]
Splits = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Slices:
    """Images with what is known of them: `images` uint8 (N, H, W); `labels` (N,) in 0..3; `patients` and `positions`
    (N,), -1 where unknown (synthetic images)."""

    images: np.ndarray
    labels: np.ndarray
    patients: np.ndarray
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, rows: np.ndarray) -> Slices:
        return Slices(
            self.images[rows], self.labels[rows], self.patients[rows], self.positions[rows]
        )

    @property
    def three(self) -> np.ndarray:
        """Labels with Mild and Moderate merged."""
        return metrics.THREE[self.labels]


# -- images as rows ---------------------------------------------------------------------------------------------------


def shrunk(image: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX))


def as_rows(images: Sequence[np.ndarray], side: int | None = None) -> np.ndarray:
    """Images as centered `float32` rows (N, H·W) in [-0.5, 0.5]; of one side where one is given or sizes differ."""
    if side is None and len({image.shape for image in images}) > 1:
        side = recovery.SEARCH_SIDE
    if side is not None:
        images = [shrunk(image, side) for image in images]
    return np.stack([image.ravel() for image in images]).astype(np.float32) / 255 - 0.5


def block_means(images: np.ndarray, side: int) -> np.ndarray:
    """Means over blocks of pixels, not rounded: uint8 (N, H, W) → float32 (N, side·side) in [0, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(images))[:, None]
    parts = [
        F.adaptive_avg_pool2d(part.float() / 255, side).flatten(1) for part in pixels.split(1024)
    ]
    return torch.cat(parts).numpy()


def nearest_rows(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Row of the gallery that is nearest to each query in Euclidean distance, block by block; both (·, D)."""
    length = (gallery**2).sum(1) / 2
    found = np.empty(len(queries), np.int64)
    for start in progress(range(0, len(queries), 512), "nearest neighbours"):
        found[start : start + 512] = (queries[start : start + 512] @ gallery.T - length).argmax(1)
    return found


# -- settings on validation patients ----------------------------------------------------------------------------------


def validation_splits(train: Slices, validation: Slices, folds: int = INNER_FOLDS) -> Splits:
    """How settings are chosen: (rows to fit on, rows to judge on) of `train` followed by `validation`.

    Where patients are kept apart, all of them judge once: `folds` groups of patients, stratified by class, since the
    twenty validation patients of a fold alone decide nothing. Where the two parts share patients (the published split,
    in which every part does) the validation part judges.
    """
    patients = np.concatenate([train.patients, validation.patients])
    labels = np.concatenate([train.labels, validation.labels])
    rows = np.arange(len(patients))
    known = np.intersect1d(train.patients[train.patients >= 0], validation.patients)
    if len(known) or (patients < 0).any():
        return [(rows[: len(train)], rows[len(train) :])]
    group = np.empty(len(patients), np.int64)
    for label in np.unique(labels):
        own = np.unique(patients[labels == label])
        place = np.random.default_rng(0).permutation(len(own))
        group[labels == label] = (place % folds)[np.searchsorted(own, patients[labels == label])]
    return [
        (rows[group != k], rows[group == k])
        for k in range(folds)
        if (group == k).any() and (group != k).any()
    ]


def choose(
    fit: Callable[[np.ndarray, Settings], Callable[[np.ndarray], np.ndarray]],
    labels: np.ndarray,
    splits: Splits,
    grid: Sequence[Settings],
) -> tuple[Settings, np.ndarray, np.ndarray]:
    """The settings with the least macro-averaged cross-entropy on the rows that judge, and their logits there.

    Args:
        fit: (rows, settings) → a function from rows to logits (n, classes).
        labels: (N,) class numbers that the logits stand for.

    Returns:
        (settings, rows that judged, their logits (n, classes)).
    """
    judged = np.concatenate([rows for _, rows in splits])
    best: tuple[float, Settings, np.ndarray] | None = None
    for settings in grid:
        logits = np.concatenate([fit(own, settings)(rows) for own, rows in splits])
        loss = macro_cross_entropy(logits, labels[judged])
        if best is None or loss < best[0]:
            best = loss, settings, logits
    return best[1], judged, best[2]


def macro_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Cross-entropy averaged over the classes present, so that a constant answer does not win."""
    log_probability = np.log(np.maximum(metrics.probabilities(logits), 1e-12))
    own = -log_probability[np.arange(len(labels)), labels]
    return float(np.mean([own[labels == label].mean() for label in np.unique(labels)]))


def grid_of(**values: Sequence[float]) -> list[Settings]:
    """Every combination of the values given for each setting."""
    return [
        dict(zip(values, combination, strict=True))
        for combination in itertools.product(*values.values())
    ]


# -- four logits from three -------------------------------------------------------------------------------------------


def moderate_share(labels: np.ndarray) -> float:
    """The share of Moderate among Mild and Moderate training slices, below one half: what a three-class model knows of
    the two. Moderate is two patients."""
    late = labels[labels >= 2]
    return float(np.clip((late == 3).mean() if len(late) else 0.0, 1e-4, 0.49))


def four_logits(three: np.ndarray, share: float) -> np.ndarray:
    """Logits (N, 4) of a three-class model (N, 3): Mild and Moderate differ by a constant and add up to their sum, so
    merging them again gives exactly the three-class probabilities."""
    return np.column_stack(
        [three[:, :2], three[:, 2] + np.log(1 - share), three[:, 2] + np.log(share)]
    )


# -- a linear model whose robust accuracy is exact --------------------------------------------------------------------


class PooledLinear(nn.Module):
    """Block means, one linear layer over three classes, four logits: float32 pixels (N, 1, H, W) in [0, 1] → (N, 4).

    Args:
        weight: (3, side·side); bias: (3,); share: of Moderate in the merged class (`moderate_share`).
    """

    def __init__(self, weight: Tensor, bias: Tensor, share: float) -> None:
        super().__init__()
        self.side = round(weight.shape[1] ** 0.5)
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        self.register_buffer(
            "split", torch.tensor([0.0, 0.0, np.log(1 - share), np.log(share)], dtype=weight.dtype)
        )

    def forward(self, images: Tensor) -> Tensor:
        three = F.adaptive_avg_pool2d(images, self.side).flatten(1) @ self.weight.T + self.bias
        return three[:, [0, 1, 2, 2]] + self.split


def room(images: np.ndarray, eps: float, side: int) -> tuple[Tensor, Tensor]:
    """By how much each block mean can be lowered and raised by pixels that move at most eps and stay in [0, 1]: two
    (N, side·side)."""
    lower, upper = [], []
    for part in torch.from_numpy(np.ascontiguousarray(images))[:, None].split(1024):
        pixels = part.float() / 255
        lower.append(F.adaptive_avg_pool2d(pixels.clamp(max=eps), side).flatten(1))
        upper.append(F.adaptive_avg_pool2d((1 - pixels).clamp(max=eps), side).flatten(1))
    return torch.cat(lower), torch.cat(upper)


def worst_logits(
    weight: Tensor, bias: Tensor, means: Tensor, lower: Tensor, upper: Tensor, labels: Tensor
) -> Tensor:
    """Logits (N, 3) of each other class at the image that serves it best against the label, the label's own at 0.

    For an attacker who wants class k instead of y the best image moves every block against the sign of w_y − w_k as
    far as it can go: the margin falls by the L1 norm of w_y − w_k, weighted with that room. Each class is reached by
    an image of its own; a decision is robust where every entry stays below 0.
    """
    classes = len(weight)
    own = means @ weight.T + bias
    difference = (weight[:, None] - weight[None]).flatten(0, 1)
    # For every pair of classes at once: each block is read once, and no row is copied.
    drop = lower @ difference.clamp_min(0).T + upper @ (-difference).clamp_min(0).T
    label = labels[:, None]
    of_label = (
        drop.view(-1, classes, classes)
        .gather(1, label[..., None].expand(-1, 1, classes))
        .squeeze(1)
    )
    return own - own.gather(1, label) + of_label


def fit_robust_linear(
    images: np.ndarray,
    labels: np.ndarray,
    eps: float,
    *,
    side: int = 32,
    weight_decay: float = 1e-3,
    steps: int = 200,
    lr: float = 0.05,
) -> PooledLinear:
    """Multinomial regression over three classes trained on its exact worst case at eps: full-batch Adam on the
    class-balanced cross-entropy of `worst_logits`. With eps 0 it is ordinary regression.

    Args:
        images: uint8 (N, H, W); labels: (N,) in 0..3.
        eps: L-infinity, in units of the [0, 1] pixel range.
    """
    three = torch.from_numpy(metrics.THREE[labels])
    means = torch.from_numpy(block_means(images, side))
    lower, upper = room(images, eps, side)
    center = means.mean(0)
    counts = torch.bincount(three, minlength=3).clamp_min(1)
    balance = len(three) / (3 * counts.float())
    weight = torch.zeros(3, means.shape[1], requires_grad=True)
    bias = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = worst_logits(weight, bias, means - center, lower, upper, three)
        loss = F.cross_entropy(logits, three, weight=balance) + weight_decay * weight.square().sum()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return PooledLinear(weight, bias - weight @ center, moderate_share(labels)).eval()


def affine_map(
    model: nn.Module, shape: tuple[int, int], groups: Groups | None = None
) -> tuple[Tensor, Tensor]:
    """Weights (C, H·W) and biases (C,) of a model that is affine in its pixels, in float64, from its gradient; with
    `groups`, of the log-probabilities that the classes of a group add up to, but for a term that all groups share.

    Raises:
        ValueError: classes of a group differ by more than a constant, so that their sum is not affine.
    """
    double = copy.deepcopy(model).double()
    zero = torch.zeros(1, 1, *shape, dtype=torch.float64)
    weights = torch.autograd.functional.jacobian(lambda image: double(image)[0], zero)
    bias = double(zero)[0].detach()
    weights = weights.reshape(len(bias), -1)
    if groups is None:
        return weights, bias
    for group in groups:
        if (weights[list(group)] - weights[group[0]]).abs().max() > 1e-9:
            raise ValueError(
                f"classes {group} differ by more than a constant: their merged probability is not affine"
            )
    bias = torch.stack([bias[list(group)].logsumexp(0) for group in groups])
    return weights[[group[0] for group in groups]], bias


def exact_worst_images(
    model: nn.Module, pixels: Tensor, labels: Tensor, eps: float, groups: Groups | None = None
) -> Tensor:
    """For a model that is affine in its pixels, the image within eps and [0, 1] at which the label's logit leads the
    others by least: float32 (N, 1, H, W). Where its answer there is right, no image of the ball changes it.

    A class that differs from the label's by a constant alone (Mild and Moderate of `PooledLinear`) cannot be reached
    by moving pixels and is not aimed at.

    Args:
        pixels: float32 (N, 1, H, W) in [0, 1]; labels: int64 (N,).
        groups: merged classes whose decision is attacked (None: the classes themselves), as in `affine_map`.
    """
    weights, bias = affine_map(model, tuple(pixels.shape[-2:]), groups)
    truth = labels if groups is None else group_labels(labels, groups)
    flat, made = pixels.flatten(1).double(), pixels.clone()
    for label in truth.unique().tolist():
        difference = weights[label] - weights
        reachable = (difference.abs().sum(1) > 1e-12).nonzero().squeeze(1)
        for rows in (truth == label).nonzero().squeeze(1).split(512):
            own = flat[rows]
            falls = own.clamp(max=eps) @ difference.clamp_min(0).T
            rises = (1 - own).clamp(max=eps) @ (-difference).clamp_min(0).T
            left = own @ difference.T + (bias[label] - bias) - falls - rises
            aim = difference[reachable[left[:, reachable].argmin(1)]]
            moved = (own - eps * aim.sign()).clamp(0, 1)
            made[rows] = moved.float().view_as(made[rows])
    return made


# -- statistics that see atrophy --------------------------------------------------------------------------------------


def intensity_statistics(images: np.ndarray) -> np.ndarray:
    """Five numbers a slice, float64 (N, 5): shares of dark pixels inside the head (below a quarter and below half of
    its 95th percentile), mean, standard deviation, and the head's share of the image. Fluid is dark on T1: where brain
    has been lost, ventricles and sulci are wide."""
    from scipy import ndimage

    found = np.zeros((len(images), 5))
    for row, image in enumerate(images):
        head = ndimage.binary_fill_holes(image > 0)
        if not head.any():
            continue
        inside = image[head].astype(np.float64)
        bright = np.percentile(inside, 95)
        found[row] = (
            (inside < 0.25 * bright).mean(),
            (inside < 0.5 * bright).mean(),
            inside.mean() / 255,
            inside.std() / 255,
            head.mean(),
        )
    return found


def _along_the_scan(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Each value times 1, its relative position and that squared: (N, 3·D), so that weights vary along the scan."""
    place = 2 * positions / max(positions.max(), 1) - 1
    basis = np.stack([np.ones_like(place), place, place**2], axis=1)
    return (values[:, :, None] * basis[:, None]).reshape(len(values), -1)


def _standardized(values: np.ndarray, positions: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Values minus the mean, over the deviation, of the `reference` rows at the same position (of all where a position
    has fewer than two)."""
    result = np.empty_like(values, dtype=np.float64)
    for position in np.unique(positions):
        own = reference[positions[reference] == position]
        basis = values[own if len(own) > 1 else reference]
        result[positions == position] = (values[positions == position] - basis.mean(0)) / (
            basis.std(0) + 1e-6
        )
    return result


def scan_statistics(
    statistics: np.ndarray, part: Slices, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(patients (P,), labels (P,), statistics of each ordered scan (P, length·5)), resampled to `length` slices."""
    patients = np.unique(part.patients)
    labels, scans = np.empty(len(patients), np.int64), []
    grid = np.linspace(0, 1, length)
    for row, patient in enumerate(patients):
        own = np.flatnonzero(part.patients == patient)
        own = own[np.argsort(part.positions[own])]
        place = np.linspace(0, 1, len(own))
        scans.append(
            np.stack(
                [np.interp(grid, place, column) for column in statistics[own].T], axis=1
            ).ravel()
        )
        labels[row] = np.bincount(part.labels[own]).argmax()
    return patients, labels, np.stack(scans)


def _logistic(
    rows: np.ndarray, labels: np.ndarray, regularization: float, classes: int
) -> Callable[[np.ndarray], np.ndarray]:
    """Class-balanced multinomial regression: a function from rows to logits (n, classes)."""
    from sklearn.linear_model import LogisticRegression

    mean, scale = rows.mean(0), rows.std() + 1e-6
    model = LogisticRegression(C=regularization, max_iter=200, class_weight="balanced")
    model.fit((rows - mean) / scale, labels)

    def answer(queries: np.ndarray) -> np.ndarray:
        probability = np.full((len(queries), classes), LOG_FLOOR)
        probability[:, model.classes_] = np.maximum(
            model.predict_proba((queries - mean) / scale), LOG_FLOOR
        )
        return np.log(probability / probability.sum(1, keepdims=True))

    return answer


# -- one control after another ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What a control answers on the test slices: `logits` (N, 4), the settings that were chosen, and, where its worst
    case is exact, logits (N, 4) at the worst image of each eps, for the decision among four classes (`<eps>:exact`) and
    among three (`<eps>:exact_merged`)."""

    logits: np.ndarray
    settings: Settings
    exact: dict[str, np.ndarray]


def _certain(answers: np.ndarray, classes: int = len(CLASSES)) -> np.ndarray:
    """Logits of a rule that gives only an answer: probability 0.97 on it, so that none is ever zero."""
    rest = 0.03 / (classes - 1)
    return np.log(np.full((len(answers), classes), rest) + (0.97 - rest) * np.eye(classes)[answers])


def permuted_patients(patients: np.ndarray, test: np.ndarray, seed: int = 0) -> dict[int, int]:
    """Who is given whose label, at random: the people of the test images among themselves, all others among themselves.
    What is left to learn is who somebody is."""
    rng = np.random.default_rng(seed)
    everybody, tested = (set(rows[rows >= 0].tolist()) for rows in (patients, patients[test]))
    return {
        int(who): int(donor)
        for part in (tested, everybody - tested)
        for who, donor in zip(sorted(part), rng.permutation(sorted(part)), strict=True)
    }


def _permuted_answers(
    labels: np.ndarray, patients: np.ndarray, tests: np.ndarray, neighbour: np.ndarray, seed: int
) -> np.ndarray:
    """Answers learned from permuted labels, turned back so that they are scored on the given ones: a row holds the
    answer for an image of the patient who was given the label of that row's patient (in turn, where the two have
    different numbers of test images)."""
    donor = permuted_patients(patients, tests, seed)
    own = {int(who): int(np.bincount(labels[patients == who]).argmax()) for who in donor}
    guess = np.array([own[donor[int(who)]] for who in patients[neighbour]])
    answers = np.empty(len(tests), np.int64)
    for who, other in donor.items():
        asked, held = (
            np.flatnonzero(patients[tests] == who),
            np.flatnonzero(patients[tests] == other),
        )
        if len(asked):
            answers[held] = np.resize(guess[asked], len(held))
    return answers


def _neighbours(fit: Slices, test: Slices, seed: int) -> tuple[Answers, Answers]:
    rows = as_rows([*fit.images, *test.images])
    known, queries = np.flatnonzero(fit.patients >= 0), rows[len(fit) :]
    nearest = nearest_rows(queries, rows[: len(fit)])
    nearest_known = known[nearest_rows(queries, rows[known])] if len(known) < len(fit) else nearest
    labels, patients = (
        np.concatenate([getattr(part, name) for part in (fit, test)])
        for name in ("labels", "patients")
    )
    tests = np.arange(len(fit), len(labels))
    permuted = _permuted_answers(labels, patients, tests, nearest_known, seed)
    return Answers(_certain(fit.labels[nearest]), {}, {}), Answers(_certain(permuted), {}, {})


def _linear(fit: Slices, test: Slices, splits: Splits) -> Answers:
    rows, queries = as_rows(fit.images, 32), as_rows(test.images, 32)

    def fitted(own: np.ndarray, settings: Settings) -> Callable[[np.ndarray], np.ndarray]:
        model = _logistic(rows[own], fit.labels[own], settings["C"], len(CLASSES))
        return lambda wanted: model(rows[wanted])

    settings = choose(fitted, fit.labels, _thinned(splits), grid_of(C=(1e-3, 1e-2, 1e-1)))[0]
    return Answers(_logistic(rows, fit.labels, settings["C"], len(CLASSES))(queries), settings, {})


def _thinned(splits: Splits) -> Splits:
    return [(own[::CHOICE_STRIDE], rows) for own, rows in splits]


def _robust_linear(
    fit: Slices, test: Slices, splits: Splits, sweep: Sequence[str], headline: str
) -> Answers:
    """Settings by the macro-averaged cross-entropy of the exact worst case at the headline eps."""
    eps = parse_eps(headline)

    def fitted(own: np.ndarray, settings: Settings) -> Callable[[np.ndarray], np.ndarray]:
        model = fit_robust_linear(fit.images[own], fit.labels[own], **settings)

        def worst(rows: np.ndarray) -> np.ndarray:
            means = torch.from_numpy(block_means(fit.images[rows], model.side))
            labels = torch.from_numpy(fit.three[rows])
            with torch.no_grad():
                return worst_logits(
                    model.weight,
                    model.bias,
                    means,
                    *room(fit.images[rows], eps, model.side),
                    labels,
                ).numpy()

        return worst

    grid = grid_of(eps=[level / 255 for level in (2, 4, 8, 16)], weight_decay=(1e-4, 1e-2))
    settings = choose(fitted, fit.three, _thinned(splits), grid)[0]
    model = fit_robust_linear(fit.images, fit.labels, **settings)
    pixels = torch.from_numpy(np.ascontiguousarray(test.images)).float()[:, None] / 255
    labels = torch.from_numpy(test.labels.astype(np.int64))
    with torch.no_grad():
        exact = {
            f"{text}:exact{suffix}": model(
                exact_worst_images(model, pixels, labels, parse_eps(text), groups)
            ).numpy()
            for text in sweep
            for groups, suffix in ((None, ""), (THREE, "_merged"))
        }
        clean = model(pixels).numpy()
    return Answers(clean, settings, exact)


def _atrophy(fit: Slices, test: Slices, splits: Splits) -> Answers:
    positions = np.concatenate([fit.positions, test.positions])
    statistics = np.concatenate(
        [intensity_statistics(fit.images), intensity_statistics(test.images)]
    )

    def fitted(own: np.ndarray, settings: Settings) -> Callable[[np.ndarray], np.ndarray]:
        rows = _along_the_scan(_standardized(statistics, positions, own), positions)
        model = _logistic(rows[own], fit.three[own], settings["C"], 3)
        return lambda wanted: model(rows[wanted])

    settings = choose(fitted, fit.three, splits, grid_of(C=(1e-3, 1e-2, 1e-1, 1.0)))[0]
    logits = fitted(np.arange(len(fit)), settings)(np.arange(len(fit), len(positions)))
    return Answers(four_logits(logits, moderate_share(fit.labels)), settings, {})


def _atrophy_scan(fit: Slices, test: Slices, splits: Splits) -> Answers:
    length = int(np.median(np.unique(fit.patients, return_counts=True)[1]))
    patients, labels, scans = scan_statistics(intensity_statistics(fit.images), fit, length)
    asked, _, queries = scan_statistics(intensity_statistics(test.images), test, length)
    three = metrics.THREE[labels]
    of_patients = [
        tuple(np.flatnonzero(np.isin(patients, fit.patients[rows])) for rows in split)
        for split in splits
    ]

    def fitted(own: np.ndarray, settings: Settings) -> Callable[[np.ndarray], np.ndarray]:
        mean, scale = scans[own].mean(0), scans[own].std(0) + 1e-6
        model = _logistic((scans[own] - mean) / scale, three[own], settings["C"], 3)
        return lambda wanted: model((wanted - mean) / scale)

    settings = choose(
        lambda own, setting: lambda rows: fitted(own, setting)(scans[rows]),
        three,
        of_patients,
        grid_of(C=(1e-3, 1e-2, 1e-1)),
    )[0]
    logits = fitted(np.arange(len(patients)), settings)(queries)
    every = logits[np.searchsorted(asked, test.patients)]
    return Answers(four_logits(every, moderate_share(fit.labels)), settings, {})


def _kernel_ridge(fit: Slices, test: Slices, splits: Splits) -> Answers:
    """Kernel ridge towards the three classes' indicators, class-balanced; one temperature, fitted where the settings
    were chosen, turns its scores into logits. The kernel's width is a multiple of the median distance."""
    positions = np.concatenate([fit.positions, test.positions])
    means = np.concatenate([block_means(fit.images, 16), block_means(test.images, 16)]).astype(
        np.float64
    )

    def fitted(own: np.ndarray, settings: Settings) -> Callable[[np.ndarray], np.ndarray]:
        rows = np.empty_like(means)
        for position in np.unique(positions):
            reference = own[positions[own] == position]
            here = positions == position
            rows[here] = means[here] - means[reference if len(reference) else own].mean(0)
        width = settings["width"] * np.median(
            _squared_distances(rows[own[:: max(1, len(own) // 500)]], rows[own])
        )
        counts = np.bincount(fit.three[own], minlength=3)
        penalty = settings["alpha"] * 3 * counts[fit.three[own]] / len(own)
        kernel = np.exp(-_squared_distances(rows[own], rows[own]) / width)
        kernel[np.diag_indices_from(kernel)] += penalty
        weights = np.linalg.solve(kernel, np.eye(3)[fit.three[own]] - 1 / 3)
        return lambda wanted: np.exp(-_squared_distances(rows[wanted], rows[own]) / width) @ weights

    grid = grid_of(width=(0.5, 1.0, 2.0), alpha=(0.1, 1.0, 10.0))
    settings, judged, scores = choose(fitted, fit.three, _thinned(splits), grid)
    temperature = metrics.fit_temperature(scores, fit.three[judged])
    scores = fitted(np.arange(len(fit)), settings)(np.arange(len(fit), len(positions)))
    return Answers(four_logits(scores / temperature, moderate_share(fit.labels)), settings, {})


def _squared_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.maximum((first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * first @ second.T, 0)


def control_answers(
    train: Slices,
    validation: Slices,
    test: Slices,
    *,
    sweep: Sequence[str],
    headline: str,
    seed: int = 0,
) -> Iterator[tuple[str, Answers]]:
    """Control → what it answers on `test`, one after another, in the order of `CONTROLS` but for the constant answer.

    Every control is fitted on training and validation slices together once its settings are chosen. Those that ask
    for a slice's place in the scan leave images of unknown patients out; `atrophy_scan` is left out where patients
    stand on both sides, since the split divides their scans.

    Args:
        sweep: L-infinity eps, as written, at which the exact worst case is wanted; headline: the one that settings of
            the robust model are chosen at.
    """
    fit = Slices(
        *(
            np.concatenate([getattr(part, name) for part in (train, validation)])
            for name in Slices.__annotations__
        )
    )
    splits = validation_splits(train, validation)
    plain, permuted = _neighbours(fit, test, seed)
    yield "nearest_neighbour", plain
    yield "nearest_neighbour_permuted", permuted
    yield "linear_32", _linear(fit, test, splits)
    yield "robust_linear_32", _robust_linear(fit, test, splits, sweep, headline)
    parts = [part.pick(np.flatnonzero(part.positions >= 0)) for part in (train, validation)]
    known = Slices(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in Slices.__annotations__
        )
    )
    splits = validation_splits(*parts)
    yield "atrophy", _atrophy(known, test, splits)
    if not np.isin(test.patients, known.patients).any():
        yield "atrophy_scan", _atrophy_scan(known, test, splits)
    yield "kernel_ridge_16", _kernel_ridge(known, test, splits)


# -- the record of all controls ---------------------------------------------------------------------------------------


def control_runs(
    raw: RawImages,
    cohort: Cohort,
    folds: Folds,
    protocol: str,
    *,
    test_folds: Sequence[int] = (0, 1, 2, 3, 4),
    seed: int = 0,
) -> list[tuple[dict[str, np.ndarray], dict[str, dict]]]:
    """One (predictions, what each control was) a fold: rows of the predictions file of `Baselines`, one a test image,
    and control → {"attacks", "settings"}. The constant answer is left out: every record holds it.

    Under `slice` the published train folder trains and its test folder tests; under `patient` each test fold is
    answered from the patients of the others.
    """
    images, runs = stack_images(raw)[:, 0].numpy(), []
    every = Slices(images, cohort.label, cohort.patient_id, cohort.slice_index)
    for fold in (0,) if protocol == "slice" else test_folds:
        rows = split_slices(cohort) if protocol == "slice" else split_patients(cohort, folds, fold)
        test = rows["test"]
        predictions = {
            "labels": cohort.label[test].astype(np.int8),
            "fold": np.full(len(test), fold, np.int8),
            "seed": np.full(len(test), seed, np.int8),
            "patient_id": cohort.patient_id[test].astype(np.int32),
            "slice_index": cohort.slice_index[test].astype(np.int16),
            "file_sha256": np.frombuffer(
                bytes.fromhex("".join(cohort.file_sha256[test])), np.uint8
            ).reshape(-1, 32),
        }
        told: dict[str, dict] = {}
        parts = {name: every.pick(own) for name, own in rows.items()}
        answers = control_answers(
            **parts, sweep=RunConfig.eps, headline=RunConfig.headline_eps, seed=seed
        )
        for name, answer in progress(list(answers), f"controls, {protocol} fold {fold}"):
            predictions[f"{name}/clean"] = metrics.to_half(answer.logits)
            attacks: dict[str, dict] = {}
            for key, logits in answer.exact.items():
                predictions[f"{name}/{key}"] = metrics.to_half(logits)
                eps, attack = key.split(":")
                meta = {
                    "norm": "linf",
                    "kind": "exact",
                    "n_attacked": len(test),
                    "n_set": len(test),
                }
                attacks.setdefault(eps, {})[attack] = meta
            told[name] = {"attacks": attacks, "settings": answer.settings}
        runs.append((predictions, told))
    return runs


def baseline_record(
    raw: RawImages,
    cohort: Cohort,
    folds: Folds,
    protocol: str,
    *,
    data: str,
    profile: str,
    cohort_sha256: str,
    **options,
) -> tuple[dict, dict[str, np.ndarray]]:
    """Record and predictions of `Baselines` under one protocol (`records.write_record` takes both)."""
    start = time.monotonic()
    runs = control_runs(raw, cohort, folds, protocol, **options)
    seconds = round(time.monotonic() - start, 1)
    common = {
        "model": "Baselines",
        "regime": "clean",
        "protocol": protocol,
        "data": data,
        "profile": profile,
        "init": "none",
        "search": "validation patients" if protocol == "patient" else "validation part",
        "search_people": [],
        "seed": 0,
        "cohort_sha256": cohort_sha256,
        "config": {"controls": CONTROLS, "headline_eps": RunConfig.headline_eps},
        "environment": environment(),
        "hardware": hardware(),
        **git_state(),
        "attacks": {},
        "sanity": [],
    }
    metas = [
        {
            **common,
            "fold": int(predictions["fold"][0]),
            "variants": told,
            "wall_seconds": {"train": seconds if number == 0 else 0, "attack": 0},
        }
        for number, (predictions, told) in enumerate(runs)
    ]
    pooled = {
        name: np.concatenate([predictions[name] for predictions, _ in runs]) for name in runs[0][0]
    }
    return records.summarise(pooled, metas), pooled
