"""Scores equal scikit-learn's, intervals resample patients, and both stay valid where data are
extreme."""

from __future__ import annotations

import itertools
import json
import time
from functools import partial

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    confusion_matrix,
    f1_score,
    log_loss,
    roc_auc_score,
)

from utils import metrics

PATIENTS_OF_CLASS = (20, 14, 6, 2)


def cohort(seed: int = 0, slices: int = 8, strength: float = 1.0, of_class=PATIENTS_OF_CLASS):
    """Logits, labels and patients of a cohort whose slices share most of their error with their
    patient's."""
    generator = np.random.default_rng(seed)
    class_of_patient = np.repeat(np.arange(4), of_class)
    patients = np.repeat(np.arange(len(class_of_patient)), slices)
    labels = class_of_patient[patients]
    logits = generator.normal(size=(len(class_of_patient), 4))[patients] + 0.4 * generator.normal(
        size=(len(patients), 4)
    )
    logits[np.arange(len(patients)), labels] += strength
    return logits, labels, patients


def values(scores: dict) -> dict:
    return {name: score["value"] for name, score in scores.items()}


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_scikit_learn(seed: int) -> None:
    logits, labels, patients = cohort(seed)
    logits[::7] = np.round(logits[::7])  # ties, which AUROC must count half
    probability, decided = metrics.probabilities(logits), logits.argmax(1)
    three = metrics.merge_classes(probability).argmax(1)
    expected = {
        "balanced_accuracy_3": balanced_accuracy_score(np.minimum(labels, 2), three),
        "balanced_accuracy": balanced_accuracy_score(labels, decided),
        "accuracy": accuracy_score(labels, decided),
        "auroc": roc_auc_score(labels > 0, metrics.disease_margin(logits)),
        "macro_f1": f1_score(labels, decided, average="macro"),
        "qwk": cohen_kappa_score(labels, decided, weights="quadratic"),
    }
    found = values(metrics.score(logits, labels, patients, n_boot=10))
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert (
        metrics.confusion_matrix(logits, labels)
        == confusion_matrix(labels, decided, labels=range(4))
    ).all()


def test_auroc_of_margins_is_that_of_probabilities() -> None:
    logits, labels, patients = cohort()
    expected = roc_auc_score(labels > 0, 1 - metrics.probabilities(logits)[:, 0])
    assert metrics.score(logits, labels, patients, n_boot=2)["auroc"]["value"] == pytest.approx(
        expected, abs=1e-6
    )


def test_ece_is_the_binned_gap_between_confidence_and_accuracy() -> None:
    logits, labels, patients = cohort()
    probability = metrics.probabilities(logits)
    confidence, right = probability.max(1), logits.argmax(1) == labels
    expected = 0.0
    for low in np.arange(metrics.ECE_BINS) / metrics.ECE_BINS:
        inside = (confidence > low) & (confidence <= low + 1 / metrics.ECE_BINS)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert metrics.score(logits, labels, patients, n_boot=2)["ece"]["value"] == pytest.approx(
        expected, abs=1e-6
    )


def test_merging_sums_probabilities_so_that_mild_beats_non_only_together() -> None:
    logits = np.log(np.array([[0.4, 0.0001, 0.3, 0.2999]]))
    four, three = metrics.correct(logits, np.array([3]))
    assert not four[0] and three[0]


def test_bootstrap_draws_equal_scores_of_weighted_slices() -> None:
    """Each draw of the weighted sums is what scikit-learn gives where slices have their patient's
    weight."""
    logits, labels, patients = cohort(slices=4)
    sums = metrics.tally(logits, labels, patients)
    weights = metrics.resampling_weights(sums.class_of_patient, 5, 0)
    drawn = metrics.statistic_of(sums)(weights)
    decided, margin = logits.argmax(1), metrics.disease_margin(logits)
    for draw, weight in enumerate(weights):
        of_slice = weight[patients]
        assert drawn["balanced_accuracy"][draw] == pytest.approx(
            balanced_accuracy_score(labels, decided, sample_weight=of_slice)
        )
        assert drawn["auroc"][draw] == pytest.approx(
            roc_auc_score(labels > 0, margin, sample_weight=of_slice)
        )
        assert drawn["qwk"][draw] == pytest.approx(
            cohen_kappa_score(labels, decided, weights="quadratic", sample_weight=of_slice)
        )


