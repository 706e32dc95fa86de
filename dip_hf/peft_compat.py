"""Every private or undocumented name of PEFT that this project uses, in one place.

`tests/test_peft_compat.py` says which versions they hold for.
"""

from __future__ import annotations

from enum import Enum

from peft import mapping
from peft.config import PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES

__all__ = ["DUMMY_TARGET_MODULES", "BaseTunerLayer", "DIPPeftType", "LoraLayer", "LoraModel", "register"]


class DIPPeftType(str, Enum):
    """PEFT's own `PeftType` is a closed enum; its callers read `.value` and use the member as a dictionary key."""

    DIPNET = "DIPNET"


def register(peft_type: DIPPeftType, config_cls: type[PeftConfig], tuner_cls: type[LoraModel]) -> None:
    """Make PEFT know a method: `PeftConfig.from_pretrained`, `get_peft_model` and loading look it up here."""
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls  # type: ignore[index]
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner_cls  # type: ignore[index]
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = tuner_cls.prefix  # type: ignore[index]
