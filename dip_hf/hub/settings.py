"""What is pushed, and where to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id


@dataclass
class PushSettings:
    """One push of a finished run.

    The access token is no field: it comes from `HF_TOKEN` or from `hf auth login`.

    Raises:
        ValueError: a field's value makes no sense; the message names field, value and remedy.
    """

    folder: str = field(metadata={"help": "Folder of a finished run: an adapter, or a whole model."})
    repo_id: str = field(metadata={"help": "Repository on the Hub, such as `you/name`; made where it is missing."})
    base_model: str | None = field(
        default=None,
        metadata={"help": "The base's name on the Hub; needed where the run was trained on a local folder."},
    )
    datasets: list[str] | None = field(
        default=None,
        metadata={
            "help": "What it was trained on: names on the Hub, or words for the card; what the run recorded if not "
            "given."
        },
    )
    report: str | None = field(
        default=None,
        metadata={"help": "report.json of recipes/evaluate.py, or its folder; FOLDER/report.json if not given."},
    )
    checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "What the report calls this run; if not given, found by its folder, or, where the report was made "
            "on another machine, by the folder's name."
        },
    )
    benchmarks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Any number of `TASK=DATASET_ID:TASK_ID`: write the report's result on TASK, which must have run "
            "on all items, to .eval_results/ as one on that Hub benchmark."
        },
    )
    merged: bool = field(
        default=False, metadata={"help": "Push the base with the adapter merged in too, in the subfolder merged/."}
    )
    dry_run: bool = field(default=False, metadata={"help": "List every file with its size, and send nothing."})
    private: bool = field(
        default=False,
        metadata={
            "help": "Make a new repository private, and refuse a public one; the Hub's own default if not given."
        },
    )
    force: bool = field(default=False, metadata={"help": "Push over commits that did not come from this folder."})
    revision: str | None = field(default=None, metadata={"help": "Branch to push to; main if not given."})
    commit_message: str | None = field(default=None, metadata={"help": "Of the one commit that a push makes."})

    def __post_init__(self) -> None:
        if not Path(self.folder).is_dir():
            raise ValueError(f"folder={self.folder!r} is no folder: give the one that training wrote")
        for name in ("datasets", "benchmarks"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        for name in ("repo_id", "base_model"):
            value = getattr(self, name)
            if value is not None:
                check_repo_id(name, value)


def is_repo_id(name: str) -> bool:
    """Whether the Hub could have a repository of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_repo_id(name: str, value: str) -> None:
    """Refuse what is no repository name.

    Raises:
        ValueError: names the field, the value and the remedy.
    """
    try:
        validate_repo_id(value)
    except HFValidationError as error:
        raise ValueError(f"{name}={value!r} is no name on the Hub, such as `you/name`: {error}") from error
