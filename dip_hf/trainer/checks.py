"""Checks before training starts: what would otherwise fail late, or train silently on the wrong thing."""

from __future__ import annotations

from datasets import Dataset
from trl import SFTTrainer

from dip_hf.trainer.config import DIPSFTConfig


def check_dataset(name: str, dataset: object) -> None:
    """
    Args:
        name: the trainer's argument that holds it.
        dataset: map-style datasets are checked; an iterable one cannot be without being consumed.

    Raises:
        ValueError: the dataset is empty, or a pre-tokenised row trains no token.
    """
    if not isinstance(dataset, Dataset):
        return
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty; give at least one example.")
    for column, ignored in (("labels", -100), ("completion_mask", 0), ("assistant_masks", 0)):
        if column in dataset.column_names:
            for index, row in enumerate(dataset.with_format(None)[column]):
                if all(value == ignored for value in row[1:]):  # nothing predicts the first token
                    raise ValueError(
                        f"{name} row {index}: every entry of {column!r} is {ignored} (the first does not count, for "
                        "nothing predicts it), so the row trains nothing; drop it or label at least one token."
                    )


def check_nothing_dropped(trainer: SFTTrainer, train_dataset: object) -> None:
    """
    Raises:
        ValueError: TRL dropped rows whose labels were all cut off by `max_length`.
    """
    prepared = trainer.train_dataset
    if trainer.args.packing or not isinstance(train_dataset, Dataset) or not isinstance(prepared, Dataset):
        return
    dropped = len(train_dataset) - len(prepared)
    if dropped > 0:
        raise ValueError(
            f"max_length={trainer.args.max_length} cuts every label off {dropped} of {len(train_dataset)} rows of "
            "train_dataset; raise max_length or drop those rows."
        )


def check_noise_setup(trainer: SFTTrainer, args: DIPSFTConfig) -> None:
    """
    Raises:
        ValueError: the set-up recomputes blocks without their noise, or cannot run folded trajectories.
    """
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing=True recomputes a block's hooks without their noise; set it to False and "
            "use activation_checkpointing=True in the training arguments."
        )
    if args.num_trajectories == 1:
        return
    if trainer.aux_loss_enabled:
        raise ValueError(
            f"num_trajectories={args.num_trajectories} does not work with a router loss, which compares the batch "
            "with its mask; set router_aux_loss_coef=0.0 or num_trajectories=1."
        )
    attention = trainer.model.config._attn_implementation
    if attention == "flex_attention":
        raise ValueError(
            f"num_trajectories={args.num_trajectories} does not work with attn_implementation={attention!r}, whose "
            "masks cannot be repeated; use 'sdpa' or a flash attention."
        )
    if args.stability_weight > 0 and trainer.is_deepspeed_enabled:
        raise ValueError(
            f"stability_weight={args.stability_weight} needs the LM head whole, which DeepSpeed may partition; use "
            "DDP or FSDP2, or set stability_weight to 0."
        )


def check_second_pass(trainer: SFTTrainer) -> None:
    """
    Raises:
        ValueError: reentrant checkpointing, which counts on one pass through each block (DReS and ICP make two), or
            sharded parameters, which are whole only during the wrapper's own pass.
    """
    zero_stage = trainer.args.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else 0
    if trainer.is_fsdp_enabled or zero_stage == 3:
        raise ValueError(
            "dres_weight and icp_weight do not work with FSDP or ZeRO-3, whose parameters are not whole in a second "
            "pass; use DDP or ZeRO-2, or set both weights to 0."
        )
    options = trainer.args.activation_checkpointing_kwargs or {}
    if trainer.args.activation_checkpointing and options.get("use_reentrant"):
        raise ValueError(
            "activation_checkpointing_kwargs={'use_reentrant': True} does not work with dres_weight or icp_weight, "
            "which pass through blocks twice; set use_reentrant to False."
        )
