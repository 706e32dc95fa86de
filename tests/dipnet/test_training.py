"""The adapter with LoRA's options, half precision, activation checkpointing and generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftModel,
)
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tests.dipnet.models import KEY, adapt, batch, load_base, logits, noisy, sites


@pytest.mark.parametrize(
    "arguments",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 2]},
        {"bias": "all"},
        {"lora_dropout": 0.1},
        {"target_modules": []},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_options_of_lora(base: str, tmp_path: Path, arguments: dict[str, Any]) -> None:
    model = adapt(load_base(base), **arguments)
    model.train()
    model(**batch()).logits.square().sum().backward()
    assert all(site.leaf("default").weight.grad.abs().sum() > 0 for site in sites(model))
    model.eval()
    expected = noisy(model), logits(model)
    assert not torch.allclose(*expected, atol=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load_base(base), tmp_path / "adapter")
    assert torch.equal(noisy(loaded), expected[0]) and torch.equal(logits(loaded), expected[1])


def test_noise_only_keeps_the_base_model(base: str) -> None:
    model = adapt(load_base(base), target_modules=[])
    assert model.peft_config["default"].noise_only
    assert torch.equal(logits(model), logits(load_base(base)))
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"weight"}
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 4 * 32


def test_generation_with_a_cache_equals_generation_without(model: PeftModel) -> None:
    arguments = {**batch(padded=True), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(**arguments, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, plain)


def test_generation_from_several_trajectories_is_refused(model: PeftModel) -> None:
    arguments = {**batch(padded=True), "max_new_tokens": 2, "do_sample": False}
    message = r"generate inside sampling\(trajectories=2\).*trajectories=1, or .*hf-dip \(num_samples=2\)"
    with model.base_model.sampling(KEY, trajectories=2), pytest.raises(ValueError, match=message):
        model.generate(**arguments)
    with model.base_model.sampling(KEY, trajectories=1):
        assert model.generate(**arguments).shape == (3, 12)
    assert model.generate(**arguments).shape == (3, 12)


def gradients(model: PeftModel, trajectories: int = 1) -> list[Tensor]:
    model.zero_grad()
    with model.base_model.sampling(KEY, trajectories):
        loss = model(**batch(padded=True), use_cache=False).logits.square().mean()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("trajectories", [1, 2])
@pytest.mark.filterwarnings("ignore")
def test_activation_checkpointing_gives_the_same_gradients(
    model: PeftModel, trajectories: int, reentrant: bool
) -> None:
    model.train()
    expected = gradients(model, trajectories)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert all(map(torch.equal, gradients(model, trajectories), expected))
    model.train()
    model(**batch(), use_cache=False).logits.sum().backward()  # outside any context too


def test_checkpoints_around_whole_blocks(model: PeftModel, base: str, tmp_path: Path) -> None:
    expected = noisy(model)
    layers = model.base_model.model.model.layers
    for index in range(4):
        layers[index] = checkpoint_wrapper(layers[index])
    assert torch.equal(noisy(model), expected)
    # names are clean on saving, and the file loads into an unwrapped model
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert len(weights) == 4 * 7 * 2 + 2 * 2 and not any("wrapped" in name for name in weights)
    assert torch.equal(noisy(PeftModel.from_pretrained(load_base(base), tmp_path)), expected)
    # such a checkpoint runs the block's hooks again in the backward pass: refused where the noise would differ
    model.train()
    with pytest.raises(RuntimeError, match="gradient_checkpointing_enable"):
        model(**batch(), use_cache=False).logits.sum().backward()


def test_saving_a_noised_block_is_refused_before_anything_changes(base: str) -> None:
    plain = load_base(base)
    with pytest.raises(ValueError, match=r"modules_to_save=\['layers.1'\].*\['model.layers.1'\].*noise_blocks"):
        adapt(plain, modules_to_save=["layers.1"])
    assert not sites(plain) and not any("lora" in name for name in plain.state_dict())
    adapt(plain, modules_to_save=["layers.1"], noise_blocks=[2, 3], target_modules=["layers.2.mlp.up_proj"])