def test_each_resample_draws_all_patients_of_a_class_but_one_and_keeps_its_size() -> None:
    patient_class = np.repeat(np.arange(5), (*PATIENTS_OF_CLASS, 1))
    weights = metrics.resampling_weights(patient_class, 200, 1)
    for label, number in enumerate((*PATIENTS_OF_CLASS, 1)):
        of_class = weights[:, patient_class == label]
        drawn = max(number - 1, 1)
        times = of_class * drawn / number
        assert times == pytest.approx(np.round(times)) and times.sum(1) == pytest.approx(drawn)
        assert of_class.sum(1) == pytest.approx(number)
    assert (weights > 1).any()


def test_resampled_variance_is_the_unbiased_one_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(size=5)
    weights = metrics.resampling_weights(np.zeros(5, dtype=np.int64), 100_000, 0)
    assert (weights @ values / 5).var() == pytest.approx(values.var(ddof=1) / 5, rel=0.02)


def test_intervals_over_patients_are_wider_than_over_slices() -> None:
    logits, labels, patients = cohort(slices=16)
    by_patients, by_slices = (
        metrics.score(logits, labels, who)["accuracy"]["ci"]
        for who in (patients, np.arange(len(patients)))
    )
    assert by_patients[1] - by_patients[0] > 2 * (by_slices[1] - by_slices[0])


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    truth = np.mean(
        [
            metrics.score(*cohort(seed, of_class=(60, 60, 60, 60)), n_boot=2)["balanced_accuracy"][
                "value"
            ]
            for seed in range(100, 160)
        ]
    )
    hits = 0
    for seed in range(80):
        low, high = metrics.score(*cohort(seed, of_class=(20, 20, 20, 20)), n_boot=300)[
            "balanced_accuracy"
        ]["ci"]
        hits += low <= truth <= high
    assert 0.86 <= hits / 80 <= 1.0


def simulated_coverage(
    of_class: tuple[int, ...], rate: float, trials: int, correlation: float = 0.3
) -> float:
    """How often the interval of balanced accuracy over three classes holds the true rate.

    Each of a patient's 32 slices is right with a probability of the patient's, beta-distributed
    around the rate; `correlation` is that of two slices of a patient (0.2 to 0.7 in the models of
    the records).
    """
    generator = np.random.default_rng(0)
    concentration = (1 - correlation) / correlation
    patient_class = np.repeat(np.arange(3), of_class)
    size, held = len(patient_class), 0
    for _ in range(trials):
        of_patient = generator.beta(rate * concentration, (1 - rate) * concentration, size)
        right = generator.binomial(32, of_patient)
        counts = np.zeros((size, 3, 2))
        counts[np.arange(size), patient_class] = np.column_stack([right, 32 - right])
        view = metrics.View(counts, np.zeros(3, dtype=np.int64), metrics.merged_share_scores)
        problem = metrics.Problem(
            metrics.view_statistic(view),
            partial(metrics.view_widths, view),
            patient_class,
            32 * size,
        )
        low, high = metrics.intervals(problem, 500, 0)["balanced_accuracy_3"]["ci"]
        held += low <= rate <= high
    return held / trials


@pytest.mark.parametrize("rate", [0.02, 0.5, 0.97])
@pytest.mark.parametrize(
    ("of_class", "least"),
    [((100, 70, 30), 0.93), ((20, 14, 6), 0.91)],
    ids=["200 patients", "40 patients"],
)
def test_simulated_intervals_cover_the_truth(
    of_class: tuple[int, ...], least: float, rate: float
) -> None:
    assert simulated_coverage(of_class, rate, trials=600) >= least


@pytest.mark.parametrize("slices", [1, 32])
@pytest.mark.parametrize(("right", "patients"), [(0, 10), (10, 10), (0, 1), (2, 2), (0, 200)])
def test_where_all_or_no_patients_are_right_the_interval_is_the_exact_one_over_patients(
    right: int, patients: int, slices: int
) -> None:
    patient = np.repeat(np.arange(patients), slices)
    found = metrics.share(patient < right, np.zeros(len(patient)), patient)
    expected = binomtest(right, patients).proportion_ci(0.95, method="exact")
    assert found["ci"] == pytest.approx([expected.low, expected.high], abs=2e-6)


