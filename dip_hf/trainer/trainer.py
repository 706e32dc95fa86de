"""The trainer: TRL's `SFTTrainer`, and the regularisers composed around its loss."""

from __future__ import annotations

import copy
import statistics
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from peft import PeftModel, TaskType
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from dip_hf.dipnet.config import DIPNetConfig
from dip_hf.dipnet.layer import own_parameters
from dip_hf.dipnet.model import DIPNetModel
from dip_hf.dres import DReSBranch
from dip_hf.icp import ICPBranch
from dip_hf.icp.functional import compared_tokens
from dip_hf.noise import NoiseKey
from dip_hf.trainer.checked import CheckedTrainer
from dip_hf.trainer.checks.adapter import check_drawn_noise, check_no_adapter, check_trainable
from dip_hf.trainer.checks.optimizer import check_own_optimizer, check_posterior
from dip_hf.trainer.checks.second_pass import check_one_loss_pass, check_second_pass
from dip_hf.trainer.checks.setup import (
    check_batch,
    check_fsdp,
    check_monteclora,
    check_noise_setup,
    check_parallelism,
    warn_of_rounding,
)
from dip_hf.trainer.config import DIPSFTConfig, own_config
from dip_hf.trainer.idle import IdleICP, warn_of_idle_fields, warn_of_idle_terms
from dip_hf.trainer.objective import DIPNetObjective, fold_labels
from dip_hf.trainer.optimizer import compose_optimizer
from dip_hf.trainer.terms import Term, check_finite, token_mean, total_loss


