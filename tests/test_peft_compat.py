"""The private names of PEFT that the adapter stands on mean what it takes them to mean."""

from __future__ import annotations

import inspect
from importlib.metadata import requires, version

import pytest
from packaging.requirements import Requirement
from peft import PeftConfig, mapping
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from dip_hf import DIPNetConfig, DIPNetModel
from dip_hf.peft_compat import DUMMY_TARGET_MODULES, DIPPeftType, clean_name


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
        (LoraModel, "add_weighted_adapter", ["adapters", "weights", "adapter_name"]),
        (LoraModel, "_enable_peft_forward_hooks", ["args", "kwargs"]),
        (BaseTunerLayer, "merge", ["safe_merge", "adapter_names"]),
        (BaseTunerLayer, "_freeze_non_trainable_peft_weights", ["adapter_names"]),
        (BaseTunerLayer, "get_base_layer", []),
    ],
)
def test_overridden_methods_take_the_arguments_that_are_passed_on(
    owner: type, name: str, parameters: list[str]
) -> None:
    found = [parameter for parameter in inspect.signature(getattr(owner, name)).parameters if parameter != "self"]
    assert found[: len(parameters)] == parameters


def test_no_targets_means_the_dummy_target() -> None:
    assert DIPNetConfig(target_modules=[]).target_modules == DUMMY_TARGET_MODULES


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
