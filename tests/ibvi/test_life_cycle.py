"""An adapter with a posterior through everything that PEFT's users do with one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    EvaConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
    inject_adapter_in_model,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM

from dip_hf import DIPNetConfig, NoiseKey
from dip_hf.ibvi.layer import Covariance
from tests.dipnet.models import KEY, adapt, batch, build, config, load_base, logits, noisy
from tests.ibvi.models import EVERYWHERE, POSTERIOR, posteriors, variational


WHERE = "model.layers.3.mlp.up_proj.lora_dip_covariance"


@pytest.fixture
def base(tmp_path: Path) -> str:
    build().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def model(base: str) -> PeftModel:
    """With S that is not the initial one."""
    model = variational(load_base(base), variational_blocks=2).eval()
    for _, leaf in posteriors(model).values():
        leaf.weight.data += 0.1
    return model


def covariances_of(model: nn.Module) -> list[Covariance]:
    return [module for module in model.modules() if isinstance(module, Covariance)]


def test_what_is_trained(model: PeftModel) -> None:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(any(part in name for part in ("lora_A", "lora_B", "lora_dip_covariance")) for name in trained)
    assert sum("lora_dip_covariance" in name for name in trained) == 14
    assert all(leaf.weight.shape == (3, *leaf.shape) for leaf in covariances_of(model))
    with model.base_model.sampling(KEY):
        model(**batch()).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(model: PeftModel, base: str, tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    expected = noisy(model), logits(model)
    model.save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert weights[f"base_model.model.{WHERE}.weight"].dtype == torch.float32
    loaded = PeftModel.from_pretrained(load_base(base), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(noisy(loaded), expected[0]) and torch.equal(logits(loaded), expected[1])
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    trainable = PeftModel.from_pretrained(load_base(base), tmp_path / "adapter", is_trainable=True)
    assert all(leaf.weight.requires_grad for leaf in covariances_of(trainable))
    read = loaded.peft_config["default"]
    assert (read.variational_rank, read.variational_blocks, read.dip_format) == (3, 2, 2)
    assert read.dip_hf_version == DIPNetConfig().dip_hf_version


@pytest.mark.parametrize("without_memory", [False, True])
def test_a_posterior_follows_the_ranks_that_eva_chooses(base: str, tmp_path: Path, without_memory: bool) -> None:
    eva = config(**POSTERIOR, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))
    model = get_peft_model(load_base(base), eva, low_cpu_mem_usage=without_memory)
    initialize_lora_eva_weights(model, [batch(8, 16)] * 3, show_progress_bar=False)
    ranks = {module.r["default"] for module, _ in posteriors(model).values()}
    assert len(ranks) > 1
    for module, leaf in posteriors(model).values():
        assert leaf.shape == module.lora_A["default"].weight.shape and leaf.weight.requires_grad
        assert torch.equal(leaf.weight, leaf.initial())
    model.train()(**batch()).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    for module, _ in posteriors(model).values():
        torch.nn.init.normal_(module.lora_B["default"].weight)
    expected = noisy(model.eval())
    assert not torch.equal(expected, logits(model))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(noisy(PeftModel.from_pretrained(load_base(base), tmp_path / "adapter")), expected)


def test_auto_classes_and_transformers_load_it(model: PeftModel, base: str, tmp_path: Path) -> None:
    expected = noisy(model), logits(model)
    folder = str(tmp_path / "adapter")
    model.save_pretrained(folder)
    auto = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(auto), expected[1]) and torch.equal(noisy(auto), expected[0])
    native = AutoModelForCausalLM.from_pretrained(folder).eval()
    added = load_base(base)
    added.load_adapter(folder)
    for loaded in (native, added):
        assert torch.equal(logits(loaded), expected[1])
        for mine, theirs in zip(covariances_of(model), covariances_of(loaded), strict=True):
            assert torch.equal(mine.weight, theirs.weight) and mine.number == theirs.number
    added.train()
    assert not torch.equal(logits(added), logits(added))


def test_injection_without_a_peft_model(base: str) -> None:
    raw = load_base(base)
    clean = logits(raw)
    inject_adapter_in_model(config(**POSTERIOR), raw)
    assert not torch.equal(logits(raw), clean) and torch.equal(logits(raw), logits(raw))
    assert not torch.equal(logits(raw.train()), logits(raw))
    assert f"{WHERE}.weight" in get_peft_model_state_dict(raw)


@pytest.mark.parametrize("others", [{"noise_blocks": [0]}, {**POSTERIOR, "variational_rank": 1}], ids=["noise", "R=1"])
def test_several_adapters(model: PeftModel, base: str, tmp_path: Path, others: dict[str, Any]) -> None:
    one = noisy(model)
    model.add_adapter("other", config(**others, target_modules=["q_proj"]))
    assert torch.equal(noisy(model), one)
    model.set_adapter("other")
    two = noisy(model)
    assert not torch.equal(two, one)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".other" in name for name in trained)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(load_base(base), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    assert torch.equal(noisy(loaded), one)
    loaded.set_adapter("other")
    assert torch.equal(noisy(loaded), two)
    loaded.delete_adapter("default")
    assert torch.equal(noisy(loaded), two)
    assert not any(".default" in name for name in loaded.state_dict())
    assert not any("default" in getattr(module, "lora_variant", {}) for module in loaded.modules())


def test_a_plain_adapter_beside_it_has_nothing_to_sample(model: PeftModel) -> None:
    model.add_adapter("plain", config(variational_rank=2, variational_blocks=[0], noise_blocks=[]))
    model.set_adapter("plain")
    assert model.base_model.variational_layers() == [0]
    model.delete_adapter("plain")
    model.set_adapter("default")
    assert model.base_model.variational_layers() == [2, 3]


def test_disabling(model: PeftModel, base: str) -> None:
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load_base(base)))
        with pytest.raises(ValueError, match="adds no noise and has no posterior"), model.base_model.sampling(KEY):
            pass
    assert not torch.equal(noisy(model), logits(model))


@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_of_the_mean(model: PeftModel, safe: bool) -> None:
    mean, drawn = logits(model), noisy(model)
    model.merge_adapter(safe_merge=safe)
    assert (logits(model) - mean).abs().max() <= 1e-5
    assert model.base_model.variational_layers() == []
    with pytest.raises(ValueError, match="has no posterior"), model.base_model.sampling(KEY):
        pass
    assert torch.equal(logits(model.train()), logits(model))
    model.eval()
    model.unmerge_adapter()
    torch.testing.assert_close(noisy(model), drawn, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("merge", [True, False])
def test_unloading_leaves_no_trace(model: PeftModel, base: str, merge: bool) -> None:
    expected = logits(model) if merge else logits(load_base(base))
    model = copy.deepcopy(model)
    plain = model.merge_and_unload() if merge else model.unload()
    torch.testing.assert_close(logits(plain.train()), expected, rtol=1e-4, atol=1e-5)
    assert set(plain.state_dict()) == set(load_base(base).state_dict())
    assert not torch.equal(noisy(variational(plain)), logits(plain))  # and it can be adapted again


def test_a_copy_is_independent(model: PeftModel) -> None:
    before = noisy(model)
    other = copy.deepcopy(model)
    assert torch.equal(noisy(other), before)
    assert len({id(leaf.state) for leaf in covariances_of(other)}) == 1
    assert covariances_of(other)[0].state is not covariances_of(model)[0].state
    covariances_of(other)[0].weight.data += 1
    assert torch.equal(noisy(model), before) and not torch.equal(noisy(other), before)


def test_batches_of_several_adapters(model: PeftModel) -> None:
    """By the mean; samples of several adapters in one batch are refused."""
    model.add_adapter("other", config(**POSTERIOR, target_modules=["q_proj"]))
    one = logits(model)
    model.set_adapter("other")
    two = logits(model)
    names = ["default", "other", "__base__"]
    mixed, visible = logits(model, adapter_names=names), batch(padded=True)["attention_mask"].bool()
    torch.testing.assert_close(mixed[0][visible[0]], one[0][visible[0]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1][visible[1]], two[1][visible[1]], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"adapter_names=\[.*one at a time"), model.base_model.sampling(KEY):
        logits(model, adapter_names=names)
    model.add_adapter("sampled", config(**POSTERIOR, noise_in_eval=True))  # though another is the active one
    with pytest.raises(ValueError, match=r"adapter_names=\[.*one at a time"):
        logits(model, adapter_names=["default", "sampled", "__base__"])


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_weighted_adapters_combine_the_means(model: PeftModel, base: str, tmp_path: Path, combination: str) -> None:
    model.add_adapter("other", config(**POSTERIOR))
    model.add_weighted_adapter(["default", "other"], [0.7, 0.3], "both", combination_type=combination)
    model.set_adapter("both")
    assert torch.equal(noisy(model), logits(model))
    assert not any(leaf.weight.any() or leaf.weight.requires_grad for _, leaf in posteriors(model, "both").values())
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(load_base(base), tmp_path / "both")
    saved, read = (
        get_peft_model_state_dict(one, adapter_name=name) for one, name in ((model, "both"), (loaded, "default"))
    )
    assert saved.keys() == read.keys() and all(torch.equal(saved[name], read[name]) for name in saved)
    # PEFT leaves what a decomposition gives as it lies in memory, by rows or columns, which decides how BLAS rounds
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)
    assert torch.equal(noisy(loaded), logits(loaded))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_after_a_cast(model: PeftModel, dtype: torch.dtype) -> None:
    drawn = noisy(model.to(dtype))
    assert drawn.dtype == dtype and drawn.isfinite().all() and not torch.equal(drawn, logits(model))
    model.train()
    model(**batch()).logits.float().square().mean().backward()
    assert all(leaf.weight.grad.isfinite().all() for leaf in covariances_of(model))


def test_a_half_precision_base_keeps_the_covariance_in_fp32(base: str) -> None:
    model = variational(load_base(base).to(torch.bfloat16))
    assert all(leaf.weight.dtype == torch.float32 for leaf in covariances_of(model))
    assert noisy(model).dtype == torch.bfloat16


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_the_covariance_is_loaded_in_fp32_onto_half_precision(
    model: PeftModel, base: str, tmp_path: Path, low_cpu_mem_usage: bool
) -> None:
    model.save_pretrained(tmp_path / "adapter")
    half = load_base(base).to(torch.bfloat16)
    loaded = PeftModel.from_pretrained(half, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    for mine, theirs in zip(covariances_of(model), covariances_of(loaded), strict=True):
        assert torch.equal(mine.weight, theirs.weight)


def test_under_autocast(model: PeftModel) -> None:
    exact = noisy(model)
    with torch.autocast("cpu", torch.bfloat16), model.base_model.sampling(KEY, 2):
        rough = model(**batch(padded=True)).logits
        rough.float().square().mean().backward()
    torch.testing.assert_close(rough[:3].float(), exact, rtol=0.1, atol=0.1)
    assert all(leaf.weight.grad.dtype == torch.float32 for leaf in covariances_of(model))


def test_checkpoints_around_whole_blocks(model: PeftModel, base: str, tmp_path: Path) -> None:
    expected = noisy(model)
    model.train()
    with model.base_model.sampling(NoiseKey(1)):
        value = model(**batch(), use_cache=False).logits.sum()
    value.backward()
    gradients = [leaf.weight.grad.clone() for leaf in covariances_of(model)]
    model.zero_grad()
    layers = model.base_model.model.model.layers
    for index in range(4):
        layers[index] = checkpoint_wrapper(layers[index])
    with model.base_model.sampling(NoiseKey(1)):
        value = model(**batch(), use_cache=False).logits.sum()
    value.backward()
    assert all(map(torch.equal, gradients, [leaf.weight.grad for leaf in covariances_of(model)]))
    model.save_pretrained(tmp_path / "adapter")  # names are clean on saving
    assert torch.equal(noisy(PeftModel.from_pretrained(load_base(base), tmp_path / "adapter")), expected)


def test_noise_and_posterior_are_saved_together(base: str, tmp_path: Path) -> None:
    model = adapt(load_base(base), variational_rank=2, noise_blocks=1, **EVERYWHERE)
    expected: Tensor = noisy(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(noisy(PeftModel.from_pretrained(load_base(base), tmp_path / "adapter")), expected)