@pytest.mark.parametrize("right", range(0, 21, 4))
def test_with_one_slice_a_patient_the_exact_interval_is_that_of_clopper_and_pearson(
    right: int,
) -> None:
    flags = np.arange(20) < right
    expected = binomtest(right, 20).proportion_ci(0.95, method="exact")
    found = metrics.exact_interval(flags.astype(float), np.ones(20))
    assert found == pytest.approx((expected.low, expected.high))
    low, high = metrics.share(flags, np.zeros(20), np.arange(20))["ci"]
    assert low <= expected.low + 1e-6 and high >= expected.high - 1e-6


def test_an_exact_interval_knows_that_slices_of_a_patient_are_alike() -> None:
    right = np.repeat([1.0, 0.0], [5, 15])
    alike = metrics.exact_interval(32 * right, np.full(20, 32.0))
    assert alike == pytest.approx(metrics.exact_interval(right, np.ones(20)))
    unlike = np.random.default_rng(0).binomial(32, 0.25, 20)
    low, high = metrics.exact_interval(unlike.astype(float), np.full(20, 32.0))
    assert high - low < (alike[1] - alike[0]) / 2


@pytest.mark.parametrize("answer", ["right", "wrong", "Non"])
def test_no_interval_has_width_zero_or_leaves_the_range(answer: str) -> None:
    _, labels, patients = cohort()
    decided = {"right": labels, "wrong": (labels + 1) % 4, "Non": np.zeros_like(labels)}[answer]
    logits = 50.0 * np.eye(4)[decided]
    flags = decided == labels
    of_flags = metrics.score_robust(flags, flags, labels, patients)
    scores = metrics.score(logits, labels, patients)
    scores |= {f"flags {name}": one for name, one in of_flags.items()}
    for name, one in scores.items():
        low, high = one["ci"]
        assert low < high and low <= one["value"] <= high, name
        assert (-1 if name == "qwk" else 0) <= low and high <= 1, name
    if answer == "right":
        assert {
            name: one["value"] for name, one in scores.items() if name != "ece"
        } == pytest.approx(dict.fromkeys(set(scores) - {"ece"}, 1)) and scores["ece"][
            "value"
        ] == pytest.approx(0)


def test_bounds_of_several_classes_are_combined_in_quadrature() -> None:
    _, labels, patients = cohort(of_class=(20, 14, 6, 0))
    found = metrics.score(50.0 * np.eye(4)[labels], labels, patients)
    exact = [1 - binomtest(n, n).proportion_ci(0.95, method="exact").low for n in (20, 14, 6)]
    expected = np.sqrt(np.sum(np.square(exact))) / 3
    assert found["balanced_accuracy"]["ci"] == pytest.approx([1 - expected, 1], abs=2e-6)
    assert found["balanced_accuracy_3"]["ci"] == found["balanced_accuracy"]["ci"]
    pairs = binomtest(20, 20).proportion_ci(0.95, method="exact").low
    assert found["auroc"]["ci"] == pytest.approx([pairs, 1], abs=2e-6)


def test_a_class_without_variance_widens_the_interval_of_the_others() -> None:
    logits, labels, patients = cohort(of_class=(20, 14, 6, 0))
    never = logits.copy()
    never[labels == 2] = 50.0 * np.eye(4)[0]
    found = metrics.score(never, labels, patients)["balanced_accuracy"]
    assert found["ci"][1] - found["value"] > metrics.no_event_bound(6) / 3


def test_means_of_numbers_stay_inside_the_numbers() -> None:
    _, labels, patients = cohort()
    numbers = np.random.default_rng(0).uniform(-0.4, -0.2, len(labels))
    found = metrics.score_robust(numbers, numbers, labels, patients)["accuracy"]
    assert found["value"] == pytest.approx(numbers.mean(), abs=1e-6)
    assert numbers.min() <= found["ci"][0] < found["value"] < found["ci"][1] <= numbers.max()
    one = metrics.score_robust(numbers[:8], numbers[:8], labels[:8], patients[:8])["accuracy"]
    assert numbers[:8].min() <= one["ci"][0] < one["ci"][1] <= numbers[:8].max(), (
        "one patient says little"
    )
    same = np.full(len(labels), 0.25)
    found = metrics.score_robust(same, same, labels, patients)["accuracy"]
    assert found == {"value": 0.25, "ci": [0.25, 0.25]}


