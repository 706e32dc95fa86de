"""From scores to a report: rows per task set and task, as text, Markdown and JSON."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dip_hf.environment import describe_environment, public_folder
from dip_hf.evaluation.calibration_report import (
    CALIBRATION_RESAMPLES,
    CalibrationBlock,
    calibration_footnote,
    calibration_tables,
    make_calibration,
)
from dip_hf.evaluation.results import CheckpointScores, EvaluationSettings, TaskScores
from dip_hf.evaluation.statistics import PairedDifference, accuracy, paired_difference, standard_error
from dip_hf.evaluation.tables import Table, markdown, plain
from dip_hf.evaluation.wording import describe_cut, describe_items, describe_split


RESAMPLES = 10_000
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Row:
    """One checkpoint on one task set or task.

    Attributes:
        checkpoint: its name.
        accuracy: a fraction in [0, 1], the unweighted mean over tasks.
        standard_error: of it, a fraction; NaN with one item in a task.
        differences: to each checkpoint before it, by name, on the same items; empty for the first.
    """

    checkpoint: str
    accuracy: float
    standard_error: float
    differences: dict[str, PairedDifference]


@dataclass(frozen=True)
class Block:
    """The rows of all checkpoints on one task set or task.

    Attributes:
        name: of the set or task.
        metric: the score's name, or names.
        tasks: number of tasks.
        items: number of items, over all of them.
        rows: one per checkpoint, in their order.
    """

    name: str
    metric: str
    tasks: int
    items: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Report:
    """A comparison of checkpoints, ready to be written.

    Attributes:
        settings: what was asked for.
        results: the scores.
        sets: one block per task set.
        tasks: one block per task.
        calibration: one block per task set; none where it was not measured.
    """

    settings: EvaluationSettings
    results: tuple[CheckpointScores, ...]
    sets: tuple[Block, ...]
    tasks: tuple[Block, ...]
    calibration: tuple[CalibrationBlock, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The checkpoints' names; the first is the reference."""
        return tuple(result.checkpoint.name for result in self.results)

    @property
    def footnote(self) -> str:
        """How to read the numbers."""
        cut = describe_cut({result.checkpoint.name: result.cut_prompts for result in self.results})
        return (
            f"Accuracy in % ± one standard error over items, the unweighted mean over a set's tasks. Difference to "
            f"{self.names[0]} in percentage points on the same items, with its 95% bootstrap interval. Neither covers "
            f"the choice of a training seed. {cut}"
        ).rstrip()


def make_report(settings: EvaluationSettings, results: Sequence[CheckpointScores]) -> Report:
    """Compute accuracies and paired differences to the first checkpoint.

    Args:
        settings: of the evaluation.
        results: at least one checkpoint's scores, all on the same items.

    Raises:
        ValueError: no result, or two checkpoints that were not scored on the same items.
    """
    if not results:
        raise ValueError("results is empty: evaluate at least one checkpoint")
    items = [[(task.task, task.items) for task in result.tasks] for result in results]
    for result, own in zip(results, items, strict=True):
        if own != items[0]:
            raise ValueError(
                f"checkpoint {result.checkpoint.name!r} was not scored on the items of "
                f"{results[0].checkpoint.name!r}; evaluate them in one run"
            )
    first = results[0].tasks
    sets = [
        _block(name, [[task for task in result.tasks if task.task_set == name] for result in results], results)
        for name in dict.fromkeys(task.task_set for task in first)
    ]
    tasks = [
        _block(task.task, [[result.tasks[index]] for result in results], results) for index, task in enumerate(first)
    ]
    return Report(
        settings, tuple(results), tuple(sets), tuple(tasks), make_calibration(results, settings.in_distribution)
    )


_RIGHT = (1, 3, 4)  # columns of numbers


def _block(name: str, tasks: Sequence[Sequence[TaskScores]], results: Sequence[CheckpointScores]) -> Block:
    """`tasks` holds, per checkpoint, the tasks of this block."""
    strata = [[task.scores for task in own] for own in tasks]
    rows = []
    for index, (result, own) in enumerate(zip(results, strata, strict=True)):
        differences = {
            earlier.checkpoint.name: paired_difference(
                own, reference, generator=np.random.default_rng(BOOTSTRAP_SEED), resamples=RESAMPLES
            )
            for earlier, reference in zip(results[:index], strata[:index], strict=True)
        }
        rows.append(Row(result.checkpoint.name, accuracy(own), standard_error(own), differences))
    metrics = ", ".join(dict.fromkeys(task.metric for task in tasks[0]))
    return Block(name, metrics, len(tasks[0]), sum(map(len, strata[0])), tuple(rows))


def _main_table(blocks: Iterable[Block]) -> Table:
    """Header and rows: accuracies, and differences to the first checkpoint."""
    table: Table = [("tasks", "items", "checkpoint", "accuracy", "difference", "95% interval")]
    for block in blocks:
        for index, row in enumerate(block.rows):
            error = "n/a" if math.isnan(row.standard_error) else f"{100 * row.standard_error:.1f}"
            lead = (_title(block), str(block.items)) if index == 0 else ("", "")
            first = next(iter(row.differences.values()), None)
            table.append((*lead, row.checkpoint, f"{100 * row.accuracy:.1f} ± {error}", *_difference(first)))
    return table


