"""Where numbers were measured: versions, device, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

import torch


_PACKAGES = ("dip_hf", "torch", "transformers", "peft", "trl", "datasets", "lm_eval", "reasoning_gym", "math-verify")


def resolve_device(device: str | None) -> str:
    """The device to compute on: the one named, or a CUDA device where there is one.

    Raises:
        ValueError: this machine, or this build of PyTorch, does not have it.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:  # a build without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device={device!r} cannot be used here ({reason}): leave it out, or name another") from error
    return device


def describe_environment(device: str | None = None) -> dict[str, Any]:
    """Package versions, Python, device, threads and the checkout's commit (None outside one)."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    used = resolve_device(device)
    return {
        "device": torch.cuda.get_device_name(used) if used.startswith("cuda") else used,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": packages,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """HEAD of the checkout that this file stands in, with "+changes" where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # An installed copy may lie in a repository that is not this one
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changes else "")


def public_folder(folder: str) -> str:
    """A folder as seen from here; of one that is not below, the last part alone."""
    try:
        relative = PurePath(os.path.relpath(folder))
    except ValueError:  # on another drive of Windows
        return PurePath(folder).name
    return relative.name if ".." in relative.parts else str(relative)
