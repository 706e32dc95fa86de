"""Baselines that only a study needs: sharpness-aware minimisation and R-Drop, each a small subclass of the trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

from dip_hf.dipnet.model import DIPNetModel
from dip_hf.trainer import DIPSFTConfig, DIPSFTTrainer


@dataclass
class StudyConfig(DIPSFTConfig):
    """`DIPSFTConfig` and the strengths of the study's own baselines, both off by default.

    Args:
        sam_rho: ρ, radius of sharpness-aware minimisation (arXiv 2010.01412) in the Euclidean norm of the gradient
            over all trained parameters; 0 is off. Two forward and backward passes a step.
        rdrop_weight: α, weight of R-Drop's divergence (arXiv 2106.14448); 0 is off. Twice the rows in every pass.

    Raises:
        ValueError: a negative strength, both baselines at once, or a set-up that one of them does not work in.
    """

    sam_rho: float = field(default=0.0, metadata={"help": "ρ of sharpness-aware minimisation; 0 is off."})
    rdrop_weight: float = field(default=0.0, metadata={"help": "α of R-Drop; 0 is off."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sam_rho", "rdrop_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must not be negative; 0 turns it off")
        if self.sam_rho > 0 and self.rdrop_weight > 0:
            raise ValueError(f"sam_rho={self.sam_rho} and rdrop_weight={self.rdrop_weight}: set one of them to 0")
        if self.sam_rho > 0 and (self.gradient_accumulation_steps > 1 or self.fp16):
            raise ValueError(
                f"sam_rho={self.sam_rho} takes the second gradient on the batch of the first, unscaled: set "
                "gradient_accumulation_steps to 1 and fp16 to false"
            )
        if self.rdrop_weight > 0 and self.label_smoothing_factor > 0:
            raise ValueError(
                f"rdrop_weight={self.rdrop_weight} has a loss of its own, without label smoothing: set "
                "label_smoothing_factor to 0"
            )
        if self.rdrop_weight > 0 and (self.padding_free or self.packing):
            raise ValueError(
                f"rdrop_weight={self.rdrop_weight} repeats rows, of which a batch without padding has one: set "
                "padding_free and packing to false"
            )
        if self.rdrop_weight > 0 and (self.dres_weight > 0 or self.icp_weight > 0):
            raise ValueError(f"rdrop_weight={self.rdrop_weight} is a baseline: set dres_weight and icp_weight to 0")


def trainer_class(config: StudyConfig) -> type[DIPSFTTrainer]:
    """The trainer that `config` asks for."""
    if config.sam_rho > 0:
        return SAMTrainer
    return RDropTrainer if config.rdrop_weight > 0 else DIPSFTTrainer


class SAMTrainer(DIPSFTTrainer):
    """Sharpness-aware minimisation (Foret et al., arXiv 2010.01412, Eq. 2 and 4): the step is made with the gradient
    at w + ρ g/‖g‖, where g is the gradient at w. Both draw their own dropout and noise.

    Libraries' SAM optimisers need a closure or two calls for a step, and Trainer makes one call without a closure; so
    the second gradient is taken here, in the training step.
    """

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The loss at w; what is left in `.grad` is the gradient at w + ρ g/‖g‖."""
        loss = super().training_step(model, dict(inputs), num_items_in_batch)
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients]))
        kept = [parameter.detach().clone() for parameter in parameters]  # a subtraction would round
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add_(gradient * (self.args.sam_rho / norm.clamp(min=1e-12)).to(gradient.dtype))
                parameter.grad = None
        super().training_step(model, dict(inputs), num_items_in_batch)
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
        return loss


def rdrop_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """R-Drop's two sums over label tokens (Wu et al., arXiv 2106.14448, Eq. 1 to 3).

    Args:
        logits: two passes under different dropout, stacked: shape (2 · batch, length, vocabulary).
        labels: shape (batch, length), -100 where not trained.

    Returns:
        The negative log-likelihood, the mean of both passes; and the symmetric divergence, half of
        KL(P1‖P2) + KL(P2‖P1). Both in nats, summed over label tokens. The paper's loss, which sums the likelihoods of
        both passes, is twice (the first + α/2 times the second).
    """
    targets = labels[:, 1:]
    valid = targets != -100
    first, second = logits[:, :-1].log_softmax(dim=-1, dtype=torch.float32).chunk(2)
    first, second, targets = first[valid], second[valid], targets[valid]
    likelihood = (F.nll_loss(first, targets, reduction="sum") + F.nll_loss(second, targets, reduction="sum")) / 2
    divergence = ((first.exp() - second.exp()) * (first - second)).sum() / 2  # KL(P1‖P2) + KL(P2‖P1), halved
    return likelihood, divergence


def check_rdrop(model: torch.nn.Module, config: StudyConfig) -> None:
    """
    Raises:
        ValueError: R-Drop is on and the model has a DIPNet adapter, or no dropout.
    """
    if config.rdrop_weight == 0:
        return
    if isinstance(model, PeftModel) and isinstance(model.base_model, DIPNetModel):
        raise ValueError(f"rdrop_weight={config.rdrop_weight} is a baseline: set adapter to 'lora' or 'none'")
    if not any(module.p > 0 for module in model.modules() if isinstance(module, torch.nn.Dropout)):
        raise ValueError(
            f"rdrop_weight={config.rdrop_weight} compares two dropout masks, but the model has no dropout: set "
            "lora_dropout"
        )


class RDropTrainer(DIPSFTTrainer):
    """R-Drop (arXiv 2106.14448): two passes under different dropout, and the divergence between them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_rdrop(self.model, self.args)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The halved loss of the paper, a mean over label tokens; in evaluation the task loss alone."""
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        # One pass over the rows twice: dropout is drawn for each row
        twice = {
            name: torch.cat([value, value])
            for name, value in inputs.items()
            if name in ("input_ids", "attention_mask")
        }
        logits = model(**twice, use_cache=False).logits
        likelihood, divergence = rdrop_loss(logits, labels)
        count = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        scale = 1 / torch.as_tensor(count, device=logits.device).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            scale = scale * self.accelerator.num_processes
        # In the log each micro-batch counts as if it were the whole step
        steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        for name, value in (("rdrop/task", likelihood), ("rdrop/divergence", divergence)):
            self._metrics["train"][name].append((value.detach() * scale * steps).item())
        loss = scale * (likelihood + self.args.rdrop_weight / 2 * divergence)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"Step {self.state.global_step}: R-Drop's loss is {loss.item()}.")
        return loss
