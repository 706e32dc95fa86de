"""Which linear layers get a posterior, and giving it to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dip_hf.dipnet.config import DIPNetConfig
from dip_hf.ibvi.layer import VariationalLora, covariances
from dip_hf.noise_state import NoiseState
from dip_hf.peft_compat import BaseTunerLayer, LoraLayer, clean_name


def block_of(name: str, block_names: Sequence[str], blocks: Sequence[int]) -> int | None:
    """The one of `blocks` that a module lies in, or is."""
    return next((block for block in blocks if f"{name}.".startswith(f"{block_names[block]}.")), None)


def _is_linear(module: nn.Module) -> bool:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return isinstance(base, nn.Linear | Conv1D)


def check_targets(
    model: nn.Module, config: DIPNetConfig, blocks: Sequence[int], is_target: Callable[[str], bool]
) -> None:
    """Check an adapter's targets before anything is changed.

    Args:
        blocks: the blocks that `variational_blocks` chooses, resolved.
        is_target: whether a module's name is one of `target_modules`.

    Raises:
        ValueError: a targeted module of these blocks is no linear layer, or there is none; or the targets were experts
            that are parameters now.
    """
    if config.target_parameters:
        raise ValueError(
            f"target_modules: in {type(model).__name__} it names experts, which are the parameters "
            f"{sorted(config.target_parameters)} and cannot have a posterior; name others, such as attention's, or "
            "set variational_rank to 0."
        )
    names = config.all_block_names or []
    inside = {name: module for name, module in model.named_modules() if block_of(name, names, blocks) is not None}
    targets = {name: module for name, module in inside.items() if is_target(name)}
    others = [f"{name} ({type(module).__name__})" for name, module in targets.items() if not _is_linear(module)]
    if others:
        raise ValueError(
            f"target_modules: {', '.join(others)} cannot have a posterior, which is for linear layers; take them out "
            "of target_modules, or their blocks out of variational_blocks."
        )
    if not targets:
        raise ValueError(_no_target(config))


def _no_target(config: DIPNetConfig) -> str:
    return (
        f"variational_blocks={config.variational_blocks!r} holds no module of "
        f"target_modules={config.target_modules!r}; choose other blocks, or set variational_rank to 0."
    )


def add_posteriors(
    model: nn.Module, adapter_name: str, config: DIPNetConfig, blocks: Sequence[int], state: NoiseState, on_meta: bool
) -> None:
    """Give every LoRA layer of an adapter that lies in `blocks` its posterior, not yet trainable.

    Args:
        on_meta: leave the covariances on the meta device, to be assigned on loading.

    Raises:
        ValueError: no such layer.
    """
    names: Any = config.all_block_names
    layers = {
        clean_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A and _is_linear(module)
    }
    found = {name: block for name in layers if (block := block_of(name, names, blocks)) is not None}
    if not found:
        raise ValueError(_no_target(config))
    for name, block in found.items():
        layer: Any = layers[name]
        VariationalLora.init(
            layer,
            adapter_name,
            rank=config.variational_rank,
            scale=config.variational_scale,
            in_eval=config.noise_in_eval,
            seed=config.noise_seed,
            name=name,
            block=block,
            state=state,
            device=torch.device("meta") if on_meta else layer.lora_A[adapter_name].weight.device,
        )
        leaf = covariances(layer)[adapter_name]
        trainable = adapter_name in layer.active_adapters and leaf.scale > 0 and not config.inference_mode
        leaf.weight.requires_grad_(trainable)
