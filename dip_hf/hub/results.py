"""Evaluation results of a run: read from a report of recipes/evaluate.py, and in the Hub's own two formats."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry

from dip_hf.adapter_files import CONFIG_NAME
from dip_hf.evaluation.wording import Prediction, describe_cut, describe_items, describe_split
from dip_hf.hub.record import scrub
from dip_hf.hub.settings import check_repo_id
from dip_hf.model_files import weight_digests


EVALUATION_FOLDER = "evaluation"
"""Where a repository has the report."""
BENCHMARK_FOLDER = ".eval_results"
"""Where the Hub looks for results on its benchmarks."""
REPORT_NAME = "report.json"
PICTURE_NAME = "report.png"

_BENCHMARK = re.compile(r"(?P<task>[^=]+)=(?P<dataset>[^:=]+):(?P<task_id>[^:=]+)")


class StaleReportError(ValueError):
    """A report is on other weights than a run's folder holds now."""


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
        predictions: how each checkpoint predicts, by its name; without those of which an older report says nothing.
        origin: which entry of which report was taken, and why; it may name local folders.
    """

    checkpoint: str
    reference: str
    lines: tuple[Line, ...]
    report: dict[str, Any]
    picture: Path | None
    predictions: dict[str, Prediction] = field(default_factory=dict)
    origin: str = ""

    @property
    def prediction(self) -> Prediction | None:
        """How this run predicts; None where an older report does not say."""
        return self.predictions.get(self.checkpoint)

    @property
    def split(self) -> str:
        """ "test", which is all that older reports know, or "validation"."""
        return str(self.report["settings"].get("split", "test"))

    @property
    def split_warning(self) -> str:
        """A sentence where it is not the test split; else empty."""
        return describe_split(self.split)

    @property
    def items(self) -> str:
        """Which items of each task were used, in words."""
        return describe_items(self.report["settings"]["limit"], [block["items"] for block in self.report["tasks"]])

    @property
    def cut_prompts(self) -> str:
        """A sentence where prompts were cut; else empty, as for older reports, which do not say."""
        return describe_cut({entry["name"]: entry.get("cut_prompts", 0) for entry in self.report["checkpoints"]})

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
                # Under "test", lm-eval's own tasks have splits of their own
                dataset_split=None if self.split == "test" else self.split,
                metric_args={"standard_error": _rounded(line.standard_error), "items": line.items}
                | ({} if self.prediction is None else {"prediction": str(self.prediction)}),
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
            ValueError: one is malformed, not in the report, the second of its task, or
                was run on the validation split or some items only.
        """
        entries = {}
        for text in benchmarks:
            match = _BENCHMARK.fullmatch(text)
            if match is None:
                raise ValueError(f"benchmarks: {text!r} must read TASK=DATASET_ID:TASK_ID")
            check_repo_id("benchmarks", match["dataset"])
            if self.split != "test":
                raise ValueError(
                    f"benchmarks: {text!r}: the report has split={self.split!r}; evaluate on the test split"
                )
            if self.report["settings"]["limit"] is not None:
                raise ValueError(
                    f"benchmarks: {text!r}: the report covers {self.items} only; evaluate without limit for a result "
                    "that can stand beside others"
                )
            blocks = {block["name"]: block for block in self.report["tasks"]}
            if match["task"] not in blocks:
                raise ValueError(f"benchmarks: {match['task']!r} is no task of the report, which has {sorted(blocks)}")
            lines = _lines(blocks[match["task"]], self.reference)
            line = next(line for line in lines if line.checkpoint == self.checkpoint)
            error = "" if line.standard_error is None else f", standard error {line.standard_error:.2f}"
            prediction = "" if self.prediction is None else f", {self.prediction}"
            name = re.sub(r"\W+", "_", match["task"]) + ".yaml"
            if name in entries:
                raise ValueError(f"benchmarks: {text!r} is another result for {name}; give one benchmark for a task")
            entries[name] = EvalResultEntry(
                dataset_id=match["dataset"],
                task_id=match["task_id"],
                value=round(line.accuracy, 2),
                notes=f"{match['task']} of lm-eval {self.report['environment']['packages'].get('lm_eval', '')}, "
                f"{line.items} items{error}{prediction}",
            )
        return entries


