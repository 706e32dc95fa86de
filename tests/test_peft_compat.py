"""The private names of PEFT that the adapter stands on mean what it takes them to mean."""

from __future__ import annotations

import importlib.util
import inspect
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, mapping
from peft.tuners import lora, tuners_utils
from peft.tuners.lora.config import MontecloraConfig
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import transformers_weight_conversion
from torch import nn

from dip_hf import DIPNetConfig, DIPNetModel
from dip_hf.peft_compat import (
    DUMMY_TARGET_MODULES,
    EMBEDDING_LAYER_NAMES,
    MONTECLORA_SAMPLER,
    DIPPeftType,
    LoraVariant,
    clean_name,
    get_pattern_key,
    requested_variants,
)


def test_the_installed_version_is_one_that_is_declared() -> None:
    declared = next(Requirement(line) for line in requires("dip_hf") or [] if line.startswith("peft"))
    assert declared.specifier.contains(version("peft"))


def test_importing_registers_the_method() -> None:
    kind = DIPPeftType.DIPNET
    assert kind == "DIPNET" and kind.value == kind.name and DIPNetConfig().peft_type is kind
    # PEFT looks up by the member, by its text and by the text in a file
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["DIPNET"] is DIPNetConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind] is DIPNetModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING["DIPNET"] == "lora_"
    assert isinstance(PeftConfig.from_peft_type(peft_type="DIPNET"), DIPNetConfig)


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (BaseTuner, "inject_adapter", ["model", "adapter_name", "autocast_adapter_dtype", "low_cpu_mem_usage"]),
        (BaseTuner, "delete_adapter", ["adapter_name"]),
        (BaseTuner, "_unload_and_optionally_merge", ["merge", "progressbar", "safe_merge", "adapter_names"]),
        (BaseTuner, "_get_adapter_state_dict", ["model", "config", "adapter_name", "state_dict"]),
        (BaseTuner, "_remove_adapter_name_from_key", ["key", "adapter_name"]),
        (BaseTuner, "_remap_adapter_state_dict_for_load", ["model", "config", "adapter_name", "state_dict"]),
        (
            LoraModel,
            "_convert_state_dict_for_initial_model",
            [
                *("peft_model", "peft_config", "path_initial_model_for_weight_conversion", "output_state_dict"),
                "kwargs",
            ],
        ),
        (
            LoraModel,
            "_create_and_replace",
            ["lora_config", "adapter_name", "target", "target_name", "parent", "current_key"],
        ),
        (LoraModel, "add_weighted_adapter", ["adapters", "weights", "adapter_name"]),
        (LoraModel, "_enable_peft_forward_hooks", ["args", "kwargs"]),
        (BaseTunerLayer, "merge", ["safe_merge", "adapter_names"]),
        (BaseTunerLayer, "_freeze_non_trainable_peft_weights", ["adapter_names"]),
        (BaseTunerLayer, "get_base_layer", []),
        (BaseTuner, "_check_target_module_exists", ["peft_config", "key"]),
        (BaseTuner, "_prepare_adapter_config", ["peft_config", "model_config"]),
        (BaseTuner, "get_model_config", ["model"]),
        (tuners_utils, "_maybe_include_all_linear_layers", ["peft_config", "model"]),
        (
            transformers_weight_conversion,
            "convert_peft_config_for_transformers",
            ["peft_config", "model", "conversions"],
        ),
        (LoraVariant, "forward", ["module", "active_adapter", "x", "result", "kwargs"]),
        (LoraVariant, "merge_safe", ["module", "active_adapter", "orig_weight"]),
        (LoraVariant, "merge_unsafe", ["module", "active_adapter", "orig_weight"]),
        (LoraVariant, "unmerge", ["module", "active_adapter", "orig_weight"]),
    ],
)
def test_what_is_overridden_or_called_takes_the_arguments_that_are_passed_on(
    owner: Any, name: str, parameters: list[str]
) -> None:
    found = [parameter for parameter in inspect.signature(getattr(owner, name)).parameters if parameter != "self"]
    assert found[: len(parameters)] == parameters


def test_the_rank_pattern_of_a_module() -> None:
    assert get_pattern_key(["k_proj", r"1\..*q_proj"], "layers.1.self_attn.q_proj") == r"1\..*q_proj"
    assert get_pattern_key(["k_proj"], "layers.1.self_attn.q_proj") == "layers.1.self_attn.q_proj"


def test_no_targets_means_the_dummy_target() -> None:
    assert DIPNetConfig(target_modules=[]).target_modules == DUMMY_TARGET_MODULES


def test_layers_with_a_row_for_each_token() -> None:
    assert EMBEDDING_LAYER_NAMES == ["embed_tokens", "lm_head"]


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("model.layers.0._orig_mod.mlp.weight", "model.layers.0.mlp.weight"),
        ("_orig_mod.model.layers.0", "model.layers.0"),
        ("model.layers.0._checkpoint_wrapped_module", "model.layers.0"),
        ("_fsdp_wrapped_module.a._fsdp_wrapped_module._orig_mod.b", "a.b"),
        ("_orig_mod", ""),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("model.layers.0", "model.layers.0"),
    ],
)
def test_names_without_wrappers(name: str, clean: str) -> None:
    assert clean_name(name) == clean


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, []),
        ({"use_rslora": True, "init_lora_weights": "gaussian"}, []),
        ({"use_dora": True}, ["use_dora"]),
        ({"monteclora_config": MontecloraConfig()}, ["monteclora_config"]),
        ({"init_lora_weights": "mica"}, ["init_lora_weights"]),
    ],
    ids=str,
)
def test_variants_of_lora_are_told_by_their_fields(arguments: dict[str, Any], expected: list[str]) -> None:
    assert requested_variants(LoraConfig(**arguments)) == expected


def test_every_linear_lora_layer_hands_its_forward_pass_to_a_variant() -> None:
    """A layer that did not would leave a posterior out silently."""
    kinds = [lora.Linear]
    if importlib.util.find_spec("bitsandbytes"):
        kinds += [lora.Linear4bit, lora.Linear8bitLt]
    for kind in kinds:
        assert "self.lora_variant[active_adapter].forward(" in inspect.getsource(kind.forward)
        for method in (kind.merge, kind.unmerge):
            assert "self.lora_variant[active_adapter]." in inspect.getsource(method)


def test_peft_makes_no_monteclora_sampler_to_save_memory(tmp_path: Path) -> None:
    """When it does, `MONTECLORA_SAMPLER` can go, and its weights be checked like all others."""
    config = LoraConfig(target_modules=["0"], monteclora_config=MontecloraConfig())
    get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).save_pretrained(tmp_path)
    found = []
    for low_cpu_mem_usage in (False, True):
        base = nn.Sequential(nn.Linear(8, 8))
        model = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        found.append(any(MONTECLORA_SAMPLER in key for key in model.state_dict()))
    assert found == [True, False]
