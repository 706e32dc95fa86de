"""From confidences to the report's calibration: measures per task set, with paired bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dip_hf.evaluation.calibration import (
    BINS,
    ReliabilityBins,
    auroc,
    brier_score,
    draw_counts,
    expected_calibration_error,
    reliability_bins,
    resampled_auroc,
    resampled_calibration_error,
)
from dip_hf.evaluation.results import CheckpointScores
from dip_hf.evaluation.statistics import basic_interval
from dip_hf.evaluation.tables import Table


CALIBRATION_RESAMPLES = 2000
MEASURES = {
    "nll": ("NLL", 1, 3),
    "calibration_error": ("ECE %", 100, 1),
    "brier": ("Brier", 1, 3),
    "auroc": ("AUROC right/wrong", 1, 3),
    "shift_auroc": ("AUROC shift", 1, 3),
}
"""Name in JSON: heading of the column, what the value is multiplied by there, and its decimals."""

_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Change:
    """A measure's difference to another checkpoint on the same items, with its 95% bootstrap interval."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Measure:
    """One number of one checkpoint; NaN where it is not defined, as a separation where nothing is wrong.

    Attributes:
        value: the number.
        changes: from each checkpoint before it, by name; without those that are not defined.
    """

    value: float
    changes: dict[str, Change]


@dataclass(frozen=True)
class CalibrationRow:
    """One checkpoint on one task set.

    Attributes:
        checkpoint: its name.
        measures: by the names in `MEASURES`.
        bins: of the reliability diagram.
    """

    checkpoint: str
    measures: dict[str, Measure]
    bins: ReliabilityBins


@dataclass(frozen=True)
class CalibrationBlock:
    """All checkpoints on one task set, whose items are pooled.

    Attributes:
        name: of the set.
        items: number of items.
        rows: one per checkpoint, in their order.
    """

    name: str
    items: int
    rows: tuple[CalibrationRow, ...]


@dataclass(frozen=True)
class _Pool:
    """One checkpoint's items in one task set, over its tasks."""

    confidences: _Array
    nlls: _Array
    correct: _Array


def make_calibration(
    results: Sequence[CheckpointScores], in_distribution: str | None, *, resamples: int = CALIBRATION_RESAMPLES
) -> tuple[CalibrationBlock, ...]:
    """Measure calibration per task set, and compare every checkpoint with those before it.

    Args:
        results: at least one checkpoint's scores, all on the same items.
        in_distribution: the task set that the others are a shift from; None: the first.
        resamples: number of bootstrap samples; each has the same items for all checkpoints.

    Returns:
        One block per task set; none where the results have no confidences.

    Raises:
        ValueError: a score that is neither 0 nor 1, or confidences outside of [0, 1]; `in_distribution` is no set.
    """
    if not all(task.confidences for result in results for task in result.tasks):
        return ()
    names = list(dict.fromkeys(task.task_set for task in results[0].tasks))
    home = check_in_distribution(in_distribution, names)
    generator = np.random.default_rng(0)
    sizes = {name: [len(task.items) for task in results[0].tasks if task.task_set == name] for name in names}
    counts = {name: draw_counts(sizes[name], resamples, generator) for name in names}
    pools = [{name: _pool(result, name) for name in names} for result in results]
    blocks = []
    for name in names:
        shift = None if name == home else home
        found = [_measure(pool, counts, name, shift) for pool in pools]
        rows = []
        for index, (result, own) in enumerate(zip(results, found, strict=True)):
            earlier = {results[place].checkpoint.name: found[place] for place in range(index)}
            measures = {
                key: Measure(value, _changes(value, samples, {other: earlier[other][key] for other in earlier}))
                for key, (value, samples) in own.items()
            }
            pool = pools[index][name]
            rows.append(
                CalibrationRow(result.checkpoint.name, measures, reliability_bins(pool.confidences, pool.correct))
            )
        blocks.append(CalibrationBlock(name, sum(sizes[name]), tuple(rows)))
    return tuple(blocks)


def check_in_distribution(in_distribution: str | None, names: Sequence[str]) -> str:
    """The task set that the others are a shift from.

    Raises:
        ValueError: it is not among `names`.
    """
    if in_distribution is not None and in_distribution not in names:
        raise ValueError(f"in_distribution={in_distribution!r} is none of the task sets {', '.join(names)}; name one")
    return in_distribution or names[0]


