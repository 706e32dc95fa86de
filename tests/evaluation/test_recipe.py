"""recipes/evaluate.py."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dip_hf.evaluation.checkpoints import Checkpoint
from dip_hf.evaluation.results import EvaluationSettings
from dip_hf.evaluation.run import evaluate_checkpoints


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipes_evaluate", ROOT / "recipes" / "evaluate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_recipe_prints_the_table_and_writes_the_report(
    recipe: ModuleType, base_folder: str, lora_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "evaluation.yaml"
    config.write_text(f"model: {base_folder}\ntasks: [dip_unseen_products]\nlimit: 50\nbatch_size: 8\n")
    arguments = ["--config", str(config), "--limit", "2", "--checkpoints", "base", f"lora={lora_folder}"]
    recipe.main([*arguments, "--output_dir", str(tmp_path / "out"), "--device", "cpu"])
    assert "dip_unseen_products" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["task_sets"][0]["items"] == 2
    assert [checkpoint["name"] for checkpoint in content["checkpoints"]] == ["base", "lora"]
    assert (tmp_path / "out" / "report.md").is_file()
    assert (tmp_path / "out" / "report.png").is_file()


def test_what_is_finished_is_kept_when_a_later_checkpoint_fails(
    recipe: ModuleType, base_folder: str, lora_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_and_no_more(settings: EvaluationSettings, checkpoints: list[Checkpoint], tasks: dict) -> Iterator[Any]:
        yield from evaluate_checkpoints(settings, checkpoints[:1], tasks)
        raise MemoryError

    monkeypatch.setattr("dip_hf.evaluation.run.evaluate_checkpoints", one_and_no_more)
    arguments = ["--tasks", "dip_unseen_products", "--limit", "2", "--checkpoints", "base", f"lora={lora_folder}"]
    with pytest.raises(MemoryError):
        recipe.main(["--model", base_folder, *arguments, "--output_dir", str(tmp_path), "--device", "cpu"])
    content = json.loads((tmp_path / "report.json").read_text())
    assert [checkpoint["name"] for checkpoint in content["checkpoints"]] == ["base"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "0"], "limit=0 must be at least 1"),
        (["--batch_size", "0"], "batch_size=0 must be at least 1"),
        (["--split", "train"], "split='train' must be 'test' or 'validation'"),
        (
            ["--calibration", "true", "--split", "validation", "--checkpoints", "base,temperature"],
            "split='validation': base's temperature is fitted on it",
        ),
        (["--num_samples", "-1"], "num_samples=-1 must be 0"),
        (["--num_samples", "4"], "num_samples=4 needs a checkpoint with a DIPNet adapter or `,dropout`, got base"),
        (["--checkpoints", "base,temperature"], "base: a temperature is there for calibration"),
        (["--in_distribution", "dip_reasoning_unseen"], "is used by calibration only"),
        (["--calibration", "true", "--in_distribution", "x"], "in_distribution='x' is none of the task sets dip_un"),
        (["--checkpoints", "lora=nowhere"], "checkpoints: lora='nowhere' does not exist"),
        (["--checkpoints", "a", "a"], "'a' is given twice"),
        (["--include_path", "nowhere"], "include_path='nowhere' is no folder"),
        (["--families", "gcd"], "families: 'gcd' is no fine-tuning family"),
        (["--device", "nosuch"], "device='nosuch' cannot be used here"),
        (["--dtype", "bf16"], "dtype='bf16' must be one of auto, float32, bfloat16, float16"),
        (["--output_dir", __file__], f"output_dir={__file__!r} cannot be written"),
        (["--chekpoints", "base"], "--chekpoints"),
    ],
)
def test_bad_input_ends_the_recipe_before_a_model_is_loaded(
    recipe: ModuleType, base_folder: str, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("dip_hf.evaluation.run.evaluate_checkpoints", refuse)
    with pytest.raises(SystemExit) as stop:
        recipe.main(["--model", base_folder, "--tasks", "dip_unseen_products", *arguments])
    assert message in str(stop.value)


def test_without_lm_eval_the_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "lm_eval.py").write_text("raise ImportError('not here')\n")
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, str(ROOT / "recipes" / "evaluate.py"), "--model", "recipes/base_model"]
    done = subprocess.run(command, env={**os.environ, **paths}, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "recipes/evaluate.py: dip_hf.evaluation needs lm-eval: install dip_hf with its extra 'eval'" in done.stderr


def test_a_base_that_cannot_be_loaded_ends_the_recipe_in_one_line(
    recipe: ModuleType, base_folder: str, tmp_path: Path
) -> None:
    damaged = shutil.copytree(base_folder, tmp_path / "damaged")
    (damaged / "config.json").write_text("{")
    arguments = ["--tasks", "dip_unseen_products", "--limit", "1", "--output_dir", str(tmp_path), "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        recipe.main(["--model", str(damaged), *arguments])
    assert str(stop.value).startswith(f"recipes/evaluate.py: model={str(damaged)!r} cannot be loaded (")
    assert "\n" not in str(stop.value)


def test_without_math_verify_gsm8k_stops_before_its_data_is_loaded(
    recipe: ModuleType, base_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    # What an earlier test of this process has imported; lm-eval keeps the modules that tasks refer to as well
    utilities = str(ROOT / "evals" / "standard" / "utils.py")
    kept = [name for name, module in sys.modules.items() if getattr(module, "__file__", None) == utilities]
    for name in ("dip_hf.evaluation.answers", *kept):
        monkeypatch.delitem(sys.modules, name, raising=False)
    arguments = ["--tasks", "dip_gsm8k", "--output_dir", str(tmp_path), "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        recipe.main(["--model", base_folder, *arguments])
    assert "scoring numeric answers needs Math-Verify: install dip_hf with its extra 'eval'" in str(stop.value)


def test_the_help_says_how_samples_are_averaged(recipe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipe.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "given the tokens before it" in text
    assert "num_samples x batch_size rows" in text


def test_an_unknown_key_of_a_config_file_is_refused(recipe: ModuleType, base_folder: str, tmp_path: Path) -> None:
    config = tmp_path / "evaluation.yaml"
    config.write_text(f"model: {base_folder}\ntask: [dip_unseen_products]\n")
    with pytest.raises(SystemExit) as stop:
        recipe.main(["--config", str(config)])
    assert "task" in str(stop.value)


def test_texts_where_lists_belong_and_a_config_behind_an_equals_sign(
    recipe: ModuleType, base_folder: str, tmp_path: Path
) -> None:
    config = tmp_path / "evaluation.yaml"
    config.write_text(f"model: {base_folder}\ntasks: dip_unseen_products\ncheckpoints: base\nlimit: 1\n")
    recipe.main([f"--config={config}", "--output_dir", str(tmp_path), "--device", "cpu"])
    content = json.loads((tmp_path / "report.json").read_text())
    assert [checkpoint["name"] for checkpoint in content["checkpoints"]] == ["base"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("limit", "2.5", "must be a whole number, got 2.5"),
        ("num_samples", "1.5", "must be a whole number, got 1.5"),
        ("batch_size", "1.5", "must be a whole number, got 1.5"),
    ],
)
def test_numbers_that_are_none(
    field: str, value: str, message: str, recipe: ModuleType, base_folder: str, tmp_path: Path
) -> None:
    config = tmp_path / "evaluation.yaml"
    config.write_text(f"model: {base_folder}\n{field}: {value}\n")
    with pytest.raises(SystemExit) as stop:
        recipe.main(["--config", str(config)])
    assert message in str(stop.value)
