"""The last checks before an optimiser step and before weights are saved: a finite loss promises neither."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dip_hf.dipnet.layer import LOG_VARIANCE
from dip_hf.trainer.terms import NEW_RUN


def _whole(norm: Tensor) -> Tensor:
    """A norm as a plain scalar; that of sharded tensors is a DTensor."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def check_finite_weights(model: nn.Module, step: int) -> None:
    """The check before weights are saved: a step may ruin them whose loss and gradient were finite.

    Args:
        model: with the parameters that are trained.
        step: the number of optimiser steps made.

    Raises:
        FloatingPointError: one of them is NaN or infinite, or a log-variance whose standard deviation is; names it.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        value = (parameter.detach() / 2).exp() if f".{LOG_VARIANCE}." in name else parameter.detach()
        if not torch.isfinite(_whole(nn.utils.get_total_norm([value]))):
            raise FloatingPointError(
                f"Step {step}: the optimiser has made {name} infinite or NaN. Nothing was saved; checkpoints of "
                f"earlier steps are intact. Start {NEW_RUN}"
            )


def check_finite_gradient(norm: Tensor, step: int) -> None:
    """The check before a step that would make the parameters NaN, and the next checkpoint worthless.

    Args:
        norm: of the trained parameters' gradient before it was clipped, a scalar; an infinite one clips it to 0.
        step: the number of optimiser steps made.

    Raises:
        FloatingPointError: the norm is NaN or infinite; names the step.
    """
    whole = _whole(norm)
    if not torch.isfinite(whole):
        raise FloatingPointError(
            f"Step {step}: the norm of the gradient is {whole.item()}, though every term of the loss is finite. "
            "Training stopped before the optimiser step; checkpoints of earlier steps are intact. "
            f"Start {NEW_RUN}"
        )
