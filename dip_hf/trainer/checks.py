"""Checks before training starts: what would otherwise fail late, or train silently on the wrong thing."""

from __future__ import annotations

from datasets import Dataset
from trl import SFTTrainer

from dip_hf.trainer.config import DIPSFTConfig


# What text configs call a change of the logits after the head
_LOGIT_CHANGES = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)


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
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise ValueError(
            "fsdp_version=1 flattens the parameters that DIPNet's objective reads; set fsdp_version to 2."
        )
    parallelism = trainer.accelerator.parallelism_config
    if parallelism is not None and (parallelism.tp_enabled or parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            f"parallelism_config={parallelism}: with tensor, context or sequence parallelism the ranks of one batch "
            "would draw different noise; use data parallelism (DDP, FSDP2, ZeRO)."
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
    scaled = trainer.model.config.get_text_config().to_dict()
    changes = [name for name in _LOGIT_CHANGES if scaled.get(name) not in (None, 1.0)]
    if args.stability_weight > 0 and changes:
        raise ValueError(
            f"stability_weight={args.stability_weight} takes the logits for a linear function of the hidden states, "
            f"but this model has {', '.join(changes)}; set stability_weight to 0."
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
    if trainer.args.icp_weight > 0 and trainer.args.activation_offloading:
        raise ValueError(
            "activation_offloading=True does not work with icp_weight, which reads the saved activations twice; use "
            "activation_checkpointing=True instead, or set icp_weight to 0."
        )
    if trainer.args.icp_steps > 1 and trainer.args.loss_type != "nll" and trainer.args.icp_weight > 0:
        raise ValueError(
            f"icp_steps={trainer.args.icp_steps} descends on loss_type='nll', but loss_type="
            f"{trainer.args.loss_type!r}; set icp_steps to 1."
        )
    if trainer.args.icp_positions == "prompt" and isinstance(trainer.train_dataset, Dataset):
        rows = trainer.train_dataset.select(range(min(100, len(trainer.train_dataset))))
        if "labels" in rows.column_names and not any(-100 in labels for labels in rows["labels"]):
            raise ValueError(
                "icp_positions='prompt' perturbs tokens without a label, but every token of train_dataset has one; "
                "give prompts and completions, or set icp_positions to 'all'."
            )


def check_one_loss_pass(trainer: SFTTrainer, has_loss_function: bool) -> None:
    """
    Args:
        has_loss_function: whether the trainer was given a `compute_loss_func`.

    Raises:
        ValueError: a loss for which TRL runs a second pass, whose hidden states would be taken for the first's.
    """
    if has_loss_function or trainer.args.label_smoothing_factor > 0:
        name = "compute_loss_func" if has_loss_function else "label_smoothing_factor"
        raise ValueError(
            f"{name} makes TRL run a second forward pass, which the regularisers cannot tell from the first; leave it "
            "unset, or turn the regularisers off."
        )
