"""Adapters that fit their base, and those that do not: PEFT leaves out what fits nothing, and says nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, VBLoRAConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from dip_hf import DIPNetConfig
from dip_hf.loading import check_loaded_whole, load_adapter
from tests.trainer.tiny import base_model


LORA = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
IDS = torch.arange(3, 11)[None]


def saved(folder: Path, config: PeftConfig, model: LlamaForCausalLM | None = None) -> PeftModel:
    adapted = get_peft_model(base_model() if model is None else model, config).eval()
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize(
    "config",
    [
        LORA,
        DIPNetConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4], task_type="CAUSAL_LM"),
        LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        VBLoRAConfig(target_modules=["q_proj"], r=2, num_vectors=8, vector_length=4, topk=2, task_type="CAUSAL_LM"),
    ],
    ids=["lora", "dipnet", "head", "tokens", "dora", "ia3", "prompt", "a shared bank"],
)
def test_what_fits(config: PeftConfig, tmp_path: Path) -> None:
    trained = saved(tmp_path, config)
    loaded = load_adapter(base_model(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, trained(input_ids=IDS).logits)
    assert not loaded.training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"depth": 2},
            r"does not fit the base model \('.*layers.2.*' is a weight of no module of the model\); load",
        ),
        ({"depth": 5}, r"does not fit the base model \('.*layers.[34].*' is not among its weights\); load it on the"),
    ],
    ids=["shallower", "deeper"],
)
def test_another_base(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path, LORA)
    with pytest.raises(ValueError, match=message):
        load_adapter(base_model(**changes), tmp_path)


def test_another_width(tmp_path: Path) -> None:
    saved(tmp_path, LORA)
    other = base_model()
    wide = other.config.to_dict() | {"hidden_size": 32}
    with pytest.raises(ValueError, match=r"does not fit the base model \(size mismatch for .*\); load it on the base"):
        load_adapter(LlamaForCausalLM(type(other.config).from_dict(wide)), tmp_path)


def test_weights_that_are_missing(tmp_path: Path) -> None:
    saved(tmp_path, LORA)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    weights.pop(next(name for name in weights if "layers.1" in name))
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"adapter='.*' does not fit .*layers.1.* is not among its weights"):
        load_adapter(base_model(), tmp_path)


def test_a_lack_of_memory_is_no_misfit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory")

    saved(tmp_path, LORA)
    monkeypatch.setattr(PeftModel, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_adapter(base_model(), tmp_path)


def test_a_further_adapter(tmp_path: Path) -> None:
    """As an ensemble loads its members."""
    saved(tmp_path / "deep", LORA, base_model(depth=5))
    model = saved(tmp_path / "own", LORA)
    check_loaded_whole(model, model.load_adapter(tmp_path / "own", "again"), "own")
    with pytest.raises(ValueError, match=r"adapter='deep' does not fit"):
        check_loaded_whole(model, model.load_adapter(tmp_path / "deep", "deep"), "deep")


def test_embeddings_grow_and_never_shrink(tmp_path: Path) -> None:
    saved(tmp_path, LORA)
    for tokens, rows in ((40, 48), (50, 50)):
        model = load_adapter(base_model(), tmp_path, tokens=tokens)
        assert model.get_input_embeddings().num_embeddings == rows
