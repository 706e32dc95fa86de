"""Accuracy, standard error and paired differences against closed forms and a slow bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dip_hf.evaluation.statistics import PairedDifference, accuracy, paired_difference, standard_error


def compare(scores: list, reference: list, seed: int = 0, resamples: int = 10_000) -> PairedDifference:
    return paired_difference(scores, reference, generator=np.random.default_rng(seed), resamples=resamples)


def test_accuracy_is_the_mean_over_tasks_whatever_their_size() -> None:
    assert accuracy([[1, 0, 0, 0]]) == 0.25
    assert accuracy([[1, 0, 0, 0], [1] * 100]) == 0.625


def test_the_standard_error_of_one_task_is_the_binomial_one() -> None:
    scores = [1] * 30 + [0] * 70
    assert math.isclose(standard_error([scores]), math.sqrt(0.3 * 0.7 / 99))


def test_the_standard_error_of_a_mean_over_tasks() -> None:
    first, second = [1] * 30 + [0] * 70, [1] * 5 + [0] * 5
    expected = math.sqrt(standard_error([first]) ** 2 + standard_error([second]) ** 2) / 2
    assert math.isclose(standard_error([first, second]), expected)


def test_the_standard_error_of_one_item_is_unknown() -> None:
    assert math.isnan(standard_error([[1]]))


def test_equal_scores_differ_by_nothing() -> None:
    scores = [[1, 0, 1, 1]]
    assert compare(scores, scores) == PairedDifference(points=0.0, low=0.0, high=0.0, better=0, worse=0)


def test_a_difference_counts_and_averages_items() -> None:
    difference = compare([[1, 1, 0, 1], [1, 1]], [[0, 1, 1, 0], [1, 1]])
    assert difference.points == 100 * (0.25 + 0.0) / 2
    assert (difference.better, difference.worse) == (2, 1)
    assert difference.low <= difference.points <= difference.high
    assert difference.low < 0 < difference.high


def test_swapping_the_two_mirrors_the_difference() -> None:
    rng = np.random.default_rng(3)
    ours, theirs = rng.integers(0, 2, 200), rng.integers(0, 2, 200)
    there, back = compare([ours], [theirs], resamples=100_000), compare([theirs], [ours], resamples=100_000)
    assert there.points == -back.points
    assert math.isclose(there.low, -back.high, abs_tol=0.5)


def test_the_interval_is_the_normal_one_for_many_items() -> None:
    rng = np.random.default_rng(0)
    theirs = (rng.random(5000) < 0.4).astype(float)
    ours = np.where(rng.random(5000) < 0.2, 1.0, theirs)
    error = 100 * np.std(ours - theirs, ddof=1) / math.sqrt(5000)
    difference = compare([ours], [theirs], resamples=100_000)
    assert math.isclose(difference.low, difference.points - 1.96 * error, abs_tol=0.05)
    assert math.isclose(difference.high, difference.points + 1.96 * error, abs_tol=0.05)
    assert difference.low > 0


def test_the_interval_is_that_of_resampled_indices_for_few_items() -> None:
    """The multinomial short cut against drawing items one by one, two tasks resampled apart."""
    ours, theirs = [np.array([1, 1, 0, 1, 0]), np.array([1, 0, 1.0])], [np.array([0, 1, 1, 0, 0]), np.array([0, 0, 1])]
    rng = np.random.default_rng(1)
    means = []
    for _ in range(20_000):
        picked = [rng.integers(0, len(scores), len(scores)) for scores in ours]
        means.append(np.mean([(a[i] - b[i]).mean() for a, b, i in zip(ours, theirs, picked, strict=True)]))
    difference = compare(ours, theirs, resamples=20_000)
    np.testing.assert_allclose([difference.low, difference.high], 100 * np.percentile(means, [2.5, 97.5]), atol=3.5)


def test_a_seed_gives_its_interval_again() -> None:
    assert compare([[1, 0, 1]], [[0, 0, 1]], seed=4) == compare([[1, 0, 1]], [[0, 0, 1]], seed=4)


@pytest.mark.parametrize("strata", [[], [[]], [[[1, 0]]]])
def test_scores_of_the_wrong_shape_are_refused(strata: list) -> None:
    with pytest.raises(ValueError, match="task"):
        accuracy(strata)


def test_other_items_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same items, got \[2\] and \[3\]"):
        compare([[1, 0]], [[1, 0, 1]])
    with pytest.raises(ValueError, match="resamples=0"):
        compare([[1, 0]], [[1, 0]], resamples=0)
