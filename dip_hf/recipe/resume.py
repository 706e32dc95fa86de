"""Where a run goes on from."""

from __future__ import annotations

from transformers import TrainingArguments

from dip_hf.trainer import checkpoints


def resumed_checkpoint(training: TrainingArguments) -> str | None:
    """The folder that `resume_from_checkpoint` names, that of the last whole checkpoint where it is true.

    Raises:
        ValueError: there is none, or the one that is named was not written to its end.
    """
    given = str(training.resume_from_checkpoint)
    known = {"none": False, "false": False, "true": True}
    return checkpoints.resumed_checkpoint(known.get(given.lower(), given), training.output_dir)
