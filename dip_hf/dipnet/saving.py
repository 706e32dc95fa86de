"""How an adapter's weights are written: under plain names, and relative to the untouched base where asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dip_hf.dipnet.layer import LOG_VARIANCE
from dip_hf.dipnet.weight_checks import CheckedLoraModel
from dip_hf.ibvi.layer import COVARIANCE
from dip_hf.peft_compat import clean_name


if TYPE_CHECKING:
    from dip_hf.dipnet.config import DIPNetConfig


class SavedLoraModel(CheckedLoraModel):
    """`LoraModel` whose files know no wrappers, and keep the noise where PEFT converts LoRA's weights."""

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: DIPNetConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # PEFT looks parameters up under their modules' names, which have the wrapper's part in them where a block is
        # wrapped (checkpoint_wrapper, FSDP), as the state dict's keys have not.
        modules = {clean_name(name): name.removeprefix("_fsdp_wrapped_module.") for name, _ in model.named_modules()}
        wrapped = {}
        for key, value in state_dict.items():
            parent, _, leaf = clean_name(key).rpartition(".")
            wrapped[f"{modules[parent]}.{leaf}" if parent in modules else key] = value
        return super()._get_adapter_state_dict(model, config, adapter_name, wrapped, unwanted_adapter_names)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT applies it on saving and, to the model's keys, on loading: no wrapper leaves a trace in a file.
        return clean_name(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls,
        peft_model: Any,
        peft_config: DIPNetConfig,
        path_initial_model_for_weight_conversion: str,
        output_state_dict: dict[str, Tensor],
        kwargs: dict[str, Any],
    ) -> dict[str, Tensor]:
        """As PEFT's, which makes LoRA's A and B twice as large, and here with everything else that is saved.

        The initial A gets no covariance.
        """
        # PEFT does so for its own LoRA alone, and has just written the other value into the initial adapter's folder.
        peft_config.init_lora_weights = True
        peft_config.save_pretrained(path_initial_model_for_weight_conversion)
        converted = super()._convert_state_dict_for_initial_model(
            peft_model, peft_config, path_initial_model_for_weight_conversion, output_state_dict, kwargs
        )
        for name, tensor in output_state_dict.items():
            if f".{COVARIANCE}." in name:
                converted[name] = torch.cat([tensor, torch.zeros_like(tensor)], dim=1)
            elif f".{LOG_VARIANCE}." in name or ".lora_" not in name:
                converted[name] = tensor
        return converted
