"""Terms of the loss: their scale under accumulation and ranks, and their place in the log."""

from __future__ import annotations

import math
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
        value: raw scalar, scaled as a mean over the whole accumulated batch of all ranks would be.
        weight: what it is multiplied by in the loss.
        share: this micro-batch's share of the step, by which the raw value enters the loss.
    """

    name: str
    value: Tensor
    weight: float
    share: float

    @property
    def loss(self) -> Tensor:
        """What is added to the loss of this micro-batch."""
        return self.value * (self.weight * self.share)


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


def batch_mean(name: str, value: Tensor, weight: float, accumulation_steps: int) -> Term:
    """A term that is a mean over a micro-batch (or depends on parameters alone).

    Every micro-batch counts alike, so each enters the step with 1/`accumulation_steps`; the ranks' gradients are
    averaged by the wrapper.
    """
    return Term(name, value, weight, 1 / accumulation_steps)


def token_mean(
    name: str, total: Tensor, weight: float, num_items: Tensor | int, num_processes: int, accumulation_steps: int
) -> Term:
    """A term that is a sum over label tokens, made a mean over all label tokens of the step, as TRL does.

    Args:
        total: sum over this micro-batch's label tokens.
        num_items: label tokens of the step, over all micro-batches and ranks.
        num_processes: the wrapper averages the ranks' gradients, which is undone by this factor.
        accumulation_steps: for the log only: the raw value is scaled up as if every micro-batch had this one's total.
    """
    scale = num_processes * accumulation_steps / torch.as_tensor(num_items, device=total.device).clamp(min=1)
    return Term(name, total * scale, weight, 1 / accumulation_steps)
