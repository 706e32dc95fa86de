"""Weights that are loaded again: of an adapter that changed the base (PiSSA), or from before the first batch."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from dip_hf import export_lora
from tests.dipnet.models import adapt, load_base, logits, noisy, sites


def assert_close(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize(
    "arguments",
    [{"modules_to_save": ["lm_head"]}, {"variational_rank": 2, "variational_blocks": "all", "noise_blocks": 2}],
    ids=str,
)
def test_conversion(base: str, tmp_path: Path, init: str, arguments: dict[str, Any]) -> None:
    model = adapt(load_base(base), init_lora_weights=init, target_modules=["q_proj", "down_proj"], **arguments)
    noisy(model.eval())  # measures the scale
    # As PEFT's documentation says: the untrained adapter is saved as one that changes no base
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "dip" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert list(model.peft_config) == ["default"]
    loaded = PeftModel.from_pretrained(load_base(base), tmp_path / "converted")
    assert not torch.allclose(logits(loaded), logits(load_base(base)), atol=1e-2)
    assert_close(logits(loaded), logits(model))
    assert_close(noisy(loaded), noisy(model))
    stock = PeftModel.from_pretrained(load_base(base), export_lora(tmp_path / "converted", tmp_path / "lora"))
    assert_close(logits(stock), logits(model))
    # the initial adapter is what it was
    assert json.loads((tmp_path / "initial" / "adapter_config.json").read_text())["init_lora_weights"] is True
    PeftModel.from_pretrained(load_base(base), tmp_path / "initial")


@pytest.mark.parametrize("way", ["set_peft_model_state_dict", "load_state_dict", "load_adapter"])
def test_back_to_the_initial_weights(base: str, way: str, tmp_path: Path) -> None:
    """Which were saved before the first batch, when no scale was measured."""
    model = adapt(load_base(base))
    initial = copy.deepcopy(model.state_dict())
    adapter = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    model.save_pretrained(tmp_path)
    drawn = noisy(model)
    if way == "set_peft_model_state_dict":
        set_peft_model_state_dict(model, adapter)
    elif way == "load_state_dict":
        model.load_state_dict(initial)
    else:
        model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert all(site.leaf("default").rms.item() == 0 for site in sites(model))
    assert torch.equal(noisy(model), drawn) and not torch.equal(drawn, logits(model))
    # Loaded with a scale of their own, they keep it
    rms = [site.leaf("default").rms.clone() for site in sites(model)]
    measured = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, {n: 2 * v if n.endswith("rms") else v for n, v in measured.items()})
    noisy(model)
    assert [site.leaf("default").rms.item() for site in sites(model)] == [2 * one.item() for one in rms]