def _pool(result: CheckpointScores, name: str) -> _Pool:
    tasks = [task for task in result.tasks if task.task_set == name]
    return _Pool(
        np.concatenate([task.confidences for task in tasks]),
        np.concatenate([task.nlls for task in tasks]),
        np.concatenate([task.scores for task in tasks]),
    )


def _measure(
    pools: dict[str, _Pool], counts: dict[str, NDArray[np.int64]], name: str, home: str | None
) -> dict[str, tuple[float, _Array]]:
    """Per measure its value and that of every bootstrap sample."""
    pool, drawn = pools[name], counts[name]
    right = pool.correct == 1
    confident, unsure = pool.confidences[right], pool.confidences[~right]
    squares = (pool.confidences - pool.correct) ** 2
    measures = {
        "nll": (float(pool.nlls.mean()), drawn @ pool.nlls / pool.nlls.size),
        "calibration_error": (
            expected_calibration_error(pool.confidences, pool.correct),
            resampled_calibration_error(pool.confidences, pool.correct, drawn),
        ),
        "brier": (brier_score(pool.confidences, pool.correct), drawn @ squares / squares.size),
        "auroc": (auroc(confident, unsure), resampled_auroc(confident, unsure, drawn[:, right], drawn[:, ~right])),
    }
    if home is None:
        return measures
    known = pools[home].confidences
    shifted = resampled_auroc(known, pool.confidences, counts[home], drawn)
    return measures | {"shift_auroc": (auroc(known, pool.confidences), shifted)}


def _changes(value: float, samples: _Array, earlier: dict[str, tuple[float, _Array]]) -> dict[str, Change]:
    changes = {}
    for name, (other, other_samples) in earlier.items():
        # Bootstrap samples without a wrong (or right) answer separate nothing, and are left out
        differences = samples - other_samples
        differences = differences[~np.isnan(differences)]
        if math.isnan(value - other) or not differences.size:
            continue
        changes[name] = Change(value - other, *basic_interval(value - other, differences))
    return changes


def calibration_tables(blocks: Sequence[CalibrationBlock]) -> list[tuple[Table, tuple[int, ...]]]:
    """Tables, each with its columns of numbers: every measure, and the differences to the first checkpoint."""
    # One set alone is a shift from none
    measures = [name for name in MEASURES if any(name in block.rows[0].measures for block in blocks)]
    headings = [MEASURES[name][0] for name in measures]
    values: Table = [("tasks", "items", "checkpoint", *headings)]
    first = blocks[0].rows[0].checkpoint
    changes: Table = [("tasks", f"minus {first}", *headings)]
    for block in blocks:
        for index, row in enumerate(block.rows):
            lead = (block.name, str(block.items)) if index == 0 else ("", "")
            values.append((*lead, row.checkpoint, *(_value(row.measures.get(key), key) for key in measures)))
        for index, row in enumerate(block.rows[1:]):
            title = "" if index else block.name
            changes.append((title, row.checkpoint, *(_change(row.measures.get(key), key, first) for key in measures)))
    tables = [(values, (1, *range(3, 3 + len(measures))))]
    return tables if len(changes) == 1 else [*tables, (changes, ())]


def calibration_footnote(blocks: Sequence[CalibrationBlock]) -> str:
    """How to read the tables."""
    home = [block.name for block in blocks if "shift_auroc" not in block.rows[0].measures]
    shift = f", and {home[0]} against the set" if len(blocks) > 1 else ""
    return (
        "Calibration, a set's items pooled. NLL: -ln of the reference answer's probability, its end included, in nats "
        "per answer. Confidence is the probability of the model's own answer, its end included (of a choice: among "
        f"the choices). ECE: {BINS} equal-width bins. Brier: mean (confidence - right)². AUROC of confidence: right "
        f"against wrong answers{shift}; 0.5 where confidence does not tell them apart. "
        f"Intervals: 95%, basic bootstrap over the same items ({CALIBRATION_RESAMPLES} resamples); they do not cover "
        "the choice of a training seed."
    )


def _value(measure: Measure | None, key: str) -> str:
    return "" if measure is None else _number(measure.value, key)


def _number(value: float, key: str, sign: str = "") -> str:
    _, scale, decimals = MEASURES[key]
    return "n/a" if math.isnan(value) else f"{scale * value:{sign}.{decimals}f}"


def _change(measure: Measure | None, key: str, first: str) -> str:
    if measure is None:
        return ""
    change = measure.changes.get(first)
    if change is None:
        return "n/a"
    difference, low, high = (_number(value, key, "+") for value in (change.difference, change.low, change.high))
    return f"{difference} [{low}, {high}]"