def read_results(folder: Path, report: str | None = None, checkpoint: str | None = None) -> Results | None:
    """Read the report on a run.

    Args:
        folder: of the run.
        report: report.json or its folder; default: report.json in `folder`, if there is one.
        checkpoint: the run's name in the report; default: found by the run's folder, or by its folder's name where
            what the report names is not on this machine.

    Returns:
        None without a report.

    Raises:
        ValueError: the report is missing or no report, or this run is not in it, or is not the base that was asked
            for.
        StaleReportError: the run was trained again since.
    """
    path = Path(report) if report is not None else folder / REPORT_NAME
    path = path / REPORT_NAME if path.is_dir() else path
    if not path.is_file():
        if report is None:
            return None
        raise ValueError(f"report={report!r} does not exist: give the folder that recipes/evaluate.py wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        folders = {str(entry["name"]): entry["path"] and str(entry["path"]) for entry in content["checkpoints"]}
        weights = {str(entry["name"]): list(entry.get("weights") or []) for entry in content["checkpoints"]}
        predictions = {str(entry["name"]): _prediction(entry) for entry in content["checkpoints"]}
        reference = str(content["reference"])
        lines = tuple(line for block in content["task_sets"] for line in _lines(block, reference))
        content["settings"].get("split"), content["environment"]["packages"]  # read below
        describe_items(content["settings"]["limit"], [block["items"] for block in content["tasks"]])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"report: {path} is no report of recipes/evaluate.py ({error!r}); evaluate again") from error
    name, reason = _find_entry(folder, folders) if checkpoint is None else (checkpoint, "as asked for")
    if name is None or name not in folders:
        known = [entry if place is None else f"{entry}={place}" for entry, place in sorted(folders.items())]
        raise ValueError(
            f"checkpoint={checkpoint!r}: {path} does not say which of its checkpoints {known} {folder} is; give its "
            "name as checkpoint, or evaluate this folder"
        )
    if folders[name] is None and (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"checkpoint={name!r}: to {path} that is the base alone, but {folder} holds an adapter; give the name of "
            "a checkpoint with it, or evaluate this folder"
        )
    if weights[name] and weight_digests(folder) not in weights[name]:
        raise StaleReportError(
            f"report: {path} has results of {name!r} with other weights than {folder} holds now; evaluate again, or "
            "push without this report"
        )
    picture = path.with_name(PICTURE_NAME)
    return Results(
        checkpoint=name,
        reference=reference,
        lines=lines,
        report=scrub(content),
        picture=picture if picture.is_file() else None,
        predictions={entry: prediction for entry, prediction in predictions.items() if prediction is not None},
        origin=f"{name!r} of {path}: {reason}",
    )


def _find_entry(folder: Path, folders: dict[str, str | None]) -> tuple[str | None, str]:
    """The checkpoint of that very folder, or else the only one whose folder has the same name and is not here.

    Returns:
        Its name, None where it is none or not clear; and the reason, for people.
    """
    own = folder.resolve()
    above = (Path.cwd(), *own.parents)  # a relative path is seen from where the evaluation was started
    exact, alike = [], []
    for name, path in folders.items():
        if not path or "+" in path:  # the base; an ensemble, which is no one run
            continue
        here = [(place / path).resolve() for place in above if (place / path).exists()]
        if own in here:
            exact.append((name, f"evaluated from {path}"))
        elif not here and Path(path).name == own.name:
            alike.append((name, f"its folder {path} is not on this machine, and has the same name"))
    found = exact or alike
    return found[0] if len(found) == 1 else (None, "")


def _prediction(entry: dict[str, Any]) -> Prediction | None:
    """How an entry of a report predicts; None where an older one does not say."""
    if "num_samples" not in entry:
        return None
    temperature = entry.get("temperature")
    return Prediction(
        adapters=len((entry["path"] or "").split("+")),
        num_samples=int(entry["num_samples"]),
        dropout=bool(entry.get("dropout")),
        temperature=None if temperature is None else float(temperature),
    )


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
