"""A file must hold what the model takes from it, and may leave out what the model has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from dip_hf import DIPNetConfig, export_lora
from tests.dipnet.models import FAMILIES


HEADS = {
    "SEQ_CLS": tf.AutoModelForSequenceClassification,
    "TOKEN_CLS": tf.AutoModelForTokenClassification,
    "QUESTION_ANS": tf.AutoModelForQuestionAnswering,
}


def with_head(task_type: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return HEADS[task_type].from_config(FAMILIES["llama"]()).eval()


def output(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[3, 4, 5]]))[0]


def trained(task_type: str) -> PeftModel:
    """An adapter whose head is no longer the base's."""
    config = DIPNetConfig(task_type=task_type, r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(with_head(task_type), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * parameter.requires_grad)
    return model


@pytest.mark.parametrize("task_type", HEADS)
def test_a_head(task_type: str, tmp_path: Path) -> None:
    model = trained(task_type)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(with_head(task_type), tmp_path / "adapter")
    assert torch.equal(output(loaded), output(model))
    assert not torch.equal(output(loaded), output(with_head(task_type)))
    loaded.load_adapter(tmp_path / "adapter", "other")
    loaded.set_adapter("other")
    assert torch.equal(output(loaded), output(model))
    for adapter in (tmp_path / "adapter", model):
        exported = export_lora(adapter, tmp_path / type(adapter).__name__)
        stock = PeftModel.from_pretrained(with_head(task_type), exported)
        assert type(stock.peft_config["default"]) is LoraConfig
        assert torch.equal(output(stock), output(model))


@pytest.mark.parametrize("task_type", HEADS)
def test_a_head_that_the_file_lacks(task_type: str, tmp_path: Path) -> None:
    trained(task_type).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if ".lora_" in name}, file)
    base = with_head(task_type)
    names = set(base.state_dict())
    with pytest.raises(ValueError, match=r"modules_to_save: the weight file holds nothing of '(score|qa_outputs)'"):
        PeftModel.from_pretrained(base, tmp_path)
    assert set(base.state_dict()) == names