def test_an_answer_that_is_known_without_sampling_has_exact_scores() -> None:
    logits, labels, patients = cohort()
    sampled = metrics.score(logits, labels, patients)
    for name, one in metrics.score(logits, labels, patients, n_boot=0).items():
        assert one == {"value": sampled[name]["value"], "ci": None, "exact": True}
    by_patient = metrics.score_patients(logits, labels, patients, n_boot=0)
    assert all(one["exact"] for one in by_patient.values())
    only = metrics.score(logits[labels == 0], labels[labels == 0], patients[labels == 0], n_boot=0)
    assert only["auroc"] == {"value": None, "ci": None, "n": int((labels == 0).sum())}


def test_the_same_seed_gives_the_same_intervals() -> None:
    logits, labels, patients = cohort()
    assert metrics.score(logits, labels, patients) == metrics.score(logits, labels, patients)
    assert metrics.score(logits, labels, patients) != metrics.score(
        logits, labels, patients, seed=1
    )


def test_constant_answer_scores_chance() -> None:
    logits, labels, patients = cohort()
    found = values(metrics.score(np.tile([0.0, -9, -9, -9], (len(labels), 1)), labels, patients))
    assert found["balanced_accuracy"] == 0.25 and found["balanced_accuracy_3"] == pytest.approx(
        1 / 3, abs=1e-6
    )
    assert found["auroc"] == 0.5 and found["qwk"] == 0


def test_absent_classes_are_left_out_and_undefined_scores_are_null() -> None:
    logits, labels, patients = cohort(of_class=(5, 5, 0, 0))
    found = metrics.score(logits, labels, patients)
    assert found["balanced_accuracy"]["value"] == pytest.approx(
        np.mean([(logits.argmax(1) == label)[labels == label].mean() for label in (0, 1)]), abs=1e-6
    )
    only = metrics.score(logits[labels == 0], labels[labels == 0], patients[labels == 0])
    assert only["auroc"] == {"value": None, "ci": None, "n": int((labels == 0).sum())}
    nothing = metrics.score(np.full((3, 4), np.nan), np.zeros(3), np.arange(3))
    assert {score["value"] for score in nothing.values()} == {None}
    json.dumps([found, only, nothing], allow_nan=False)


def test_nan_rows_are_outside_the_declared_set() -> None:
    logits, labels, patients = cohort()
    kept = np.arange(len(labels)) % 3 > 0
    holed = np.where(kept[:, None], logits, np.nan)
    assert metrics.score(holed, labels, patients) == metrics.score(
        logits[kept], labels[kept], patients[kept]
    )


def test_patient_scores_use_the_mean_slice_probability() -> None:
    logits, labels, patients = cohort()
    mean = np.array(
        [
            metrics.probabilities(logits[patients == patient]).mean(0)
            for patient in np.unique(patients)
        ]
    )
    class_of_patient = np.array([labels[patients == patient][0] for patient in np.unique(patients)])
    found = values(metrics.score_patients(logits, labels, patients, n_boot=2))
    assert found["accuracy"] == pytest.approx((mean.argmax(1) == class_of_patient).mean(), abs=1e-6)
    assert found["auroc"] == pytest.approx(
        roc_auc_score(class_of_patient > 0, 1 - mean[:, 0]), abs=1e-6
    )


def test_seeds_are_not_averaged_into_an_ensemble() -> None:
    logits, labels, patients = cohort()
    other, _, _ = cohort(seed=5)
    pooled = [
        np.concatenate(pair) for pair in ((logits, other), (labels, labels), (patients, patients))
    ]
    seeds = np.repeat([0, 1], len(labels))
    accuracy = [
        metrics.score_patients(x, labels, patients, n_boot=2)["accuracy"]["value"]
        for x in (logits, other)
    ]
    assert metrics.score_patients(*pooled, seeds=seeds, n_boot=2)["accuracy"][
        "value"
    ] == pytest.approx(np.mean(accuracy), abs=1e-5)


