"""Closed forms of Holm's correction, the bootstrap and the calibration error."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_hf.evaluation.calibration import expected_calibration_error
from studies.statistics import Resampler, calibrated_error, holm, least_shown, seeds_p_value


def _resampler(seeds: int, items: list[int], resamples: int = 4000) -> Resampler:
    return Resampler(seeds, items, np.random.default_rng(0), resamples)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_p_and_bonferroni_and_keeps_the_order(p: list[float]) -> None:
    adjusted = holm(p)
    assert all(one <= two <= min(1, len(p) * one) + 1e-12 for one, two in zip(p, adjusted, strict=True))
    order = sorted(range(len(p)), key=p.__getitem__)
    assert [adjusted[i] for i in order] == sorted(adjusted)


def test_the_t_test_over_seeds_by_hand() -> None:
    # t = 2√3 with two degrees of freedom, whose distribution function is 1/2 + t / (2 √(2 + t²))
    assert seeds_p_value([1.0, 2.0, 3.0]) == pytest.approx(1 - 2 * 3**0.5 / 14**0.5)
    assert seeds_p_value([-3.0, -2.0, -1.0]) == seeds_p_value([1.0, 2.0, 3.0])
    assert (seeds_p_value([0.0, 0.0]), seeds_p_value([0.5, 0.5]), seeds_p_value([0.5])) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(("seeds", "tests"), [(5, 8), (10, 1)])
def test_what_is_shown_four_times_of_five(seeds: int, tests: int) -> None:
    draws = np.random.default_rng(0).normal(least_shown(3.0, seeds, tests), 3.0, (4000, seeds))
    assert np.mean([tests * seeds_p_value(own) < 0.05 for own in draws]) == pytest.approx(0.8, abs=0.02)
    assert least_shown(6.0, seeds, tests) == pytest.approx(2 * least_shown(3.0, seeds, tests))


def test_chance_gives_a_calibrated_model_some_error() -> None:
    """In a bin of its own a single item of confidence c has E|right - c| = 2c (1 - c)."""
    confidences = np.array([[0.05, 0.5, 0.95], [0.25, 0.45, 1.0]])
    expected = (2 * confidences * (1 - confidences)).mean(axis=1)
    found = calibrated_error(confidences, np.random.default_rng(0), draws=20_000)
    assert found == pytest.approx(expected, abs=0.005)


def test_few_uneven_seeds_are_no_evidence() -> None:
    """Where seeds are all that varies the bootstrap over five of them finds what the t-test does not."""
    scores = np.array([0.1, 0.2, 0.3, 0.9, 1.0])[:, None] * np.ones(50)
    resampler = _resampler(5, [50])
    difference = resampler.difference(resampler.means([scores]), resampler.means([np.zeros_like(scores)]))
    assert difference.p == pytest.approx(seeds_p_value(scores[:, 0])) and difference.p > 0.05 and difference.low > 0


def test_equal_scores_give_zero_and_a_constant_difference_itself() -> None:
    scores = [np.random.default_rng(1).random((3, 7)), np.random.default_rng(2).random((3, 5))]
    resampler = _resampler(3, [7, 5])
    same = resampler.difference(resampler.means(scores), resampler.means(scores))
    assert (same.value, same.low, same.high, same.p, same.higher, same.lower, same.seeds) == (0, 0, 0, 1.0, 0, 0, 3)
    higher = resampler.means([stratum + 0.25 for stratum in scores])
    shifted = resampler.difference(higher, resampler.means(scores))
    assert [shifted.value, shifted.low, shifted.high] == pytest.approx([0.25] * 3)
    assert shifted.p == pytest.approx(2 / 4001) and (shifted.higher, shifted.lower) == (3, 0)


def test_the_resamples_variance_is_the_two_way_bootstraps() -> None:
    """For a_s + b_i the resampled mean's variance is that of both parts' means: Σ(a - ā)²/S² + Σ(b - b̄)²/n²."""
    a, b = np.array([0.0, 0.3, -0.2, 0.5]), np.linspace(-1, 2, 30) ** 2
    resampler = _resampler(4, [30], resamples=40_000)
    _, resampled = resampler.means([a[:, None] + b])
    means = (resampled * resampler.seed_weights).sum(axis=1)
    assert means.mean() == pytest.approx(a.mean() + b.mean(), abs=0.01)
    assert means.var() == pytest.approx(a.var() / 4 + b.var() / 30, rel=0.03)


def test_an_item_is_drawn_for_all_seeds_and_tasks_weigh_alike() -> None:
    """One resample by hand from the weights."""
    rng = np.random.default_rng(3)
    scores = [rng.random((2, 3)), rng.random((2, 6))]
    resampler = _resampler(2, [3, 6], resamples=5)
    observed, resampled = resampler.means(scores)
    assert observed == pytest.approx([(scores[0][s].mean() + scores[1][s].mean()) / 2 for s in (0, 1)])
    for r in range(5):
        by_hand = [np.mean([(scores[t][s] * resampler.item_weights[t][r]).sum() for t in (0, 1)]) for s in (0, 1)]
        assert resampled[r] == pytest.approx(by_hand)
    assert np.allclose(resampler.seed_weights.sum(axis=1), 1)


def test_the_calibration_error_is_the_evaluations_for_one_seed_and_task() -> None:
    rng = np.random.default_rng(4)
    confidences = rng.random((2, 50))
    right = (rng.random((2, 50)) < confidences**2).astype(float)
    resampler = _resampler(2, [50], resamples=3)
    observed, resampled = resampler.calibration_errors([confidences], [right])
    assert observed == pytest.approx([expected_calibration_error(confidences[s], right[s]) for s in (0, 1)])
    drawn = np.repeat(np.arange(50), (resampler.item_weights[0][0] * 50).round().astype(int))
    by_hand = [expected_calibration_error(confidences[s][drawn], right[s][drawn]) for s in (0, 1)]
    assert resampled[0] == pytest.approx(by_hand)


def test_tasks_share_the_bins_of_the_calibration_error() -> None:
    """One is too sure by 1/4 and the other too unsure: in the bin of both there is no error."""
    confidences, right = [np.full((1, 2), 0.75)] * 2, [np.array([[1.0, 0.0]]), np.ones((1, 2))]
    assert _resampler(1, [2, 2]).calibration_errors(confidences, right)[0] == pytest.approx([0.0])
    assert _resampler(1, [2]).calibration_errors(confidences[:1], right[:1])[0] == pytest.approx([0.25])


def test_the_spread_is_the_samples_standard_deviation() -> None:
    resampler = _resampler(2, [1])
    zero = resampler.means([np.zeros((2, 1))])
    assert resampler.difference(resampler.means([[[0.1], [0.3]]]), zero).spread == pytest.approx(0.02**0.5)


def test_the_interval_of_a_calibration_error_is_corrected_for_its_bias() -> None:
    """The reference is too sure by .2 everywhere and the arm not at all, so that the true difference is -.2.

    Chance raises the arm's error and shrinks the observed difference; resampling does so again, and an interval that
    is not reflected misses the truth.
    """
    rng, covered, by_percentiles = np.random.default_rng(6), 0, 0
    for _ in range(60):
        resampler = Resampler(1, [400], rng, 300)
        confidences = rng.uniform(0.3, 0.95, (1, 400))
        right = [(rng.random((1, 400)) < confidences - shift).astype(float) for shift in (0.0, 0.2)]
        arm, reference = (resampler.calibration_errors([confidences], [scores]) for scores in right)
        difference = resampler.difference(arm, reference)
        covered += difference.low <= -0.2 <= difference.high
        low, high = np.percentile(arm[1] - reference[1], [2.5, 97.5])
        by_percentiles += low <= -0.2 <= high
    assert covered > 0.75 * 60 and by_percentiles < 0.25 * 60


def test_scores_of_another_shape_and_nothing_to_resample_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must have the shapes \[\(2, 3\)\]"):
        _resampler(2, [3]).means([np.zeros((3, 2))])
    with pytest.raises(ValueError, match="must all be at least 1"):
        _resampler(0, [3])


def test_five_seeds_that_alone_vary_are_covered_as_the_report_says() -> None:
    """The percentile interval of five normal seeds' mean covers P(|t_4| < 1.96 √(4/5)), about 85%."""
    rng, covered = np.random.default_rng(5), 0
    resampler = _resampler(5, [1], resamples=1000)
    zero = resampler.means([np.zeros((5, 1))])
    for _ in range(1500):
        difference = resampler.difference(resampler.means([rng.standard_normal((5, 1))]), zero)
        covered += difference.low <= 0 <= difference.high
    assert covered / 1500 == pytest.approx(0.85, abs=0.035)
