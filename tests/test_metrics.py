"""Scores equal scikit-learn's, intervals resample people, and both stay valid where data are extreme."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from sklearn.metrics import (accuracy_score, balanced_accuracy_score, cohen_kappa_score, confusion_matrix, f1_score,
                             log_loss, roc_auc_score)

from utils import metrics

PEOPLE_OF_CLASS = (20, 14, 6, 2)


def cohort(seed: int = 0, slices: int = 8, strength: float = 1.0, of_class=PEOPLE_OF_CLASS):
    """Logits, labels and people of a cohort whose slices share most of their error with their person."""
    generator = np.random.default_rng(seed)
    person_class = np.repeat(np.arange(4), of_class)
    people = np.repeat(np.arange(len(person_class)), slices)
    labels = person_class[people]
    logits = generator.normal(size=(len(person_class), 4))[people] + 0.4 * generator.normal(size=(len(people), 4))
    logits[np.arange(len(people)), labels] += strength
    return logits, labels, people


def values(scores: dict) -> dict:
    return {name: score["value"] for name, score in scores.items()}


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_scikit_learn(seed: int) -> None:
    logits, labels, people = cohort(seed)
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
    found = values(metrics.score(logits, labels, people, n_boot=10))
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert (metrics.confusion_matrix(logits, labels) == confusion_matrix(labels, decided, labels=range(4))).all()


def test_auroc_of_margins_is_that_of_probabilities() -> None:
    logits, labels, people = cohort()
    expected = roc_auc_score(labels > 0, 1 - metrics.probabilities(logits)[:, 0])
    assert metrics.score(logits, labels, people, n_boot=2)["auroc"]["value"] == pytest.approx(expected, abs=1e-6)


def test_ece_is_the_binned_gap_between_confidence_and_accuracy() -> None:
    logits, labels, people = cohort()
    probability = metrics.probabilities(logits)
    confidence, right = probability.max(1), logits.argmax(1) == labels
    expected = 0.0
    for low in np.arange(metrics.ECE_BINS) / metrics.ECE_BINS:
        inside = (confidence > low) & (confidence <= low + 1 / metrics.ECE_BINS)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert metrics.score(logits, labels, people, n_boot=2)["ece"]["value"] == pytest.approx(expected, abs=1e-6)


def test_merging_sums_probabilities_so_that_mild_beats_non_only_together() -> None:
    logits = np.log(np.array([[0.4, 0.0001, 0.3, 0.2999]]))
    four, three = metrics.correct(logits, np.array([3]))
    assert not four[0] and three[0]


def test_bootstrap_draws_equal_scores_of_resampled_people() -> None:
    """The weighted sums give, draw by draw, what scikit-learn gives on the people really repeated."""
    logits, labels, people = cohort(slices=4)
    sums = metrics.tally(logits, labels, people)
    weights = metrics._weights(sums.person_class.tobytes(), 5, 0)
    drawn = metrics._statistic(sums)(weights)
    for draw, weight in enumerate(weights.astype(int)):
        rows = np.concatenate([np.flatnonzero(people == person)
                               for person in np.repeat(np.arange(len(weight)), weight)])
        decided = logits[rows].argmax(1)
        assert drawn["balanced_accuracy"][draw] == pytest.approx(balanced_accuracy_score(labels[rows], decided))
        assert drawn["auroc"][draw] == pytest.approx(roc_auc_score(labels[rows] > 0,
                                                                   metrics.disease_margin(logits[rows])))
        assert drawn["qwk"][draw] == pytest.approx(cohen_kappa_score(labels[rows], decided, weights="quadratic"))


def test_each_resample_keeps_the_number_of_people_of_every_class() -> None:
    person_class = np.repeat(np.arange(4), PEOPLE_OF_CLASS)
    weights = metrics._weights(person_class.tobytes(), 200, 1)
    for label, number in enumerate(PEOPLE_OF_CLASS):
        assert (weights[:, person_class == label].sum(1) == number).all()
    assert (weights > 1).any()


def test_intervals_over_people_are_wider_than_over_slices() -> None:
    logits, labels, people = cohort(slices=16)
    by_people, by_slices = (metrics.score(logits, labels, who)["accuracy"]["ci"]
                            for who in (people, np.arange(len(people))))
    assert by_people[1] - by_people[0] > 2 * (by_slices[1] - by_slices[0])


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    truth = np.mean([metrics.score(*cohort(seed, of_class=(60, 60, 60, 60)), n_boot=2)["balanced_accuracy"]["value"]
                     for seed in range(100, 160)])
    hits = 0
    for seed in range(80):
        low, high = metrics.score(*cohort(seed, of_class=(20, 20, 20, 20)), n_boot=300)["balanced_accuracy"]["ci"]
        hits += low <= truth <= high
    assert 0.86 <= hits / 80 <= 1.0


def test_the_same_seed_gives_the_same_intervals() -> None:
    logits, labels, people = cohort()
    assert metrics.score(logits, labels, people) == metrics.score(logits, labels, people)
    assert metrics.score(logits, labels, people) != metrics.score(logits, labels, people, seed=1)


def test_all_correct_gives_a_valid_interval() -> None:
    _, labels, people = cohort()
    for name, score in metrics.score(50.0 * np.eye(4)[labels], labels, people).items():
        assert score["value"] == pytest.approx(0 if name == "ece" else 1) and score["ci"] == [score["value"]] * 2


def test_constant_answer_scores_chance() -> None:
    logits, labels, people = cohort()
    found = values(metrics.score(np.tile([0.0, -9, -9, -9], (len(labels), 1)), labels, people))
    assert found["balanced_accuracy"] == 0.25 and found["balanced_accuracy_3"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["auroc"] == 0.5 and found["qwk"] == 0


def test_absent_classes_are_left_out_and_undefined_scores_are_null() -> None:
    logits, labels, people = cohort(of_class=(5, 5, 0, 0))
    found = metrics.score(logits, labels, people)
    assert found["balanced_accuracy"]["value"] == pytest.approx(
        np.mean([(logits.argmax(1) == label)[labels == label].mean() for label in (0, 1)]), abs=1e-6)
    only = metrics.score(logits[labels == 0], labels[labels == 0], people[labels == 0])
    assert only["auroc"] == {"value": None, "ci": None, "n": int((labels == 0).sum())}
    nothing = metrics.score(np.full((3, 4), np.nan), np.zeros(3), np.arange(3))
    assert {score["value"] for score in nothing.values()} == {None}
    json.dumps([found, only, nothing], allow_nan=False)


def test_nan_rows_are_outside_the_declared_set() -> None:
    logits, labels, people = cohort()
    kept = np.arange(len(labels)) % 3 > 0
    holed = np.where(kept[:, None], logits, np.nan)
    assert metrics.score(holed, labels, people) == metrics.score(logits[kept], labels[kept], people[kept])


def test_person_scores_use_the_mean_slice_probability() -> None:
    logits, labels, people = cohort()
    mean = np.array([metrics.probabilities(logits[people == person]).mean(0) for person in np.unique(people)])
    person_class = np.array([labels[people == person][0] for person in np.unique(people)])
    found = values(metrics.score_people(logits, labels, people, n_boot=2))
    assert found["accuracy"] == pytest.approx((mean.argmax(1) == person_class).mean(), abs=1e-6)
    assert found["auroc"] == pytest.approx(roc_auc_score(person_class > 0, 1 - mean[:, 0]), abs=1e-6)


def test_seeds_are_not_averaged_into_an_ensemble() -> None:
    logits, labels, people = cohort()
    other, _, _ = cohort(seed=5)
    pooled = [np.concatenate(pair) for pair in ((logits, other), (labels, labels), (people, people))]
    seeds = np.repeat([0, 1], len(labels))
    accuracy = [metrics.score_people(x, labels, people, n_boot=2)["accuracy"]["value"] for x in (logits, other)]
    assert metrics.score_people(*pooled, seeds=seeds, n_boot=2)["accuracy"]["value"] == pytest.approx(np.mean(accuracy),
                                                                                                      abs=1e-5)


def test_standing_scores_are_means_of_class_shares() -> None:
    logits, labels, people = cohort()
    four, three = metrics.correct(logits, labels)
    standing, clean = metrics.score_standing(four, three, labels, people), metrics.score(logits, labels, people)
    for name in ("balanced_accuracy_3", "balanced_accuracy", "accuracy"):
        assert standing[name] == clean[name]
    shares = metrics.share_by_class(four, labels, people)
    assert np.mean([share["value"] for share in shares]) == pytest.approx(standing["balanced_accuracy"]["value"],
                                                                          abs=1e-5)
    assert [share["n_people"] for share in shares] == list(PEOPLE_OF_CLASS)


def test_paired_difference_is_tighter_than_two_separate_intervals() -> None:
    logits, labels, people = cohort()
    better = logits + 0.3 * np.eye(4)[labels]
    paired = metrics.paired_difference(better, logits, labels, people)["accuracy"]
    alone = [metrics.score(x, labels, people)["accuracy"] for x in (better, logits)]
    assert paired["value"] == pytest.approx(alone[0]["value"] - alone[1]["value"], abs=1e-6)
    assert paired["ci"][1] - paired["ci"][0] < min(score["ci"][1] - score["ci"][0] for score in alone)
    assert metrics.paired_difference(logits, logits, labels, people)["auroc"] == {"value": 0.0, "ci": [0.0, 0.0]}


def test_paired_standing_difference_is_that_of_the_scores() -> None:
    logits, labels, people = cohort()
    flags = [metrics.correct(x, labels) for x in (logits + np.eye(4)[labels], logits)]
    difference = metrics.paired_standing_difference(*flags, labels, people)["balanced_accuracy_3"]
    one, two = (metrics.score_standing(*pair, labels, people)["balanced_accuracy_3"]["value"] for pair in flags)
    assert difference["value"] == pytest.approx(one - two, abs=2e-6) and difference["ci"][0] > 0


def test_a_difference_of_other_images_of_the_same_people_resamples_these_people() -> None:
    logits, labels, people = cohort()
    odd = np.arange(len(people)) % 2 == 1
    sides = [(*metrics.correct(logits[rows], labels[rows]), labels[rows], people[rows]) for rows in (odd, ~odd)]
    difference = metrics.standing_difference(*sides)["balanced_accuracy_3"]
    one, two = (metrics.score_standing(*side)["balanced_accuracy_3"]["value"] for side in sides)
    assert difference["value"] == pytest.approx(one - two, abs=2e-6) and difference["ci"][0] < difference["value"] < difference["ci"][1]
    gone = sides[1][3] != people[0]
    with pytest.raises(ValueError, match="same ones"):
        metrics.standing_difference(sides[0], tuple(column[gone] for column in sides[1]))


def test_kept_shares_count_only_what_was_there_before() -> None:
    labels, people = np.repeat([0, 1], 40), np.repeat(np.arange(20), 4)
    had, had_too = np.arange(80) % 2 == 0, np.ones(80, bool)
    shares = metrics.kept_shares((had, np.arange(80) % 4 == 0), (had_too, np.arange(80) % 4 != 0), labels, people)
    assert [shares[name]["value"] for name in ("first", "second", "difference")] == [0.5, 0.75, -0.25]
    assert metrics.kept_shares((had, ~had), (had_too, had_too), labels, people)["first"]["value"] == 0, "what comes up later is not kept"
    assert metrics.kept_shares((~had_too, had), (had_too, had_too), labels, people)["difference"]["value"] is None


def test_half_precision_keeps_every_decision() -> None:
    logits = np.random.default_rng(0).normal(size=(5000, 4)).astype(np.float32)
    logits[:1000, 1] = logits[:1000, 0] + np.float32(1e-6) * np.random.default_rng(1).choice([-1, 1], 1000)
    logits[1000:1010] = 300 * logits[1000:1010] ** 3
    half = metrics.to_half(np.vstack([logits, np.full((2, 4), np.nan), [[0, 0, 0, 0]]]))
    assert half.dtype == np.float16 and np.isnan(half[5000:5002]).all() and np.isfinite(half[:5000]).all()
    assert (half[:5000].argmax(1) == logits.argmax(1)).all() and half[5002].argmax() == 0
    assert (half[:5000].max(1) == 0).all() and ((half[:5000] == 0).sum(1) == 1).all()
    once = half[:5000].astype(np.float32)
    assert (metrics.to_half(once) == half[:5000]).all()


def test_temperature_minimises_cross_entropy_and_keeps_decisions() -> None:
    generator = np.random.default_rng(0)
    logits = 2 * generator.normal(size=(4000, 4))
    labels = np.array([generator.choice(4, p=row) for row in metrics.probabilities(logits)])
    temperature = metrics.fit_temperature(3.0 * logits, labels)
    assert temperature == pytest.approx(3.0, rel=0.08)
    best = log_loss(labels, metrics.probabilities(3 * logits / temperature))
    assert all(best <= log_loss(labels, metrics.probabilities(3 * logits / other))
               for other in (0.97 * temperature, 1.03 * temperature))
    separable = 9.0 * np.eye(4)[labels]
    temperature = metrics.fit_temperature(separable, labels)
    assert 0.05 <= temperature < 1 and log_loss(labels, metrics.probabilities(separable / temperature)) < 1e-12


def test_calibration_curve_accounts_for_every_slice() -> None:
    logits, labels, people = cohort()
    curve = metrics.calibration_curve(logits, labels, people)
    assert sum(b["n_slices"] for b in curve) == len(labels)
    assert sum(b["n_slices"] * b["accuracy"] for b in curve) == pytest.approx((logits.argmax(1) == labels).sum())
    assert all(b["ci"][0] <= b["accuracy"] <= b["ci"][1] for b in curve)


def test_whole_cohort_is_scored_in_well_under_two_seconds() -> None:
    logits, labels, people = cohort(slices=32, of_class=(100, 70, 28, 2))
    metrics._weights.cache_clear()
    start = time.process_time()
    metrics.score(logits, labels, people, n_boot=2000)
    assert logits.shape == (6400, 4) and time.process_time() - start < 2


# ------------------------------------------------------------------------------------- abstention and conformal sets


def people_with_confidence(n: int = 400, seed: int = 0):
    """(logits, labels, people): one row a person over three classes; the surer the answer, the oftener it is right."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    logits = generator.normal(size=(n, 4)) + 1.5 * np.eye(4)[labels]
    logits[:, 3] = -9
    return logits, labels, np.arange(n)


