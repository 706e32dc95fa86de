"""The trainer: TRL's `SFTTrainer`, and the regularisers composed around its loss."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainingArguments
from trl import SFTTrainer

from dip_hf.dipnet.export import NOISE_PREFIX
from dip_hf.dipnet.model import DIPNetModel
from dip_hf.noise import NoiseKey
from dip_hf.trainer.checks import check_dataset, check_noise_setup, check_nothing_dropped
from dip_hf.trainer.config import DIPSFTConfig
from dip_hf.trainer.objective import DIPNetObjective
from dip_hf.trainer.optimizer import noise_group
from dip_hf.trainer.terms import Term, batch_mean


class DIPSFTTrainer(SFTTrainer):
    """`trl.SFTTrainer` with this project's regularisers.

    With a `DIPNetConfig` as `peft_config` (or a model that holds such an adapter) it minimises DIPNet's Eq. 4 (arXiv
    2506.04690). With any other PEFT config, or none, and the default `DIPSFTConfig`, it is `SFTTrainer` to the last
    bit.

    Every term is logged raw and weighted; a term that is NaN or infinite stops the run before the optimiser step.

    Args:
        model: as for `SFTTrainer`.
        args: a `DIPSFTConfig`; TRL's `SFTConfig` is accepted, with this project's defaults for the rest.
        train_dataset: as for `SFTTrainer`; neither empty nor with rows that train no token.
        **kwargs: as for `SFTTrainer`.

    Raises:
        ValueError: before training starts, on a dataset, adapter or set-up that cannot work; names the field, its
            value and the remedy.
        FloatingPointError: in training, on a term that is not finite.
    """

    _tag_names = ["trl", "sft", "dip_hf"]  # noqa: RUF012  (an instance variable for SFTTrainer)
    _name = "DIP-SFT"

    def __init__(
        self, model: Any, args: TrainingArguments | None = None, *, train_dataset: Any = None, **kwargs: Any
    ) -> None:
        if args is None:
            args = DIPSFTConfig(output_dir="dip-sft")
        elif not isinstance(args, DIPSFTConfig):
            args = DIPSFTConfig(**{**args.to_dict(), "hub_token": args.hub_token})  # to_dict hides the token
        check_dataset("train_dataset", train_dataset)
        super().__init__(model, args=args, train_dataset=train_dataset, **kwargs)
        check_nothing_dropped(self, train_dataset)
        self.dipnet: DIPNetObjective | None = None
        self._micro_step = (-1, -1)  # (global step, index of its micro-batch)
        if isinstance(self.model, PeftModel) and isinstance(self.model.base_model, DIPNetModel):
            check_noise_setup(self, args)
            self.dipnet = DIPNetObjective(self.model, args)
            for name, parameter in self.model.named_parameters():
                if f".{NOISE_PREFIX}" in name:
                    parameter.data = parameter.data.float()  # SFTTrainer casts a quantised model's adapter to bf16

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task loss, plus every regulariser that is on; in evaluation the task loss alone."""
        if not self.model.training or self.dipnet is None:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss = result[0] if return_outputs else result
            if self.model.training:
                batch_mean("task", loss, 1.0, 1).check_finite(self.state.global_step)
            return result
        if return_outputs:
            raise ValueError("return_outputs=True is for evaluation; training with DIPNet returns the loss alone.")
        return self._dipnet_loss(self.dipnet, model, inputs, num_items_in_batch)

    def _dipnet_loss(
        self, dipnet: DIPNetObjective, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """Eq. 4: the mean of the trajectories' log-losses, the penalty, and the stability term."""
        trajectories = self.args.num_trajectories
        steps = self.current_gradient_accumulation_steps
        with dipnet.sampling(self._noise_key()) as record:
            task = super().compute_loss(
                model,
                dipnet.fold_labels(inputs),
                num_items_in_batch=None if num_items_in_batch is None else num_items_in_batch * trajectories,
            )
        if num_items_in_batch is None:
            # TRL took the mean over this micro-batch's tokens, and Trainer divides the sum by the number of steps.
            steps, num_items_in_batch = 1, (inputs["labels"][:, 1:] != -100).sum()
        penalty, values = record.penalty(steps)
        terms = [Term("task", task * steps, 1.0, 1 / steps)]
        if penalty.value.requires_grad:  # not with learn_noise=False: a constant would only blur the logged loss
            terms.append(penalty)
        if self.args.stability_weight > 0:
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            terms.append(record.stability(inputs["labels"], num_items_in_batch, processes, steps))
        self._log_terms(terms, values)
        return torch.stack([term.loss for term in terms]).sum()

    def _noise_key(self) -> NoiseKey:
        """The key of this micro-batch: a function of where training stands, so that a resumed run finds it again."""
        step, index = self._micro_step
        self._micro_step = (step, index + 1) if step == self.state.global_step else (self.state.global_step, 0)
        return NoiseKey(self.args.seed, *self._micro_step, self.args.process_index)

    def _log_terms(self, terms: list[Term], values: dict[str, float]) -> None:
        """Check every term, then note it raw and weighted, and further values as they are, for the next log line."""
        metrics = self._metrics["train"]
        # Not `gather_for_metrics`, which takes the terms for examples and cuts them to the size of a short last batch.
        values_here = torch.stack([term.value.detach().float() for term in terms])
        means = self.accelerator.reduce(values_here, reduction="mean")
        for term, mean in zip(terms, means.tolist(), strict=True):
            term.check_finite(self.state.global_step)
            metrics[term.name].append(mean)
            if term.weight != 1:
                metrics[f"{term.name}_weighted"].append(mean * term.weight)
        for name, value in values.items():
            metrics[name].append(value)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As Trainer's, with the log-variances in a group of their own: `noise_learning_rate`, no weight decay."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if not is_new or self.dipnet is None:
            return optimizer
        noise = noise_group(optimizer.param_groups, self.model if model is None else model, self.args)
        if noise is not None:
            optimizer.add_param_group(noise)
        return optimizer
