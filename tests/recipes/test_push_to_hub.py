"""recipes/push_to_hub.py and `dip-hf push`: the same fields, and clear errors; the push itself is in tests/hub."""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dip_hf.cli import main
from dip_hf.hub import PushSettings
from tests.recipes.support import ROOT, save_small_model


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipes_push", ROOT / "recipes" / "push_to_hub.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    base = AutoModelForCausalLM.from_pretrained(save_small_model(tmp_path / "base"))
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def test_a_dry_run_from_a_config_file(
    recipe: ModuleType, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "push.yaml"
    config.write_text(f"folder: {adapter}\nrepo_id: you/other\nbase_model: you/base\nprivate: true\n")
    recipe.main(["--config", str(config), "--repo_id", "you/run", "--dry_run"])
    output = capsys.readouterr().out
    assert "adapter_model.safetensors" in output and "nothing was sent" in output
    assert main(["push", str(adapter), "you/run", "--base_model", "you/base", "--dry_run"]) == 0
    assert capsys.readouterr().out == output


def test_bad_input_is_named(recipe: ModuleType, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"recipes/push_to_hub\.py: base_model=.*its name on the Hub"):
        recipe.main(["--folder", str(adapter), "--repo_id", "you/run", "--dry_run"])
    assert main(["push", str(adapter), "you/run", "--dry_run"]) == 2
    assert capsys.readouterr().err.startswith("dip-hf push: base_model=")
    with pytest.raises(SystemExit, match="chekpoint"):
        recipe.main(["--folder", str(adapter), "--repo_id", "you/run", "--chekpoint", "x"])


def test_without_a_network_nothing_is_sent(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """These tests run with HF_HUB_OFFLINE set."""
    assert main(["push", str(adapter), "you/run", "--base_model", "you/base"]) == 1
    assert "HF_HUB_OFFLINE is set; unset it to push" in capsys.readouterr().err
    assert not (adapter / ".dip_hf_push.json").exists()


def test_the_command_has_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["push", "--help"])
    text = capsys.readouterr().out
    for field in fields(PushSettings):
        assert f"--{field.name}" in text or field.name.upper() in text


def test_a_config_file_that_is_not_there(recipe: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"recipes/push_to_hub\.py: .*No such file.*missing\.yaml"):
        recipe.main([f"--config={tmp_path / 'missing.yaml'}"])