def _other_table(blocks: Iterable[Block], names: Sequence[str]) -> Table:
    """Header and rows: differences among the checkpoints after the first. Empty with fewer than three."""
    if len(names) < 3:
        return []
    table: Table = [("tasks", "items", "comparison", "better / worse items", "difference", "95% interval")]
    for block in blocks:
        lead = (_title(block), str(block.items))
        for row in block.rows[2:]:
            for name, difference in list(row.differences.items())[1:]:
                counts = f"{difference.better} / {difference.worse}"
                table.append((*lead, f"{row.checkpoint} - {name}", counts, *_difference(difference)))
                lead = ("", "")
    return table


def _difference(value: PairedDifference | None) -> tuple[str, str]:
    return ("", "") if value is None else (f"{value.points:+.1f}", f"[{value.low:+.1f}, {value.high:+.1f}]")


def _title(block: Block) -> str:
    return f"{block.name} ({block.tasks} tasks)" if block.tasks > 1 else block.name


def to_text(report: Report) -> str:
    """The tables of task sets for a terminal."""
    tables = [_main_table(report.sets), _other_table(report.sets, report.names)]
    warning = describe_split(report.settings.split)
    parts = [warning] if warning else []
    parts += [*(plain(table, _RIGHT) for table in tables if table), textwrap.fill(report.footnote, 100)]
    if report.calibration:
        parts += [plain(table, right) for table, right in calibration_tables(report.calibration)]
        parts.append(textwrap.fill(calibration_footnote(report.calibration), 100))
    return "\n\n".join(parts)


def to_markdown(report: Report, picture: str | None = None, calibration_picture: str | None = None) -> str:
    """The tables of task sets and of single tasks, with what was run.

    Args:
        report: the comparison.
        picture: file name of the picture, to be shown.
        calibration_picture: the same for the reliability diagrams.
    """
    settings, environment = report.settings, describe_environment(report.settings.device)
    checkpoints = "\n".join(
        f"| {result.checkpoint.name} | {result.kind} | `{result.checkpoint.path or settings.model}` "
        f"| {result.prediction} | {result.seconds:.0f} |"
        for result in report.results
    )
    packages = ", ".join(f"{name} {number}" for name, number in environment["packages"].items())
    items = describe_items(settings.limit, [block.items for block in report.tasks])
    families = "" if settings.families is None else f"families {', '.join(settings.families)}; "
    others = _other_table(report.sets, report.names)
    revision = report.results[0].revision
    base = f"`{settings.model}`" + (f" at `{revision}`" if revision else "")
    parts = [
        f"# Evaluation of {', '.join(report.names)}",
        describe_split(settings.split),
        f"![Accuracy and paired differences]({picture})" if picture else "",
        markdown(_main_table(report.sets), _RIGHT),
        markdown(others, _RIGHT) if others else "",
        report.footnote,
        *_calibration_parts(report, calibration_picture),
        "## Checkpoints",
        f"| name | kind | folder | prediction | seconds |\n|---|---|---|---|---:|\n{checkpoints}",
        "## Single tasks",
        markdown(_main_table(report.tasks), _RIGHT) if len(report.tasks) > len(report.sets) else "As above.",
        "## Settings",
        f"Base {base}; {families}split {settings.split}; {items}; dtype {settings.dtype}; batch size "
        f"{settings.batch_size}; noise seed {settings.noise_seed}; {RESAMPLES} bootstrap resamples, seed "
        f"{BOOTSTRAP_SEED}.",
        f"Device {environment['device']}; Python {environment['python']}; {packages}; commit {environment['commit']}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _calibration_parts(report: Report, picture: str | None) -> list[str]:
    if not report.calibration:
        return []
    tables = [markdown(table, right) for table, right in calibration_tables(report.calibration)]
    shown = f"![Reliability diagrams]({picture})" if picture else ""
    return ["## Calibration", shown, *tables, calibration_footnote(report.calibration)]


def to_json(report: Report) -> str:
    """Everything but the single items: settings, environment, and each block's counts, accuracies and differences."""

    folder = report.settings.include_path
    content: dict[str, Any] = {
        # A report travels; where the task files lay on this machine does not
        "settings": asdict(report.settings)
        | {"include_path": None if folder is None else public_folder(folder)}
        | {"bootstrap_resamples": RESAMPLES, "bootstrap_seed": BOOTSTRAP_SEED},
        "environment": describe_environment(report.settings.device),
        "checkpoints": [
            {
                "name": result.checkpoint.name,
                "path": result.checkpoint.path,
                "kind": result.kind,
                "num_samples": result.num_samples,
                "dropout": result.checkpoint.dropout,
                "temperature": result.temperature,
                "weights": result.weights,
                "cut_prompts": result.cut_prompts,
                "seconds": round(result.seconds, 1),
            }
            for result in report.results
        ],
        "reference": report.names[0],
        "revision": report.results[0].revision,
        "task_sets": [asdict(value) for value in report.sets],
        "tasks": [
            asdict(value) | {"task_set": task.task_set}
            for value, task in zip(report.tasks, report.results[0].tasks, strict=True)
        ],
    }
    if report.calibration:
        content["calibration"] = {
            "resamples": CALIBRATION_RESAMPLES,
            "task_sets": [asdict(value) for value in report.calibration],
        }
    return json.dumps(_without_nan(content), indent=2, allow_nan=False) + "\n"


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
