"""What is refused before anything is sent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dip_hf.hub import PushSettings, push
from dip_hf.hub.stage import is_of_a_run
from tests.hub.conftest import BASE


def test_a_base_that_is_a_folder_is_seen_from_anywhere(
    run_folder: Path, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path of two parts would pass for somebody's repository."""
    project = tmp_path / "project"
    shutil.copytree(base_folder, project / "models" / "base")
    shutil.copytree(run_folder, project / "runs" / "deep" / "lora")
    config = project / "runs" / "deep" / "lora" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "models/base"}))
    (tmp_path / "elsewhere").mkdir()
    for place in (project, tmp_path / "elsewhere"):
        monkeypatch.chdir(place)
        with pytest.raises(ValueError, match=r"base_model='models/base'.* is a local folder: give base_model"):
            push(PushSettings(folder=str(config.parent), repo_id="you/run", dry_run=True))


def test_what_cannot_be_pushed(run_folder: Path, base_folder: Path, tmp_path: Path) -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            push(PushSettings(**{"folder": str(run_folder), "repo_id": "you/run", **changes}))

    refused("is no folder", folder=str(tmp_path / "nowhere"))
    refused("repo_id='a/b/c' is no name on the Hub", repo_id="a/b/c")
    refused("base_model='../base' is no name", base_model="../base")
    refused("benchmarks=.* need a report", benchmarks=["a=b/c:d"])

    config = json.loads((run_folder / "adapter_config.json").read_text())
    for base in (str(base_folder), "/gone/base"):
        config["base_model_name_or_path"] = base
        (run_folder / "adapter_config.json").write_text(json.dumps(config))
        refused("give base_model, its name on the Hub")

    (run_folder / "tokenizer_config.json").write_text(json.dumps({"name": "hf_" + "a" * 34}))
    refused("tokenizer_config.json holds what looks like an access token", base_model=BASE)

    weights = run_folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    refused("truncated or damaged", base_model=BASE)
    weights.rename(run_folder / "adapter_model.bin")
    refused("pickle", base_model=BASE)
    (run_folder / "adapter_config.json").unlink()
    refused("neither an adapter .* nor a model")


def test_a_base_that_was_a_folder_where_the_run_began(run_folder: Path) -> None:
    """Seen from elsewhere its relative path looks like a name on the Hub."""
    environment = json.loads((run_folder / "environment.json").read_text())
    assert environment["base_is_local"] is False
    (run_folder / "environment.json").write_text(json.dumps({**environment, "base_is_local": True}))
    with pytest.raises(ValueError, match=rf"base_model='{BASE}', .* is a local folder: give base_model"):
        push(PushSettings(folder=str(run_folder), repo_id="you/run", dry_run=True))
    push(PushSettings(folder=str(run_folder), repo_id="you/run", base_model=BASE, dry_run=True))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "adapter_config.json"])
@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_file_is_not_pushed(name: str, cut: bool, run_folder: Path) -> None:
    content = (run_folder / name).read_text()
    (run_folder / name).write_text(content[: len(content) // 2] if cut else "[]")
    with pytest.raises(ValueError, match=name):
        push(PushSettings(folder=str(run_folder), repo_id="you/run", base_model=BASE, dry_run=True))


def test_a_config_without_a_type_is_not_pushed(run_folder: Path, base_folder: Path, tmp_path: Path) -> None:
    (run_folder / "adapter_config.json").write_text("{}")
    whole = Path(shutil.copytree(base_folder, tmp_path / "whole"))
    (whole / "config.json").write_text("{}")
    for folder, message in ((run_folder, "names no peft_type"), (whole, "names no model_type")):
        with pytest.raises(ValueError, match=message):
            push(PushSettings(folder=str(folder), repo_id="you/run", base_model=BASE, dry_run=True))


def test_what_a_later_push_removes() -> None:
    removed = ["tokenizer.json", "merged/chat_template.jinja", "lora/tokenizer_config.json", "adapter_config.json"]
    removed += [".dip_hf_push.json", "report.json", "evaluation/report.png", "merged/model-00001-of-00002.safetensors"]
    kept = ["README.md", ".gitattributes", "other/tokenizer.json", "other/report.json", "notes.txt"]
    assert [name for name in (*removed, *kept) if is_of_a_run(name)] == removed
