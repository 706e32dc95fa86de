"""Evaluation results of a run: read from a report of recipes/evaluate.py, and in the Hub's own two formats."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry

from dip_hf.hub.record import scrub
from dip_hf.hub.settings import check_repo_id


REPORT_NAME = "report.json"
PICTURE_NAME = "report.png"

_BENCHMARK = re.compile(r"(?P<task>[^=]+)=(?P<dataset>[^:=]+):(?P<task_id>[^:=]+)")


@dataclass(frozen=True)
class Line:
    """One row of the card's table.

    Attributes:
        tasks: name of the task set.
        items: number of items in it.
        checkpoint: name of what was evaluated.
        accuracy: in %.
        standard_error: of it, over items, in percentage points; None with one item in a task.
        difference: to the reference, in percentage points with its 95% interval; None for the reference.
    """

    tasks: str
    items: int
    checkpoint: str
    accuracy: float
    standard_error: float | None
    difference: tuple[float, float, float] | None


@dataclass(frozen=True)
class Results:
    """A report, and which of its checkpoints this run is.

    Attributes:
        checkpoint: this run's name in it.
        reference: name of the checkpoint that the others are compared with.
        lines: of all checkpoints on all task sets.
        report: the report's content, fit to be published.
        picture: the report's picture; None where there is none.
    """

    checkpoint: str
    reference: str
    lines: tuple[Line, ...]
    report: dict[str, Any]
    picture: Path | None

    def model_index(self) -> list[EvalResult]:
        """This run's results on task sets, as the metadata `model-index` of a model card has them; in %."""
        return [
            EvalResult(
                task_type="text-generation",
                dataset_type=block["name"],
                dataset_name=block["name"],
                metric_type=block["metric"],
                metric_name="accuracy in %",
                metric_value=round(line.accuracy, 2),
                metric_args={"standard_error": _rounded(line.standard_error), "items": line.items},
            )
            for block in self.report["task_sets"]
            for line in _lines(block, self.reference)
            if line.checkpoint == self.checkpoint
        ]

    def benchmark_entries(self, benchmarks: Iterable[str]) -> dict[str, EvalResultEntry]:
        """This run's results on Hub benchmarks, for .eval_results/.

        Args:
            benchmarks: each `TASK=DATASET_ID:TASK_ID`: a task of the report, and what the Hub calls it.

        Returns:
            A file's name to its entry, the value in %.

        Raises:
            ValueError: one is malformed, not in the report, or was run on some of its items only.
        """
        entries = {}
        for text in benchmarks:
            match = _BENCHMARK.fullmatch(text)
            if match is None:
                raise ValueError(f"benchmarks: {text!r} must read TASK=DATASET_ID:TASK_ID")
            check_repo_id("benchmarks", match["dataset"])
            if self.report["settings"]["limit"] is not None:
                raise ValueError(
                    f"benchmarks: {text!r}: the report covers the first {self.report['settings']['limit']} items of "
                    "each task only; evaluate without limit for a result that can stand beside others"
                )
            blocks = {block["name"]: block for block in self.report["tasks"]}
            if match["task"] not in blocks:
                raise ValueError(f"benchmarks: {match['task']!r} is no task of the report, which has {sorted(blocks)}")
            lines = _lines(blocks[match["task"]], self.reference)
            line = next(line for line in lines if line.checkpoint == self.checkpoint)
            error = "" if line.standard_error is None else f", standard error {line.standard_error:.2f}"
            entries[re.sub(r"\W+", "_", match["task"]) + ".yaml"] = EvalResultEntry(
                dataset_id=match["dataset"],
                task_id=match["task_id"],
                value=round(line.accuracy, 2),
                notes=f"{match['task']} of lm-eval {self.report['environment']['packages'].get('lm_eval', '')}, "
                f"{line.items} items{error}",
            )
        return entries


def read_results(folder: Path, report: str | None = None, checkpoint: str | None = None) -> Results | None:
    """Read the report on a run.

    Args:
        folder: of the run.
        report: report.json or its folder; default: report.json in `folder`, if there is one.
        checkpoint: the run's name in the report; default: found by the run's folder, or by its folder's name.

    Returns:
        None without a report.

    Raises:
        ValueError: the report is missing or no report, or this run is not in it.
    """
    path = Path(report) if report is not None else folder / REPORT_NAME
    path = path / REPORT_NAME if path.is_dir() else path
    if not path.is_file():
        if report is None:
            return None
        raise ValueError(f"report={report!r} does not exist: give the folder that recipes/evaluate.py wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        folders = {entry["name"]: entry["path"] for entry in content["checkpoints"]}
        reference = str(content["reference"])
        lines = tuple(line for block in content["task_sets"] for line in _lines(block, reference))
        content["settings"]["limit"], content["tasks"], content["environment"]["packages"]  # read below
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"report: {path} is no report of recipes/evaluate.py ({error!r}); evaluate again") from error
    name = checkpoint if checkpoint is not None else _name_of(folder, folders)
    if name is None or name not in folders:
        raise ValueError(
            f"checkpoint={checkpoint!r}: {path} does not say which of its checkpoints {sorted(folders)} "
            f"{folder} is; give its name as checkpoint"
        )
    picture = path.with_name(PICTURE_NAME)
    return Results(name, reference, lines, scrub(content), picture if picture.is_file() else None)


def _name_of(folder: Path, folders: dict[str, str | None]) -> str | None:
    """The checkpoint of that very folder, or the only one whose folder has the same name."""
    exact = [name for name, path in folders.items() if path and Path(path).resolve() == folder.resolve()]
    alike = [name for name, path in folders.items() if path and Path(path).name == folder.resolve().name]
    found = exact or alike
    return found[0] if len(found) == 1 else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _lines(block: dict[str, Any], reference: str) -> list[Line]:
    lines = []
    for row in block["rows"]:
        error, difference = row["standard_error"], row["differences"].get(reference)
        lines.append(
            Line(
                tasks=str(block["name"]),
                items=int(block["items"]),
                checkpoint=str(row["checkpoint"]),
                accuracy=100 * float(row["accuracy"]),
                standard_error=None if error is None else 100 * float(error),
                difference=None
                if difference is None
                else (float(difference["points"]), float(difference["low"]), float(difference["high"])),
            )
        )
    return lines
