from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor

from dip_hf import NoiseKey
from dip_hf.diagnostics import robustness
from tests.diagnostics.test_smoothness import state_of
from tests.dipnet import models


CONDITIONS = ["none", "noise_0.5", "noise_2", "fgsm_0.05", "fgsm_1"]


def measure(model: Any, batches: list[dict[str, Tensor]], **options: Any) -> dict[str, dict[str, float]]:
    return robustness(model, batches, **{"noise_scales": (0.5, 2.0), "fgsm_scales": (0.05, 1.0), **options})


def answer_nll(model: Any, batch: dict[str, Tensor], row: int, x: Tensor) -> Tensor:
    """Of one example at the embeddings x of its tokens alone."""
    labels = batch["labels"][row, : x.shape[0]]
    log_p = model(inputs_embeds=x[None], use_cache=False).logits[0].log_softmax(-1)
    return -sum(log_p[t - 1, labels[t]] for t in range(1, x.shape[0]) if labels[t] != -100)


def test_tokens_that_an_adapter_puts_in_front(batch: dict[str, Tensor]) -> None:
    model = get_peft_model(models.build(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"logits have 11 positions for 9 tokens, as where a prompt-learning adapter"):
        measure(model, [batch])


def test_fgsm_is_the_plain_one(batch: dict[str, Tensor]) -> None:
    model = models.build(initializer_range=0.3).double()
    total = {0.05: 0.0, 1.0: 0.0}
    for row, prompt in enumerate([6, 5, 3]):
        ids = batch["input_ids"][row, : int(batch["attention_mask"][row].sum())]
        x = model.get_input_embeddings()(ids).detach().requires_grad_()
        (g,) = torch.autograd.grad(answer_nll(model, batch, row, x), x)
        for epsilon in total:
            moved = x.detach().clone()
            for t in range(prompt):
                moved[t] += epsilon * x[t].detach().square().mean().sqrt() * g[t].sign()
            total[epsilon] += answer_nll(model, batch, row, moved).item() / 3
    found = measure(model, [batch])
    assert list(found) == CONDITIONS
    for epsilon, expected in total.items():
        assert found[f"fgsm_{epsilon:g}"]["nll"] == pytest.approx(expected, rel=1e-6)
    assert found["none"]["nll"] < found["fgsm_0.05"]["nll"]


def test_exact_match_is_that_of_greedy_generation() -> None:
    model = models.build(initializer_range=0.5)
    ids = torch.randint(3, models.VOCABULARY, (8, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        greedy = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3, do_sample=False
        )
    greedy[5:, 7] = 3 + (greedy[5:, 7] + 1) % 40  # three answers that greedy generation does not give
    labels = greedy.clone()
    labels[:, :6] = -100
    batch = {"input_ids": greedy, "attention_mask": torch.ones_like(greedy), "labels": labels}
    assert measure(model, [batch])["none"]["exact_match"] == 5 / 8


def test_noise_grows_depends_on_the_key_and_not_on_the_batch(batch: dict[str, Tensor]) -> None:
    model = models.build(initializer_range=0.3).double()
    found = measure(model, [batch])
    single = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(3)]
    for name, row in measure(model, single).items():
        assert row == pytest.approx(found[name], rel=1e-6)
    assert measure(model, [batch]) == found
    other = measure(model, [batch], key=NoiseKey(1))
    assert other["none"] == found["none"] and other["fgsm_1"] == found["fgsm_1"]
    assert other["noise_0.5"] != found["noise_0.5"] != found["none"]


def test_the_answers_own_tokens_are_not_perturbed(batch: dict[str, Tensor]) -> None:
    """Seen from a model that looks at nothing but the token before: only the answer's first token can change."""
    model = models.build(initializer_range=0.3)
    for block in model.model.layers:
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
    later = batch["labels"].clone()
    for row, prompt in enumerate([6, 5, 3]):
        later[row, prompt] = -100  # the first answer token, predicted from the prompt's last one
    ids = batch["input_ids"]
    shortened = {**batch, "labels": later}
    found = measure(model, [batch])
    assert found["noise_2"]["nll"] != found["none"]["nll"]
    # The first answer token now counts as prompt: perturbing it changes what follows it
    assert measure(model, [shortened])["noise_2"]["nll"] != measure(model, [shortened])["none"]["nll"]
    # Two tokens further nothing can tell
    two = torch.full_like(later, -100)
    two[0, 7:9] = ids[0, 7:9]
    first_only = {name: value[:1] for name, value in {**batch, "labels": two}.items()}
    one = {**first_only, "labels": first_only["labels"].clone()}
    one["labels"][0, 7] = -100
    gap = {name: measure(model, [first_only])[name]["nll"] for name in ("none", "noise_2", "fgsm_1")}
    last = measure(model, [one])["none"]["nll"]  # unperturbed -ln p of the last token
    seven = {**first_only, "labels": first_only["labels"].clone()}
    seven["labels"][0, 8] = -100
    for name, value in gap.items():
        assert value == pytest.approx(measure(model, [seven])[name]["nll"] + last, rel=1e-5)


def test_model_stays_as_it_was_and_noise_is_off(batch: dict[str, Tensor]) -> None:
    model = models.adapt(models.build(), noise_in_eval=True).train()
    before = state_of(model)
    found = measure(model, [batch])
    assert state_of(model) == before
    expected = measure(model.merge_and_unload(), [batch])
    for name, row in expected.items():
        assert found[name]["nll"] == pytest.approx(row["nll"], rel=1e-3)


def test_refusals(batch: dict[str, Tensor]) -> None:
    model = models.build()
    for name in ("noise_scales", "fgsm_scales"):
        for bad in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=name):
                measure(model, [batch], **{name: (0.1, bad)})
    with pytest.raises(ValueError, match="example 1 has no prompt"):
        labels = batch["labels"].clone()
        labels[1] = batch["input_ids"][1]
        measure(model, [{**batch, "labels": labels}])
    with pytest.raises(ValueError, match="batches is empty"):
        measure(model, [])


def test_without_perturbations_there_is_one_row(batch: dict[str, Tensor]) -> None:
    model = models.build()
    assert list(measure(model, [batch], noise_scales=(), fgsm_scales=())) == ["none"]
