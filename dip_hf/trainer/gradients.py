"""The last check before an optimiser step: a loss may be finite whose gradient is not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
        if args.fp16 or not gradients:
            return
        norm = total_norm(gradients)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"Step {state.global_step}: the norm of the gradient is {norm.item()}, though every term of the loss "
                "is finite. Training stopped before the optimiser step; the last checkpoint is intact. Start "
                f"{NEW_RUN}"
            )
