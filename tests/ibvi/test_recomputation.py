"""Activation checkpointing: the backward pass computes blocks again, with the sample that the forward pass had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import CheckpointError
from trl import DPOConfig, DPOTrainer

from dip_hf import DIPNetConfig, NoiseKey
from tests.dipnet.models import adapt, batch, build, config
from tests.ibvi.models import EVERYWHERE, POSTERIOR, variational
from tests.trainer.tiny import ADAPTER, base_model, tokenizer


def checkpointed(model: PeftModel, reentrant: bool = False) -> PeftModel:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model.train()


def loss(model: PeftModel, rows: int = 3) -> Tensor:
    return model(**batch(rows, padded=True), use_cache=False).logits.square().mean()


def gradients(model: PeftModel) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("trajectories", [0, 1, 2], ids=["no context", "m=1", "m=2"])
@pytest.mark.parametrize(
    "arguments", [POSTERIOR, {"variational_rank": 2, **EVERYWHERE}], ids=["posterior", "with noise"]
)
@pytest.mark.filterwarnings("ignore")
def test_the_same_gradient(arguments: dict[str, Any], trajectories: int, reentrant: bool) -> None:
    """Two micro-batches, each with a sample of its own, after the `sampling` context has closed, or with none."""
    results = []
    for recompute in (False, True):
        model = adapt(build(), **arguments, lora_dropout=0.2).train()
        if recompute:
            checkpointed(model, reentrant)
        torch.manual_seed(0)
        for step in range(2):
            if trajectories:
                with model.base_model.sampling(NoiseKey(0, step), trajectories):
                    value = loss(model)
            else:
                value = loss(model)
            value.backward()
        results.append(gradients(model))
    assert all(gradient.abs().sum() > 0 for gradient in results[0])
    assert all(map(torch.equal, *results))


def test_a_gradient_inside_the_context_and_one_after_it() -> None:
    """As ICP's: `torch.autograd.grad` on the graph, a second pass under the same key, then the backward pass."""
    results = []
    for recompute in (False, True):
        model = variational(build()).train()
        if recompute:
            checkpointed(model)
        with model.base_model.sampling(NoiseKey(5)):
            value = loss(model)
            weight = next(parameter for parameter in model.parameters() if parameter.requires_grad)
            (first,) = torch.autograd.grad(value, weight, retain_graph=True)
            with torch.no_grad():
                loss(model)
        value.backward()
        assert torch.equal(weight.grad, first)
        results.append(gradients(model))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.filterwarnings("ignore")
def test_a_pass_of_another_adapter_before_the_backward_pass(reentrant: bool) -> None:
    """As the reference's in TRL's DPO."""
    results = []
    for recompute in (False, True):
        model = variational(build())
        model.add_adapter("ref", config(**POSTERIOR))
        if recompute:
            checkpointed(model, reentrant)
        value = loss(model.train())
        with torch.no_grad():
            model.set_adapter("ref")
            loss(model)
            model.set_adapter("default")
        value.backward()
        results.append(gradients(model))
    assert all(map(torch.equal, *results))


def test_dpo_of_a_loaded_adapter(tmp_path: Path) -> None:
    """With TRL's defaults, among them activation checkpoints and a reference that is a copy of the adapter."""
    adapter = DIPNetConfig(**ADAPTER, **POSTERIOR)
    get_peft_model(base_model(), adapter).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(base_model(), tmp_path / "adapter", is_trainable=True)
    args = DPOConfig(output_dir=str(tmp_path), max_steps=2, use_cpu=True, bf16=False, report_to="none")
    rows = Dataset.from_list([{"prompt": "ab ", "chosen": "cd", "rejected": "ef"}] * 8)
    trainer = DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer())
    assert args.activation_checkpointing and "ref" in model.peft_config
    trainer.train()
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    after = get_peft_model_state_dict(model)
    assert any(not torch.equal(after[name], value) for name, value in before.items() if "covariance" in name)


def test_several_passes_before_one_backward_pass() -> None:
    """Without checkpoints each keeps its sample; with them the earlier ones would be recomputed wrongly: an error."""
    model = variational(build()).train()
    expected = []
    for step in range(2):
        with model.base_model.sampling(NoiseKey(0, step)):
            loss(model, 2 + step).backward()
        expected.append(gradients(model))
    model.zero_grad()
    losses = []
    for step in range(2):
        with model.base_model.sampling(NoiseKey(0, step)):
            losses.append(loss(model, 2 + step))
    sum(losses).backward()  # type: ignore[union-attr]
    for found, total in zip(gradients(model), expected[1], strict=True):
        torch.testing.assert_close(found, total, rtol=1e-4, atol=1e-7)

    checkpointed(model)
    losses = []
    for step in range(2):
        with model.base_model.sampling(NoiseKey(0, step)):
            losses.append(loss(model, 2 + step))
    with pytest.raises(CheckpointError, match="different metadata"):
        sum(losses).backward()  # type: ignore[union-attr]


def test_several_passes_under_one_key_before_one_backward_pass() -> None:
    results = []
    for recompute in (False, True):
        model = variational(build()).train()
        if recompute:
            checkpointed(model)
        with model.base_model.sampling(NoiseKey(0)):
            total = loss(model, 2) + loss(model, 3)
        total.backward()
        results.append(gradients(model))
    assert all(map(torch.equal, *results))


def test_compiled_parts_of_a_block_that_is_recomputed() -> None:
    """They are compiled anew in the backward pass, when the context has closed, and draw the same sample again."""
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = variational(build(num_hidden_layers=2), target_modules=["q_proj", "up_proj"])
        if compiled:
            checkpointed(model)
            for block in model.base_model.model.model.layers:
                block.mlp.compile(backend="eager")
                block.self_attn.compile(backend="eager")
        with model.train().base_model.sampling(NoiseKey(1)):
            logits = model(**batch(), use_cache=False).logits
        logits.square().mean().backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    torch.testing.assert_close(found[1], found[0])
    torch._dynamo.reset()
