"""Dropout at test time and ensembles against plain loops over single passes, and what a plain pass is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dip_hf import NoiseKey
from dip_hf.evaluation.lm import DIPLM
from dip_hf.evaluation.sampling import DropoutSampler


def load(base: str, adapter: str, **options: object) -> DIPLM:
    return DIPLM(pretrained=base, peft=adapter, device="cpu", batch_size=4, **options)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.arange(20).view(2, 10) + 40


def greedy_loop(model: DIPLM, prompts: torch.Tensor, tokens: int) -> torch.Tensor:
    """Generation without a cache: the likelihood pass over the whole text, for every token."""
    for _ in range(tokens):
        prompts = torch.cat([prompts, model._model_call(prompts)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return prompts


def generate(model: DIPLM, tokens: torch.Tensor) -> list[list[int]]:
    attended = torch.ones_like(tokens)
    return model._model_generate(tokens, 16, stop=["\n"], do_sample=False, attention_mask=attended).tolist()


def test_an_ensemble_averages_its_members_probabilities(
    base_folder: str, lora_folder: str, other_lora_folder: str, tokens: torch.Tensor
) -> None:
    members = [lora_folder, other_lora_folder, lora_folder, lora_folder]
    ensemble = load(base_folder, "+".join(members))
    mean = 0
    for folder in members:
        member = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder)
        with torch.no_grad():
            mean = mean + member(tokens).logits.softmax(-1) / 4
    torch.testing.assert_close(ensemble._model_call(tokens).exp(), mean)
    assert generate(ensemble, tokens) == greedy_loop(ensemble, tokens, 6).tolist()


def test_a_penalty_meets_an_average_of_equals_as_it_meets_one_of_them(
    base_folder: str, lora_folder: str, tokens: torch.Tensor
) -> None:
    """A base's generation_config.json may have one, and it must not tell averaged from plain predictions."""
    one, twice = load(base_folder, lora_folder), load(base_folder, f"{lora_folder}+{lora_folder}")
    answers = []
    for penalty in (1.0, 1.2, 4.0):
        one.model.generation_config.repetition_penalty = twice.model.generation_config.repetition_penalty = penalty
        answers.append(generate(one, tokens))
        assert generate(twice, tokens) == answers[-1]
    assert answers[0] != answers[-1]


def test_dropout_averages_passes_that_differ(base_folder: str, dropout_folder: str, tokens: torch.Tensor) -> None:
    model = load(base_folder, dropout_folder, dropout=True, num_samples=3, noise_seed=4)
    averaged = model._model_call(tokens)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), dropout_folder)
    modules = [module for module in plain.modules() if isinstance(module, torch.nn.Dropout) and module.p == 0.3]
    assert modules
    for module in modules:
        module.train()
    with torch.no_grad(), model._sampler.sampling(NoiseKey(4, step=1)):  # for its generators alone
        samples = plain(tokens.repeat(3, 1)).logits.softmax(-1).chunk(3)
    torch.testing.assert_close(averaged.exp(), sum(samples) / 3)
    assert not torch.allclose(samples[0], samples[1], atol=1e-3)


def test_dropout_leaves_generators_and_modules_as_they_were(
    base_folder: str, dropout_folder: str, tokens: torch.Tensor
) -> None:
    model = load(base_folder, dropout_folder, dropout=True, num_samples=2)
    noise_free = model.model(tokens).logits
    before = torch.get_rng_state()
    first = model._model_call(tokens)
    generated = model._model_generate(tokens, 14, stop=["\n"], do_sample=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.model.training and not any(module.training for module in model.model.modules())
    torch.testing.assert_close(model.model(tokens).logits, noise_free, rtol=0, atol=0)
    torch.manual_seed(17)  # nothing outside decides the masks
    again = load(base_folder, dropout_folder, dropout=True, num_samples=2)
    torch.testing.assert_close(again._model_call(tokens), first, rtol=0, atol=0)
    assert again._model_generate(tokens, 14, stop=["\n"], do_sample=False).tolist() == generated.tolist()
    assert not torch.allclose(again._model_call(tokens), first, atol=1e-3)  # each call has masks of its own
    other = load(base_folder, dropout_folder, dropout=True, num_samples=2, noise_seed=1)
    assert not torch.allclose(other._model_call(tokens), first, atol=1e-3)


def test_posterior_samples_are_the_same_in_every_call(
    base_folder: str, posterior_folder: str, tokens: torch.Tensor
) -> None:
    model = load(base_folder, posterior_folder, num_samples=3)
    torch.testing.assert_close(model._model_call(tokens), model._model_call(tokens), rtol=0, atol=0)
    other = load(base_folder, posterior_folder, num_samples=3, noise_seed=1)
    assert not torch.allclose(model._model_call(tokens), other._model_call(tokens), atol=1e-3)


def test_monteclora_loads_and_predicts_by_its_mean(
    base_folder: str, monteclora_folder: str, tokens: torch.Tensor
) -> None:
    """PEFT samples MonteCLoRA in training alone."""
    model = load(base_folder, monteclora_folder)
    torch.testing.assert_close(model._model_call(tokens), model._model_call(tokens), rtol=0, atol=0)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), monteclora_folder)
    with torch.no_grad():
        expected = merged.merge_and_unload()(tokens).logits
    torch.testing.assert_close(model._model_call(tokens), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["dipnet_folder", "posterior_folder"])
def test_a_plain_pass_is_noise_free_whatever_the_adapter_was_saved_with(
    kind: str, base_folder: str, tokens: torch.Tensor, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    noisy = Path(shutil.copytree(folder, tmp_path / "noisy")) / "adapter_config.json"
    noisy.write_text(json.dumps({**json.loads(noisy.read_text()), "noise_in_eval": True}))
    plain, ours = load(base_folder, folder), load(base_folder, str(tmp_path / "noisy"))
    torch.testing.assert_close(ours._model_call(tokens), plain._model_call(tokens), rtol=0, atol=0)
    assert generate(ours, tokens) == generate(plain, tokens)
    with torch.no_grad():
        assert not torch.equal(ours.model(tokens).logits, plain.model(tokens).logits)  # as it was


def test_dropout_on_a_device_whose_generator_is_not_seeded(base_folder: str, dropout_folder: str) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), dropout_folder).to("meta")
    with pytest.raises(ValueError, match="dropout=True on device='meta'"):
        DropoutSampler(model, 2)
