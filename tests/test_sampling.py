"""sampling: small samples cover classes and slices evenly, without any randomness."""

import numpy as np
import pytest

from utils.sampling import bit_reversed_order, classes_in_proportion, classes_in_turn


def test_bit_reversal_is_van_der_corputs_order():
    assert bit_reversed_order(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    assert bit_reversed_order(5).tolist() == [0, 4, 2, 1, 3]
    assert bit_reversed_order(1).tolist() == [0]


@pytest.mark.parametrize("count", [6, 32, 100])
def test_every_prefix_of_bit_reversal_covers_the_range(count):
    order = bit_reversed_order(count)
    assert sorted(order) == list(range(count))
    for size in (4, count // 2, count):
        gaps = np.diff(np.concatenate([[-1], np.sort(order[:size]), [count]]))
        assert gaps.max() <= 4 * count / size


def test_classes_take_turns_until_one_has_no_row_left():
    labels = np.array([2, 0, 0, 0, 1, 1])
    assert labels[classes_in_turn(labels)].tolist() == [0, 1, 2, 0, 1, 0]
    assert classes_in_turn(labels).tolist() == [1, 4, 0, 2, 5, 3]


def test_within_a_class_the_given_order_decides():
    labels, order = np.array([0, 0, 0, 1]), np.array([2, 3, 1, 0])
    assert classes_in_turn(labels, order).tolist() == [2, 3, 1, 0]
    assert classes_in_proportion(labels, order).tolist() == [2, 3, 1, 0]


def test_a_prefix_holds_classes_in_proportion_and_each_at_least_once():
    labels = np.repeat([0, 1, 2, 3], [60, 30, 9, 1])
    rows = classes_in_proportion(labels)
    assert sorted(rows) == list(range(100)) and set(labels[rows[:4]]) == {0, 1, 2, 3}
    for size in (10, 20, 50):
        counts = np.bincount(labels[rows[:size]], minlength=4)
        assert np.abs(counts - size * np.array([0.6, 0.3, 0.09, 0.01])).max() <= 2
