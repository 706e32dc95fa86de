"""An exported adapter is plain LoRA with the noise-free logits; what cannot be one is refused, and nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dip_hf import NoiseKey, export_lora
from dip_hf.cli import main
from tests.dipnet.models import adapt, batch, build, config


# What a user without dip_hf does; the import of dip_hf would fail there, so it must not happen.
STOCK = """
import sys, torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM
base, adapter, inputs, output = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
assert type(model.peft_config["default"]) is LoraConfig, model.peft_config
assert not any("dip" in name for name in model.state_dict())
with torch.no_grad():
    torch.save(model(**torch.load(inputs)).logits, output)
assert "dip_hf" not in sys.modules
"""


def trained(folder: Path, **arguments: Any) -> tuple[PeftModel, Tensor]:
    """A model whose weights are all random, on a saved base, and its noise-free logits."""
    build().save_pretrained(folder / "base")
    model = adapt(AutoModelForCausalLM.from_pretrained(folder / "base"), **arguments).eval()
    with torch.no_grad(), model.base_model.sampling(NoiseKey(0)):
        model(**batch())
    with torch.no_grad():
        return model, model(**batch(padded=True)).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "arguments",
    [
        {"target_modules": "all-linear"},
        {"use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "embed_tokens"]},
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["lm_head"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        },
        {"target_modules": [], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_logits_are_those_of_the_noise_free_pass(tmp_path: Path, arguments: dict[str, Any]) -> None:
    model, expected = trained(tmp_path, **arguments)
    model.save_pretrained(tmp_path / "adapter")
    from_folder = export_lora(tmp_path / "adapter", tmp_path / "from_folder")
    from_model = export_lora(model, tmp_path / "deeper" / "from_model")
    for folder in (from_folder, from_model):
        assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        written = json.loads((folder / "adapter_config.json").read_text())
        assert written["peft_type"] == "LORA"
        assert not {"noise_scale", "noise_blocks", "block_names", "dip_format"} & set(written)
        stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder).eval()
        assert type(stock.peft_config["default"]) is LoraConfig
        with torch.no_grad():
            assert (stock(**batch(padded=True)).logits - expected).abs().max() <= 1e-5


def test_stock_peft_loads_it_without_dip_hf(tmp_path: Path) -> None:
    model, expected = trained(tmp_path, target_modules="all-linear")
    export_lora(model, tmp_path / "lora")
    torch.save(batch(padded=True), tmp_path / "inputs.pt")
    subprocess.run(
        [sys.executable, "-c", STOCK, *(str(tmp_path / name) for name in ("base", "lora", "inputs.pt", "logits.pt"))],
        check=True,
        cwd=tmp_path,  # not the repository, from which dip_hf could be imported
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert (torch.load(tmp_path / "logits.pt") - expected).abs().max() <= 1e-5


def test_a_named_adapter_of_a_model(tmp_path: Path) -> None:
    model, _ = trained(tmp_path)
    model.add_adapter("other", config(noise_blocks=[0]))
    model.set_adapter("other")
    with torch.no_grad():
        expected = model(**batch()).logits
    folder = export_lora(model, tmp_path / "other", adapter_name="other")
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder).eval()
    with torch.no_grad():
        assert (stock(**batch()).logits - expected).abs().max() <= 1e-5


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    model, _ = trained(tmp_path)
    (tmp_path / "lora").mkdir()
    assert export_lora(model, tmp_path / "lora") == tmp_path / "lora"


def refused(tmp_path: Path, adapter: Any, message: str, output: str = "out") -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        export_lora(adapter, tmp_path / output)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_refused(tmp_path: Path) -> None:
    model, _ = trained(tmp_path)
    refused(tmp_path, model, "output=.*base exists and is not empty; name a new folder", "base")
    refused(tmp_path, model, "exists and is not empty", "base/config.json")
    refused(tmp_path, tmp_path / "nowhere", "No adapter_config.json in .*nowhere")

    model.save_pretrained(tmp_path / "damaged")
    weights = tmp_path / "damaged" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    refused(tmp_path, tmp_path / "damaged", "truncated or damaged")

    adapt(build(), target_modules=[]).save_pretrained(tmp_path / "noise")
    refused(tmp_path, tmp_path / "noise", "noise only.*nothing to export")

    adapt(build(), modules_to_save=["lm_head"]).save_pretrained(tmp_path / "headless")
    weights = tmp_path / "headless" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(weights).items() if "lm_head" not in name}, weights)
    refused(
        tmp_path,
        tmp_path / "headless",
        r"modules_to_save=\['lm_head'\]: .*adapter_model.safetensors holds nothing of them; save or",
    )

    plain = get_peft_model(build(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    plain.save_pretrained(tmp_path / "plain")
    refused(tmp_path, tmp_path / "plain", "peft_type='LORA' is no DIPNet adapter")


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = trained(tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("dip_hf.dipnet.export.save_file", full)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="no space left"):
        export_lora(model, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = trained(tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    arguments = ["export-lora", str(tmp_path / "adapter"), str(tmp_path / "lora")]
    assert main(arguments) == 0
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    assert str(tmp_path / "lora") in capsys.readouterr().out
    assert main(arguments) == 2  # it stands there already
    error = capsys.readouterr().err
    assert error.startswith("dip-hf export-lora: output=") and error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["export-lora"], ["no-such-command"]], ids=str)
def test_command_line_misused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
