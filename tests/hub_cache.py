"""A model in a Hub cache of its own, at one revision alone: asked for another, it cannot be loaded offline."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


COMMIT = "0" * 40


def cache_model(name: str, revision: str, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Args:
        name: on the Hub.
        revision: a branch.
        model: a whole model's folder.
        cache: an empty folder, which becomes the Hub's cache.
        monkeypatch: of the test.
    """
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(model, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / revision).write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
