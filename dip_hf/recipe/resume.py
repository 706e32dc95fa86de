"""Where a run goes on from."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments

from dip_hf.trainer.checkpoints import is_whole, last_checkpoint


def resumed_checkpoint(training: TrainingArguments) -> str | None:
    """The folder that `resume_from_checkpoint` names, that of the last whole checkpoint where it is true.

    Raises:
        ValueError: there is none, or the one that is named was not written to its end.
    """
    given, folder = str(training.resume_from_checkpoint), Path(training.output_dir)
    if given.lower() in ("none", "false"):
        return None
    last = given.lower() == "true"
    found = last_checkpoint(folder) if last else given
    if found is None or not Path(found).is_dir():
        raise ValueError(
            f"resume_from_checkpoint={given}: no checkpoint in {folder if last else given}; leave it out to begin anew"
        )
    if not is_whole(found):
        raise ValueError(
            f"resume_from_checkpoint={given} was not written to its end: the run was stopped while it saved; name an "
            "earlier one, or set it to true for the last that is whole"
        )
    return found
