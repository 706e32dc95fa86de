"""Noise, a posterior, or both, through everything that PEFT's users do with an adapter."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dip_hf import DIPNetConfig
from dip_hf.ibvi.layer import Covariance
from tests.dipnet.models import KEY, adapt, batch, config, load_base, logits, noisy
from tests.ibvi.models import KINDS, leaves


NOISE = {"model.layers.2.dip_noise.lora_dip_log_variance.weight", "model.layers.2.dip_noise.lora_dip_log_variance.rms"}
POSTERIOR = {"model.layers.3.mlp.up_proj.lora_dip_covariance.weight"}
NAMES = {"noise": NOISE, "posterior": POSTERIOR, "both": NOISE | POSTERIOR}
"""Some of what a file must hold."""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(base: str, kind: str) -> PeftModel:
    """With weights that are not the initial ones."""
    model = adapt(load_base(base), **KINDS[kind]).eval()
    for leaf in leaves(model):
        leaf.weight.data += 0.1
    return model


def test_what_is_trained(model: PeftModel) -> None:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(any(part in name for part in ("lora_A", "lora_B", "lora_dip_")) for name in trained)
    assert sum("lora_dip_" in name for name in trained) == len(leaves(model))
    model.train()(**batch()).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(model: PeftModel, kind: str, base: str, tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    expected = noisy(model), logits(model)
    model.save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {f"base_model.model.{name}" for name in NAMES[kind]} <= set(weights)
    loaded = PeftModel.from_pretrained(load_base(base), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(noisy(loaded), expected[0]) and torch.equal(logits(loaded), expected[1])
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    trainable = PeftModel.from_pretrained(load_base(base), tmp_path / "adapter", is_trainable=True)
    assert all(leaf.weight.requires_grad for leaf in leaves(trainable))
    read = loaded.peft_config["default"]
    assert type(read) is DIPNetConfig and read.dip_hf_version == DIPNetConfig().dip_hf_version
    assert read.dip_format == (1 if kind == "noise" else 2)
    assert all(getattr(read, name) == value for name, value in KINDS[kind].items())


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
        for mine, theirs in zip(leaves(model), leaves(loaded), strict=True):
            assert type(mine) is type(theirs)
            assert not isinstance(mine, Covariance) or mine.number == theirs.number  # of which samples are drawn
            torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    added.train()
    assert not torch.equal(logits(added), logits(added))


def test_injection_without_a_peft_model(kind: str, base: str) -> None:
    raw = load_base(base)
    clean = logits(raw)
    inject_adapter_in_model(config(**KINDS[kind]), raw)
    assert not torch.equal(logits(raw), clean) and torch.equal(logits(raw), logits(raw))
    assert not torch.equal(logits(raw.train()), logits(raw))
    assert set(get_peft_model_state_dict(raw)) >= NAMES[kind]


@pytest.mark.parametrize("others", KINDS)
def test_several_adapters(model: PeftModel, base: str, tmp_path: Path, others: str) -> None:
    one = noisy(model)
    model.add_adapter("other", config(**KINDS[others] | {"noise_scale": 0.3}, target_modules=["q_proj"]))
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
    kept = ("lora_variant", "noise_in_eval", "seeds")
    assert not any("default" in getattr(module, name, {}) for module in loaded.modules() for name in kept)


def test_disabling(model: PeftModel, base: str) -> None:
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load_base(base)))
        with pytest.raises(ValueError, match="adds no noise and has no posterior"), model.base_model.sampling(KEY):
            pass
    assert not torch.equal(noisy(model), logits(model))


@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_of_the_clean_pass(model: PeftModel, safe: bool) -> None:
    clean, drawn = logits(model), noisy(model)
    model.merge_adapter(safe_merge=safe)
    assert (logits(model) - clean).abs().max() <= 1e-5
    assert model.base_model.noised_layers() == model.base_model.variational_layers() == []
    with pytest.raises(ValueError, match="has no posterior"), model.base_model.sampling(KEY):
        pass
    assert torch.equal(logits(model.train()), logits(model))  # a merged adapter is out of training
    model.eval()
    model.unmerge_adapter()
    torch.testing.assert_close(noisy(model), drawn, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("copied", [True, False])
def test_unloading_leaves_no_trace(model: PeftModel, kind: str, base: str, merge: bool, copied: bool) -> None:
    expected = logits(model) if merge else logits(load_base(base))
    model = copy.deepcopy(model) if copied else model
    plain = model.merge_and_unload() if merge else model.unload()
    torch.testing.assert_close(logits(plain.train()), expected, rtol=1e-4, atol=1e-5)
    assert set(plain.state_dict()) == set(load_base(base).state_dict())
    assert not any(module._forward_pre_hooks for module in plain.modules())
    assert not torch.equal(noisy(adapt(plain, **KINDS[kind])), logits(plain))  # and it can be adapted again


def test_a_copy_is_independent(model: PeftModel) -> None:
    before = noisy(model)
    other = copy.deepcopy(model)
    assert torch.equal(noisy(other), before)
    assert other.base_model.noise_state is not model.base_model.noise_state
    for leaf in leaves(other):
        leaf.weight.data += 1
    assert torch.equal(noisy(model), before) and not torch.equal(noisy(other), before)


def test_batches_of_several_adapters(model: PeftModel, kind: str) -> None:
    """By the clean pass; samples of several adapters in one batch are refused."""
    model.add_adapter("other", config(**KINDS[kind], target_modules=["q_proj"]))
    one = logits(model)
    model.set_adapter("other")
    two = logits(model)
    with model.disable_adapter():
        none = logits(model)
    names = ["default", "other", "__base__"]
    mixed, visible = logits(model, adapter_names=names), batch(padded=True)["attention_mask"].bool()
    expected = torch.stack([one[0], two[1], none[2]])
    torch.testing.assert_close(mixed[visible], expected[visible], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"adapter_names=\[.*one at a time"), model.base_model.sampling(KEY):
        logits(model, adapter_names=names)
    model.add_adapter("sampled", config(**KINDS[kind], noise_in_eval=True))  # though another is the active one
    with pytest.raises(ValueError, match=r"adapter_names=\[.*one at a time"):
        logits(model, adapter_names=["default", "sampled", "__base__"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_after_a_cast(model: PeftModel, dtype: torch.dtype) -> None:
    noisy(model)
    drawn = noisy(model.to(dtype))
    assert drawn.dtype == dtype and drawn.isfinite().all() and not torch.equal(drawn, logits(model))
    model.train()
    model(**batch()).logits.float().square().mean().backward()
    assert all(leaf.weight.grad.isfinite().all() for leaf in leaves(model))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_half_precision_base_keeps_ours_in_fp32(
    model: PeftModel, kind: str, base: str, tmp_path: Path, low_cpu_mem_usage: bool
) -> None:
    noisy(model)
    model.save_pretrained(tmp_path / "adapter")
    half = load_base(base).to(torch.bfloat16)
    loaded = PeftModel.from_pretrained(half, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    for mine, theirs in zip(leaves(model), leaves(loaded), strict=True):
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    new = adapt(load_base(base).to(torch.bfloat16), **KINDS[kind])
    assert all(leaf.weight.dtype == torch.float32 for leaf in leaves(new))
    assert noisy(new).dtype == torch.bfloat16


def test_under_autocast(model: PeftModel) -> None:
    exact = noisy(model)
    with torch.autocast("cpu", torch.bfloat16), model.base_model.sampling(KEY, 2):
        rough = model(**batch(padded=True)).logits
        rough.float().square().mean().backward()
    torch.testing.assert_close(rough[:3].float(), exact, rtol=0.1, atol=0.1)
    assert all(leaf.weight.grad.dtype == torch.float32 for leaf in leaves(model))
