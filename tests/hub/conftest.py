"""A loopback Hub, a process that talks to it, and a finished run to push."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dip_hf import DIPNetConfig, DIPSFTConfig
from dip_hf.hub import PushSettings
from dip_hf.hub.record import write_record
from dip_hf.hub.stage import Staging, stage
from tests.hub.repo import TOKEN
from tests.hub.server import Hub
from tests.recipes.support import ROOT, save_small_model


BASE = "you/base"


def staged(folder: Path, work: Path, **changes: Any) -> Staging:
    work.mkdir()
    return stage(PushSettings(str(folder), "you/run", **changes), work)


def save_adapter(base: Path, folder: Path, config: LoraConfig) -> PeftModel:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-block Llama with its tokenizer."""
    return save_small_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def hub(base_folder: Path) -> Iterator[Hub]:
    with Hub() as server:
        server.add_repo(BASE, {path.name: path.read_bytes() for path in base_folder.iterdir()})
        yield server


@pytest.fixture(autouse=True)
def no_faults(request: pytest.FixtureRequest) -> Iterator[None]:
    """Faults end with their test, and the server made no mistake of its own."""
    yield
    if "hub" in request.fixturenames:
        hub = request.getfixturevalue("hub")
        hub.faults.clear()
        assert hub.errors == []


@pytest.fixture(scope="session")
def online(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a process whose Hub is the loopback one."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    dropped = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "PYTHONPATH")
    return {name: value for name, value in kept.items() if name not in dropped} | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path_factory.mktemp("hf")),
        "HF_HUB_DISABLE_XET": "1",  # which the server does not speak
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": TOKEN,
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def call(online: dict[str, str]) -> Iterator[Callable[..., dict[str, Any]]]:
    """Call a function of tests/hub/worker.py; answers with {"value": ...} or {"error": ..., "message": ...}."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.hub.worker"],
        cwd=ROOT,
        env=online,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def call(function: str, *positional: Any, **named: Any) -> dict[str, Any]:
        print(json.dumps({"function": function, "positional": positional, "named": named}), file=stdin, flush=True)
        answer: dict[str, Any] = json.loads(stdout.readline())
        return answer

    yield call
    process.terminate()
    process.wait(timeout=30)


@pytest.fixture
def run_folder(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run of one's own."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture(scope="session")
def finished_run(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What DIPSFTTrainer leaves, without the training: a DIPNet adapter, its tokenizer and its record."""
    folder = tmp_path_factory.mktemp("finished")
    config = DIPNetConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config)
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(folder)
    args = DIPSFTConfig(output_dir=str(folder), dres_weight=0.1, bf16=False, use_cpu=True)
    write_record(folder, args, DIPSFTConfig.__annotations__)
    (folder / "training_args.bin").write_bytes(b"a pickle")
    return folder
