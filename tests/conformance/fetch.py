"""Fetch PEFT's own tests, which travel in its source distribution, into build/; a script."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


BUILD = Path(__file__).parents[2] / "build"
SUITE = "test_custom_models.py"


def tests_folder() -> Path:
    """Where the installed PEFT version's tests lie, once fetched."""
    return BUILD / "peft-tests" / version("peft").replace(".", "_").replace("+", "_")


def fetch() -> Path:
    """Download the tests of the installed PEFT version through pip, unless they are there; returns their folder."""
    target = tests_folder()
    if (target / SUITE).is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run(
            [*command, "--no-binary=peft", f"--dest={scratch}", f"peft=={version('peft')}"],
            check=True,
        )
        (archive,) = Path(scratch).glob("peft-*.tar.gz")
        with tarfile.open(archive) as content:
            content.extractall(scratch, filter="data")
        (unpacked,) = Path(scratch).glob("peft-*/tests")
        try:
            unpacked.rename(target)
        except OSError:  # another process was faster
            if not (target / SUITE).is_file():
                raise
    return target


if __name__ == "__main__":
    print(f"PEFT's tests are in {fetch()}")
