"""The comparison of every arm with the reference, at one data size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, median
from typing import Any

import numpy as np

from dip_hf.evaluation.calibration import auroc, brier_score
from studies.results import Array, Results, time_ratio
from studies.spec import TASK_SETS, Arm
from studies.statistics import Difference, Resampler, calibrated_error, holm, least_shown


LEVEL = 0.05
MIN_SEEDS = 3
"""Below so many seeds a report gives no verdict."""
UNANIMOUS = 5
"""Up to so many seeds a verdict takes all to agree, which is the harder the more there are."""
BOOTSTRAP_SEED = 0
CALIBRATED = ("standard", "harder")
"""Task sets whose probabilities are compared."""


@dataclass(frozen=True)
class Measure:
    """One number that arms are compared by.

    Attributes:
        task_set: such as "standard".
        what: "accuracy" in %, "nll" in nats per answer, or "ece" in %.
    """

    task_set: str
    what: str

    @property
    def name(self) -> str:
        """Such as "standard accuracy"."""
        return f"{self.task_set} {self.what}"

    @property
    def rising(self) -> bool:
        """Whether more is better."""
        return self.what == "accuracy"


@dataclass(frozen=True)
class Row:
    """One arm by one measure.

    Attributes:
        arm: its name.
        seeds: number of seeds that are finished; 0 is pending.
        mean: over those seeds; None while pending.
        spread: standard deviation over seeds; None with fewer than two, and for the base.
        difference: to the reference over the seeds of both; None for the reference itself and while pending.
        p: of the difference, after Holm's correction over the arms of this size and measure.
        missing: number of the study's seeds that the difference lacks: not run yet, or diverged.
    """

    arm: str
    seeds: int
    mean: float | None = None
    spread: float | None = None
    difference: Difference | None = None
    p: float | None = None
    missing: int = 0

    def verdict(self, measure: Measure) -> str:
        """What the numbers support, in a word or three: a difference needs p below the level after correction, and
        with a handful of seeds the same sign in each."""
        own = self.difference
        if own is None or self.p is None:
            return "" if self.seeds else "pending"
        if own.seeds < MIN_SEEDS:
            return "too few seeds"
        if self.missing:
            return "seeds missing"
        if self.p >= LEVEL or (own.seeds <= UNANIMOUS and own.seeds not in (own.higher, own.lower)):
            return "no difference shown"
        return "better" if (own.value > 0) == measure.rising else "worse"


def shown_difference(rows: Sequence[Row]) -> float | None:
    """The true difference that a table would show of its median arm in four of five repetitions.

    By the t-test over seeds alone; None where no verdict can be given.

    Args:
        rows: all arms by one measure.
    """
    whole = [row.difference for row in rows if row.difference is not None and not row.missing]
    spreads = [own.spread for own in whole if own.seeds >= MIN_SEEDS and own.spread]
    if not spreads:
        return None
    return least_shown(median(spreads), whole[0].seeds, len(rows) - 1, LEVEL)


@dataclass(frozen=True)
class Comparison:
    """All arms at one data size.

    Attributes:
        size: training examples per family.
        rows: per measure, in the order of the study's arms.
        probes: per arm and number of robustness, smoothness, reconstruction and posterior the mean over seeds and its
            standard deviation (None with fewer than two seeds).
        costs: per arm the training time as a multiple of the reference's; None where it is not known.
        settings: per arm the overrides that the validation split chose, and the mean of the temperatures fitted on it;
            None while pending, {} without a choice.
        trials: per arm the validation scores of all its trials, `exact_match` and `nll`; empty while pending and
            without a choice.
        discrimination: per task set and arm the confidence, the calibration error that chance alone would give a
            perfectly calibrated model of these confidences, the Brier score, and the AUROC of right against wrong
            answers, over the items of all tasks: mean over seeds and standard deviation as in `probes`; AUROC is left
            out where some seed has no right or no wrong answer.
    """

    size: int
    rows: dict[Measure, list[Row]]
    probes: dict[str, dict[str, tuple[float, float | None]]]
    costs: dict[str, float | None]
    settings: dict[str, dict[str, Any] | None]
    trials: dict[str, list[dict[str, float | None]]]
    discrimination: dict[str, dict[str, dict[str, tuple[float, float | None]]]]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "size": self.size,
            "measures": {
                measure.name: [asdict(row) | {"verdict": row.verdict(measure)} for row in rows]
                for measure, rows in self.rows.items()
            },
            "probes": self.probes,
            "training_time_ratio": self.costs,
            "settings": self.settings,
            "trials": self.trials,
            "discrimination": self.discrimination,
        }


def compare(results: Results, size: int) -> Comparison:
    """Compare all arms with the reference at one data size, with what is finished."""
    study = results.study
    sets = [name for name in TASK_SETS if name in study.evaluation.items]
    measures = [Measure(name, "accuracy") for name in sets]
    measures += [Measure(name, what) for name in sets if name in CALIBRATED for what in ("nll", "ece")]
    rows = measure_rows(results, size, measures)
    return Comparison(
        size=size,
        rows=rows,
        probes={arm.name: _probes(results, arm, size) for arm in study.arms},
        costs={arm.name: time_ratio(results, arm, size) for arm in study.arms},
        settings={arm.name: _setting(results, arm, size) for arm in study.arms},
        trials={
            arm.name: results.line(arm, size, seed)["trial_scores"]
            for arm in study.arms
            for seed in results.seeds(arm, size)[:1]
        },
        discrimination={
            name: {arm.name: _discrimination(results, arm, size, name) for arm in study.arms}
            for name in sets
            if name in CALIBRATED
        },
    )


def measure_rows(results: Results, size: int, measures: Sequence[Measure]) -> dict[Measure, list[Row]]:
    """Per measure all arms, in the study's order, and their differences to its reference."""
    # One set of resamples per task set and seeds, for all arms and measures
    resamplers: dict[tuple[str, tuple[int, ...]], Resampler] = {}
    return {measure: _rows(results, size, measure, resamplers) for measure in measures}


