"""Files that other programs read: accelerate's configs, the Makefile, and the packaging."""

import re
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from tests.recipes.support import ROOT


ACCELERATE = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
TARGETS = ["quickstart", "test", "conformance", "quality", "style", "benchmark", "study", "pretrain"]


def test_every_way_to_launch_has_its_config() -> None:
    assert [path.stem for path in ACCELERATE] == ["ddp", "fsdp2", "one_gpu", "two_nodes", "zero2", "zero3"]


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_loads_its_config(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.num_processes % config.num_machines == 0
    # Recomputes hooks without their random state
    assert not config.fsdp_config.get("fsdp_activation_checkpointing", False)


def test_the_kinds_of_parallelism_are_what_the_names_say() -> None:
    configs = {path.stem: load_config_from_file(str(path)) for path in ACCELERATE}
    assert configs["fsdp2"].fsdp_config["fsdp_version"] == 2
    assert configs["zero2"].deepspeed_config["zero_stage"] == 2
    assert configs["zero3"].deepspeed_config["zero_stage"] == 3
    assert configs["two_nodes"].num_machines == 2
    assert {name: config.distributed_type.value for name, config in configs.items()} == {
        "ddp": "MULTI_GPU",
        "fsdp2": "FSDP",
        "one_gpu": "NO",
        "two_nodes": "MULTI_GPU",
        "zero2": "DEEPSPEED",
        "zero3": "DEEPSPEED",
    }


@pytest.mark.parametrize("target", TARGETS)
def test_make_knows_its_targets_and_the_files_they_name(target: str) -> None:
    # As if installed already: this asks for the commands alone
    stamps = [f"--assume-old=.venv/{name}" for name in (".installed", ".quickstart_installed")]
    command = ["make", "--dry-run", *stamps, target]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    named = re.findall(r"(?:recipes|benchmarks|tests)/[\w./]+\.(?:py|yaml)", result.stdout)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_tests_complete_what_a_quickstart_installed(tmp_path: Path) -> None:
    def commands(target: str) -> str:
        command = ["make", "--dry-run", f"VENV={tmp_path}", target]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    quickstart, test = commands("quickstart"), commands("test")
    assert "'.[eval,reasoning]'" in quickstart and "conformance" not in quickstart
    assert "'.[dev,eval,quant,reasoning]'" in test and "conformance/fetch.py" in test
    (tmp_path / ".quickstart_installed").touch()
    assert "pip install" not in commands("quickstart") and commands("test") == test
    assert f"touch {tmp_path}/.quickstart_installed {tmp_path}/.installed" in test  # the other way round


def test_ci_runs_what_a_person_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert "make test" in script.read_text()
    assert script.stat().st_mode & 0o111


def test_torch_is_pinned_without_a_local_label() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line[:60])
    assert re.fullmatch(r"[\d.]+", pins["torch"])
    for name in ("transformers", "peft", "trl", "accelerate", "datasets", "lm_eval", "reasoning_gym", "numpy"):
        assert name in pins
