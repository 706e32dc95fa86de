"""Checks of the set-up that the noise is to run in: launcher, recomputation, padding, attention."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from accelerate import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested
from trl import SFTTrainer

from dip_hf.dipnet.layer import NoiseSite, own_parameters
from dip_hf.dipnet.trajectories import check_trajectories
from dip_hf.trainer.checks.adapter import active_lora
from dip_hf.trainer.config import DIPSFTConfig


# bitsandbytes' classes, by name: it need not be installed
_QUANTISED = ("Params4bit", "Int8Params")
# Kinds of blocks that a padding-free batch can be folded in front of
_ATTENTIONS = {"full_attention", "sliding_attention", "chunked_attention"}
# What text configs call a change of the logits after the head
_LOGIT_CHANGES = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)


def check_monteclora(trainer: SFTTrainer) -> None:
    """
    Raises:
        ValueError: blocks are recomputed in the backward pass whose adapter would then draw another sample.
    """
    if not any(config.monteclora_config is not None for config in active_lora(trainer.model)):
        return
    recomputes = trainer.args.activation_checkpointing or trainer.model.get_base_model().is_activation_checkpointing
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.activation_checkpointing:
        recomputes = True
    if recomputes:
        raise ValueError(
            "activation_checkpointing=True with monteclora_config: MonteCLoRA draws a new sample each time that a "
            "layer runs, so that recomputed layers give a wrong gradient; set activation_checkpointing (or its old "
            "name, gradient_checkpointing; of FSDP, fsdp_activation_checkpointing) to False."
        )


def check_parallelism(parallelism: ParallelismConfig | None) -> None:
    """
    Raises:
        ValueError: several ranks share one batch, in which each would draw noise and groups of its own.
    """
    if parallelism is not None and (parallelism.tp_enabled or parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            f"parallelism_config has tp_size={parallelism.tp_size}, cp_size={parallelism.cp_size} and "
            f"sp_size={parallelism.sp_size}: with tensor, context or sequence parallelism ranks of one batch would "
            "draw different noise and groups; use data parallelism (DDP, FSDP2, ZeRO)."
        )


def check_noise_setup(trainer: SFTTrainer, args: DIPSFTConfig) -> None:
    """
    Raises:
        ValueError: the set-up hides padding from the noise's scale, or cannot run folded trajectories.
    """
    has_noise = any(isinstance(module, NoiseSite) for module in trainer.model.modules())
    multiple = args.pad_to_multiple_of
    if multiple is not None and trainer.padding_free and has_noise:
        raise ValueError(
            f"pad_to_multiple_of={multiple} with packing=True or padding_free=True pads without a mask, so that the "
            "padding would count in the scale of DIPNet's noise; leave it unset, or turn both off."
        )
    if args.num_trajectories > 1:
        _check_trajectories(trainer, args.num_trajectories)
    if args.stability_weight > 0:
        _check_stability(trainer, args.stability_weight)


def warn_of_rounding(trainer: SFTTrainer) -> None:
    """Warn where sharding hands what the adapter learns besides LoRA, kept in fp32, to a pass in half precision.

    Args:
        trainer: of a model with a DIPNet adapter, before its model is prepared.
    """
    precision = trainer.accelerator.mixed_precision
    learns = any(parameter.requires_grad for parameter in own_parameters(trainer.model).values())
    if learns and precision != "no" and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        warnings.warn(
            f"mixed_precision={precision!r} with FSDP or DeepSpeed rounds what DIPNet and IBVI learn in every pass: "
            "in bf16 noise changes in steps of 1.6 %, and a covariance hardly at all; use DDP where these are to "
            "learn.",
            stacklevel=3,
        )


def check_fsdp(model: nn.Module, plugin: FullyShardedDataParallelPlugin) -> None:
    """
    Args:
        model: with its adapter.
        plugin: accelerate's, by which it is to be sharded.

    Raises:
        ValueError: it recomputes blocks without their noise, or cannot shard the adapter's parameters.
    """
    if plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing=True recomputes a block's hooks without their noise; set it to False and "
            "use activation_checkpointing=True in the training arguments."
        )
    if plugin.fsdp_version == 1:
        raise ValueError(
            "fsdp_version=1 flattens the parameters that DIPNet's objective reads; set fsdp_version to 2."
        )
    has_noise = any(isinstance(module, NoiseSite) for module in model.modules())
    in_4bit = any(type(parameter).__name__ == "Params4bit" for parameter in model.parameters())
    if plugin.cpu_ram_efficient_loading and has_noise and not in_4bit:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading=True takes all of a model's state for sharded parameters, which the "
            "measured RMS of DIPNet's blocks is not; set it to False."
        )
    _check_quantised(model)


def _check_trajectories(trainer: SFTTrainer, trajectories: int) -> None:
    kinds = set(trainer.model.config.get_text_config().to_dict().get("layer_types") or ()) - _ATTENTIONS
    if trainer.padding_free and kinds:
        raise ValueError(
            f"num_trajectories={trajectories} with packing or padding_free=True: {sorted(kinds)[0]} blocks read the "
            "boundaries of one row alone; turn both off, or set num_trajectories to 1."
        )
    if trainer.aux_loss_enabled:
        raise ValueError(
            f"num_trajectories={trajectories} does not work with a router loss, which compares the batch with its "
            "mask; set router_aux_loss_coef=0.0 or num_trajectories=1."
        )
    check_trajectories(trainer.model.get_base_model(), active_lora(trainer.model), trajectories)


def _check_stability(trainer: SFTTrainer, weight: float) -> None:
    config = trainer.model.config.get_text_config().to_dict()
    changes = [name for name in _LOGIT_CHANGES if config.get(name) not in (None, 1.0)]
    if changes:
        raise ValueError(
            f"stability_weight={weight} takes the logits for a linear function of the hidden states, but this model "
            f"has {', '.join(changes)}; set stability_weight to 0."
        )
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            f"stability_weight={weight} needs the LM head whole, which DeepSpeed may partition; use DDP or FSDP2, or "
            "set stability_weight to 0."
        )


def _check_quantised(model: nn.Module) -> None:
    """
    Raises:
        ValueError: with FSDP the trained parameters of a block must be of one type, but over a quantised base TRL
            trains LoRA in bf16, and what DIPNet and IBVI add stays fp32.
    """
    quantised = any(type(parameter).__name__ in _QUANTISED for parameter in model.parameters())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = trained & own_parameters(model).keys()
    if quantised and own and trained != own:
        raise ValueError(
            f"FSDP with a quantised base: {min(own)} is trained in fp32 and LoRA in bf16, but FSDP takes parameters "
            "of one type; use DDP, or leave load_in_4bit and load_in_8bit unset."
        )


def check_batch(model: PreTrainedModel, inputs: Mapping[str, Any], trajectories: int) -> None:
    """
    Args:
        model: the trained one.
        inputs: a batch.
        trajectories: m > 1.

    Raises:
        ValueError: the boundaries of a padding-free batch are in `position_ids` alone, from which flash attention
            reads them in batches of one row, and so not in one that is folded into m (TRL's own collator gives
            `cu_seq_lens_q` beside them); or the model adds features of images between its blocks.
    """
    images = [name for name in ("pixel_values", "pixel_values_videos") if inputs.get(name) is not None]
    if images:
        config = model.config.to_dict()  # a deep copy
        if config.get("deepstack_layer_map") or (config.get("vision_config") or {}).get("deepstack_visual_indexes"):
            raise ValueError(
                f"num_trajectories={trajectories}: {type(model).__name__} adds features of {images[0]} to the rows "
                "between its blocks, and knows nothing of their copies; train on text alone, or set num_trajectories "
                "to 1."
            )
    positions = inputs.get("position_ids")
    if positions is None or inputs.get("attention_mask") is not None or inputs.get("cu_seq_lens_q") is not None:
        return
    if is_flash_attention_requested(model.config) and (positions[:, 1:] == 0).any():
        raise ValueError(
            f"num_trajectories={trajectories}: with attn_implementation={model.config._attn_implementation!r} a "
            "padding-free batch needs cu_seq_lens_q and its kin, but the data_collator gives position_ids alone; take "
            "TRL's collator or `DataCollatorWithFlattening(return_flash_attn_kwargs=True)`, or set num_trajectories "
            "to 1."
        )
