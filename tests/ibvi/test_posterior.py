"""Sampled passes against plain LoRA at A + Σ z_k S_k, on a language model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from dip_hf import NoiseKey
from tests.dipnet.models import FAMILIES, KEY, adapt, batch, build, config, logits, noisy, sites
from tests.ibvi.models import EVERYWHERE, POSTERIOR, at_sample, coefficients, posteriors, variational


def gradients(model: PeftModel, output: Tensor, weight: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (output * weight).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_samples(model: PeftModel, inputs: dict[str, Any], trajectories: int, tolerance: float = 1e-4) -> None:
    """Logits and gradients of folded samples are those of a loop over plain LoRA passes at each sample."""
    rows = len(inputs["input_ids"])
    with model.base_model.sampling(KEY, trajectories):
        folded = model(**inputs).logits
    visible = inputs["attention_mask"].bool()
    weight = torch.randn(folded.shape, generator=torch.Generator().manual_seed(0))
    weight = weight * visible.repeat(trajectories, 1)[..., None]
    found = gradients(model, folded, weight)
    expected: dict[str, Tensor] = {name: torch.zeros_like(gradient) for name, gradient in found.items()}
    for j in range(trajectories):
        own = slice(j * rows, (j + 1) * rows)
        with at_sample(model, KEY, j):
            output = model(**inputs).logits
            torch.testing.assert_close(folded[own][visible], output[visible], rtol=tolerance, atol=tolerance)
            here = gradients(model, output, weight[own])
        for name, gradient in here.items():
            expected[name] += gradient
        for name, (_, leaf) in posteriors(model).items():
            z = coefficients(name, KEY, j, leaf.rank)
            path = f"base_model.model.{name}"
            gradient = here[f"{path}.lora_A.default.weight"]
            expected[f"{path}.lora_dip_covariance.default.weight"] += z[:, None, None] * gradient
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=name)
    assert not torch.allclose(folded[:rows][visible], folded[-rows:][visible], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_every_family(family: str) -> None:
    targets = ["q_proj", "o_proj"] if family in ("mixtral", "qwen3_moe") else "all-linear"  # experts are refused
    assert_samples(variational(build(family), target_modules=targets), batch(padded=True), 3)


def test_a_sampled_pass_has_loras_dropout() -> None:
    model, passes = variational(build(), variational_scale=1e-6, lora_dropout=0.5).train(), []
    for seed in (0, 0, 1):
        with torch.random.fork_rng(), model.base_model.sampling(KEY):
            torch.manual_seed(seed)
            passes.append(logits(model))
    assert torch.equal(passes[0], passes[1]) and not torch.allclose(passes[0], passes[2], atol=1e-3)


@pytest.mark.parametrize("blocks", [1, [1, 2], ".*[02]"], ids=str)
def test_some_blocks_only(blocks: Any) -> None:
    model = variational(build(), variational_blocks=blocks)
    assert_samples(model, batch(), 2)
    assert len(posteriors(model)) == 7 * len(model.base_model.variational_layers())


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}, {"lora_alpha": 32}], ids=str
)
def test_options_of_lora(options: dict[str, Any]) -> None:
    """In double precision: a large alpha makes weights whose rounding a few tokens amplify a thousandfold."""
    assert_samples(variational(build(), **options).double(), batch(), 2, tolerance=1e-9)


def test_trajectories_share_the_computation_below_the_first_variational_block() -> None:
    model = variational(build(), variational_blocks=2)
    rows = []
    for block in model.base_model.model.model.layers:
        block.register_forward_hook(lambda block, args, output: rows.append(len(output)))
    with torch.no_grad(), model.base_model.sampling(KEY, 4):
        model(**batch())
    assert rows == [3, 3, 12, 12]


def test_with_noise_the_fold_begins_at_the_first_of_both() -> None:
    model = adapt(build(), noise_blocks=[2], variational_rank=2, variational_blocks=[1])
    rows = []
    for block in model.base_model.model.model.layers:
        block.register_forward_hook(lambda block, args, output: rows.append(len(output)))
    with torch.no_grad(), model.base_model.sampling(KEY, 2):
        outputs = model(**batch()).logits
    assert rows == [3, 6, 6, 6] and len(outputs) == 6
    with torch.no_grad(), model.base_model.sampling(KEY):
        first = model(**batch()).logits
    torch.testing.assert_close(outputs[:3], first, rtol=1e-4, atol=1e-4)


def test_at_step_0_every_sample_is_the_base_model() -> None:
    base = logits(build())
    model = variational(build(), init_lora_weights=True)
    for step in range(3):
        assert torch.equal(noisy(model, NoiseKey(0, step)), base)
    model.train()
    assert torch.equal(logits(model), base)


def test_lora_is_initialised_as_without_a_posterior() -> None:
    torch.manual_seed(1)
    lora = get_peft_model(build(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    model = get_peft_model(build(), config(**POSTERIOR, init_lora_weights=True))
    after = torch.random.get_rng_state()
    found = dict(model.named_parameters())
    assert all(torch.equal(value, found[name]) for name, value in lora.named_parameters())
    torch.manual_seed(1)
    get_peft_model(build(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    assert torch.equal(torch.random.get_rng_state(), after)


def test_scale_0_is_lora() -> None:
    model = variational(build(), variational_scale=0.0)
    mean = logits(model)
    assert torch.equal(noisy(model), mean) and torch.equal(logits(model.train()), mean)
    for _ in range(2):
        covariances = [leaf.weight for _, leaf in posteriors(model).values()]
        assert len(covariances) == 28 and not any(p.requires_grad or p.any() for p in covariances)
        model.set_adapter("default")  # sets requires_grad anew
    with torch.no_grad(), model.base_model.sampling(KEY, 2):
        torch.testing.assert_close(model(**batch(padded=True)).logits[3:], mean, rtol=1e-4, atol=1e-5)


def test_a_sample_is_of_its_key_module_and_seed() -> None:
    model = variational(build())
    one = noisy(model)
    assert torch.equal(noisy(model), one) and not torch.equal(noisy(model, NoiseKey(4)), one)
    assert not torch.equal(noisy(model, NoiseKey(3, rank=1)), one)
    other = variational(build(), noise_seed=1)
    for name, (_, leaf) in posteriors(other).items():
        assert not torch.equal(leaf.weight, posteriors(model)[name][1].weight)


def test_the_posteriors_key_may_stay_while_the_noises_changes() -> None:
    model = adapt(build(), variational_rank=2, **EVERYWHERE)

    def sampled(key: int, posterior_key: int | None) -> Tensor:
        posterior = None if posterior_key is None else NoiseKey(posterior_key)
        with model.base_model.sampling(NoiseKey(key), posterior_key=posterior):
            return logits(model)

    assert torch.equal(sampled(1, None), sampled(1, 1))
    assert not torch.equal(sampled(1, 1), sampled(1, 2)) and not torch.equal(sampled(1, 1), sampled(2, 1))
    alone = variational(build())
    with alone.base_model.sampling(NoiseKey(8), posterior_key=KEY):
        assert torch.equal(logits(alone), noisy(alone))
    assert len(sites(alone)) == 0


def test_a_sample_is_shared_by_rows_and_tokens() -> None:
    """A row alone gives what it gives in a batch, and a cached token what it gives in its sequence."""
    model = variational(build())
    inputs = batch()
    together = noisy_on(model, inputs)
    torch.testing.assert_close(noisy_on(model, {n: v[1:2] for n, v in inputs.items()}), together[1:2])
    with torch.no_grad(), model.base_model.sampling(KEY):
        start = model(input_ids=inputs["input_ids"][:, :6], use_cache=True)
        rest = model(input_ids=inputs["input_ids"][:, 6:], past_key_values=start.past_key_values).logits
    torch.testing.assert_close(torch.cat([start.logits, rest], 1), together, rtol=1e-4, atol=1e-4)


def noisy_on(model: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), model.base_model.sampling(KEY):
        return model(**inputs).logits


def test_generation_under_one_sample_equals_generation_at_it() -> None:
    model = variational(build())
    arguments = {**batch(padded=True), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with model.base_model.sampling(KEY):
        cached, plain = (model.generate(**arguments, use_cache=use_cache) for use_cache in (True, False))
    with at_sample(model, KEY, 0):
        expected = model.generate(**arguments)
    assert torch.equal(cached, expected) and torch.equal(plain, expected)
    assert not torch.equal(model.generate(**arguments), expected)


def test_training_outside_a_trainer_draws_a_new_sample_for_every_pass() -> None:
    def passes(**arguments: Any) -> list[Tensor]:
        model = adapt(build(), **arguments).train()
        return [logits(model) for _ in range(3)]

    for arguments in (POSTERIOR, {"variational_rank": 3, "noise_blocks": [1], **EVERYWHERE}):
        one, two, three = passes(**arguments)
        assert not torch.equal(one, two) and not torch.equal(two, three) and not torch.equal(one, three)
        assert all(map(torch.equal, passes(**arguments), (one, two, three)))


def test_evaluation_is_by_the_mean_unless_asked() -> None:
    model = variational(build())
    assert torch.equal(logits(model), logits(model))
    sampling = variational(build(), noise_in_eval=True)
    assert not torch.equal(logits(sampling), logits(sampling))


def test_two_active_adapters_have_independent_samples() -> None:
    """Two adapters with the same weights: their sum is not one adapter's sample taken twice."""
    model = variational(build(), target_modules=["q_proj"])
    model.add_adapter("other", config(**POSTERIOR, target_modules=["q_proj"]))
    layer = next(iter(posteriors(model).values()))[0]
    model.base_model.set_adapter(["default", "other"])
    model.eval()
    seen = []
    for name in ("default", "other"):
        layer.lora_dip_covariance[name].register_forward_hook(lambda leaf, args, output: seen.append(output))
        layer.lora_A[name].weight.data.zero_()
    noisy(model)
    assert torch.equal(*[layer.lora_dip_covariance[name].weight for name in ("default", "other")])
    assert len(seen) == 2 and not torch.allclose(*seen)


@pytest.mark.parametrize("arguments", [{}, {"noise_blocks": "all"}])
def test_a_generated_text_is_of_one_sample(arguments: dict[str, Any]) -> None:
    """Where evaluation keeps the noise: the cache holds keys and values of every token before."""
    model = variational(build(), noise_in_eval=True, **arguments).eval()
    state = model.base_model.noise_state
    leaf = next(iter(posteriors(model).values()))[1]
    seen: list[tuple[Any, Any]] = []

    def watch(*_: Any) -> None:
        seen.append((tuple(leaf.drawn[0].tolist()), tuple(state.key.tolist())))

    model.get_base_model().model.register_forward_hook(watch)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    model.generate(**batch(1, 5), **options)
    model.generate(**batch(1, 5), **options)
    samples, keys = [list(column) for column in zip(*seen, strict=True)]
    assert len(seen) == 6 and len(set(keys)) == 6
    assert samples == [samples[0]] * 3 + [samples[3]] * 3 and samples[0] != samples[3]
    model(**batch(1, 5))
    assert seen[-1][0] == seen[-1][1] != samples[3]
