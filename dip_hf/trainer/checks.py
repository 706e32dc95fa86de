"""Checks before training starts: what would otherwise fail late, or train silently on the wrong thing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested
from trl import SFTTrainer

from dip_hf.dipnet.layer import NoiseSite
from dip_hf.trainer.config import DIPSFTConfig
from dip_hf.trainer.objective import own_parameters


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


def active_lora(model: nn.Module) -> list[LoraConfig]:
    """The configurations of the active adapters that are LoRA, DIPNet's among them."""
    configs = [model.peft_config[name] for name in model.active_adapters] if isinstance(model, PeftModel) else []
    return [config for config in configs if isinstance(config, LoraConfig)]


def check_trainable(model: PeftModel) -> None:
    """
    Raises:
        ValueError: an adapter without a parameter that learns, or that is to save modules which the model has not.
    """
    names = [name for name, _ in model.named_modules()]
    for config in active_lora(model):
        missing = [name for name in config.modules_to_save or () if not any(own.endswith(name) for own in names)]
        if missing:
            raise ValueError(
                f"modules_to_save={list(config.modules_to_save or ())}: the model has no module of the name "
                f"{missing[0]!r}, and the adapter could not be exported; correct it, or leave it out."
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "the adapter leaves nothing to train (learn_noise=False without target_modules, or loaded for inference); "
            "name target_modules, learn the noise, or load with is_trainable=True."
        )


def check_drawn_noise(model: nn.Module) -> None:
    """
    Raises:
        ValueError: log-variances would be trained of an adapter whose noise no pass draws, another one being active
            before it.
    """
    for site in (module for module in model.modules() if isinstance(module, NoiseSite)):
        drawn, *others = site.adapters_with_noise() or [""]
        for name in others:
            if site.leaf(name).weight.requires_grad:
                raise ValueError(
                    f"active adapters {[drawn, *others]}: block {site.layer} draws the noise of {drawn!r}, the first "
                    f"of them, so that the noise of {name!r} would be trained without being drawn; activate {name!r} "
                    f"first or alone, or merge {drawn!r} into the base by merge_and_unload."
                )


def check_recomputation(trainer: SFTTrainer) -> None:
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


def check_parallelism(trainer: SFTTrainer) -> None:
    """
    Raises:
        ValueError: several ranks share one batch, in which each would draw noise and groups of its own.
    """
    parallelism = trainer.accelerator.parallelism_config
    if parallelism is not None and (parallelism.tp_enabled or parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            f"parallelism_config={parallelism}: with tensor, context or sequence parallelism the ranks of one batch "
            "would draw different noise and groups; use data parallelism (DDP, FSDP2, ZeRO)."
        )


def check_noise_setup(trainer: SFTTrainer, args: DIPSFTConfig) -> None:
    """
    Raises:
        ValueError: the set-up recomputes blocks without their noise, cannot shard the adapter's parameters, or cannot
            run folded trajectories.
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
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        quantised = any(type(parameter).__name__ == "Params4bit" for parameter in trainer.model.parameters())
        if not quantised and any(isinstance(module, NoiseSite) for module in trainer.model.modules()):
            raise ValueError(
                "fsdp_cpu_ram_efficient_loading=True takes all of a model's state for sharded parameters, which the "
                "measured RMS of DIPNet's blocks is not; set it to False."
            )
    if trainer.is_fsdp_enabled:
        _check_quantised(trainer.model)
    multiple = args.pad_to_multiple_of
    if (
        multiple is not None
        and trainer.padding_free
        and any(isinstance(m, NoiseSite) for m in trainer.model.modules())
    ):
        raise ValueError(
            f"pad_to_multiple_of={multiple} with packing=True or padding_free=True pads without a mask, so that the "
            "padding would count in the scale of DIPNet's noise; leave it unset, or turn both off."
        )
    if args.num_trajectories == 1:
        return
    if any(config.alora_invocation_tokens is not None for config in active_lora(trainer.model)):
        raise ValueError(
            f"num_trajectories={args.num_trajectories} does not work with alora_invocation_tokens: aLoRA knows where "
            "a row's invocation is for the rows of the batch, not for their copies; leave alora_invocation_tokens "
            "unset, or set num_trajectories to 1."
        )
    kinds = set(trainer.model.config.get_text_config().to_dict().get("layer_types") or ()) - _ATTENTIONS
    if trainer.padding_free and kinds:
        raise ValueError(
            f"num_trajectories={args.num_trajectories} with packing or padding_free=True: {sorted(kinds)[0]} blocks "
            "read the boundaries of one row alone; turn both off, or set num_trajectories to 1."
        )
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


def check_no_adapter(model: nn.Module) -> None:
    """
    Raises:
        ValueError: there is a DIPNet adapter, but put in by transformers' `add_adapter`, which hides it from PEFT and
            TRL.
    """
    if own_parameters(model):
        raise ValueError(
            f"model={type(model).__name__} holds a DIPNet adapter outside of a PeftModel, as add_adapter leaves it; "
            "pass peft_config=DIPNetConfig(...) instead, or a model from get_peft_model or PeftModel.from_pretrained."
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
    config = model.config.to_dict()
    if images and (
        config.get("deepstack_layer_map") or (config.get("vision_config") or {}).get("deepstack_visual_indexes")
    ):
        raise ValueError(
            f"num_trajectories={trajectories}: {type(model).__name__} adds features of {images[0]} to the rows "
            "between its blocks, and knows nothing of their copies; train on text alone, or set num_trajectories to 1."
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
