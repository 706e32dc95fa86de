"""Every private or undocumented name of PEFT that this project imports, in one place.

Methods of PEFT's classes that subclasses override or call are in the test's table alone.

`tests/test_peft_compat.py` says which versions they hold for.
"""

from __future__ import annotations

import re
from dataclasses import fields
from enum import Enum

from peft import LoraConfig, PeftType, mapping
from peft.config import PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as include_all_linear_layers
from peft.utils.constants import DUMMY_TARGET_MODULES, EMBEDDING_LAYER_NAMES
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn


__all__ = [
    "DUMMY_TARGET_MODULES",
    "EMBEDDING_LAYER_NAMES",
    "MONTECLORA_SAMPLER",
    "PARAMETER_PREFIX",
    "BaseTunerLayer",
    "DIPPeftType",
    "LoraLayer",
    "LoraModel",
    "LoraVariant",
    "check_adapters_to_merge",
    "clean_name",
    "convert_targets",
    "get_pattern_key",
    "include_all_linear_layers",
    "is_own",
    "register",
    "requested_variants",
]

# Parts that FSDP, activation checkpointing and torch.compile put into the names of what they wrap.
_WRAPPERS = re.compile(r"(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)(?:\.|$)")


PARAMETER_PREFIX = "lora_dip_"
"""Begins the names of the parameters that DIPNet and IBVI add to LoRA's: PEFT saves what begins with "lora_"."""

MONTECLORA_SAMPLER = "lora_monteclora_sampler"
"""Used in training alone: PEFT saves it, and makes none in a layer that it loads with `low_cpu_mem_usage`."""


class DIPPeftType(str, Enum):  # noqa: UP042  (PEFT parses str(member), which StrEnum changes)
    """PEFT's own `PeftType` is a closed enum; its callers read `.value` and use the member as a dictionary key."""

    DIPNET = "DIPNET"


def register(peft_type: DIPPeftType, config_cls: type[PeftConfig], tuner_cls: type[LoraModel]) -> None:
    """Make PEFT know a method: `PeftConfig.from_pretrained`, `get_peft_model` and loading look it up here."""
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner_cls
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = tuner_cls.prefix


def requested_variants(config: LoraConfig) -> list[str]:
    """Names of the fields that ask for a variant of LoRA (DoRA, MonteCLoRA, ...), of which a layer has at most one."""
    names = [
        option.name
        for option in fields(config)
        if option.metadata.get("is_lora_variant") and getattr(config, option.name)
    ]
    inits = LoraConfig.__dataclass_fields__["init_lora_weights"].metadata["lora_variants"]
    return names + (["init_lora_weights"] if config.init_lora_weights in inits else [])


def convert_targets(config: LoraConfig, model: nn.Module) -> None:
    """Name, in place, as a model of transformers 5 has them the experts that were linear layers before: as parameters.

    PEFT does it for configurations of its own LoRA's type alone.

    Raises:
        ValueError: `target_modules` has a part only of what is one parameter now.
    """
    if config.target_modules is None:  # PEFT's own choice, of attention's layers, which it would lose
        return
    own, config.peft_type = config.peft_type, PeftType.LORA
    try:
        convert_peft_config_for_transformers(config, model, conversions=None)
    finally:
        config.peft_type = own


def is_own(name: str) -> bool:
    """Whether a parameter, by its whole name, is one that plain LoRA does not know."""
    return f".{PARAMETER_PREFIX}" in name


def clean_name(name: str) -> str:
    """A module's or parameter's name without the parts that wrappers put into it."""
    return _WRAPPERS.sub("", name).removesuffix(".")