def test_robust_scores_are_means_of_class_shares() -> None:
    logits, labels, patients = cohort()
    four, three = metrics.correct(logits, labels)
    robust, clean = (
        metrics.score_robust(four, three, labels, patients),
        metrics.score(logits, labels, patients),
    )
    for name in ("balanced_accuracy_3", "balanced_accuracy", "accuracy"):
        assert robust[name] == clean[name]
    shares = metrics.share_by_class(four, labels, patients)
    assert np.mean([share["value"] for share in shares]) == pytest.approx(
        robust["balanced_accuracy"]["value"], abs=1e-5
    )
    assert [share["n_people"] for share in shares] == list(PATIENTS_OF_CLASS)


def test_paired_difference_is_tighter_than_two_separate_intervals() -> None:
    logits, labels, patients = cohort()
    better = logits + 0.3 * np.eye(4)[labels]
    paired = metrics.paired_difference(better, logits, labels, patients)["accuracy"]
    alone = [metrics.score(x, labels, patients)["accuracy"] for x in (better, logits)]
    assert paired["value"] == pytest.approx(alone[0]["value"] - alone[1]["value"], abs=1e-6)
    assert paired["ci"][1] - paired["ci"][0] < min(
        score["ci"][1] - score["ci"][0] for score in alone
    )


def test_equal_answers_differ_by_no_more_than_so_many_patients_can_tell() -> None:
    logits, labels, patients = cohort(of_class=(20, 14, 6, 0))
    found = metrics.paired_difference(logits, logits, labels, patients)
    for name, one in found.items():
        assert one["value"] == 0 and one["p"] == 1, name
        assert one["ci"][0] < 0 < one["ci"][1], name
    bounds = [metrics.no_event_bound(n) for n in (20, 14, 6)]
    expected = np.sqrt(np.sum(np.square(bounds))) / 3
    assert found["balanced_accuracy"]["ci"] == pytest.approx([-expected, expected], abs=2e-6)
    assert found["auroc"]["ci"] == pytest.approx([-bounds[0], bounds[0]], abs=2e-6)


def test_a_difference_of_all_against_none_has_one_sided_bounds() -> None:
    _, labels, patients = cohort(of_class=(20, 0, 0, 0))
    every, none = np.ones(len(labels), bool), np.zeros(len(labels), bool)
    found = metrics.paired_robust_difference((every, every), (none, none), labels, patients)[
        "accuracy"
    ]
    assert (
        found["value"] == 1
        and found["ci"][1] == 1
        and found["p"] == pytest.approx(2 / 2001, abs=1e-6)
    )
    assert (
        1 - 2 * metrics.no_event_bound(20) < found["ci"][0] < 1 - metrics.no_event_bound(20) + 2e-6
    )


def test_p_values_agree_with_the_intervals_and_turn_with_the_sign() -> None:
    logits, labels, patients = cohort(slices=4)
    decided = []
    for gain in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8):
        other = (
            logits
            + gain * np.eye(4)[labels]
            + 0.3 * np.random.default_rng(1).normal(size=logits.shape)
        )
        forward = metrics.paired_difference(other, logits, labels, patients)
        backward = metrics.paired_difference(logits, other, labels, patients)
        for name, one in forward.items():
            assert 0 < one["p"] <= 1 and one["p"] == pytest.approx(backward[name]["p"], abs=2e-6)
            if one["ci"][0] <= 0 <= one["ci"][1]:
                assert one["p"] >= 0.049, (gain, name)
        decided.append(forward["accuracy"]["p"])
    assert decided[0] > 0.3 and decided[-1] < 0.01


def test_p_values_are_rare_where_there_is_no_difference() -> None:
    generator = np.random.default_rng(0)
    labels, patients = np.repeat(np.arange(40) % 2, 8), np.repeat(np.arange(40), 8)
    below = 0
    for _ in range(200):
        first, second = (generator.random(320) < generator.random(40)[patients] for _ in range(2))
        below += (
            metrics.paired_robust_difference(
                (first, first), (second, second), labels, patients, n_boot=400
            )["accuracy"]["p"]
            <= 0.05
        )
    assert 2 <= below <= 20


