"""The lm-eval model "hf-dip": stock results without samples, the average of a plain loop with them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config

from dip_hf import DIPNetConfig, NoiseKey
from dip_hf.evaluation.lm import DIPLM
from dip_hf.ibvi.functional import average_log_probabilities


PROMPTS = ["Compute: 7 + 9\nAnswer:", "Spell backward: dipolar\nAnswer:", "Compute: 1 + 1\nAnswer:"]


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, value, index) for index, value in enumerate(arguments)]


def generate(model: HFLM) -> list[str]:
    settings = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    return model.generate_until(requests("generate_until", *((p, settings) for p in PROMPTS)), disable_tqdm=True)


def load(kind: type[HFLM], base: str, adapter: str | None, **options: int) -> HFLM:
    return kind(pretrained=base, peft=adapter, device="cpu", batch_size=4, **options)


def penalised(logits: torch.Tensor, text: torch.Tensor, penalty: float) -> torch.Tensor:
    """A repetition penalty, token by token."""
    result = logits.clone()
    for row, tokens in enumerate(text.tolist()):
        for token in set(tokens):
            result[row, token] *= penalty if result[row, token] < 0 else 1 / penalty
    return result


def test_the_average_is_the_log_of_the_mean_probability() -> None:
    logits = torch.randn(6, 5, 7, dtype=torch.float64)
    mean = logits.view(3, 2, 5, 7).softmax(-1).mean(0)
    torch.testing.assert_close(average_log_probabilities(logits, 3), mean.log().float())


def test_the_average_of_one_trajectory_is_its_log_softmax() -> None:
    logits = torch.randn(2, 5, 7)
    torch.testing.assert_close(average_log_probabilities(logits, 1), logits.log_softmax(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("adapter", ["lora_folder", "dipnet_folder", None])
def test_without_trajectories_it_is_the_stock_model(
    base_folder: str, adapter: str | None, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(adapter) if adapter else None
    stock, ours = load(HFLM, base_folder, folder), load(DIPLM, base_folder, folder)
    pairs = requests("loglikelihood", *((prompt, " 16") for prompt in PROMPTS))
    assert ours.loglikelihood(pairs, disable_tqdm=True) == stock.loglikelihood(pairs, disable_tqdm=True)
    assert generate(ours) == generate(stock)


def test_cut_prompts_of_choices_are_noted(base_folder: str) -> None:
    model = load(DIPLM, base_folder, None)
    fits, cut = "1" * 511, "1" * 512  # of 512 tokens, one a letter, and the last one is predicted only
    pairs = requests("loglikelihood", *((prompt, answer) for prompt in (fits, cut) for answer in (" 1", " 2")))
    model.loglikelihood(pairs, disable_tqdm=True)
    assert model.cut_prompts == {cut}


def test_a_call_averages_what_a_loop_over_trajectories_gives(base_folder: str, dipnet_folder: str) -> None:
    model = load(DIPLM, base_folder, dipnet_folder, num_samples=3, noise_seed=5)
    tokens = torch.randint(0, 200, (2, 9))
    averaged = model._model_call(tokens)
    with torch.no_grad(), model.model.base_model.sampling(NoiseKey(5, step=1), trajectories=3):
        logits = model.model(tokens).logits
    probabilities = sum(part.softmax(-1) for part in logits.chunk(3)) / 3
    torch.testing.assert_close(averaged.exp(), probabilities)
    assert averaged.shape == (2, 9, logits.shape[-1])
    torch.testing.assert_close(averaged.logsumexp(-1), torch.zeros(2, 9), rtol=0, atol=1e-5)
    assert not torch.allclose(*logits.chunk(3)[:2]), "trajectories must differ"


def test_likelihoods_follow_the_average(base_folder: str, dipnet_folder: str) -> None:
    model = load(DIPLM, base_folder, dipnet_folder, num_samples=2)
    [(value, _)] = model.loglikelihood(requests("loglikelihood", (PROMPTS[0], " 1")), disable_tqdm=True)
    tokens = torch.tensor([model.tok_encode(PROMPTS[0] + " 1")])
    with torch.no_grad(), model.model.base_model.sampling(NoiseKey(0, step=1), trajectories=2):
        probabilities = model.model(tokens[:, :-1]).logits.softmax(-1).mean(0)
    expected = probabilities[-2, tokens[0, -2]].log() + probabilities[-1, tokens[0, -1]].log()
    assert math.isclose(value, expected.item(), rel_tol=1e-4)


@pytest.mark.parametrize("penalty", [1.0, 4.0])
@pytest.mark.parametrize("adapter", ["dipnet_folder", "posterior_folder"])
def test_generation_is_a_plain_loop_of_averaged_greedy_choices(
    base_folder: str, adapter: str, penalty: float, request: pytest.FixtureRequest
) -> None:
    """Each sample's rows run through the whole model in the loop, with a cache of its own."""
    model = load(DIPLM, base_folder, request.getfixturevalue(adapter), num_samples=3, noise_seed=2)
    model.model.generation_config.repetition_penalty = penalty  # as a base's own generation_config.json may have it
    prompts = torch.tensor([model.tok_encode("Compute: 7 + 9"), model.tok_encode("Compute: 3 - 1")])
    generated = model._model_generate(prompts, prompts.shape[1] + 6, stop=["\n"], do_sample=False)
    chosen = []
    with torch.no_grad():
        inputs, text, caches = prompts, prompts, [None] * 3
        for token in range(6):
            probabilities = normaliser = 0
            for sample in range(3):
                key = NoiseKey(2, step=1, micro_step=token)
                with model.model.base_model.sampling(key, trajectories=3, posterior_key=NoiseKey(2)):
                    output = model.model(inputs, past_key_values=caches[sample], use_cache=True)
                caches[sample] = output.past_key_values
                logits = output.logits[:, -1].chunk(3)[sample]
                probabilities = probabilities + logits.softmax(-1) / 3
                normaliser = normaliser + logits.logsumexp(-1, keepdim=True) / 3
            chosen.append(penalised(probabilities.log() + normaliser, text, penalty).argmax(-1))
            inputs = chosen[-1][:, None]
            text = torch.cat([text, inputs], dim=1)
    assert generated[:, prompts.shape[1] :].tolist() == torch.stack(chosen, 1).tolist()


