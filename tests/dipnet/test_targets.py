"""An adapter trains what LoRA with the same targets trains, experts too; a configuration serves several models, and a
base several configurations one after the other."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from dip_hf import DIPNetConfig, export_lora
from dip_hf.ibvi.layer import Covariance
from dip_hf.noise import NoiseKey
from tests.dipnet.models import adapt, batch, build, config, load_base, logits, noisy, sites


LISTS = {
    "llama": ["q_proj", "gate_proj", "up_proj"],
    "mixtral": ["q_proj", "w1", "w2", "w3"],
    "qwen3_moe": ["q_proj", "gate_proj", "up_proj", "down_proj"],
}


def lora_parameters(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters() if p.requires_grad and "lora_dip" not in name}


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q_proj|gate_proj|up_proj|w1|w3)$", "list"])
@pytest.mark.parametrize("family", LISTS)
def test_the_targets_of_lora(family: str, targets: str) -> None:
    arguments: dict[str, Any] = {"target_modules": LISTS[family] if targets == "list" else targets, "r": 4}
    plain = get_peft_model(build(family), LoraConfig(**arguments, task_type="CAUSAL_LM"))
    found = lora_parameters(adapt(build(family), **arguments, init_lora_weights=True))
    assert found == lora_parameters(plain)
    assert any(".experts." in name for name in found) == (family != "llama")


def test_targets_that_nobody_named() -> None:
    """PEFT's choice for the family, as it is before transformers 5 made parameters of experts."""
    names = {name.split(".")[-4] for name in lora_parameters(adapt(build("mixtral"), target_modules=None))}
    assert names == {"q_proj", "v_proj"}


def test_a_part_of_what_is_one_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="w1 without also targeting w3"):
        adapt(build("mixtral"), target_modules=["q_proj", "w1"])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_saved_loaded_and_exported(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path / "base")
    model = adapt(load_base(str(tmp_path / "base"))).eval()
    expected, drawn = logits(model), noisy(model)
    model.save_pretrained(tmp_path / "adapter")
    for low_cpu_mem_usage in (False, True):
        base = load_base(str(tmp_path / "base"))
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded), expected) and torch.equal(noisy(loaded), drawn)
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    stock = PeftModel.from_pretrained(load_base(str(tmp_path / "base")), tmp_path / "lora").eval()
    assert type(stock.peft_config["default"]) is LoraConfig and torch.equal(logits(stock), expected)


@pytest.mark.parametrize(
    "again",
    [lambda given: given, dataclasses.replace, lambda given: DIPNetConfig(**given.to_dict()), copy.deepcopy],
    ids=["same", "replace", "to_dict", "deepcopy"],
)
@pytest.mark.parametrize("first", [4, 6])
def test_one_configuration_for_models_of_several_depths(
    first: int, again: Callable[[DIPNetConfig], DIPNetConfig]
) -> None:
    given = config(noise_blocks="50%")
    for depth in (first, 10 - first):
        given = again(given)
        model = get_peft_model(build(num_hidden_layers=depth), given)
        assert [site.layer for site in sites(model)] == list(range(depth // 2, depth))
        assert given.block_names is None and len(given.all_block_names or ()) == depth


def test_one_configuration_in_two_models_at_once() -> None:
    """Each trajectory begins at the first random block of the model that runs, whichever was made last."""
    given = config(noise_blocks="50%")
    models = [get_peft_model(build(num_hidden_layers=depth), given) for depth in (4, 6)]
    for model, depth in zip(models, (4, 6), strict=True):
        assert model.base_model.block_names() == [f"model.layers.{index}" for index in range(depth)]
        with model.base_model.sampling(NoiseKey(1), 2):
            assert len(model(**batch()).logits) == 2 * len(batch()["input_ids"])


def test_names_of_a_shallower_model_where_blocks_are_hidden() -> None:
    """A copied configuration brings the names of the model that it came from: they are not all of a deeper one's."""
    given = config()
    get_peft_model(build(num_hidden_layers=4), given)
    for depth in (4, 6):
        model = build(num_hidden_layers=depth)
        for index in range(depth):
            model.model.layers[index] = torch.compile(model.model.layers[index], backend="eager")
        copied = copy.deepcopy(given)
        if depth == 4:
            assert len(sites(get_peft_model(model, copied))) == 4
            continue
        with pytest.raises(ValueError, match="block_names=None: found 0 lists of 6 decoder blocks"):
            get_peft_model(model, copied)


def test_a_saved_configuration_for_a_deeper_model(tmp_path: Path) -> None:
    get_peft_model(build(), config(noise_blocks="all")).save_pretrained(tmp_path)
    saved = DIPNetConfig.from_pretrained(tmp_path)
    assert saved.all_block_names == [f"model.layers.{index}" for index in range(4)]
    fresh = dataclasses.replace(saved, inference_mode=False)
    assert len(sites(get_peft_model(build(num_hidden_layers=6), fresh))) == 6


def test_block_names_that_were_given_stay() -> None:
    names = [f"model.layers.{index}" for index in range(3)]
    assert [site.layer for site in sites(adapt(build(), block_names=names, noise_blocks=1))] == [2]


def test_a_base_that_was_adapted_before(tmp_path: Path) -> None:
    """As a notebook's cell is run again with other settings: what the first run left has no part in the second."""
    base = build()
    adapt(base, variational_rank=4, variational_scale=2.0, variational_blocks="all", learn_noise=False)
    again = {"noise_blocks": 1, "noise_scale": 0.3, "variational_rank": 2, "variational_blocks": [0, 1]}
    with pytest.warns(UserWarning, match="second time"):
        model = adapt(base, **again).train()
    tuner = model.base_model
    assert tuner.noised_layers() == [3] and tuner.variational_layers() == [0, 1]
    assert {leaf.rank for leaf in model.modules() if isinstance(leaf, Covariance)} == {2}
    fresh = adapt(build(), **again).train()
    own = {name: p.requires_grad for name, p in model.named_parameters() if "lora_dip" in name}
    assert own == {name: p.requires_grad for name, p in fresh.named_parameters() if "lora_dip" in name}
    drawn = logits(model)  # measures the scale
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(logits(loaded), logits(model.eval())) and not torch.equal(logits(model), drawn)
    with pytest.warns(UserWarning, match="second time"):
        assert adapt(base, noise_blocks=[0]).train().base_model.variational_layers() == []
