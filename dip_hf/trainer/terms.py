"""Terms of the loss: their scale under accumulation and ranks, and their place in the log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


NEW_RUN = (
    "a new run with a lower learning rate, from the beginning or from the checkpoint's weights (an adapter's: "
    "PeftModel.from_pretrained(base, CHECKPOINT, is_trainable=True)); resuming restores the old rate."
)
"""What to do where the loss has lost its way."""


@dataclass(frozen=True)
class Term:
    """One additive term of a micro-batch's loss, on one rank.

    Attributes:
        name: its name in the log; "NAME" is the raw value, "NAME_weighted" the value times `weight`.
        value: raw scalar, scaled as if every micro-batch of every rank had this one's: their mean is that of the step,
            and 1/micro-batches of it enters the loss, as of a term that is a mean over a micro-batch.
        weight: what it is multiplied by in the loss.
    """

    name: str
    value: Tensor
    weight: float


def check_finite(name: str, value: float, step: int) -> None:
    """
    Args:
        name: of a term.
        value: the term's.
        step: at which it came up.

    Raises:
        FloatingPointError: the value is NaN or infinite; names the step and the term.
    """
    if not math.isfinite(value):
        remedy = "Start" if name == "task" else "Lower the term's weight and resume from one, or start"
        raise FloatingPointError(
            f"Step {step}: the term {name!r} is {value}. Training stopped before the optimiser step; checkpoints of "
            f"earlier steps are intact. {remedy} {NEW_RUN}"
        )


def token_mean(
    name: str, total: Tensor, weight: float, num_items: Tensor | int, num_processes: int, accumulation_steps: int
) -> Term:
    """A term that is a sum over label tokens, made a mean over all label tokens of the step, as TRL does.

    Args:
        total: sum over this micro-batch's label tokens.
        num_items: label tokens of the step, over all micro-batches and ranks.
        num_processes: the wrapper averages the ranks' gradients, which is undone by this factor.
        accumulation_steps: micro-batches of the step; likewise.
    """
    scale = num_processes * accumulation_steps / torch.as_tensor(num_items, device=total.device).clamp(min=1)
    return Term(name, total * scale, weight)


def total_loss(terms: Sequence[Term], accumulation_steps: int) -> Tensor:
    """What a micro-batch's backward pass starts from: the weighted terms, of which the step adds up so many."""
    weighted = [(term.value * term.weight).to(terms[0].value.device) for term in terms]
    return torch.stack(weighted).sum() / accumulation_steps
