"""The adapter through everything that PEFT's users do with one, on a real, if tiny, language model."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import (
    EvaConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import BdLoraConfig
from peft.tuners.lora.config import MontecloraConfig
from torch import Tensor
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from dip_hf import DIPNetModel
from dip_hf.noise_state import NoiseState
from tests.dipnet.models import KEY, adapt, batch, build, config, load_base, logits, noisy, sites


WHERE = "model.layers.2.dip_noise.lora_dip_log_variance"


def test_noise_is_on_in_training_and_off_in_evaluation(model: PeftModel) -> None:
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    assert torch.equal(logits(model), logits(model))
    assert isinstance(model.base_model, DIPNetModel)
    assert model.base_model.noised_layers() == []
    assert model.peft_config["default"].all_block_names == [f"model.layers.{index}" for index in range(4)]


def test_noise_in_evaluation_where_asked_for(base: str) -> None:
    model = adapt(load_base(base), noise_in_eval=True)
    assert not torch.equal(logits(model), logits(model))
    assert model.base_model.noised_layers() == [0, 1, 2, 3]


@pytest.mark.parametrize("noise_in_eval", [False, True])
def test_text_generated_in_training_mode(noise_in_eval: bool) -> None:
    """As a callback does it in the midst of training: by the noise-free pass, and training goes on with noise."""
    model = adapt(build(), noise_in_eval=noise_in_eval, variational_rank=2, variational_blocks=[1]).train()
    logits(model)  # measures the scale

    def texts() -> list[Tensor]:
        return [model.generate(**batch(), max_new_tokens=8, do_sample=False) for _ in range(2)]

    in_training = texts()
    assert model.training and not torch.equal(logits(model), logits(model))
    model.eval()
    assert torch.equal(*in_training) != noise_in_eval
    assert noise_in_eval or torch.equal(in_training[0], texts()[0])
    with model.base_model.sampling(KEY):
        assert not torch.equal(in_training[0], texts()[0])


def test_noise_outside_a_trainer_follows_its_seed(base: str) -> None:
    def passes(seed: int) -> list[Tensor]:
        model = adapt(load_base(base), noise_seed=seed).train()
        return [logits(model) for _ in range(2)]

    assert all(map(torch.equal, passes(1), passes(1)))
    assert not torch.equal(passes(1)[0], passes(2)[0])


def test_noise_outside_a_trainer_differs_between_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = SimpleNamespace(is_initialized=lambda: True, get_rank=lambda: 1)
    monkeypatch.setattr("dip_hf.noise_state.dist", ranks)
    state = NoiseState()
    state.enter_layer(0, seed=7)
    assert state.key.tolist() == [7, 1, 0, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"target_parameters": ["mlp.down_proj.weight", "mlp.up_proj.weight"]},
        {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2)},
        {"monteclora_config": MontecloraConfig()},
    ],
    ids=lambda options: next(iter(options)),
)
def test_variants_whose_files_have_other_names_or_shapes(base: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = adapt(load_base(base), target_modules=["q_proj", "v_proj"], **options).eval()
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(load_base(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded), logits(model))
    assert not torch.allclose(logits(loaded), logits(load_base(base)), atol=1e-3)


def test_frozen_noise_stays_frozen(base: str) -> None:
    model = adapt(load_base(base), learn_noise=False)
    for _ in range(2):
        assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "dip" in name)
        model.set_adapter("default")  # sets requires_grad anew
    assert not torch.equal(noisy(model), logits(model))


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_the_scale_is_measured_once_and_stored(task_type: str | None, base: str, tmp_path: Path) -> None:
    """Without a task type PEFT calls the model inside of the tuner."""
    model = adapt(load_base(base), noise_blocks=2, task_type=task_type).eval()
    leaves = [site.leaf("default") for site in sites(model)]
    assert all(leaf.rms.item() == 0 for leaf in leaves)
    seen: list[Tensor] = []
    model.base_model.model.model.layers[2].register_forward_pre_hook(
        lambda module, args: seen.append(args[0]), prepend=True
    )
    noisy(model)
    visible = batch(padded=True)["attention_mask"].bool()
    expected = seen[0][visible].square().mean(-1).sqrt().median()  # of real tokens, not of padding
    torch.testing.assert_close(leaves[0].rms, expected.reshape(1))
    measured = [leaf.rms.clone() for leaf in leaves]
    with torch.no_grad(), model.base_model.sampling(KEY):
        model(input_ids=batch(2, 4)["input_ids"])
    assert all(torch.equal(leaf.rms, rms) for leaf, rms in zip(leaves, measured, strict=True))

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter")
    with torch.no_grad(), loaded.base_model.sampling(KEY):
        loaded(input_ids=batch(2, 4)["input_ids"])
    assert all(torch.equal(s.leaf("default").rms, rms) for s, rms in zip(sites(loaded), measured, strict=True))


def measured_scale(trajectories: int = 1) -> float:
    """Of the last block's noise, in a padded batch."""
    model = adapt(build(), noise_blocks=1)
    with model.base_model.sampling(KEY, trajectories):
        logits(model)
    return sites(model)[0].leaf("default").rms.item()


