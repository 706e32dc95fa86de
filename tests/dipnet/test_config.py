"""Fields that make no sense are refused with the field, its value and a remedy, before the model is changed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from dip_hf import DIPNetConfig
from tests.dipnet.models import adapt, build


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("noise_scale", 0, "noise_scale=0 must be positive and finite; for no noise use peft.LoraConfig"),
        ("noise_scale", -0.1, "noise_scale=-0.1 must be positive"),
        ("noise_scale", math.nan, "noise_scale=nan must be positive"),
        ("noise_scale", math.inf, "noise_scale=inf must be positive and finite"),
        ("noise_blocks", 1.5, r"noise_blocks=1.5 must be 'all', a number, '25%', a list"),
        ("noise_blocks", True, r"noise_blocks=True must be 'all'"),
        ("noise_blocks", None, r"noise_blocks=None must be 'all'"),
        ("noise_blocks", ["model.layers.1"], r"noise_blocks=\['model.layers.1'\] must be"),
        ("noise_blocks", "0%", r"noise_blocks='0%' must be from '1%' to '100%'"),
        ("variational_blocks", "150%", r"variational_blocks='150%' must be from '1%' to '100%'"),
        ("noise_seed", 1.5, r"noise_seed=1.5 must be a whole number"),
        ("dip_format", 3, "dip_format=3: this version of dip_hf reads formats 1 to 2; upgrade dip_hf"),
        ("dip_format", 0, "dip_format=0: "),
        ("dip_format", "one", "dip_format='one': "),
        ("layer_replication", [(0, 2), (1, 3)], r"layer_replication=\[.*leave it unset"),
    ],
    ids=str,
)
def test_values(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DIPNetConfig(target_modules=["q_proj"], **{field: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_blocks": 5}, "noise_blocks=5: the model has 4 blocks; give a number from 1 to 4"),
        ({"noise_blocks": 0}, "noise_blocks=0 and variational_rank=0 leave nothing but LoRA; use peft.LoraConfig"),
        ({"noise_blocks": [4]}, r"noise_blocks=\[4\]: the model has 4 blocks.*each from -4 to 3"),
        ({"noise_blocks": []}, r"noise_blocks=\[\] and variational_rank=0 leave nothing"),
        ({"noise_blocks": "blocks"}, "noise_blocks='blocks' matches no block; the blocks are 'model.layers.0'"),
        ({"block_names": []}, r"block_names=\[\] names no block; name all decoder blocks, or leave it unset"),
        ({"block_names": ["model.layers.0", "layers.9"]}, r"block_names: \['layers.9'\] are no modules of Llama"),
    ],
    ids=str,
)
def test_blocks_that_the_model_has_not(arguments: dict[str, Any], message: str) -> None:
    model = build()
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        adapt(model, **arguments)
    assert set(model.state_dict()) == names and not any(module._forward_pre_hooks for module in model.modules())


def test_a_second_adapter_that_is_refused_leaves_the_first() -> None:
    model = adapt(build())
    names = set(model.state_dict())
    with pytest.raises(ValueError, match="noise_blocks=9"):
        model.add_adapter("other", DIPNetConfig(noise_blocks=9, target_modules=["q_proj"]))
    assert set(model.state_dict()) == names and list(model.peft_config) == ["default"]


def test_a_model_of_ones_own() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    with pytest.raises(ValueError, match=r"block_names=None: Own has no config with a number of layers"):
        adapt(Own(), task_type=None, target_modules=["first"])
    with pytest.raises(ValueError, match=r"input size of 'second' \(Sequential\).*name `nn.Linear` modules instead"):
        adapt(Own(), task_type=None, target_modules=["first"], block_names=["second"])
    # a block that is a LoRA target as well: both see the noise
    model = adapt(Own(), task_type=None, target_modules=["first"], block_names=["first", "second.0"]).train()
    assert not torch.equal(model(torch.ones(2, 4)), model(torch.ones(2, 4)))


def test_a_block_that_a_later_adapters_lora_wraps() -> None:
    model = adapt(nn.Sequential(nn.Linear(4, 4)), task_type=None, target_modules=[], block_names=["0"])
    with torch.no_grad():
        model.train()(torch.ones(2, 4))  # measures the scale
    model.add_adapter(
        "lora", DIPNetConfig(target_modules=["0"], block_names=["0"], init_lora_weights=False, noise_scale=0.5)
    )
    names = [name for name in model.state_dict() if "dip" in name]
    assert all(".0.dip_noise.lora_dip_log_variance." in name for name in names) and len(names) == 4
    model.set_adapter("lora")
    wrapper = model.base_model.model[0]
    seen: dict[str, torch.Tensor] = {}
    wrapper.base_layer.register_forward_pre_hook(lambda module, args: seen.update(base=args[0]))
    wrapper.lora_A["lora"].register_forward_pre_hook(lambda module, args: seen.update(lora=args[0]))
    model(torch.ones(2, 4))
    assert torch.equal(seen["base"], seen["lora"]) and not torch.equal(seen["base"], torch.ones(2, 4))


def test_a_round_trip_through_a_file(tmp_path: Path) -> None:
    config = DIPNetConfig(
        target_modules=["q_proj"], noise_blocks=range(1, 3), noise_scale=0.3, learn_noise=False, noise_seed=5
    )
    config.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(read, DIPNetConfig)
    assert (read.noise_blocks, read.noise_scale, read.learn_noise, read.noise_seed) == ([1, 2], 0.3, False, 5)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    adapt(build()).save_pretrained(tmp_path)
    return tmp_path


def test_an_adapter_of_a_newer_format(saved: Path) -> None:
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dip_format": 7, "an_option_of_the_future": 1}))
    with pytest.raises(ValueError, match=r"dip_format=7: .*upgrade dip_hf"):
        PeftModel.from_pretrained(build(), saved)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_an_adapter_without_its_weights(saved: Path, is_trainable: bool) -> None:
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"No adapter_model.safetensors in .*weights are missing; save or copy"):
        PeftModel.from_pretrained(build(), saved, is_trainable=is_trainable)


def test_a_damaged_or_pickled_adapter_is_not_loaded(saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is truncated or damaged"):
        PeftModel.from_pretrained(build(), saved)
    weights.unlink()
    torch.save({}, saved / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin is a pickled weight file"):
        PeftModel.from_pretrained(build(), saved)


def test_saving_a_pickle_warns(saved: Path, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(build(), saved)
    message = r"safe_serialization=False has pickled .*save again without it, or convert it with safetensors"
    with pytest.warns(UserWarning, match=message) as warned:
        model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert [warning.filename for warning in warned] == [__file__]
    pickle = tmp_path / "pickled" / "adapter_model.bin"
    save_file(torch.load(pickle, weights_only=True), pickle.with_suffix(".safetensors"))
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (saved, tmp_path / "pickled"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert isinstance(PeftModel.from_pretrained(build(), tmp_path / "pickled"), PeftModel)
