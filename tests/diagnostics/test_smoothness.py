from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from dip_hf.diagnostics import smoothness
from tests.dipnet import models


def losses(model: Any, batch: dict[str, Tensor], row: int) -> tuple[Any, Tensor]:
    """One example's loss as a function of the embeddings of its tokens alone, and these; no padding, no hooks."""
    length = int(batch["attention_mask"][row].sum())
    ids, labels = batch["input_ids"][row, :length], batch["labels"][row, :length]
    embeddings = model.get_input_embeddings()(ids).detach()

    def loss(x: Tensor) -> Tensor:
        log_p = model(inputs_embeds=x.view(1, length, -1), use_cache=False).logits[0].log_softmax(-1)
        places = [t for t in range(1, length) if labels[t] != -100]
        return -sum(log_p[t - 1, labels[t]] for t in places) / len(places)

    return loss, embeddings


def state_of(model: torch.nn.Module) -> tuple:
    return (
        [parameter.grad for parameter in model.parameters()],
        [parameter.requires_grad for parameter in model.parameters()],
        [module.training for module in model.modules()],
        [len(module._forward_hooks) for module in model.modules()],
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize(("family", "attention"), [("gpt2", "eager"), ("qwen3", "sdpa")])
def test_norms_are_those_of_the_explicit_derivatives(family: str, attention: str, batch: dict[str, Tensor]) -> None:
    model = models.build(
        family, num_hidden_layers=2, hidden_size=8, initializer_range=0.5, _attn_implementation="eager"
    )
    model = model.double()
    batch = {name: value[1:, :7] for name, value in batch.items()}
    gradients, hessians, units = [], [], []
    for row in range(2):
        loss, x = losses(model, batch, row)
        gradients.append(torch.autograd.functional.jacobian(loss, x).norm().item())
        hessian = torch.autograd.functional.hessian(loss, x).reshape(x.numel(), x.numel())
        hessians.append(torch.linalg.eigvalsh(hessian).abs().max().item())
        units.append(x.square().mean().sqrt().item())
    model.set_attn_implementation(attention)
    found = smoothness(model, [batch], max_iterations=1000, tolerance=1e-4)  # norm layers compute in fp32
    assert found["gradient_norm_mean"] == pytest.approx(sum(gradients) / 2, rel=1e-6)
    assert found["gradient_norm_max"] == pytest.approx(max(gradients), rel=1e-6)
    assert found["hessian_norm_mean"] == pytest.approx(sum(hessians) / 2, rel=3e-3)
    assert found["hessian_norm_max"] == pytest.approx(max(hessians), rel=3e-3)
    relative = [h * u**2 for h, u in zip(hessians, units, strict=True)]
    assert found["relative_hessian_norm_mean"] == pytest.approx(sum(relative) / 2, rel=3e-3)
    assert found["relative_gradient_norm_max"] == pytest.approx(
        max(g * u for g, u in zip(gradients, units, strict=True)), rel=1e-6
    )
    assert found["embedding_rms"] == pytest.approx(sum(units) / 2, rel=1e-6)
    assert found["hessian_unconverged"] == 0 and found["examples"] == 2


def test_norms_are_those_of_finite_differences(batch: dict[str, Tensor]) -> None:
    model = models.build("gpt2", num_hidden_layers=1, hidden_size=8, initializer_range=0.5).double()
    model.set_attn_implementation("sdpa")
    row = {name: value[2:] for name, value in batch.items()}
    found = smoothness(model, [row], max_iterations=1000, tolerance=1e-6)
    loss, x = losses(model, batch, 2)
    steps = 1e-4 * torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(loss(x), x)[0].flatten()

    with torch.no_grad():
        slopes = torch.stack([(loss(x + step) - loss(x - step)) / 2e-4 for step in steps])
    columns = [gradient((x + step).requires_grad_()) - gradient((x - step).requires_grad_()) for step in steps]
    hessian = torch.stack(columns) / 2e-4
    assert found["loss"] == pytest.approx(loss(x).item(), rel=1e-9)
    assert found["gradient_norm_mean"] == pytest.approx(slopes.norm().item(), rel=1e-5)
    assert found["hessian_norm_mean"] == pytest.approx(torch.linalg.eigvalsh(hessian).abs().max().item(), rel=1e-3)


def test_neither_padding_nor_batching_matters(batch: dict[str, Tensor]) -> None:
    model = models.build("gpt2").double()  # absolute positions
    single = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(3)]
    lengths = batch["attention_mask"].sum(1).tolist()
    left = {name: torch.stack([r.roll(9 - n) for r, n in zip(v, lengths, strict=True)]) for name, v in batch.items()}
    expected = smoothness(model, [batch], max_iterations=4)
    for other in (single, [left]):
        found = smoothness(model, other, max_iterations=4)
        for name in expected:
            if name not in ("hessian_iterations", "hessian_unconverged"):
                assert found[name] == pytest.approx(expected[name], rel=1e-6), name


def test_noise_is_off_and_the_model_stays_as_it_was(batch: dict[str, Tensor]) -> None:
    model = models.adapt(models.build(), noise_in_eval=True).train()
    model.base_model.model.model.layers[1].eval()
    before, rng = state_of(model), torch.get_rng_state()
    found = smoothness(model, [batch], max_iterations=3)
    assert state_of(model) == before
    assert all(site.noise_in_eval == {"default": True} for site in models.sites(model))
    torch.set_rng_state(rng)
    merged = model.merge_and_unload().eval()
    expected = smoothness(merged, [batch], max_iterations=3)
    assert found["gradient_norm_max"] == pytest.approx(expected["gradient_norm_max"], rel=3e-3)
    assert found["hessian_norm_max"] == pytest.approx(expected["hessian_norm_max"], rel=3e-3)


def test_works_under_no_grad_and_with_frozen_weights(batch: dict[str, Tensor]) -> None:
    model = get_peft_model(models.build(), LoraConfig(target_modules="all-linear"))
    expected = smoothness(model, [batch], max_iterations=3)
    with torch.no_grad():
        assert smoothness(model.requires_grad_(False), [batch], max_iterations=3) == expected


def test_refusals(batch: dict[str, Tensor]) -> None:
    model = models.build()
    with pytest.raises(ValueError, match="batches is empty"):
        smoothness(model, [])
    with pytest.raises(ValueError, match="no labels"):
        smoothness(model, [{name: batch[name] for name in ("input_ids", "attention_mask")}])
    with pytest.raises(ValueError, match=r"labels \(3, 1\)"):
        smoothness(model, [{**batch, "labels": batch["labels"][:, :1]}])
    unlabelled = batch["labels"].clone()
    unlabelled[1] = -100
    with pytest.raises(ValueError, match="example 4 has no label"):
        smoothness(model, [batch, {**batch, "labels": unlabelled}], max_iterations=2)
    with pytest.raises(ValueError, match=r"bfloat16.*dtype=torch\.float32"):
        smoothness(models.build().bfloat16(), [batch])
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2'"):
        smoothness(model, [batch])
