"""Which of a run's checkpoints are whole, so that a run goes on from the last of them."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


STATE_NAME = "trainer_state.json"
"""What Trainer writes last into a checkpoint, and reads whenever it resumes."""


def is_whole(checkpoint: str | Path) -> bool:
    """Whether a checkpoint was written to its end, and not cut short by a kill."""
    try:
        TrainerState.load_from_json(str(Path(checkpoint, STATE_NAME)))
    except (OSError, ValueError, TypeError):  # missing, cut, or of another kind
        return False
    return True


def last_checkpoint(folder: str | Path) -> str | None:
    """The whole checkpoint of the highest step in a run's `output_dir`; None where there is none.

    transformers' `get_last_checkpoint` takes a half-written one too.
    """
    found = [(path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"), path) for path in Path(folder).glob("checkpoint-*")]
    steps = sorted(((int(step), path) for step, path in found if step.isdecimal()), reverse=True)
    return next((str(path) for _, path in steps if is_whole(path)), None)


def resumed_checkpoint(given: str | bool, folder: str | Path) -> str | None:
    """The folder to go on from; None to begin anew.

    Args:
        given: that folder, or whether to take the last whole checkpoint.
        folder: a run's `output_dir`.

    Raises:
        ValueError: there is none, or the one that is named was not written to its end.
    """
    if given is False:
        return None
    found = last_checkpoint(folder) if given is True else given
    if found is None or not Path(found).is_dir():
        place = folder if given is True else given
        raise ValueError(f"resume_from_checkpoint={given}: no whole checkpoint in {place}; leave it out to begin anew")
    if not is_whole(found):
        raise ValueError(
            f"resume_from_checkpoint={given} was not written to its end: the run was stopped while it saved; name an "
            "earlier one, or set it to true for the last that is whole"
        )
    return found
