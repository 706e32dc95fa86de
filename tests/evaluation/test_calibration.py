"""Measures of calibration against closed forms, definitions written out, and resampling item by item."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dip_hf.evaluation.calibration import (
    TEMPERATURES,
    auroc,
    brier_score,
    draw_counts,
    expected_calibration_error,
    fit_temperature,
    reliability_bins,
    resampled_auroc,
    resampled_calibration_error,
)


PROBABILITIES = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1 / 15, 2 / 15, 0.5, 1.0, 1e-300, 1e-20]))
ITEMS = st.lists(st.tuples(PROBABILITIES, st.integers(0, 1)), min_size=1, max_size=40)


def test_a_constant_confidence_is_off_by_its_distance_from_the_accuracy() -> None:
    assert math.isclose(expected_calibration_error([0.8] * 10, [1] * 5 + [0] * 5), 0.3)
    assert math.isclose(expected_calibration_error([1.0] * 4, [1, 1, 1, 0]), 0.25)
    assert math.isclose(expected_calibration_error([0.0, 1.0], [0, 1]), 0, abs_tol=1e-12)
    assert expected_calibration_error([0.25, 0.75], [1, 0]) == 0.75


def test_over_and_under_confidence_in_one_bin_cancel_and_in_two_do_not() -> None:
    assert math.isclose(expected_calibration_error([0.51, 0.52], [0, 1], bins=1), 0.015)
    assert math.isclose(expected_calibration_error([0.2, 0.8], [1, 0], bins=2), 0.8)


@given(ITEMS)
@example([(11 / 15, 1), (11 / 15 - 0.01, 0)])  # an edge, which rounding puts here or there
@settings(max_examples=60, deadline=None)
def test_the_error_is_the_bins_weighted_gaps(items: list[tuple[float, int]]) -> None:
    confidences, correct = zip(*items, strict=True)
    bins = reliability_bins(confidences, correct)
    assert sum(bins.count) == len(items) and all(bins.count)
    gaps = [abs(a - c) * n for a, c, n in zip(bins.accuracy, bins.confidence, bins.count, strict=True)]
    error = expected_calibration_error(confidences, correct)
    assert math.isclose(error, sum(gaps) / len(items), abs_tol=1e-9)
    ones = np.ones((1, len(items)), dtype=np.int64)
    assert math.isclose(error, resampled_calibration_error(confidences, correct, ones)[0], abs_tol=1e-9)


def test_an_item_is_in_the_bin_that_holds_it_and_one_in_the_last() -> None:
    bins = reliability_bins([0.0, 0.49, 0.5, 1.0], [0, 1, 0, 1], bins=2)
    assert bins.count == (2, 2)
    assert bins.confidence == (0.245, 0.75)
    assert bins.accuracy == (0.5, 0.5)


def test_brier_is_the_mean_square() -> None:
    assert math.isclose(brier_score([0.9, 0.2, 0.5], [1, 0, 1]), (0.01 + 0.04 + 0.25) / 3)


@given(st.lists(PROBABILITIES, min_size=1, max_size=15), st.lists(PROBABILITIES, min_size=1, max_size=15))
@settings(max_examples=60, deadline=None)
def test_auroc_is_the_share_of_pairs_in_order(positive: list[float], negative: list[float]) -> None:
    pairs = [(a > b) + 0.5 * (a == b) for a in positive for b in negative]
    assert math.isclose(auroc(positive, negative), sum(pairs) / len(pairs), abs_tol=1e-9)
    ones = [np.ones((1, len(values)), dtype=np.int64) for values in (positive, negative)]
    assert math.isclose(resampled_auroc(positive, negative, *ones)[0], sum(pairs) / len(pairs), abs_tol=1e-9)


def test_auroc_without_one_of_the_two_is_unknown() -> None:
    assert math.isnan(auroc([], [0.5])) and math.isnan(auroc([0.5], []))


def test_the_bootstrap_is_that_of_repeated_items() -> None:
    rng = np.random.default_rng(0)
    confidences, correct = rng.random(12).round(1), rng.integers(0, 2, 12)
    counts = draw_counts([5, 7], 30, rng)
    assert (counts[:, :5].sum(1) == 5).all() and (counts[:, 5:].sum(1) == 7).all()
    errors = resampled_calibration_error(confidences, correct, counts)
    right = correct == 1
    areas = resampled_auroc(confidences[right], confidences[~right], counts[:, right], counts[:, ~right])
    for drawn, error, area in zip(counts, errors, areas, strict=True):
        some, hits = np.repeat(confidences, drawn), np.repeat(correct, drawn)
        assert math.isclose(error, expected_calibration_error(some, hits), abs_tol=1e-9)
        np.testing.assert_allclose(area, auroc(some[hits == 1], some[hits == 0]), atol=1e-9)


def test_a_bootstrap_sample_without_one_of_the_two_is_unknown() -> None:
    areas = resampled_auroc([0.9, 0.8], [0.1], np.array([[1, 1], [2, 0]]), np.array([[0], [1]]))
    assert math.isnan(areas[0]) and areas[1] == 1


@pytest.mark.parametrize("share", [0.6, 0.75, 0.99])
def test_the_temperature_of_two_choices_has_a_closed_form(share: float) -> None:
    """A logit of 2 for an answer that is right with this share: the best probability is the share itself."""

    def negative_log_likelihood(temperature: float) -> float:
        log_odds = 2 / temperature
        return share * math.log1p(math.exp(-log_odds)) + (1 - share) * math.log1p(math.exp(log_odds))

    assert math.isclose(fit_temperature(negative_log_likelihood), 2 / math.log(share / (1 - share)), rel_tol=5e-3)


def test_the_temperature_stays_in_its_bounds() -> None:
    assert math.isclose(fit_temperature(lambda temperature: -temperature), TEMPERATURES[1], rel_tol=1e-2)
    assert math.isclose(fit_temperature(lambda temperature: temperature), TEMPERATURES[0], rel_tol=1e-2)


@pytest.mark.parametrize(
    ("confidences", "correct", "message"),
    [
        ([], [], "non-empty"),
        ([[0.5]], [[1]], "one-dimensional"),
        ([0.5, 0.5], [1], "alike"),
        ([1.5], [1], r"confidences must lie in \[0, 1\], got 1.5"),
        ([float("nan")], [1], r"confidences must lie in \[0, 1\], got nan"),
        ([0.5], [0.5], "correct must hold 0 and 1 only, got 0.5"),
    ],
)
def test_bad_input_is_refused(confidences: list, correct: list, message: str) -> None:
    for function in (expected_calibration_error, brier_score, reliability_bins):
        with pytest.raises(ValueError, match=message):
            function(confidences, correct)


def test_no_bin_is_refused() -> None:
    with pytest.raises(ValueError, match="bins=0"):
        expected_calibration_error([0.5], [1], bins=0)
