"""A saved base model, and an adapter on it."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import PeftModel

from tests.dipnet.models import adapt, build, load_base


@pytest.fixture
def base(tmp_path: Path) -> str:
    """Folder of a saved base model, so that adapters know where theirs is."""
    build().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def model(base: str) -> PeftModel:
    return adapt(load_base(base), noise_blocks=2).eval()
