"""Averaged probabilities against a plain loop over samples; what has no posterior is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from dip_hf.ibvi import posterior_predictive
from tests.dipnet.models import KEY, adapt, batch, build
from tests.ibvi.models import at_sample, variational


def loop(model: PeftModel, inputs: dict[str, Tensor], num_samples: int) -> Tensor:
    """One plain LoRA pass a sample."""
    probabilities = []
    for j in range(num_samples):
        with torch.no_grad(), at_sample(model, KEY, j):
            probabilities.append(model(**inputs).logits.float().softmax(-1))
    return torch.stack(probabilities).mean(0)


@pytest.mark.parametrize("arguments", [{}, {"variational_blocks": 1}, {"variational_rank": 1}], ids=str)
@pytest.mark.parametrize("num_samples", [1, 2, 5])
def test_it_is_the_mean_of_the_samples_probabilities(arguments: dict[str, Any], num_samples: int) -> None:
    model, inputs = variational(build(), **arguments), batch(padded=True)
    found = posterior_predictive(model, inputs, num_samples, KEY)
    assert found.shape == (3, 10, 50) and found.dtype == torch.float32 and not found.requires_grad
    visible = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[visible], loop(model, inputs, num_samples)[visible], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 10))


def test_it_changes_nothing_of_the_model() -> None:
    model, inputs = variational(build(), lora_dropout=0.5).train(), batch()
    first = posterior_predictive(model, {**inputs, "labels": inputs["input_ids"]}, 3, KEY)
    assert all(module.training for module in model.modules())
    assert torch.equal(posterior_predictive(model, inputs, 3, KEY), first)  # without dropout
    assert not torch.equal(posterior_predictive(model, inputs, 3), first)
    torch.testing.assert_close(first, loop(model.eval(), inputs, 3), rtol=1e-4, atol=1e-6)


def test_of_a_point_it_is_the_means() -> None:
    model, inputs = variational(build(), variational_scale=0.0), batch()
    with torch.no_grad():
        expected = model(**inputs).logits.softmax(-1)
    torch.testing.assert_close(posterior_predictive(model, inputs, 2), expected, rtol=1e-4, atol=1e-6)


def test_of_noise_alone_it_averages_noisy_passes() -> None:
    model, inputs = adapt(build()), batch()
    with torch.no_grad(), model.base_model.sampling(KEY, 2):
        expected = model(**inputs).logits.softmax(-1).unflatten(0, (2, -1)).mean(0)
    torch.testing.assert_close(posterior_predictive(model, inputs, 2, KEY), expected)


def test_what_is_refused() -> None:
    model, inputs = variational(build()).train(), batch()
    for num_samples in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=rf"num_samples={num_samples} must be a whole number, at least 1"):
            posterior_predictive(model, inputs, num_samples)  # type: ignore[arg-type]
    with model.disable_adapter(), pytest.raises(ValueError, match="has no posterior; activate an unmerged"):
        posterior_predictive(model, inputs, 2)
    assert model.training
    lora = get_peft_model(build(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    with pytest.raises(ValueError, match="no posterior in a LoraConfig; give a PEFT model with a DIPNetConfig"):
        posterior_predictive(lora, inputs, 2)
    with pytest.raises(ValueError, match="no posterior in a LlamaForCausalLM"):
        posterior_predictive(build(), inputs, 2)  # type: ignore[arg-type]
