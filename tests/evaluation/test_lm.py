"""The lm-eval model "hf-dip": stock results without trajectories, the average of a plain loop with them."""

from __future__ import annotations

import math

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from dip_hf import NoiseKey
from dip_hf.evaluation.lm import DIPLM, average_log_probabilities


PROMPTS = ["Compute: 7 + 9\nAnswer:", "Spell backward: dipolar\nAnswer:", "Compute: 1 + 1\nAnswer:"]


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, value, index) for index, value in enumerate(arguments)]


def generate(model: HFLM) -> list[str]:
    settings = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    return model.generate_until(requests("generate_until", *((p, settings) for p in PROMPTS)), disable_tqdm=True)


def load(kind: type[HFLM], base: str, adapter: str | None, **options: int) -> HFLM:
    return kind(pretrained=base, peft=adapter, device="cpu", batch_size=4, **options)


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


def test_a_call_averages_what_a_loop_over_trajectories_gives(base_folder: str, dipnet_folder: str) -> None:
    model = load(DIPLM, base_folder, dipnet_folder, trajectories=3, noise_seed=5)
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
    model = load(DIPLM, base_folder, dipnet_folder, trajectories=2)
    [(value, _)] = model.loglikelihood(requests("loglikelihood", (PROMPTS[0], " 1")), disable_tqdm=True)
    tokens = torch.tensor([model.tok_encode(PROMPTS[0] + " 1")])
    with torch.no_grad(), model.model.base_model.sampling(NoiseKey(0, step=1), trajectories=2):
        probabilities = model.model(tokens[:, :-1]).logits.softmax(-1).mean(0)
    expected = probabilities[-2, tokens[0, -2]].log() + probabilities[-1, tokens[0, -1]].log()
    assert math.isclose(value, expected.item(), rel_tol=1e-4)


def test_generation_is_a_plain_loop_of_averaged_greedy_choices(base_folder: str, dipnet_folder: str) -> None:
    model = load(DIPLM, base_folder, dipnet_folder, trajectories=3, noise_seed=2)
    prompts = torch.tensor([model.tok_encode("Compute: 7 + 9"), model.tok_encode("Compute: 3 - 1")])
    generated = model._model_generate(prompts, prompts.shape[1] + 6, stop=["\n"], do_sample=False)
    chosen = []
    with torch.no_grad():
        inputs, cache = prompts.repeat(3, 1), None
        for token in range(6):
            with model.model.base_model.sampling(NoiseKey(2, step=1, micro_step=token)):
                output = model.model(inputs, past_key_values=cache, use_cache=True)
            probabilities = sum(part.softmax(-1) for part in output.logits[:, -1].chunk(3)) / 3
            chosen.append(probabilities.argmax(-1))
            inputs, cache = chosen[-1].repeat(3)[:, None], output.past_key_values
    assert generated[:, prompts.shape[1] :].tolist() == torch.stack(chosen, 1).tolist()


def test_generation_draws_new_noise_for_every_token(base_folder: str, dipnet_folder: str) -> None:
    model = load(DIPLM, base_folder, dipnet_folder, trajectories=2)
    keys = []
    original = model.model.base_model.sampling

    def recording(key: NoiseKey, trajectories: int = 1):
        keys.append(key)
        return original(key, trajectories=trajectories)

    model.model.base_model.sampling = recording
    context = torch.tensor([model.tok_encode(PROMPTS[0])])
    model._model_generate(context, context.shape[1] + 4, stop=["\n"], do_sample=False)
    assert len(keys) >= 4
    assert len(set(keys)) == len(keys)


def test_generation_repeats_itself_and_the_seed_matters(base_folder: str, dipnet_folder: str) -> None:
    first, again, other = (
        generate(load(DIPLM, base_folder, dipnet_folder, trajectories=2, noise_seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_generation_leaves_the_noise_off_behind_it(base_folder: str, dipnet_folder: str) -> None:
    model = load(DIPLM, base_folder, dipnet_folder, trajectories=2)
    tokens = torch.randint(0, 200, (1, 6))
    before = model.model(tokens).logits
    generate(model)
    torch.testing.assert_close(model.model(tokens).logits, before, rtol=0, atol=0)


def test_sampling_tokens_from_an_average_is_refused(base_folder: str, dipnet_folder: str) -> None:
    model = load(DIPLM, base_folder, dipnet_folder, trajectories=2)
    with pytest.raises(ValueError, match=r"trajectories=2 generates greedily.*do_sample"):
        model._model_generate(torch.ones(1, 3, dtype=torch.long), 5, stop=["\n"], do_sample=True, temperature=1.0)


def test_negative_trajectories_are_refused(base_folder: str) -> None:
    with pytest.raises(ValueError, match="trajectories=-1 must be 0"):
        load(DIPLM, base_folder, None, trajectories=-1)


@pytest.mark.parametrize("adapter", ["lora_folder", None])
def test_trajectories_without_noise_are_refused(
    base_folder: str, adapter: str | None, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(adapter) if adapter else None
    with pytest.raises(ValueError, match=r"trajectories=2 needs a model with a DIPNet adapter.*trajectories=0"):
        load(DIPLM, base_folder, folder, trajectories=2)