def test_holm_adjusts_as_in_a_known_example_whatever_the_order() -> None:
    p_values = np.array([0.01, 0.04, 0.03, 0.005])
    assert metrics.holm(p_values) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    for order in itertools.permutations(range(4)):
        assert metrics.holm(p_values[list(order)]) == pytest.approx(
            metrics.holm(p_values)[list(order)]
        )
    assert metrics.holm([0.5, 0.6]) == pytest.approx([1, 1]) and metrics.holm(
        [0.2]
    ) == pytest.approx([0.2])
    assert metrics.holm([0.02, 0.02]) == pytest.approx([0.04, 0.04]) and len(metrics.holm([])) == 0
    for wrong in ([1.2], [-0.1], [np.nan]):
        with pytest.raises(ValueError, match="between 0 and 1"):
            metrics.holm(wrong)


def test_paired_robust_difference_is_that_of_the_scores() -> None:
    logits, labels, patients = cohort()
    flags = [metrics.correct(x, labels) for x in (logits + np.eye(4)[labels], logits)]
    difference = metrics.paired_robust_difference(*flags, labels, patients)["balanced_accuracy_3"]
    one, two = (
        metrics.score_robust(*pair, labels, patients)["balanced_accuracy_3"]["value"]
        for pair in flags
    )
    assert difference["value"] == pytest.approx(one - two, abs=2e-6) and difference["ci"][0] > 0


def test_a_difference_of_other_images_of_the_same_patients_resamples_these_patients() -> None:
    logits, labels, patients = cohort()
    odd = np.arange(len(patients)) % 2 == 1
    sides = [
        (*metrics.correct(logits[rows], labels[rows]), labels[rows], patients[rows])
        for rows in (odd, ~odd)
    ]
    difference = metrics.robust_difference(*sides)["balanced_accuracy_3"]
    one, two = (metrics.score_robust(*side)["balanced_accuracy_3"]["value"] for side in sides)
    assert (
        difference["value"] == pytest.approx(one - two, abs=2e-6)
        and difference["ci"][0] < difference["value"] < difference["ci"][1]
    )
    gone = sides[1][3] != patients[0]
    with pytest.raises(ValueError, match="same ones"):
        metrics.robust_difference(sides[0], tuple(column[gone] for column in sides[1]))


def test_kept_shares_count_only_what_was_there_before() -> None:
    labels, patients = np.repeat([0, 1], 40), np.repeat(np.arange(20), 4)
    had, had_too = np.arange(80) % 2 == 0, np.ones(80, bool)
    shares = metrics.kept_shares(
        (had, np.arange(80) % 4 == 0), (had_too, np.arange(80) % 4 != 0), labels, patients
    )
    assert [shares[name]["value"] for name in ("first", "second", "difference")] == [
        0.5,
        0.75,
        -0.25,
    ]
    assert (
        metrics.kept_shares((had, ~had), (had_too, had_too), labels, patients)["first"]["value"]
        == 0
    ), "what comes up later is not kept"
    assert (
        metrics.kept_shares((~had_too, had), (had_too, had_too), labels, patients)["difference"][
            "value"
        ]
        is None
    )


def test_recalls_are_those_of_each_class_by_slice_and_by_patient() -> None:
    logits, labels, patients = cohort()
    logits[::9] = np.nan
    rows = metrics.scored(logits)
    _, three = metrics.correct(logits, labels)
    found = metrics.recalls(logits, labels, patients)
    for index, one in enumerate(found):
        own = rows & (metrics.THREE[labels] == index)
        assert (
            one["value"] == pytest.approx(three[own].mean(), abs=1e-6)
            and one["n_slices"] == own.sum()
        )
        assert one["ci"][0] < one["value"] < one["ci"][1]
    assert [one["n_people"] for one in found] == [20, 14, 8]
    balanced = metrics.score(logits, labels, patients)["balanced_accuracy_3"]["value"]
    assert np.mean([one["value"] for one in found]) == pytest.approx(balanced, abs=2e-6)
    four = metrics.recalls(logits, labels, patients, np.arange(4))
    right, _ = metrics.correct(logits, labels)
    assert four == metrics.share_by_class(right[rows], labels[rows], patients[rows])
    by_patient = metrics.recalls(*metrics.by_patient(logits, labels, patients))
    assert [one["n_slices"] for one in by_patient] == [20, 14, 8]
    absent = metrics.recalls(logits[labels == 0], labels[labels == 0], patients[labels == 0])[1]
    assert absent["value"] is None and absent["n_people"] == 0


