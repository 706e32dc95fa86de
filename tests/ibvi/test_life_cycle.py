"""An adapter with a posterior through everything that PEFT's users do with one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import (
    EvaConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from dip_hf import NoiseKey
from dip_hf.ibvi.layer import Covariance
from tests.dipnet.models import batch, build, config, load_base, logits, noisy
from tests.ibvi.models import POSTERIOR, posteriors, variational


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


def test_a_plain_adapter_beside_it_has_nothing_to_sample(model: PeftModel) -> None:
    model.add_adapter("plain", config(variational_rank=2, variational_blocks=[0], noise_blocks=[]))
    model.set_adapter("plain")
    assert model.base_model.variational_layers() == [0]
    model.delete_adapter("plain")
    model.set_adapter("default")
    assert model.base_model.variational_layers() == [2, 3]


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
