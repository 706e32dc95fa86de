"""Checks of rows that are seen when it is their turn: a stream's, and those that the collator prepares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def check_streamed(batches: Sequence[Mapping[str, Any]], of: str) -> None:
    """
    Args:
        batches: of one optimiser step; a row that is packed, or without padding, is one row with its neighbours.
        of: what a row is of, for the error message.

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
                f"train_dataset: a row of the {of} has no label but perhaps on its first token, which nothing "
                "predicts, so the row trains nothing; filter such rows out, or raise max_length if it cut them."
            )


def check_first_step(batches: Sequence[Mapping[str, Any]], wanted: int, max_length: int | None) -> None:
    """
    Args:
        batches: for a run's first optimiser step.
        wanted: how many that step takes; with fewer, Trainer would begin its epoch anew without end.
        max_length: to which rows are cut.

    Raises:
        ValueError: there are fewer, as of a stream that has no row with a label within `max_length`.
    """
    if len(batches) < wanted:
        raise ValueError(
            f"train_dataset gave {len(batches)} of the {wanted} batches of the first step: max_length={max_length} "
            "cuts every label off its rows, or they are too few; raise max_length, or give more rows."
        )
