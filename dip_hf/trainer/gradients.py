"""The last checks before an optimiser step and before weights are saved: a finite loss promises neither."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dip_hf.dipnet.layer import LOG_VARIANCE
from dip_hf.trainer.terms import NEW_RUN


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients together, a plain scalar.

    Args:
        gradients: at least one; sharded ones (DTensors) and plain ones may be mixed, as under expert parallelism, and
            the former lie on different meshes, of which torch takes one at a time.
    """
    by_mesh = defaultdict(list)
    for gradient in gradients:
        by_mesh[gradient.device_mesh if isinstance(gradient, DTensor) else None].append(gradient)
    norms = [nn.utils.get_total_norm(group) for group in by_mesh.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return whole[0] if len(whole) == 1 else nn.utils.get_total_norm(whole)


def check_finite_weights(model: nn.Module, step: int) -> None:
    """The check before weights are saved: a step may ruin them whose loss and gradient were finite.

    Args:
        model: with the parameters that are trained.
        step: the number of optimiser steps made.

    Raises:
        FloatingPointError: one of them is NaN or infinite, or a log-variance whose standard deviation is; names it.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    values = {
        name: (parameter.detach() / 2).exp() if f".{LOG_VARIANCE}." in name else parameter.detach()
        for name, parameter in trained.items()
    }
    if not values or torch.isfinite(total_norm(values.values())):
        return
    ruined = [name for name, value in values.items() if not torch.isfinite(total_norm([value]))]
    raise FloatingPointError(
        f"Step {step}: the optimiser has made {ruined[0] if ruined else 'the weights'} infinite or NaN. Nothing was "
        f"saved; checkpoints of earlier steps are intact. Start {NEW_RUN}"
    )


class FiniteGradients(TrainerCallback):
    """Stops a run before a step that would make its parameters NaN, and its next checkpoint worthless.

    Not in fp16, whose gradient scaler meets infinities and leaves such steps out itself; nor under DeepSpeed, which
    keeps the gradients to itself.

    Raises:
        FloatingPointError: the norm of the trained parameters' gradient is NaN or infinite; names the step.
    """

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None  # given by Trainer
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if args.mixed_precision == "fp16" or not gradients:  # of the arguments, or of the launcher
            return
        norm = total_norm(gradients)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"Step {state.global_step}: the norm of the gradient is {norm.item()}, though every term of the loss "
                "is finite. Training stopped before the optimiser step; checkpoints of earlier steps are intact. "
                f"Start {NEW_RUN}"
            )
