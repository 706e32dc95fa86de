"""A run goes to the Hub over HTTP and comes back by its name: to a stranger without dip_hf, and to lm-eval with it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load as load_tensors

from dip_hf import DIPSFTConfig
from tests.hub.conftest import BASE
from tests.hub.repo import TOKEN
from tests.hub.server import Hub


Call = Callable[..., dict[str, Any]]
REPO = "you/trained"
TASK = "loopback_choice"

TASK_FILE = f"""
task: {TASK}
dataset_path: json
dataset_kwargs:
  data_files: {{test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    rows = [{"question": f"{n} and {n} is", "choices": [f" {n}", f" {2 * n}"], "answer": 1} for n in (1, 2, 3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(TASK_FILE.replace("DATA", str(folder / "rows.jsonl")))
    return folder


@pytest.fixture(scope="module")
def trained(call: Call, hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`trainer.push_to_hub()` of a run on a base of the Hub."""
    answer = call(
        "train",
        str(tmp_path_factory.mktemp("runs") / "trained"),
        BASE,
        {"dataset_name": "you/questions", "tags": "counting"},
        hub_model_id=REPO,
        hub_token=TOKEN,
        hub_private_repo=True,
        icp_weight=0.1,
        model_init_kwargs={"revision": "main"},
    )
    assert "value" in answer, answer
    found: dict[str, Any] = answer["value"]
    return found


def test_one_commit_carries_the_run(trained: dict[str, Any], hub: Hub) -> None:
    repo = hub.repos[REPO]
    assert repo.private
    assert [message for _, message, _ in repo.commits] == ["initial commit", "End of training"]
    assert repo.head == trained["commit"]
    assert set(repo.files) == {
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "environment.json",
        "lora/adapter_config.json",
        "lora/adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_config.yaml",
    }
    config = json.loads(repo.files["adapter_config.json"])
    assert config["peft_type"] == "DIPNET" and config["base_model_name_or_path"] == BASE
    assert config["dip_format"] >= 1 and config["dip_hf_version"]
    assert json.loads(repo.files["lora/adapter_config.json"])["peft_type"] == "LORA"
    assert any("lora_dip_" in name for name in load_tensors(repo.files["adapter_model.safetensors"]))
    assert not any("lora_dip_" in name for name in load_tensors(repo.files["lora/adapter_model.safetensors"]))
    assert json.loads(repo.files["environment.json"])["packages"]["dip_hf"]
    card = ModelCard(repo.files["README.md"].decode())
    assert card.data.base_model == BASE and card.data.library_name == "peft"
    assert card.data.datasets == ["you/questions"]
    assert {"dip_hf", "dipnet", "icp", "counting"} <= set(card.data.tags or [])


def test_no_token_or_place_is_published(trained: dict[str, Any], hub: Hub) -> None:
    settings = yaml.safe_load(hub.repos[REPO].files["training_config.yaml"])
    assert settings["icp_weight"] == 0.1 and settings["max_steps"] == 2 and settings["num_trajectories"] == 1
    assert DIPSFTConfig(output_dir="again", **settings).icp_weight == 0.1
    for name, content in hub.repos[REPO].files.items():
        for private in (TOKEN.encode(), b"trust_remote_code", b"/runs", os.uname().nodename.encode()):
            assert private not in content, f"{private!r} in {name}"


def test_a_stranger_loads_it_by_its_name_and_lm_eval_agrees(
    trained: dict[str, Any], call: Call, online: dict[str, str], task_folder: Path, tmp_path: Path
) -> None:
    arguments = [BASE, REPO, str(task_folder), TASK]
    command = [sys.executable, str(Path(__file__).with_name("stock.py")), *arguments]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=online, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    ours = call("evaluate", "hf-dip", {"pretrained": BASE, "peft": REPO, "device": "cpu"}, str(task_folder), TASK)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-3000:]
    stock = json.loads(io.StringIO(output).readlines()[-1])
    assert stock["logits"] == pytest.approx(trained["logits"], abs=1e-5)
    assert "value" in ours, ours
    assert ours["value"]["accuracy"] == stock["accuracy"]
    for found, expected in zip(ours["value"]["log_likelihoods"], stock["log_likelihoods"], strict=True):
        assert found == pytest.approx(expected, abs=1e-4)


def test_checkpoints_pushed_while_training_are_the_runs_own(
    trained: dict[str, Any], call: Call, hub: Hub, tmp_path: Path
) -> None:
    arguments = {"hub_model_id": "you/again", "push_to_hub": True, "hub_strategy": "every_save", "save_steps": 1}
    answer = call("train", str(tmp_path / "again"), BASE, {"blocking": False}, hub_token=TOKEN, **arguments)
    assert "value" in answer, answer
    repo = hub.repos["you/again"]
    assert repo.head == answer["value"]["commit"]
    assert [message for _, message, _ in repo.commits][-1] == "End of training"
    assert len(repo.commits) > 2
    assert "lora/adapter_model.safetensors" in repo.files
    assert "training_args.bin" not in repo.files  # a pickle, which transformers pushes with every checkpoint
    pickles = [files["training_args.bin"] for _, _, files in repo.commits if "training_args.bin" in files]
    assert pickles and not any(TOKEN.encode() in content for content in pickles)


def test_the_run_is_not_lost_where_the_push_is_refused(
    trained: dict[str, Any], call: Call, hub: Hub, tmp_path: Path
) -> None:
    repo = hub.add_repo("you/theirs", {"README.md": b"theirs"})
    refused = call("train", str(tmp_path / "run"), BASE, {}, hub_model_id="you/theirs", hub_token=TOKEN)
    assert refused["error"] == "ValueError" and "did not come from" in refused["message"]
    assert len(repo.commits) == 1
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_a_name_without_an_owner_is_the_users(call: Call, hub: Hub, run_folder: Path) -> None:
    answer = call("push", {"folder": str(run_folder), "repo_id": "mine"}, token=TOKEN)
    assert "value" in answer, answer
    assert 'from_pretrained(base, "you/mine", subfolder="lora")' in hub.repos["you/mine"].files["README.md"].decode()


def test_results_of_replaced_weights_go(call: Call, hub: Hub, run_folder: Path) -> None:
    """They would stand beside weights that nobody has evaluated."""
    name, old = "you/replaced", {"evaluation/report.json", "evaluation/report.png", ".eval_results/gsm8k.yaml"}
    kept = {"notes/evaluation.md", "README.md"}
    hub.add_repo(name, dict.fromkeys(old | kept, b"old"))
    answer = call("push", {"folder": str(run_folder), "repo_id": name, "force": True}, token=TOKEN)
    assert "value" in answer, answer
    assert not old & set(hub.repos[name].files) and kept <= set(hub.repos[name].files)
