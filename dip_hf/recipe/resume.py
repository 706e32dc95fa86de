"""Where a run goes on from."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


def resumed_checkpoint(training: TrainingArguments) -> str | None:
    """The folder that `resume_from_checkpoint` names, that of the last checkpoint where it is true.

    Raises:
        ValueError: there is none.
    """
    given, folder = str(training.resume_from_checkpoint), Path(training.output_dir)
    if given.lower() in ("none", "false"):
        return None
    last = given.lower() == "true"
    found = get_last_checkpoint(folder) if last and folder.is_dir() else None if last else given
    if found is None or not Path(found).is_dir():
        raise ValueError(
            f"resume_from_checkpoint={given}: no checkpoint in {folder if last else given}; leave it out to begin anew"
        )
    return found