def test_risk_falls_with_coverage_and_ends_at_the_whole_error():
    logits, labels, people = people_with_confidence()
    curve = metrics.risk_coverage(logits, labels, people, n_boot=200)
    whole = (logits.argmax(1) != labels).mean()
    assert [point["coverage"] for point in curve] == pytest.approx(np.linspace(0.1, 1, 10))
    assert curve[-1]["risk"] == pytest.approx(whole, abs=1e-6) and curve[-1]["n"] == len(labels)
    assert curve[0]["risk"] < whole / 2 and all(point["ci"][0] <= point["risk"] <= point["ci"][1] for point in curve)


def test_the_threshold_of_clean_studies_is_kept_under_attack():
    logits, labels, people = people_with_confidence()
    probability = metrics.merge_classes(metrics.probabilities(logits))
    half = np.median(probability.max(axis=1))
    unsure = metrics.selective_risk(np.ones(len(labels), bool), np.full(len(labels), 0.34), half, labels, people)
    assert unsure["risk"] is None and unsure["answered"] == 0
    sure = metrics.selective_risk(np.ones(len(labels), bool), np.full(len(labels), 0.99), half, labels, people, n_boot=100)
    assert sure["risk"] == 1 and sure["answered"] == 1


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_conformal_sets_cover_new_people_as_promised_and_no_more(alpha):
    logits, labels, _ = people_with_confidence(4000)
    threshold = metrics.conformal_threshold(logits[:2000], labels[:2000], alpha)
    sets = metrics.conformal_sets(logits[2000:], threshold)
    coverage = sets[np.arange(2000), labels[2000:]].mean()
    assert coverage == pytest.approx(1 - alpha, abs=0.03)
    assert coverage <= sets.sum(axis=1).mean() < 2  # below 1 where models err more rarely than alpha: some sets are empty


def test_too_few_people_to_calibrate_on_give_every_class():
    logits, labels, _ = people_with_confidence(5)
    assert metrics.conformal_threshold(logits, labels, 0.1) == 1.0
    assert metrics.conformal_sets(logits, 1.0).all()


def test_nobody_is_judged_by_a_threshold_that_they_took_part_in():
    logits, labels, _ = people_with_confidence(200)
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


def test_pair_scores_and_shares_are_those_of_their_formulas():
    generator = np.random.default_rng(3)
    labels, people = np.repeat(np.arange(60) % 4, 5), np.repeat(np.arange(60), 5)
    a, b = generator.random(300) < 0.4, generator.random(300) < 0.3
    found = metrics.pair_scores(a ^ b, a, b, labels, people, n_boot=300)
    assert found["disagreement"]["value"] == pytest.approx((a ^ b).mean(), abs=1e-6)
    assert found["error_correlation"]["value"] == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-6)
    never = metrics.pair_scores(a, a, np.zeros(300, bool), labels, people, n_boot=50)
    assert never["error_correlation"]["value"] is None, "a model without errors has no correlation"
    assert metrics.share(a, labels, people, n_boot=50)["value"] == pytest.approx(a.mean(), abs=1e-6)
