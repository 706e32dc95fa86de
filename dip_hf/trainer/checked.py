"""What a run is refused whatever its loss: data that train nothing, half-written checkpoints, ruined weights."""

from __future__ import annotations

from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from dip_hf.trainer.checkpoints import resumed_checkpoint
from dip_hf.trainer.checks.data import (
    by_name,
    check_columns,
    check_dataset,
    check_prepared,
    check_rows_left,
)
from dip_hf.trainer.checks.resume import check_resumed
from dip_hf.trainer.checks.streams import check_first_step, check_streamed
from dip_hf.trainer.config import DIPSFTConfig
from dip_hf.trainer.gradients import check_finite_gradient, check_finite_weights
from dip_hf.trainer.publishing import PublishingTrainer


class CheckedTrainer(PublishingTrainer):
    """`trl.SFTTrainer` that says so where it would train on nothing, go on from half a checkpoint, or save NaN.

    Args:
        model: as for `SFTTrainer`.
        args: of the run.
        train_dataset: as for `SFTTrainer`; neither empty nor with rows that train no token.
        eval_dataset: likewise.
        **kwargs: as for `SFTTrainer`.

    Raises:
        ValueError: a dataset is empty, or has a row that trains nothing or lacks a value; names the row.
        FloatingPointError: in training, on a gradient's norm or on weights that are not finite.
    """

    def __init__(
        self,
        model: Any,
        args: DIPSFTConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        for name, rows in {"train_dataset": train_dataset, **by_name(eval_dataset)}.items():
            check_dataset(name, rows, args)
            if kwargs.get("formatting_func") is None:
                check_columns(name, rows, args)
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        check_prepared("train_dataset", train_dataset, self.train_dataset, args, args.packing)
        packing = args.packing if args.eval_packing is None else args.eval_packing
        prepared = by_name(self.eval_dataset)
        for name, rows in by_name(eval_dataset).items():
            check_prepared(name, rows, prepared[name], args, packing)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """As Trainer's; rows that could not be seen before, a stream's or the collator's, are checked now.

        Raises:
            ValueError: a row trains nothing, or a stream has too few to make a step with.
        """
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.state.global_step == 0:
            check_first_step(samples, num_batches, self.args.max_length)
        splits_rows = self.args.packing and self.args.packing_strategy != "bfd"  # a piece may well have no label
        is_stream = isinstance(self.train_dataset, IterableDataset)
        if (is_stream or self._skip_prepare_dataset) and not splits_rows:
            check_streamed(samples, "stream" if is_stream else "batch")
        return samples, num_items

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As Trainer's; True stands for the last checkpoint that was written to its end.

        Raises:
            ValueError: there is no such checkpoint, or it is cut short; or its adapter is another one than the
                model's, and the message names the option.
        """
        checkpoint = resumed_checkpoint(resume_from_checkpoint or False, self.args.output_dir)
        if checkpoint is not None:
            check_resumed(self.model, checkpoint)
        return super().train(checkpoint, *args, **kwargs)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """As Trainer's, which asks for it before every optimiser step.

        Not checked in fp16, whose gradient scaler meets infinities and leaves such steps out itself; nor under
        DeepSpeed, which keeps the gradients to itself.

        Raises:
            FloatingPointError: the norm is NaN or infinite.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if self.args.mixed_precision != "fp16" and not self.is_deepspeed_enabled:  # of the arguments or the launcher
            check_finite_gradient(norm, self.state.global_step)
        return norm

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As Trainer's.

        Raises:
            ValueError: there is no row to evaluate.
        """
        check_rows_left(dataloader)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's.

        Raises:
            FloatingPointError: trained weights are not finite; nothing is written.
        """
        check_finite_weights(self.model, self.state.global_step)
        super().save_model(output_dir, _internal_call)
