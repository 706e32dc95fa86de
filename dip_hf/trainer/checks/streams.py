"""Checks of a stream, whose rows are seen when it is their turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import Trainer


def check_streamed(batches: Sequence[Mapping[str, Any]]) -> None:
    """A stream's rows are seen when it is their turn.

    Args:
        batches: of one optimiser step; a row that is packed, or without padding, is one row with its neighbours.

    Raises:
        ValueError: a row trains no token, and is or has more than one.
    """
    for batch in batches:
        labels, mask, positions = (batch.get(name) for name in ("labels", "attention_mask", "position_ids"))
        if not isinstance(labels, Tensor) or labels.dim() != 2:
            continue
        idle = ~(labels[:, 1:] != -100).any(1)
        if isinstance(mask, Tensor) and mask.shape == labels.shape:
            idle &= mask.sum(1) > 1  # a lone token, such as an empty text's, has nothing to predict
        elif isinstance(positions, Tensor) and positions.shape == labels.shape:
            idle &= (positions > 0).any(1)
        if idle.any():
            raise ValueError(
                "train_dataset: a row of the stream has no label but perhaps on its first token, which nothing "
                "predicts, so the row trains nothing; filter such rows out."
            )


def check_steps_made(trainer: Trainer) -> None:
    """
    Raises:
        ValueError: training ended without a step, for a stream had no row with a label within `max_length`.
    """
    if trainer.state.global_step == 0 and trainer.state.max_steps > 0:
        raise ValueError(
            f"train_dataset: the stream gave no batch, so no step was made: max_length={trainer.args.max_length} cuts "
            "every label off its rows, or there are fewer than a batch; raise max_length, or give more rows."
        )