def test_shares_of_two_decisions_have_no_interval_of_width_zero() -> None:
    labels, patients = np.repeat([0, 1], 40), np.repeat(np.arange(20), 4)
    every, none = np.ones(80, bool), np.zeros(80, bool)
    kept = metrics.kept_shares((every, every), (every, every), labels, patients)
    bound = np.sqrt(2) * metrics.no_event_bound(10) / 2
    assert kept["first"]["ci"] == kept["second"]["ci"] == pytest.approx([1 - bound, 1], abs=2e-6)
    assert kept["difference"]["ci"] == pytest.approx([-bound, bound], abs=2e-6)
    assert metrics.share(none, labels, patients)["ci"] == pytest.approx([0, bound], abs=2e-6)
    alike = np.arange(80) % 8 < 4
    pair = metrics.pair_scores(none, alike, alike, labels, patients)
    assert pair["error_correlation"]["value"] == 1 and -1 <= pair["error_correlation"]["ci"][0] < 1
    assert pair["disagreement"]["value"] == 0 and pair["disagreement"]["ci"][1] > 0
    sure = metrics.calibration_curve(50.0 * np.eye(4)[labels], labels, patients)
    assert [one["accuracy"] for one in sure] == [1.0] and sure[0]["ci"][0] < 1 == sure[0]["ci"][1]


def test_half_precision_keeps_every_decision() -> None:
    logits = np.random.default_rng(0).normal(size=(5000, 4)).astype(np.float32)
    logits[:1000, 1] = logits[:1000, 0] + np.float32(1e-6) * np.random.default_rng(1).choice(
        [-1, 1], 1000
    )
    logits[1000:1010] = 300 * logits[1000:1010] ** 3
    half = metrics.to_half(np.vstack([logits, np.full((2, 4), np.nan), [[0, 0, 0, 0]]]))
    assert (
        half.dtype == np.float16
        and np.isnan(half[5000:5002]).all()
        and np.isfinite(half[:5000]).all()
    )
    assert (half[:5000].argmax(1) == logits.argmax(1)).all() and half[5002].argmax() == 0
    assert (half[:5000].max(1) == 0).all() and ((half[:5000] == 0).sum(1) == 1).all()
    once = half[:5000].astype(np.float32)
    assert (metrics.to_half(once) == half[:5000]).all()


def test_temperature_minimizes_cross_entropy_and_keeps_decisions() -> None:
    generator = np.random.default_rng(0)
    logits = 2 * generator.normal(size=(4000, 4))
    labels = np.array([generator.choice(4, p=row) for row in metrics.probabilities(logits)])
    temperature = metrics.fit_temperature(3.0 * logits, labels)
    assert temperature == pytest.approx(3.0, rel=0.08)
    best = log_loss(labels, metrics.probabilities(3 * logits / temperature))
    assert all(
        best <= log_loss(labels, metrics.probabilities(3 * logits / other))
        for other in (0.97 * temperature, 1.03 * temperature)
    )
    separable = 9.0 * np.eye(4)[labels]
    temperature = metrics.fit_temperature(separable, labels)
    assert (
        0.05 <= temperature < 1
        and log_loss(labels, metrics.probabilities(separable / temperature)) < 1e-12
    )


def test_calibration_curve_accounts_for_every_slice() -> None:
    logits, labels, patients = cohort()
    curve = metrics.calibration_curve(logits, labels, patients)
    assert sum(b["n_slices"] for b in curve) == len(labels)
    assert sum(b["n_slices"] * b["accuracy"] for b in curve) == pytest.approx(
        (logits.argmax(1) == labels).sum()
    )
    assert all(b["ci"][0] <= b["accuracy"] <= b["ci"][1] for b in curve)


def test_whole_cohort_is_scored_in_well_under_two_seconds() -> None:
    logits, labels, patients = cohort(slices=32, of_class=(100, 70, 28, 2))
    start = time.process_time()
    metrics.score(logits, labels, patients, n_boot=2000, seed=99)  # weights that no test asked for
    assert logits.shape == (6400, 4) and time.process_time() - start < 2


# -- abstention and conformal sets -----------------------------------------------------------------


