"""Differences paired by seed and item, their bootstrap intervals, and Holm's correction.

Scores come as strata, one array per task (a family) of shape (seeds, items): row s is the model trained with seed s,
column i is test item i, which is the same for all seeds and arms. Tasks are fixed and weigh alike; seeds and items
are samples. A resample draws seeds with replacement and, independently and within each task, items with replacement,
the same items for every seed (the two-way bootstrap of Owen, 2007, for crossed factors, called "pigeonhole"); an
arm's score always comes with the reference's of the same seed and item. With one seed the interval covers items alone.

A bootstrap over a handful of seeds finds too many differences where seeds are most of what varies, and most of all in
the far tail that a correction over many arms reads. A p-value is therefore never below that of a paired t-test over
seeds, which takes the number of seeds into account.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from dip_hf.evaluation.calibration import BINS, bin_of
from dip_hf.evaluation.statistics import basic_interval


Array = NDArray[np.float64]
RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """An arm's mean minus the reference's, over the seeds that both have.

    Attributes:
        value: the difference, in the scores' unit.
        low: lower end of the 95% basic bootstrap interval, see `dip_hf.evaluation.statistics.basic_interval`.
        high: upper end of it.
        p: two-sided p-value, the larger one of two. Of the bootstrap: twice the smaller share of the resampled
            differences, reflected about the observed one, on either side of zero, zero itself and the difference at
            hand counted on both sides; so at least 2/(resamples + 1). And of `seeds_p_value`, with two seeds or more.
        seeds: number of seeds.
        higher: number of seeds in which the arm's mean is above the reference's.
        lower: number of seeds in which it is below.
        spread: standard deviation over seeds of the difference; None with a single one.
    """

    value: float
    low: float
    high: float
    p: float
    seeds: int
    higher: int
    lower: int
    spread: float | None


class Resampler:
    """The resamples of one set of seeds and items, shared by all arms, so that their intervals are comparable.

    Args:
        seeds: number of seeds.
        items: number of items of each task.
        generator: source of the resamples.
        resamples: number of them.

    Raises:
        ValueError: nothing to resample.
    """

    def __init__(
        self, seeds: int, items: Sequence[int], generator: np.random.Generator, resamples: int = RESAMPLES
    ) -> None:
        if seeds < 1 or not items or min(items) < 1 or resamples < 1:
            raise ValueError(f"seeds={seeds}, items={list(items)} and resamples={resamples} must all be at least 1")
        self.items = tuple(items)
        self.seed_weights: Array = generator.multinomial(seeds, [1 / seeds] * seeds, size=resamples) / seeds
        self.item_weights: list[Array] = [generator.multinomial(n, [1 / n] * n, size=resamples) / n for n in items]

    def means(self, strata: Sequence[ArrayLike]) -> tuple[Array, Array]:
        """Mean per seed, shape (seeds,), and the resampled means per seed, shape (resamples, seeds).

        Raises:
            ValueError: the scores do not have the resampler's shape.
        """
        arrays = [np.asarray(scores, dtype=np.float64) for scores in strata]
        shapes = [(self.seed_weights.shape[1], n) for n in self.items]
        if [scores.shape for scores in arrays] != shapes:
            raise ValueError(f"scores must have the shapes {shapes}, got {[scores.shape for scores in arrays]}")
        observed = np.mean([scores.mean(axis=1) for scores in arrays], axis=0)
        resampled = np.mean(
            [weights @ scores.T for weights, scores in zip(self.item_weights, arrays, strict=True)], axis=0
        )
        return observed, resampled

    def calibration_errors(
        self, confidences: Sequence[ArrayLike], scores: Sequence[ArrayLike], bins: int = BINS
    ) -> tuple[Array, Array]:
        """Expected calibration error per seed, and resampled, in the shapes that `means` returns.

        Σ_b |Σ_{i in b} w_i (c_i - y_i)| over bins of equal width of the confidence c, y being 1 where the answer is
        right; w_i is 1/(tasks · items of the task), so that tasks weigh alike. Items of all tasks share the bins.
        """
        observed, resampled = np.zeros(self.seed_weights.shape[1]), np.zeros(self.seed_weights.shape)
        binned = [bin_of(np.asarray(c, dtype=np.float64), bins) for c in confidences]
        gaps = [np.asarray(c, dtype=np.float64) - np.asarray(y) for c, y in zip(confidences, scores, strict=True)]
        for index in range(bins):
            mean, means = self.means([gap * (where == index) for gap, where in zip(gaps, binned, strict=True)])
            observed, resampled = observed + np.abs(mean), resampled + np.abs(means)
        return observed, resampled

    def difference(self, arm: tuple[Array, Array], reference: tuple[Array, Array]) -> Difference:
        """Compare two results of `means` or of `calibration_errors`."""
        per_seed = arm[0] - reference[0]
        resampled = ((arm[1] - reference[1]) * self.seed_weights).sum(axis=1)
        value = float(per_seed.mean())
        low, high = basic_interval(value, resampled)
        reflected = 2 * value - resampled
        # A sum in another order must not turn a difference of zero into one of 1e-17
        near = 1e-9 * max(1.0, float(np.abs(reflected).max()))
        side = 1 + min(int((reflected <= near).sum()), int((reflected >= -near).sum()))
        return Difference(
            value=value,
            low=low,
            high=high,
            p=max(min(1.0, 2 * side / (len(resampled) + 1)), seeds_p_value(per_seed)),
            seeds=len(per_seed),
            higher=int((per_seed > 1e-9).sum()),
            lower=int((per_seed < -1e-9).sum()),
            spread=float(per_seed.std(ddof=1)) if len(per_seed) > 1 else None,
        )


def seeds_p_value(differences: ArrayLike) -> float:
    """Two-sided p-value of a t-test that paired differences, one per seed, have mean zero; 0 with a single one."""
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2:
        return 0.0
    error = values.std(ddof=1) / len(values) ** 0.5
    if error <= 1e-9:  # the same in every seed
        return float(abs(values.mean()) <= 1e-9)
    return float(2 * stats.t.sf(abs(values.mean()) / error, len(values) - 1))


def least_shown(spread: float, seeds: int, tests: int, level: float = 0.05, power: float = 0.8) -> float:
    """The true mean difference that `seeds_p_value` finds below the level in a share `power` of repetitions.

    It is the first of `tests` in Holm's order, so that p is multiplied by their number: all others show nothing. By
    the noncentral t distribution, for differences that are normal over seeds.

    Args:
        spread: standard deviation over seeds of the paired differences, positive.
        seeds: number of seeds, at least 2.
        tests: number of comparisons that are corrected for.
        level: of significance, two-sided.
        power: share of repetitions.
    """
    bound = stats.t.isf(level / tests / 2, seeds - 1)

    def shortfall(shift: float) -> float:
        return float(stats.nct.sf(bound, seeds - 1, shift)) - power

    return float(optimize.brentq(shortfall, 0.0, 20 * bound) * spread / seeds**0.5)


def calibrated_error(confidences: Array, generator: np.random.Generator, draws: int = 200, bins: int = BINS) -> Array:
    """The calibration error that chance alone gives a perfectly calibrated model of these confidences.

    Args:
        confidences: shape (seeds, items).
        generator: source of the answers, each of which is right with the probability of its confidence.
        draws: number of them.
        bins: of equal width.

    Returns:
        The expected calibration error in the mean over the draws, shape (seeds,).
    """
    where = bin_of(confidences, bins)
    right = generator.random((draws, *confidences.shape)) < confidences
    gaps = np.stack([((right - confidences) * (where == index)).sum(-1) for index in range(bins)])
    return np.abs(gaps).sum(0).mean(0) / confidences.shape[1]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Holm, 1979), in the order given.

    The k-th smallest of m is multiplied by m - k + 1, then raised to the one before it, and cut at 1.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted
