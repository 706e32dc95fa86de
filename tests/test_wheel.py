"""The wheel of `python -m build` works in an environment with it, its declared dependencies, and no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


REPOSITORY = Path(__file__).parents[1]
FIXTURE = REPOSITORY / "tests" / "fixtures" / "adapters" / "0.1.0" / "dipnet"
OPTIONAL = {"bitsandbytes", "lm_eval", "math_verify", "matplotlib", "reasoning_gym", "scipy"}

IMPORTS = """
import importlib, json, pkgutil, sys
import dip_hf
failed = {}
for module in pkgutil.walk_packages(dip_hf.__path__, "dip_hf."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        failed[module.name] = ((error.__cause__ or error).name or str(error)).partition(".")[0]
print(json.dumps({"file": dip_hf.__file__, "failed": failed, "loaded": sorted(sys.modules)}))
"""


def dependencies() -> dict[str, Distribution]:
    """What pip would install beside the wheel: the declared requirements, theirs, and so on, without extras."""
    found: dict[str, Distribution] = {}
    pending = [(Requirement(line), "") for line in distribution("dip_hf").requires or []]
    done: set[tuple[str, str]] = set()
    while pending:
        requirement, extra = pending.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found[name] = distribution(name)
        for wanted in {"", *requirement.extras}:
            if (name, wanted) not in done:
                done.add((name, wanted))
                pending += [(Requirement(line), wanted) for line in found[name].requires or []]
    return found


def link(dependency: Distribution, site_packages: Path) -> None:
    """Put a distribution's top-level files and folders into another environment."""
    for file in dependency.files or []:
        top = file.parts[0]
        if top not in ("..", "__pycache__") and not (site_packages / top).exists():
            (site_packages / top).symlink_to(Path(str(dependency.locate_file(top))))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site_packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    for dependency in dependencies().values():
        link(dependency, site_packages)
    install = ["install", "--no-deps", "--no-index", "--no-compile", "--quiet", str(wheel)]
    python = str(folder / "bin" / "python")
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True)
    return folder / "bin"


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run from a folder that holds nothing, so that no module comes from it."""
    cwd.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        command, cwd=cwd, env={**env, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "dip_hf").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == sources
    assert {"dip_hf/py.typed", "dip_hf/hub/card.md.jinja"} <= names


def test_every_module_imports(environment: Path, tmp_path: Path) -> None:
    done = run([str(environment / "python"), "-c", IMPORTS], tmp_path / "empty")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert Path(found["file"]).is_relative_to(environment.parent)
    assert set(found["failed"].values()) <= OPTIONAL, found["failed"]
    assert not {"recipes", "evals", "tests", "benchmarks"} & set(found["loaded"])


def test_export_lora_on_the_command_line(environment: Path, tmp_path: Path) -> None:
    command = [str(environment / "dip-hf"), "export-lora", str(FIXTURE), str(tmp_path / "lora")]
    done = run(command, tmp_path / "empty")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    assert not list((tmp_path / "empty").iterdir())
