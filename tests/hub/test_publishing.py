"""What the trainer refuses to push, before it trains."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from huggingface_hub.errors import OfflineModeIsEnabled
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dip_hf import DIPSFTConfig, DIPSFTTrainer
from dip_hf.hub import PushSettings
from dip_hf.hub.stage import stage
from tests.hub.conftest import BASE


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def trainer(model: Any, base_folder: Path, tmp_path: Path, push_to_hub: bool = True, **options: Any) -> DIPSFTTrainer:
    return DIPSFTTrainer(
        model=model,
        args=DIPSFTConfig(str(tmp_path / "run"), push_to_hub=push_to_hub, bf16=False, use_cpu=True, report_to="none"),
        train_dataset=Dataset.from_list([{"prompt": "How many?", "completion": " One."}] * 2),
        processing_class=AutoTokenizer.from_pretrained(base_folder),
        **options,
    )


def adapted(base_folder: Path) -> PeftModel:
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), lora())


@pytest.mark.parametrize("given", ["path", "model", "adapted"])
def test_an_adapter_on_a_local_base_is_refused_where_it_would_be_pushed(
    given: str, base_folder: Path, tmp_path: Path
) -> None:
    model, options = str(base_folder), {"peft_config": lora()}
    if given == "model":
        model = AutoModelForCausalLM.from_pretrained(base_folder)
    elif given == "adapted":
        model, options = adapted(base_folder), {}
    message = re.escape(f"push_to_hub=True, but the base {str(base_folder)!r} is a local folder")
    with pytest.raises(ValueError, match=rf"{message}.* `dip-hf push .*run REPO --base_model NAME` after training"):
        trainer(model, base_folder, tmp_path, **options)


def test_what_can_be_pushed_is_not_refused(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With push_to_hub a trainer makes its repository at once, which fails here for want of a network alone."""
    (tmp_path / BASE).mkdir(parents=True)  # a folder that is called as the base is, and holds none
    monkeypatch.chdir(tmp_path)
    named = adapted(base_folder)
    named.peft_config["default"].base_model_name_or_path = BASE
    for model in (named, str(base_folder)):  # the latter trains the whole model, which needs no base
        with pytest.raises(OfflineModeIsEnabled):
            trainer(model, base_folder, tmp_path)
    trainer(str(base_folder), base_folder, tmp_path, push_to_hub=False, peft_config=lora())  # pushed with base_model


def test_a_run_remembers_that_its_base_was_a_folder(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base_folder.parent)
    trainer(base_folder.name, base_folder, tmp_path, push_to_hub=False, peft_config=lora()).save_model()
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["base_is_local"] is True


@pytest.mark.parametrize("name", ["default", "mine"])
def test_an_adapter_of_another_name_lies_elsewhere(name: str, base_folder: Path, tmp_path: Path) -> None:
    """What would be pushed is the run's folder, where PEFT leaves "default" as it was, or nothing at all."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), lora(), name)
    if name == "default":
        model.add_adapter("mine", lora())
        model.set_adapter("mine")
    message = r"push_to_hub=True, but the active adapter is 'mine', .* `dip-hf push .*run.mine REPO`"
    with pytest.raises(ValueError, match=message):
        trainer(model, base_folder, tmp_path)
    plain = trainer(model, base_folder, tmp_path, push_to_hub=False)
    plain.hub_model_id = "you/run"
    with pytest.raises(ValueError, match="push_to_hub, but the active adapter is 'mine'"):
        plain.push_to_hub()
    folder = tmp_path / "run"
    assert (folder / "mine" / "adapter_model.safetensors").is_file()
    settings = PushSettings(str(folder), "you/run", base_model=BASE)
    (tmp_path / "work").mkdir()
    if name == "default":
        assert stage(settings, tmp_path / "work").left_out["mine/"] == "another adapter; push its own folder"
    else:
        with pytest.raises(ValueError, match=r"run holds adapters in folders of their own \(mine\)"):
            stage(settings, tmp_path / "work")
    (tmp_path / "own").mkdir()
    assert stage(PushSettings(str(folder / "mine"), "you/run", base_model=BASE), tmp_path / "own").files