class DIPSFTTrainer(CheckedTrainer):
    """`trl.SFTTrainer` with this project's regularisers.

    With a `DIPNetConfig` as `peft_config` (or a model that holds such an adapter) it minimises DIPNet's Eq. 4 (arXiv
    2506.04690), its task loss in expectation over IBVI's posterior where the adapter has one (arXiv 2505.20235).
    `DIPSFTConfig(dres_weight=..., icp_weight=...)` adds DReS and ICP, with any adapter or none. With everything off it
    is `SFTTrainer` to the last bit, on data of which it would drop no row.

    Every term is logged raw and weighted; a term or a gradient that is NaN or infinite stops the run before the
    optimiser step, but for gradients in fp16, whose scaler leaves such steps out, and under DeepSpeed, which keeps its
    own.

    Args:
        model: as for `SFTTrainer`.
        args: a `DIPSFTConfig`; TRL's `SFTConfig` is accepted, with this project's defaults for the rest. What DReS
            and ICP do is read from it here and now, so that another value set later has no effect on them, but for
            `dres_weight` while it stays above 0.
        data_collator, train_dataset, eval_dataset, processing_class: as for `SFTTrainer`; no dataset may be empty, nor
            have rows that train no token.
        **kwargs: as for `SFTTrainer`, whose further arguments are given by name.

    Raises:
        ValueError: before training starts, on arguments, a dataset, an adapter or a set-up that cannot work; names
            the field, its value and the remedy.
        FloatingPointError: in training, on a term or a gradient that is not finite; with the exceptions above.
    """

    _tag_names = ["trl", "sft", "dip_hf"]  # noqa: RUF012  (an instance variable for SFTTrainer)

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = DIPSFTConfig(output_dir="dip-sft")
        elif not isinstance(args, DIPSFTConfig):
            args = own_config(args)
        adapter = kwargs.get("peft_config")
        if isinstance(adapter, DIPNetConfig) and adapter.task_type is None:
            # By which AutoPeft finds the base's class: no class's name is taken from an adapter's file
            kwargs["peft_config"] = adapter = copy.copy(adapter)
            adapter.task_type = TaskType.CAUSAL_LM
        known = own_parameters(model) if isinstance(model, PeftModel) else {}
        given = {name: parameter.detach().clone() for name, parameter in known.items()}
        kwargs |= {"data_collator": data_collator, "processing_class": processing_class}
        super().__init__(model, args, train_dataset, eval_dataset, **kwargs)
        check_monteclora(self)
        # Global step and index of its last micro-batch; evaluation counts apart, so that training does not notice it
        self._micro_steps = {True: (-1, -1), False: (-1, -1)}
        self._step_values: list[dict[str, float]] = []  # what is to be logged of the step's micro-batches so far
        self.dipnet: DIPNetObjective | None = None
        self.dres: DReSBranch | None = None
        self.icp: ICPBranch | None = None
        block_names: list[str] | None = None
        if isinstance(self.model, PeftModel) and isinstance(self.model.base_model, DIPNetModel):
            check_trainable(self.model)
            check_drawn_noise(self.model)
            if self.is_fsdp_enabled:
                check_fsdp(self.model, self.accelerator.state.fsdp_plugin)
            check_noise_setup(self, args)
            warn_of_rounding(self)
            check_posterior(self.model, args)
            optimizers = kwargs.get("optimizers") or (None, None)
            check_own_optimizer(self.model, args, optimizers[0], kwargs.get("optimizer_cls_and_kwargs"))
            self.dipnet = DIPNetObjective(self.model, args)
            block_names = self.dipnet.tuner.block_names()
            self.dipnet.restore_precision(given)
        else:
            check_no_adapter(self.model)
        warn_of_idle_fields(self.model, args)
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        if args.dres_weight > 0:
            self.dres = DReSBranch(base, args.dres_options(), block_names)
            self.dres.check(args.per_device_train_batch_size, self.padding_free)
        if args.icp_weight > 0:
            self.icp = ICPBranch(base, args.icp_options(), block_names=block_names)
            self.add_callback(IdleICP(self.icp.options))
        if self.dres is not None or self.icp is not None:
            check_second_pass(self)
        if self.dipnet is not None or self.dres is not None or self.icp is not None:
            check_parallelism(self.accelerator.parallelism_config)
            check_one_loss_pass(args, kwargs.get("compute_loss_func") is not None)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task loss, plus every regulariser that is on; in evaluation the task loss alone."""
        regularised = self.dipnet is not None or self.dres is not None or self.icp is not None
        # Under regional compilation `model` is a copy, and evaluation leaves `self.model`, which TRL asks, as it was
        self.model.training = model.training
        if not self.model.training or not regularised:
            with ExitStack() as sampling:
                if self.dipnet is not None and self.dipnet.is_random():
                    sampling.enter_context(self.dipnet.tuner.sampling(self._noise_key(), everywhere=False))
                result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss = result[0] if return_outputs else result
            if self.model.training:
                check_finite("task", loss.item(), self.state.global_step)
            return result
        if return_outputs:
            raise ValueError("return_outputs=True is for evaluation; regularised training returns the loss alone.")
        return self._regularised_loss(model, inputs, num_items_in_batch)

    def _regularised_loss(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None) -> Tensor:
        """The task loss and the regularisers' terms, all of them from one forward pass (and ICP's teacher)."""
        key = self._noise_key()
        # Without a count TRL takes the mean over the micro-batch, and Trainer divides the loss by the number of steps.
        steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        icp, weight, feature_weight = self.icp, 1.0, 0.0
        if icp is not None and icp.options.due(self.state.global_step):
            weight, feature_weight = icp.options.term_weights(self.state.global_step / max(1, self.state.max_steps))
        if feature_weight == 0:
            icp = None  # nothing to distil in this step
        trajectories = 1 if self.dipnet is None else self.args.num_trajectories
        if trajectories > 1:
            check_batch(self.model, inputs, trajectories)
        folded = fold_labels(inputs, trajectories)
        items = None if num_items_in_batch is None else num_items_in_batch * trajectories
        with ExitStack() as sampling:
            noise = None if self.dipnet is None else sampling.enter_context(self.dipnet.sampling(key))
            with ExitStack() as watching:
                clean = None if icp is None else watching.enter_context(icp.clean())
                mask = inputs.get("attention_mask")
                coded = None if self.dres is None else watching.enter_context(self.dres.attached(key, mask))
                task = super().compute_loss(model, folded, num_items_in_batch=items)
            terms = [Term("task", task * steps, weight)]
            values: dict[str, float] = {}
            if noise is not None:  # before ICP's second pass, which writes over what the first left
                more, values = noise.terms(inputs["labels"], num_items_in_batch, self._counted_processes(), steps)
                terms += more
            if coded is not None:
                terms.append(Term("dres/error", coded.error, self.args.dres_weight))
            if icp is not None and clean is not None:
                # On the scale of `task`, for Adam's moments mix the gradients of all steps
                again = partial(self.model, **folded, num_items_in_batch=items, fused_lm_head=True)
                scale = 1 if items is None else self._counted_processes()
                total, tokens = icp.loss(clean, inputs, task, lambda: again().loss * scale, key)
                terms.append(self._feature_term(total, tokens, feature_weight, num_items_in_batch, steps))
            elif self.icp is not None:
                values["icp/features_weighted"] = 0.0  # so that a log line's mean is that of all its steps
        self._log_terms(terms, values)
        return total_loss(terms, steps)

    def _feature_term(
        self, total: Tensor, tokens: Tensor, weight: float, num_items: Tensor | int | None, steps: int
    ) -> Term:
        """ICP's term, a mean over the compared tokens of the step."""
        if num_items is None:
            return Term("icp/features", total / tokens.clamp(min=1), weight)
        return token_mean("icp/features", total, weight, self._compared_tokens, self._counted_processes(), steps)

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer's, which asks for it at the start of each attempt at training.

        A step that an exception cut off is taken up anew, with the numbers of its micro-batches.
        `auto_find_batch_size` may have made batches too small for a group of DReS.
        """
        self._micro_steps[True] = (-1, -1)
        self._step_values.clear()
        self._metrics["train"].clear()  # what an earlier run has not logged
        if self.dres is not None:
            self.dres.check(self._train_batch_size, self.padding_free)
        return super().get_train_dataloader()

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """As Trainer's, which counts the step's label tokens; ICP's mean needs the number of compared tokens too."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.icp is not None and samples:
            count = torch.stack([compared_tokens(sample).sum() for sample in samples]).sum().to(device)
            if self.args.average_tokens_across_devices:
                count = self.accelerator.gather(count).sum()
            self._compared_tokens = count
        return samples, num_items

    def _counted_processes(self) -> int:
        """Over how many processes the step's tokens are counted."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def _noise_key(self) -> NoiseKey:
        """The key of this micro-batch: a function of where training stands, so that a resumed run finds it again."""
        here, training = self.state.global_step, self.model.training
        step, index = self._micro_steps[training]
        index = index + 1 if step == here else 0
        self._micro_steps[training] = (here, index)
        return NoiseKey(self.args.seed, here, index if training else -1 - index, self.args.process_index)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `CheckedTrainer`'s.

        Raises:
            ValueError: as there; or the active adapter, if it is another one by now, cannot be trained with these
                arguments.
        """
        if self.dipnet is not None:
            check_drawn_noise(self.model)  # another adapter may have been activated since
            check_posterior(self.model, self.args)
            if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # which keep parameters of their own
                # `evaluate` with bf16_full_eval or fp16_full_eval casts the model for good
                own = own_parameters(self.model)
                self.dipnet.restore_precision({name: parameter.detach() for name, parameter in own.items()})
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As Trainer's; noise that an adapter keeps in evaluation is a function of the step and the batch's number.

        Before training that noise has the scale of the evaluation's first batch, and training measures its own.
        """
        self._micro_steps[False] = (-1, -1)
        with nullcontext() if self.dipnet is None else self.dipnet.scale_unchanged():
            return super().evaluation_loop(*args, **kwargs)

    def _log_terms(self, terms: list[Term], values: dict[str, float]) -> None:
        """Check every term, then note it raw and weighted, and further values as they are, for the next log line.

        That takes the mean of what is noted, one value a step, so that the terms add up to the loss where a dataset's
        steps have different numbers of micro-batches.
        """
        # Not `gather_for_metrics`, which takes the terms for examples and cuts them to the size of a short last batch.
        here = torch.stack([term.value.detach().float().to(terms[0].value.device) for term in terms])
        reduced = self.accelerator.reduce(here, reduction="mean")
        for term, mean in zip(terms, reduced.tolist(), strict=True):
            check_finite(term.name, mean, self.state.global_step)  # the mean, so that all ranks stop together
            values |= {term.name: mean, f"{term.name}_weighted": mean * term.weight}
        self._step_values.append(values)
        if self.accelerator.sync_gradients:  # the step's last micro-batch
            for name in values:
                self._metrics["train"][name].append(statistics.mean(step[name] for step in self._step_values))
            self._step_values.clear()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `SFTTrainer`'s; warns of a term that is on and trains nothing, or not what it was to."""
        warn_of_idle_terms(self._metrics["train"], self.args, self.dres)
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As Trainer's, with log-variances and posterior covariances in groups of their own, without weight decay."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if not is_new or self.dipnet is None:
            return optimizer
        composed = compose_optimizer(optimizer, self.model if model is None else model, self.args)
        self.optimizer: torch.optim.Optimizer = composed
        return composed