def _rows(
    results: Results, size: int, measure: Measure, resamplers: dict[tuple[str, tuple[int, ...]], Resampler]
) -> list[Row]:
    reference = results.study.arm(results.study.reference)
    theirs = results.seeds(reference, size)
    rows, differences = [], {}
    for arm in results.study.arms:
        seeds = results.seeds(arm, size)
        if not seeds:
            rows.append(Row(arm.name, 0))
            continue
        values = _estimate(results, arm, size, seeds, measure, resamplers)[0]
        spread = None if len(seeds) < 2 or arm.untrained else float(values.std(ddof=1))
        rows.append(Row(arm.name, 1 if arm.untrained else len(seeds), float(values.mean()), spread))
        both = [seed for seed in seeds if seed in theirs]
        if arm is not reference and both:
            pair = [_estimate(results, one, size, both, measure, resamplers) for one in (arm, reference)]
            differences[arm.name] = resamplers[measure.task_set, tuple(both)].difference(*pair)
    # An arm that is not finished counts as one that shows nothing, so that its result cannot take back a verdict
    # already given; a seed or two of it may have any p.
    p_values = {row.arm: 1.0 for row in rows if row.arm != reference.name}
    whole = len(results.study.seeds)
    p_values |= {name: one.p for name, one in differences.items() if one.seeds == whole}
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    for index, row in enumerate(rows):
        if row.arm in differences:
            own = differences[row.arm]
            missing = len(results.study.seeds) - own.seeds
            rows[index] = replace(row, difference=own, p=adjusted[row.arm], missing=missing)
    return rows


def _estimate(
    results: Results,
    arm: Arm,
    size: int,
    seeds: list[int],
    measure: Measure,
    resamplers: dict[tuple[str, tuple[int, ...]], Resampler],
) -> tuple[Any, Any]:
    """The measure per seed, and resampled: shapes (seeds,) and (resamples, seeds)."""
    correct = results.strata(arm, size, seeds, measure.task_set, "correct")
    key = (measure.task_set, tuple(seeds))
    if key not in resamplers:
        items = [scores.shape[1] for scores in correct]
        resamplers[key] = Resampler(len(seeds), items, np.random.default_rng(BOOTSTRAP_SEED))
    if measure.what == "accuracy":
        return resamplers[key].means([100 * scores for scores in correct])
    if measure.what == "nll":
        return resamplers[key].means(results.strata(arm, size, seeds, measure.task_set, "nll"))
    confidences = results.strata(arm, size, seeds, measure.task_set, "confidence")
    observed, resampled = resamplers[key].calibration_errors(confidences, correct)
    return 100 * observed, 100 * resampled


def _probes(results: Results, arm: Arm, size: int) -> dict[str, tuple[float, float | None]]:
    """Every number that `studies.measure.probe` found, by a name such as "robustness typos exact_match"."""
    seeds = results.seeds(arm, size)[: 1 if arm.untrained else None]
    if not seeds:
        return {}
    line = results.line(arm, size, seeds[0])
    nested, flat = ("robustness", "reconstruction"), ("smoothness", "posterior")
    paths: list[tuple[str, ...]] = [
        (kind, name, value) for kind in nested for name, own in line.get(kind, {}).items() for value in own
    ]
    paths += [(kind, name) for kind in flat for name in line.get(kind, {})]
    values = {" ".join(path): results.probes(arm, size, seeds, *path) for path in paths}
    return {name: _over_seeds(own) for name, own in values.items() if own is not None}


def _over_seeds(values: Array) -> tuple[float, float | None]:
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None


def _discrimination(results: Results, arm: Arm, size: int, task_set: str) -> dict[str, tuple[float, float | None]]:
    seeds = results.seeds(arm, size)[: 1 if arm.untrained else None]
    if not seeds:
        return {}
    confidences = np.concatenate(results.strata(arm, size, seeds, task_set, "confidence"), axis=1)
    correct = np.concatenate(results.strata(arm, size, seeds, task_set, "correct"), axis=1)
    pairs = list(zip(confidences, correct, strict=True))
    values = {
        "chance": calibrated_error(confidences, np.random.default_rng(BOOTSTRAP_SEED)),
        "confidence": confidences.mean(axis=1),
        "brier": np.array([brier_score(*pair) for pair in pairs]),
        "auroc": np.array([auroc(own[right == 1], own[right == 0]) for own, right in pairs]),
    }
    return {name: _over_seeds(own) for name, own in values.items() if not np.isnan(own).any()}


def _setting(results: Results, arm: Arm, size: int) -> dict[str, Any] | None:
    seeds = results.seeds(arm, size)
    if not seeds:
        return None
    lines = [results.line(arm, size, seed) for seed in seeds]
    fitted = {"temperature": round(fmean(line["temperature"] for line in lines), 2)} if arm.temperature else {}
    return {**(lines[0]["trial_overrides"] or {}), **fitted}
