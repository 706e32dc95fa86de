"""What a push carries, and what of it is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dip_hf import DIPNetConfig, export_lora
from dip_hf.hub.push import describe
from dip_hf.hub.record import write_data
from tests.hub.conftest import BASE, save_adapter, staged


def test_every_file_is_listed_with_its_size_and_what_is_missing_with_the_reason(
    run_folder: Path, tmp_path: Path
) -> None:
    staging = staged(run_folder, tmp_path / "work")
    assert "training_args.bin" not in staging.files
    lines = describe(staging)
    weights = (run_folder / "adapter_model.safetensors").stat().st_size
    assert f"{weights:>14,}  adapter_model.safetensors" in lines
    assert f"{sum(staging.sizes().values()):>14,}  bytes in {len(staging.files)} files" in lines
    assert list(staging.left_out) == ["evaluation/report.json"]
    (run_folder / "environment.json").unlink()
    assert "DIPSFTTrainer.save_model" in staged(run_folder, tmp_path / "two").left_out["environment.json"]


def test_plain_lora_is_its_own_copy(base_folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    save_adapter(base_folder, tmp_path / "lora", config)
    staging = staged(tmp_path / "lora", tmp_path / "work", base_model=BASE)
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} == set(staging.files)
    assert json.loads(staging.files["adapter_config.json"].read_text())["base_model_name_or_path"] == BASE
    assert str(base_folder) in (tmp_path / "lora" / "adapter_config.json").read_text()  # read only
    card = staging.files["README.md"].read_text()
    assert 'subfolder="lora"' not in card and "import dip_hf" not in card and "--max-lora-rank 8" in card
    assert "resize_token_embeddings" not in card and "revision=" not in card


def test_noise_alone_has_no_lora_copy(base_folder: Path, tmp_path: Path) -> None:
    config = DIPNetConfig(target_modules=[], task_type="CAUSAL_LM")
    save_adapter(base_folder, tmp_path / "noise", config)
    staging = staged(tmp_path / "noise", tmp_path / "work", base_model=BASE)
    assert not any(name.startswith("lora/") for name in staging.files)
    assert "noise alone" in staging.left_out["lora/"]
    card = staging.files["README.md"].read_text()
    assert "vllm serve" not in card and "without dip_hf, use the base" in card


def test_a_whole_model_goes_as_it_is(base_folder: Path, tmp_path: Path) -> None:
    staging = staged(base_folder, tmp_path / "work", base_model="you/origin")
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(staging.files)
    card = staging.files["README.md"].read_text()
    assert "library_name: transformers" in card and "base_model_relation: finetune" in card
    with pytest.raises(ValueError, match=r"merged=True: .* no adapter to merge"):
        staged(base_folder, tmp_path / "two", merged=True)


@pytest.mark.parametrize("base", ["/home/somebody/llama", "models/base", "you/origin"])
def test_a_whole_models_card_names_no_local_base(
    base: str, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(base_folder, tmp_path / "project" / "runs" / "whole")
    shutil.copytree(base_folder, tmp_path / "project" / "models" / "base")
    (folder / "README.md").write_text(f"---\nbase_model: {base}\n---\n")
    monkeypatch.chdir(base_folder)
    assert (base in staged(folder, tmp_path / "work").files["README.md"].read_text()) == (base == "you/origin")


@pytest.mark.parametrize("kind", [LoraConfig, DIPNetConfig])
@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=str,
)
def test_the_card_makes_room_for_added_tokens(
    kind: type[LoraConfig], targets: dict[str, Any], base_folder: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    rows = base.get_input_embeddings().num_embeddings + 2
    base.resize_token_embeddings(rows)
    config = kind(r=2, task_type="CAUSAL_LM", **targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, that it saves the embeddings
        get_peft_model(base, config).save_pretrained(tmp_path / "run")
    card = staged(tmp_path / "run", tmp_path / "work", base_model=BASE).files["README.md"].read_text()
    assert f'from_pretrained("{BASE}")\nbase.resize_token_embeddings({rows})  # as in training\nmodel = Peft' in card


def test_results_and_benchmarks(run_folder: Path, tmp_path: Path) -> None:
    report = write_report(run_folder / "report.json", run_folder)
    (run_folder / "report.png").write_bytes(b"picture")
    staging = staged(run_folder, tmp_path / "work", benchmarks=["gsm8k_cot=openai/gsm8k:gsm8k"])
    text = staging.files["evaluation/report.json"].read_text()
    assert str(tmp_path) not in text and json.loads(text)["task_sets"] == report["task_sets"]
    assert staging.files["evaluation/report.png"].read_bytes() == b"picture"
    (entry,) = yaml.safe_load(staging.files[".eval_results/gsm8k_cot.yaml"].read_text())
    assert entry["dataset"] == {"id": "openai/gsm8k", "task_id": "gsm8k"} and entry["value"] == 51.25
    assert "standard error 1.50" in entry["notes"]
    card = staging.files["README.md"].read_text()
    assert "| `gsm8k_cot` | 1319 | mine (this one) |  | 51.2 ± 1.5 | +10.0 | [+8.0, +12.0] |" in card


@pytest.mark.parametrize(
    ("changes", "limit", "message"),
    [
        ({"benchmarks": ["gsm8k_cot"]}, None, "must read TASK=DATASET_ID:TASK_ID"),
        ({"benchmarks": ["gsm8k_cot=a/b:c", "gsm8k_cot=a/b:d"]}, None, "'gsm8k_cot=a/b:d' is another result for"),
        ({"benchmarks": ["aime=a/b:c"]}, None, "'aime' is no task of the report"),
        ({"benchmarks": ["gsm8k_cot=a/b:c"]}, 100, "covers the first 100 items"),
        ({"checkpoint": "other"}, None, "checkpoint='other'.*give its name"),
        ({"report": "nowhere"}, None, "report='nowhere' does not exist"),
    ],
)
def test_results_that_do_not_fit(
    run_folder: Path, tmp_path: Path, changes: dict[str, Any], limit: int | None, message: str
) -> None:
    write_report(run_folder / "report.json", run_folder, limit)
    with pytest.raises(ValueError, match=message):
        staged(run_folder, tmp_path / "work", **changes)


def test_a_file_that_is_no_report(run_folder: Path, tmp_path: Path) -> None:
    (run_folder / "report.json").write_text('{"checkpoints": []}')
    with pytest.raises(ValueError, match=r"is no report of recipes/evaluate\.py"):
        staged(run_folder, tmp_path / "work")


def test_an_export_beside_the_run_is_staged_or_left_out_once(run_folder: Path, tmp_path: Path) -> None:
    export_lora(run_folder, run_folder / "lora")
    export_lora(run_folder, run_folder / "other")
    staging = staged(run_folder, tmp_path / "work", base_model=BASE)
    assert "lora/adapter_model.safetensors" in staging.files
    assert "other/" in staging.left_out and "lora/" not in staging.left_out


def write_report(path: Path, folder: Path, limit: int | None = None) -> dict[str, Any]:
    """A report as recipes/evaluate.py writes it, on one task and two checkpoints, `folder` the second."""
    rows = [
        {"checkpoint": "base", "accuracy": 0.4125, "standard_error": 0.01, "differences": {}},
        {
            "checkpoint": "mine",
            "accuracy": 0.5125,
            "standard_error": 0.015,
            "differences": {"base": {"points": 10.0, "low": 8.0, "high": 12.0, "better": 150, "worse": 20}},
        },
    ]
    block = {"name": "gsm8k_cot", "metric": "exact_match", "tasks": 1, "items": 1319, "rows": rows}
    report: dict[str, Any] = {
        "settings": {"model": str(folder), "limit": limit},
        "environment": {"packages": {"lm_eval": "0.4.13"}},
        "checkpoints": [{"name": "base", "path": None}, {"name": "mine", "path": str(folder)}],
        "reference": "base",
        "task_sets": [block],
        "tasks": [{**block, "task_set": "gsm8k_cot"}],
    }
    path.write_text(json.dumps(report))
    return report


@pytest.mark.parametrize("name", ["vocab.txt", "training_config.yaml", "environment.json", "README.md"])
def test_a_link_out_of_the_folder_is_not_followed(name: str, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("mine: alone")
    (run_folder / name).unlink(missing_ok=True)
    (run_folder / name).symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match=rf"{name} is a link that leads out of its folder, to .*private"):
        staged(run_folder, tmp_path / "work")


def test_a_whole_model_whose_folder_has_a_plus_in_its_name(base_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base_folder, tmp_path / "full+dres"))
    (folder / "extra.safetensors").write_bytes(b"something else")
    (folder / "README.md").write_text("---\nbase_model: [you/origin]\n---\n")
    staging = staged(folder, tmp_path / "work")
    assert staging.files["model.safetensors"] == folder / "model.safetensors"
    assert "extra.safetensors" not in staging.files
    assert "base_model: you/origin" in staging.files["README.md"].read_text()
    (folder / "README.md").write_text("---\nbase_model: [you/one, you/two]\n---\n")
    with pytest.raises(ValueError, match=r"base_model=\['you/one', 'you/two'\] in .*README.md are several"):
        staged(folder, tmp_path / "again")


def test_one_dataset_may_be_given_as_a_text(run_folder: Path, tmp_path: Path) -> None:
    staging = staged(run_folder, tmp_path / "work", datasets="openai/gsm8k")
    assert "- openai/gsm8k" in staging.files["README.md"].read_text()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"families": ["gcd", "lcm"], "train_size": 50}, "`gcd`, `lcm`"),
        ({"dataset_name": "you/data"}, "`you/data`"),
        ({}, "`you/card`"),
    ],
)
def test_the_card_names_the_data_that_a_run_recorded(
    data: dict[str, Any], expected: str, run_folder: Path, tmp_path: Path
) -> None:
    (run_folder / "README.md").write_text("---\ndatasets: [you/card]\n---\n")
    write_data(run_folder, data)
    staging = staged(run_folder, tmp_path / "work")
    assert f"**Data:** {expected}." in staging.files["README.md"].read_text()
    assert data.items() <= yaml.safe_load(staging.files["training_data.yaml"].read_text()).items()
    with (run_folder / "adapter_model.safetensors").open("rb+") as file:  # as after another training
        file.seek(-1, 2)
        file.write(b"\x01")
    staging = staged(run_folder, tmp_path / "again")
    assert "**Data:** `you/card`." in staging.files["README.md"].read_text()
    assert "training_data.yaml" not in staging.files


def test_a_record_of_no_names(run_folder: Path, tmp_path: Path) -> None:
    write_data(run_folder, {"families": 5})
    with pytest.raises(ValueError, match=r"families=5 in .*training_data\.yaml must be a name or a list of names"):
        staged(run_folder, tmp_path / "work")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("---\na: [\n---\n", "the head of .*README.md is no YAML mapping"),
        ("---\ndatasets: 5\n---\n", "datasets=5 in .*README"),
    ],
)
def test_a_card_whose_head_is_broken(head: str, message: str, run_folder: Path, tmp_path: Path) -> None:
    (run_folder / "README.md").write_text(head)
    with pytest.raises(ValueError, match=message):
        staged(run_folder, tmp_path / "work")
