"""The adapter on 4- and 8-bit bases (bitsandbytes, on the CPU)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from dip_hf import NoiseKey, export_lora
from dip_hf.dipnet.layer import NoiseSite
from tests.dipnet.models import adapt, batch, build


KEY = NoiseKey(3)
SETTINGS = {"4 bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "8 bit": {"load_in_8bit": True}}


def load(folder: Path, bits: str) -> PreTrainedModel:
    quantisation = BitsAndBytesConfig(**SETTINGS[bits], bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantisation, dtype=torch.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("bitsandbytes")
    # bitsandbytes's blocks of 64 need sizes that are multiples of it
    build(hidden_size=64, intermediate_size=64, head_dim=16, num_hidden_layers=2).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", SETTINGS)
def test_training_saving_loading_and_export(folder: Path, tmp_path: Path, bits: str) -> None:
    base = prepare_model_for_kbit_training(load(folder, bits), use_gradient_checkpointing=False)
    model = adapt(base, target_modules="all-linear").train()
    assert not any(isinstance(module, NoiseSite) for module in base.modules() if isinstance(module, nn.Linear))
    with model.base_model.sampling(KEY, 2):
        logits = model(**batch()).logits
    assert len(logits) == 6
    logits.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32 and parameter.grad.abs().sum() > 0, name

    def passes(one: PeftModel) -> list[torch.Tensor]:
        one.eval()
        with torch.no_grad():
            clean = one(**batch()).logits
            with one.base_model.sampling(KEY):
                return [clean, one(**batch()).logits]

    expected = passes(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(folder, bits), tmp_path / "adapter")
    torch.testing.assert_close(passes(loaded), expected, rtol=1e-4, atol=1e-4)
    stock = PeftModel.from_pretrained(load(folder, bits), export_lora(model, tmp_path / "lora")).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(**batch()).logits, expected[0], rtol=1e-4, atol=1e-4)