def test_a_generation_keeps_its_posterior_sample_and_matches_whole_passes(
    base_folder: str, posterior_folder: str
) -> None:
    """Without a cache: the whole text so far goes through the likelihood pass, for every token."""
    model = load(DIPLM, base_folder, posterior_folder, num_samples=3)
    prompts = torch.tensor([model.tok_encode("Compute: 7 + 9"), model.tok_encode("Compute: 3 - 1")])
    generated = model._model_generate(prompts, prompts.shape[1] + 6, stop=["\n"], do_sample=False)
    text = prompts
    for _ in range(6):
        text = torch.cat([text, model._model_call(text)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert generated.tolist() == text.tolist()
    mean = load(DIPLM, base_folder, posterior_folder)
    assert not torch.allclose(model._model_call(prompts), mean._model_call(prompts).log_softmax(-1), atol=1e-3)


def test_generation_draws_new_noise_for_every_token(base_folder: str, dipnet_folder: str) -> None:
    model = load(DIPLM, base_folder, dipnet_folder, num_samples=2)
    keys, posterior_keys = [], []
    original = model.model.base_model.sampling

    def recording(key: NoiseKey, posterior_key: NoiseKey, **arguments: Any):
        keys.append(key)
        posterior_keys.append(posterior_key)
        return original(key, posterior_key=posterior_key, **arguments)

    model.model.base_model.sampling = recording
    context = torch.tensor([model.tok_encode(PROMPTS[0])])
    model._model_generate(context, context.shape[1] + 4, stop=["\n"], do_sample=False)
    assert len(keys) >= 4
    assert len(set(keys)) == len(keys)
    assert set(posterior_keys) == {NoiseKey(0)}


def test_generation_repeats_itself_and_the_seed_matters(base_folder: str, dipnet_folder: str) -> None:
    first, again, other = (
        generate(load(DIPLM, base_folder, dipnet_folder, num_samples=2, noise_seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_generation_leaves_the_noise_off_behind_it(base_folder: str, dipnet_folder: str) -> None:
    model = load(DIPLM, base_folder, dipnet_folder, num_samples=2)
    tokens = torch.randint(0, 200, (1, 6))
    before = model.model(tokens).logits
    generate(model)
    torch.testing.assert_close(model.model(tokens).logits, before, rtol=0, atol=0)


def test_sampling_tokens_from_an_average_is_refused(base_folder: str, dipnet_folder: str) -> None:
    model = load(DIPLM, base_folder, dipnet_folder, num_samples=2)
    with pytest.raises(ValueError, match=r"^do_sample=True: with num_samples=2 .* greedily"):
        model._model_generate(torch.ones(1, 3, dtype=torch.long), 5, stop=["\n"], do_sample=True, temperature=1.0)


def test_likelihoods_at_a_temperature_and_generation_without(base_folder: str, lora_folder: str) -> None:
    plain, warm = load(DIPLM, base_folder, lora_folder), load(DIPLM, base_folder, lora_folder, temperature=2.0)
    tokens = torch.randint(0, 200, (2, 9))
    torch.testing.assert_close(warm._model_call(tokens), plain._model_call(tokens) / 2, rtol=0, atol=0)
    assert generate(warm) == generate(plain)
    with pytest.raises(ValueError, match=r"temperature=2.0 answers are generated greedily"):
        warm._model_generate(tokens, 12, stop=["\n"], do_sample=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": -1}, "num_samples=-1 must be 0"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"temperature": float("nan")}, "temperature=nan must be positive"),
        ({"num_samples": 2, "temperature": 2.0}, "cannot be combined"),
        ({"dropout": True}, "dropout=True with num_samples=0: give the number"),
        ({"dropout": True, "num_samples": 2}, "needs a LoRA adapter trained with lora_dropout > 0"),
        ({"num_samples": 2}, r"num_samples=2 needs a model with a DIPNet adapter.*num_samples=0"),
    ],
)
@pytest.mark.parametrize("adapter", ["lora_folder", None])
def test_bad_input_is_refused(
    base_folder: str, adapter: str | None, options: dict, message: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(adapter) if adapter else None
    with pytest.raises(ValueError, match=message):
        load(DIPLM, base_folder, folder, **options)


@pytest.mark.parametrize("kind", [peft.LoraConfig, DIPNetConfig])
def test_a_base_with_more_rows_than_tokens_keeps_them(kind: type, base_folder: str, tmp_path: Path) -> None:
    """As Qwen2.5's and Gemma 3's: an adapter with a head of its own has as many rows."""
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    model.resize_token_embeddings(len(tokenizer) + 6)
    base = tmp_path / "base"
    for part in (model, tokenizer):
        part.save_pretrained(base)
    adapted = peft.get_peft_model(model, kind(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    adapted.save_pretrained(tmp_path / "adapter")
    plain, ours = load(DIPLM, str(base), None), load(DIPLM, str(base), str(tmp_path / "adapter"))
    pairs = requests("loglikelihood", *((prompt, " 16") for prompt in PROMPTS))
    assert ours.loglikelihood(pairs, disable_tqdm=True) == plain.loglikelihood(pairs, disable_tqdm=True)


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}])
def test_probabilities_of_a_bfloat16_model_are_in_float32(base_folder: str, options: dict[str, float]) -> None:
    model = load(DIPLM, base_folder, None, dtype="bfloat16", **options)
    [(prompt, answer)] = [model._encode_pair(PROMPTS[0], " 16")]
    with torch.no_grad():
        logits = model.model(torch.tensor([prompt + answer])[:, :-1]).logits
    assert logits.dtype is torch.bfloat16
    expected = (logits.float() / options.get("temperature", 1.0)).log_softmax(-1)[0, -len(answer) :]
    total = expected.gather(1, torch.tensor(answer)[:, None]).sum().item()
    [(value, _)] = model.loglikelihood(requests("loglikelihood", (PROMPTS[0], " 16")), disable_tqdm=True)
    assert value == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [3, 4]},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [peft.LoraConfig, DIPNetConfig])
def test_embeddings_of_the_adapters_own_on_a_tied_base(
    kind: type[peft.LoraConfig], changes: dict[str, Any], base_folder: str, tmp_path: Path
) -> None:
    """`hf` ties the head of a base to its embeddings after the adapter is loaded."""
    base = AutoModelForCausalLM.from_pretrained(base_folder, tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(tmp_path / "base")
    trained = peft.get_peft_model(base, kind(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **changes)).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) / 4
    trained.save_pretrained(tmp_path / "adapter")
    model = load(DIPLM, str(tmp_path / "base"), str(tmp_path / "adapter"))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = trained(input_ids=tokens).logits
    torch.testing.assert_close(model._model_call(tokens), expected, rtol=0, atol=1e-5)


def test_a_head_of_the_adapters_own_on_a_tied_text_model_inside_of_another(base_folder: str, tmp_path: Path) -> None:
    """Such as Gemma 3's, where the config that ties is the outer one."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    text = {**sizes, "vocab_size": len(tokenizer), "num_key_value_heads": 1, "head_dim": 8}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    tokens = {"image_token_index": 2, "boi_token_index": 3, "eoi_token_index": 4}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", modules_to_save=["lm_head"])
    trained = peft.get_peft_model(base, adapter).eval()
    with torch.no_grad():
        trained.get_base_model().lm_head.modules_to_save["default"].weight += 1
    trained.save_pretrained(tmp_path / "adapter")
    model = load(DIPLM, str(tmp_path / "base"), str(tmp_path / "adapter"))
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model._model_call(ids), trained(input_ids=ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", ["x", 2.5, -1])
def test_a_number_of_samples_that_is_none(number: Any, base_folder: str) -> None:
    with pytest.raises(
        ValueError, match=rf"num_samples={number} must be 0 \(a plain pass\) or how many to average over"
    ):
        load(DIPLM, base_folder, None, num_samples=number)
