"""How well probabilities fit: negative log-likelihood, calibration error, Brier score, separation, temperature.

A confidence is the probability that a model gives its own answer. `correct` says whether that answer is right. Plain
functions on arrays; the bootstrap at the end gives all of them intervals, paired by item.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray


BINS = 15
"""Equal-width bins of expected calibration error and reliability diagram, as is the custom since arXiv 1706.04599."""
TEMPERATURES = (0.05, 20.0)
"""Bounds of a fitted temperature (this project's choice)."""

_MISSING = "calibration needs {}: install dip_hf with its extra 'eval'"
_Array = NDArray[np.float64]


@dataclass(frozen=True)
class ReliabilityBins:
    """What a reliability diagram shows (arXiv 1706.04599), the non-empty bins only.

    Attributes:
        confidence: mean confidence in each bin.
        accuracy: share of right answers in it.
        count: number of items in it.
    """

    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    count: tuple[int, ...]


def reliability_bins(confidences: ArrayLike, correct: ArrayLike, bins: int = BINS) -> ReliabilityBins:
    """Items sorted into bins of equal width by confidence; 1 belongs to the last bin.

    Args:
        confidences: shape (items,), in [0, 1].
        correct: shape (items,), 0 or 1.
        bins: their number.

    Raises:
        ValueError: see `expected_calibration_error`.
    """
    scores, right = _checked(confidences, correct)
    indices = bin_of(scores, bins)
    counts = np.bincount(indices, minlength=bins)
    full = counts > 0
    means = [np.bincount(indices, values, minlength=bins)[full] / counts[full] for values in (scores, right)]
    return ReliabilityBins(tuple(means[0].tolist()), tuple(means[1].tolist()), tuple(counts[full].tolist()))


def expected_calibration_error(confidences: ArrayLike, correct: ArrayLike, bins: int = BINS) -> float:
    """Σ_b n_b/n · |accuracy_b - confidence_b| over equal-width bins (arXiv 1706.04599, Eq. 3), by torchmetrics.

    Args:
        confidences: shape (items,), in [0, 1].
        correct: shape (items,), 0 or 1.
        bins: their number.

    Raises:
        ValueError: no item, other shapes or values, or `bins` < 1.
        ImportError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.classification import binary_calibration_error
    except ImportError as error:
        raise ImportError(_MISSING.format("torchmetrics")) from error
    scores, right = _checked(confidences, correct)
    bin_of(scores, bins)
    below_one = np.minimum(scores, np.nextafter(1.0, 0.0))  # torchmetrics would give 1 a bin of its own
    return float(binary_calibration_error(torch.tensor(below_one), torch.tensor(right), n_bins=bins, norm="l1"))


def brier_score(confidences: ArrayLike, correct: ArrayLike) -> float:
    """Mean of (confidence - correct)²: 0 is best, 1/4 is what a constant one half gets.

    This is the score of the statement "my answer is right", not that of a whole distribution over answers.

    Args:
        confidences: shape (items,), in [0, 1].
        correct: shape (items,), 0 or 1.

    Raises:
        ValueError: see `expected_calibration_error`.

    >>> brier_score([1.0, 0.5], [1, 0])
    0.125
    """
    scores, right = _checked(confidences, correct)
    return float(np.mean((scores - right) ** 2))


def auroc(positive: ArrayLike, negative: ArrayLike) -> float:
    """Probability that a positive item has more confidence than a negative one, ties counting half, by scikit-learn.

    Right against wrong answers, or in-distribution against shifted inputs.

    Args:
        positive: confidences, shape (positives,).
        negative: confidences, shape (negatives,).

    Returns:
        A fraction, 1/2 where confidence says nothing; NaN where either kind is missing.

    Raises:
        ValueError: other shapes or values.
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise ImportError(_MISSING.format("scikit-learn")) from error
    # torchmetrics has it in fp32 only, where the probabilities of long answers are all 0
    scores = [np.asarray(values, dtype=np.float64) for values in (positive, negative)]
    if not all(values.size for values in scores):
        return math.nan
    labels = np.repeat([1.0, 0.0], [values.size for values in scores])
    joined, _ = _checked(np.concatenate(scores), labels)
    return float(roc_auc_score(labels, joined))


def fit_temperature(negative_log_likelihood: Callable[[float], float]) -> float:
    """The temperature in `TEMPERATURES` with the least negative log-likelihood (arXiv 1706.04599, section 4.2).

    Args:
        negative_log_likelihood: of a validation set, from a temperature; evaluated some dozen times.

    Raises:
        ImportError: scipy is not installed.
    """
    try:
        from scipy.optimize import minimize_scalar
    except ImportError as error:
        raise ImportError(_MISSING.format("scipy")) from error
    bounds = (math.log(TEMPERATURES[0]), math.log(TEMPERATURES[1]))
    found = minimize_scalar(
        lambda log: negative_log_likelihood(math.exp(log)), bounds=bounds, method="bounded", options={"xatol": 1e-3}
    )
    return math.exp(found.x)


def draw_counts(sizes: Sequence[int], resamples: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """How often each item is in each bootstrap sample, items resampled within their task.

    Args:
        sizes: number of items per task.
        resamples: number of samples.
        generator: source of the samples.

    Returns:
        Shape (resamples, items), the tasks' items side by side.
    """
    parts = [generator.multinomial(size, np.full(size, 1 / size), size=resamples) for size in sizes]
    return np.concatenate(parts, axis=1)


def resampled_calibration_error(
    confidences: ArrayLike, correct: ArrayLike, counts: NDArray[np.int64], bins: int = BINS
) -> _Array:
    """`expected_calibration_error` of every bootstrap sample, shape (resamples,).

    Args:
        confidences: shape (items,), in [0, 1].
        correct: shape (items,), 0 or 1.
        counts: shape (resamples, items), from `draw_counts`.
        bins: their number.
    """
    scores, right = _checked(confidences, correct)
    # Σ_b |Σ_{i in b} (correct_i - confidence_i)| / n: the bins' counts cancel
    gaps = np.zeros((scores.size, bins))
    gaps[np.arange(scores.size), bin_of(scores, bins)] = right - scores
    return np.abs(counts @ gaps).sum(axis=1) / counts.sum(axis=1)


def resampled_auroc(
    positive: ArrayLike,
    negative: ArrayLike,
    positive_counts: NDArray[np.int64],
    negative_counts: NDArray[np.int64],
) -> _Array:
    """`auroc` of every bootstrap sample, shape (resamples,); NaN where a sample lacks one of the two kinds.

    Args:
        positive: confidences, shape (positives,).
        negative: confidences, shape (negatives,).
        positive_counts: shape (resamples, positives).
        negative_counts: shape (resamples, negatives).
    """
    ours, theirs = np.asarray(positive, dtype=np.float64), np.asarray(negative, dtype=np.float64)
    values = np.unique(np.concatenate([ours, theirs]))
    above = _per_value(positive_counts, np.searchsorted(values, ours), values.size)
    below = _per_value(negative_counts, np.searchsorted(values, theirs), values.size)
    wins = (above * (below.cumsum(axis=1) - below / 2)).sum(axis=1)
    pairs = above.sum(axis=1) * below.sum(axis=1)
    return np.divide(wins, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def _per_value(counts: NDArray[np.int64], owners: NDArray[np.int64], size: int) -> _Array:
    """Counts added up over items of equal value, shape (resamples, size)."""
    totals = np.zeros((counts.shape[0], size))
    if owners.size:
        order = np.argsort(owners, kind="stable")
        present, starts = np.unique(owners[order], return_index=True)
        totals[:, present] = np.add.reduceat(counts[:, order], starts, axis=1)
    return totals


def bin_of(scores: _Array, bins: int) -> NDArray[np.int64]:
    """Index of the bin of equal width that each score in [0, 1] falls into; of any shape."""
    if bins < 1:
        raise ValueError(f"bins={bins} must be at least 1")
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64).numpy()  # torchmetrics', of which numpy's differ
    return np.minimum(np.searchsorted(edges, scores, side="right") - 1, bins - 1)


def _checked(confidences: ArrayLike, correct: ArrayLike) -> tuple[_Array, _Array]:
    scores, right = np.asarray(confidences, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if scores.ndim != 1 or scores.size == 0 or scores.shape != right.shape:
        raise ValueError(
            f"confidences and correct must be non-empty and one-dimensional alike, got {scores.shape}, {right.shape}"
        )
    if not np.all((scores >= 0) & (scores <= 1)):
        raise ValueError(f"confidences must lie in [0, 1], got {scores[~((scores >= 0) & (scores <= 1))][0]}")
    if not np.all((right == 0) | (right == 1)):
        raise ValueError(f"correct must hold 0 and 1 only, got {right[(right != 0) & (right != 1)][0]}")
    return scores, right