def patients_with_confidence(n: int = 400, seed: int = 0):
    """(logits, labels, patients): one row a patient over three classes; the surer the answer, the
    oftener it is right."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    logits = generator.normal(size=(n, 4)) + 1.5 * np.eye(4)[labels]
    logits[:, 3] = -9
    return logits, labels, np.arange(n)


def test_risk_falls_with_coverage_and_ends_at_the_whole_error() -> None:
    logits, labels, patients = patients_with_confidence()
    curve = metrics.risk_coverage(logits, labels, patients, n_boot=200)
    whole = (logits.argmax(1) != labels).mean()
    assert [point["coverage"] for point in curve] == pytest.approx(np.linspace(0.1, 1, 10))
    assert curve[-1]["risk"] == pytest.approx(whole, abs=1e-6) and curve[-1]["n"] == len(labels)
    assert curve[0]["risk"] < whole / 2 and all(
        point["ci"][0] <= point["risk"] <= point["ci"][1] for point in curve
    )


def test_the_threshold_of_clean_scans_is_kept_under_attack() -> None:
    logits, labels, patients = patients_with_confidence()
    probability = metrics.merge_classes(metrics.probabilities(logits))
    half = np.median(probability.max(axis=1))
    unsure = metrics.selective_risk(
        np.ones(len(labels), bool), np.full(len(labels), 0.34), half, labels, patients
    )
    assert unsure["risk"] is None and unsure["answered"] == 0
    sure = metrics.selective_risk(
        np.ones(len(labels), bool), np.full(len(labels), 0.99), half, labels, patients, n_boot=100
    )
    assert sure["risk"] == 1 and sure["answered"] == 1


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_conformal_sets_cover_new_patients_as_promised_and_no_more(alpha: float) -> None:
    logits, labels, _ = patients_with_confidence(4000)
    threshold = metrics.conformal_threshold(logits[:2000], labels[:2000], alpha)
    sets = metrics.conformal_sets(logits[2000:], threshold)
    coverage = sets[np.arange(2000), labels[2000:]].mean()
    assert coverage == pytest.approx(1 - alpha, abs=0.03)
    assert (
        coverage <= sets.sum(axis=1).mean() < 2
    )  # below 1 where models err more rarely than alpha: some sets are empty


def test_too_few_patients_to_calibrate_on_give_every_class() -> None:
    logits, labels, _ = patients_with_confidence(5)
    assert metrics.conformal_threshold(logits, labels, 0.1) == 1.0
    assert metrics.conformal_sets(logits, 1.0).all()


def test_no_patient_is_judged_by_a_threshold_that_it_took_part_in() -> None:
    logits, labels, _ = patients_with_confidence(200)
    fold = np.arange(200) // 40
    thresholds = metrics.cross_conformal(logits, labels, fold, 0.1)
    for row in range(0, 200, 17):
        moved = logits.copy()
        moved[row] = [-30, -30, -30, -30]
        moved[row, (labels[row] + 1) % 3] = 30  # as wrong as can be
        again = metrics.cross_conformal(moved, labels, fold, 0.1)
        assert again[row] == thresholds[row]
        assert np.array_equal(again[fold != fold[row]], thresholds[fold != fold[row]])
    covered = metrics.conformal_sets(logits, thresholds)[np.arange(200), labels].mean()
    assert 0.84 <= covered <= 0.99


def test_pair_scores_and_shares_are_those_of_their_formulas() -> None:
    generator = np.random.default_rng(3)
    labels, patients = np.repeat(np.arange(60) % 4, 5), np.repeat(np.arange(60), 5)
    a, b = generator.random(300) < 0.4, generator.random(300) < 0.3
    found = metrics.pair_scores(a ^ b, a, b, labels, patients, n_boot=300)
    assert found["disagreement"]["value"] == pytest.approx((a ^ b).mean(), abs=1e-6)
    assert found["error_correlation"]["value"] == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-6)
    never = metrics.pair_scores(a, a, np.zeros(300, bool), labels, patients, n_boot=50)
    assert never["error_correlation"]["value"] is None, "a model without errors has no correlation"
    assert metrics.share(a, labels, patients, n_boot=50)["value"] == pytest.approx(
        a.mean(), abs=1e-6
    )
