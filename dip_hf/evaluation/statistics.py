"""Accuracy, its standard error, and paired differences between checkpoints with bootstrap intervals.

Scores come as strata, one array per task (a family, a benchmark). A task set's accuracy is the unweighted mean of its
tasks' accuracies, so that a large task does not outvote a small one; the tasks are fixed, the items in each of them
are a sample. All of this is the project's choice; the DIPNet paper gives single accuracies without intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class PairedDifference:
    """A checkpoint's mean score minus the reference's, on the same items.

    Attributes:
        points: the difference in percentage points; positive where the checkpoint is better.
        low: lower end of the 95% bootstrap interval, in points.
        high: upper end of it, in points.
        better: number of items that the checkpoint scores higher than the reference.
        worse: number of items that it scores lower. With few of `better` + `worse` an interval means little.
    """

    points: float
    low: float
    high: float
    better: int
    worse: int


def accuracy(strata: Sequence[ArrayLike]) -> float:
    """Unweighted mean over strata of the mean score, a fraction in [0, 1].

    Args:
        strata: per task the scores of its items, each of shape (items,), in [0, 1].

    Raises:
        ValueError: no stratum, or one that is empty or not one-dimensional.

    >>> accuracy([[1, 0], [1, 1, 1, 1]])
    0.75
    """
    return float(np.mean([scores.mean() for scores in _as_arrays(strata)]))


def standard_error(strata: Sequence[ArrayLike]) -> float:
    """Standard error of `accuracy`: the square root of Σ_t s_t²/n_t over the number of tasks, tasks being fixed.

    s_t² is the sample variance (divisor n_t - 1) of task t's scores, so one task alone gives lm-eval's own number.

    Args:
        strata: as in `accuracy`.

    Returns:
        A fraction, or NaN where a task has one item only. Zero where every task's scores are all equal.

    >>> standard_error([[1, 0, 1, 0, 1]]) == (0.3 / 5) ** 0.5
    True
    """
    arrays = _as_arrays(strata)
    if any(scores.size < 2 for scores in arrays):
        return float("nan")
    return float(np.sqrt(sum(scores.var(ddof=1) / scores.size for scores in arrays)) / len(arrays))


def paired_difference(
    scores: Sequence[ArrayLike],
    reference: Sequence[ArrayLike],
    *,
    generator: np.random.Generator,
    resamples: int = 10_000,
) -> PairedDifference:
    """Difference in accuracy on the same items, with a 95% percentile bootstrap interval.

    Items are resampled within each task, a checkpoint's score always together with the reference's. The interval
    covers the choice of items alone, not that of the training seed.

    Args:
        scores: per task the checkpoint's scores, each of shape (items,).
        reference: the same tasks and items, scored under the reference.
        generator: source of the resamples.
        resamples: number of them.

    Raises:
        ValueError: the two do not have the same tasks and numbers of items, or `resamples` < 1.
    """
    if resamples < 1:
        raise ValueError(f"resamples={resamples} must be at least 1")
    ours, theirs = _as_arrays(scores), _as_arrays(reference)
    if [a.size for a in ours] != [b.size for b in theirs]:
        raise ValueError(
            f"scores and reference must hold the same items, got {[a.size for a in ours]} and "
            f"{[b.size for b in theirs]} items per task"
        )
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    means = np.mean([_resampled_means(d, resamples, generator) for d in differences], axis=0)
    low, high = np.percentile(100 * means, [2.5, 97.5])
    return PairedDifference(
        points=float(100 * np.mean([d.mean() for d in differences])),
        low=float(low),
        high=float(high),
        better=int(sum((d > 0).sum() for d in differences)),
        worse=int(sum((d < 0).sum() for d in differences)),
    )


def basic_interval(value: float, resampled: NDArray[np.float64]) -> tuple[float, float]:
    """95% basic bootstrap interval: the percentile interval, reflected about the observed value.

    Where resampling shifts a statistic, as it raises a calibration error (the more, the smaller that is), sampling has
    shifted the observed value likewise: the reflection corrects for that shift, which a percentile interval doubles
    (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 5.2).

    Args:
        value: the observed statistic.
        resampled: the statistic of every bootstrap sample, shape (resamples,).
    """
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(2 * value - high), float(2 * value - low)


def _resampled_means(
    values: NDArray[np.float64], resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Means of `resamples` bootstrap samples of `values`, shape (resamples,)."""
    # A mean depends only on how often each distinct value is drawn, and scores have two or three distinct values: the
    # multinomial counts give the bootstrap's exact distribution without drawing resamples × items indices.
    distinct, counts = np.unique(values, return_counts=True)
    drawn = generator.multinomial(values.size, counts / values.size, size=resamples)
    return drawn @ distinct / values.size


def _as_arrays(strata: Sequence[ArrayLike]) -> list[NDArray[np.float64]]:
    arrays = [np.asarray(scores, dtype=np.float64) for scores in strata]
    if not arrays:
        raise ValueError("at least one task is needed, got none")
    for index, scores in enumerate(arrays):
        if scores.ndim != 1 or scores.size == 0:
            raise ValueError(f"task {index} must have a non-empty one-dimensional array of scores, got {scores.shape}")
    return arrays
