"""Checks before training starts of DReS and ICP, which go through blocks a second time."""

from __future__ import annotations

from accelerate.utils import DynamoBackend, is_compiled_module
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import SFTTrainer

from dip_hf.trainer.checks.adapter import active_lora
from dip_hf.trainer.config import DIPSFTConfig


def check_second_pass(trainer: SFTTrainer) -> None:
    """
    Raises:
        ValueError: sharded parameters, which are whole only during the wrapper's own pass; compiled code, which sees
            no hooks that come and go; an adapter that a second pass finds changed; reentrant checkpoints; kernels or
            compiled code that bear one backward pass; padding without a mask; or no prompts to perturb.
    """
    backend = trainer.accelerator.state.dynamo_plugin.backend
    if backend != DynamoBackend.NO:
        raise ValueError(
            f"dynamo_backend={backend.value} of accelerate does not work with dres_weight or icp_weight, whose hooks "
            "come and go between steps, which compiled code does not see; set it to 'no', or these weights to 0."
        )
    zero_stage = trainer.args.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else 0
    if trainer.is_fsdp_enabled or trainer.is_distributed_loading_by_transformers or zero_stage == 3:
        raise ValueError(
            "dres_weight and icp_weight do not work with FSDP or ZeRO-3, whose parameters are not whole in a second "
            "pass; use DDP or ZeRO-2, or set both weights to 0."
        )
    if not trainer.args.activation_checkpointing and any(map(_reentrant, trainer.model.modules())):
        raise ValueError(
            "the model's gradient_checkpointing_enable made reentrant checkpoints, which do not work with dres_weight "
            "or icp_weight, whose second pass goes through the same blocks; call it with {'use_reentrant': False}, or "
            "set activation_checkpointing=True."
        )
    with_kernels = any(isinstance(part, PreTrainedModel) and part.use_kernels for part in trainer.model.modules())
    if with_kernels and trainer.args.icp_weight > 0:
        raise ValueError(
            "use_kernels=True does not work with icp_weight, which goes backward twice through one graph: the Hub's "
            "kernels may write their gradients over what they saved; load the model without them, or set icp_weight "
            "to 0."
        )
    compiled = _compiled_part(trainer.model)
    if compiled is not None and trainer.args.icp_weight > 0:
        raise ValueError(
            f"{compiled} is compiled code, which does not work with icp_weight, for that goes backward twice through "
            "one graph; leave it uncompiled (of attention, take 'sdpa'), or set icp_weight to 0."
        )
    for config in active_lora(trainer.model):
        if config.monteclora_config is not None:
            raise ValueError(
                "dres_weight and icp_weight do not work with monteclora_config: MonteCLoRA draws a new sample each "
                "time that a layer runs, so that a second pass may differ by it; leave it unset, or set both weights "
                "to 0."
            )
        if config.alora_invocation_tokens is not None:
            raise ValueError(
                "dres_weight and icp_weight do not work with alora_invocation_tokens: PEFT says where a row's "
                "invocation is in the model's own pass alone; leave it unset, or set both weights to 0."
            )
    if trainer.args.icp_weight > 0 and trainer.args.icp_steps > 1 and trainer.aux_loss_enabled:
        raise ValueError(
            f"icp_steps={trainer.args.icp_steps} does not work with a router loss, which is scaled otherwise in the "
            "further steps' passes; set router_aux_loss_coef=0.0 or icp_steps=1."
        )
    multiple = trainer.args.pad_to_multiple_of
    if trainer.args.dres_weight > 0 and trainer.padding_free and multiple is not None:
        raise ValueError(
            f"pad_to_multiple_of={multiple} with packing=True or padding_free=True pads without a mask, so that DReS "
            "would code the padding; leave it unset, or set dres_weight to 0."
        )
    if trainer.args.icp_positions == "prompt" and isinstance(trainer.train_dataset, Dataset):
        rows = trainer.train_dataset.select(range(min(100, len(trainer.train_dataset))))
        if "labels" in rows.column_names and not any(-100 in labels for labels in rows["labels"]):
            raise ValueError(
                "icp_positions='prompt' perturbs tokens without a label, but every token of train_dataset has one; "
                "give prompts and completions, or set icp_positions to 'all'."
            )


def _compiled_part(model: PreTrainedModel | PeftModel) -> str | None:
    """What of a model is compiled code, as an error is to call it; None where nothing is."""
    if model.config.get_text_config()._attn_implementation == "flex_attention":
        return "attn_implementation='flex_attention'"
    for name, module in model.named_modules():
        if is_compiled_module(module) or module._compiled_call_impl is not None:
            return name or type(module).__name__
    return None


def _reentrant(module: nn.Module) -> bool:
    """Whether a block is recomputed by torch's reentrant checkpoints, which are its default."""
    if not isinstance(module, GradientCheckpointingLayer) or not module.gradient_checkpointing:
        return False
    return module._gradient_checkpointing_func.keywords.get("use_reentrant") is not False


def check_one_loss_pass(args: DIPSFTConfig, has_loss_function: bool) -> None:
    """
    Args:
        args: of a trainer with a regulariser that is on.
        has_loss_function: whether the trainer was given a `compute_loss_func`.

    Raises:
        ValueError: a loss for which TRL runs a second pass, whose hidden states would be taken for the first's.
    """
    smooths = args.label_smoothing_factor > 0 and args.loss_type == "nll"  # TRL smooths no other loss
    if has_loss_function or smooths:
        name = "compute_loss_func" if has_loss_function else "label_smoothing_factor"
        raise ValueError(
            f"{name} makes TRL run a second forward pass, which the regularisers cannot tell from the first; leave it "
            "unset, or turn the regularisers off."
        )