def test_the_scale_of_several_trajectories_is_that_of_one() -> None:
    assert measured_scale(3) == pytest.approx(measured_scale())


def test_ranks_share_their_mean_square(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = measured_scale()
    ranks = SimpleNamespace(
        is_initialized=lambda: True, all_reduce=lambda total: total.add_(3), get_world_size=lambda: 2
    )
    monkeypatch.setattr("dip_hf.dipnet.layer.dist", ranks)
    assert measured_scale() ** 2 == pytest.approx((alone**2 + 3) / 2)


@pytest.mark.parametrize("rho", [1.0, 2.0])  # which lets ranks differ
def test_eva_fills_what_was_made_without_memory(base: str, tmp_path: Path, rho: float) -> None:
    arguments = {"target_modules": ["q_proj", "v_proj"], "eva_config": EvaConfig(rho=rho)}
    eva = config(init_lora_weights="eva", **arguments)
    model = get_peft_model(load_base(base), eva, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(model, [batch(8, 16)] * 3, show_progress_bar=False)
    assert all(torch.equal(site.leaf("default").weight, site.leaf("default").initial()) for site in sites(model))
    model.train()(**batch()).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    expected = noisy(model.eval())
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(load_base(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(noisy(loaded), expected)


def test_a_mask_given_by_position_counts(base: str) -> None:
    scales = []
    for by_position in (False, True):
        model = adapt(load_base(base), task_type=None).train()
        inputs = batch(padded=True)
        if by_position:
            model(inputs["input_ids"], inputs["attention_mask"])
        else:
            model(**inputs)
        scales.append([site.leaf("default").rms.item() for site in sites(model)])
    assert scales[0] == scales[1]


def test_input_dtype_casting_is_switched_as_for_lora() -> None:
    model = adapt(build()).eval()
    with disable_input_dtype_casting(model):
        cast = noisy(model)
    assert torch.equal(cast, noisy(model))


@pytest.mark.parametrize("mask", ["by kind", "generation config"])
def test_a_mask_that_does_not_say_which_tokens_are_padding(base: str, mask: str) -> None:
    model = adapt(build("gemma3") if mask == "by kind" else load_base(base)).train()
    if mask == "by kind":  # transformers takes one mask for each kind of attention
        model(batch()["input_ids"], attention_mask={"full_attention": None, "sliding_attention": None})
    else:
        with model.base_model.sampling(KEY):
            model.generate(batch()["input_ids"], GenerationConfig(max_new_tokens=1, do_sample=False))
    assert all(site.leaf("default").rms.item() > 0 for site in sites(model))


def test_an_encoder_s_padding_does_not_count_for_the_decoder() -> None:
    sizes = {
        "vocab_size": 50,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)).eval()
    inputs = batch(padded=True)
    scales = []
    for mask in (inputs["attention_mask"], torch.ones_like(inputs["attention_mask"])):
        model = adapt(copy.deepcopy(base), target_modules=[], task_type="SEQ_2_SEQ_LM").train()
        base_inputs = {"input_ids": inputs["input_ids"], "decoder_input_ids": inputs["input_ids"]}
        model(**base_inputs, attention_mask=torch.ones_like(mask), decoder_attention_mask=mask)
        scales.append(sites(model)[0].leaf("default").rms.item())
    embedded = base.shared(inputs["input_ids"])
    rms = embedded.square().mean(-1).sqrt()
    expected = [rms[inputs["attention_mask"].bool()].median().item(), rms.median().item()]
    assert scales == pytest.approx(expected) and scales[0] != scales[1]
