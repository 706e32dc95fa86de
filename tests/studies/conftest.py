"""A study on made-up cells, shared by the tests of its results and of its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from studies.plan import finished_cells
from studies.spec import Study
from studies.store import Store
from tests.studies.support import finish_cells, finish_trials, small_study


ARMS: dict[str, Any] = {
    "base": {"untrained": True},
    "lora": {"trials": [{"learning_rate": 1e-3}, {"learning_rate": 1e-2}]},
    "good": {"adapter": "dipnet", "trials": [{"noise_scale": 0.1}, {"noise_scale": 0.3}]},
    "bad": {"adapter": "dipnet", "trials": [{"noise_scale": 1.0}, {"noise_scale": 3.0}]},
    "late": {"trials": [{"lora_dropout": 0.1}, {"lora_dropout": 0.2}]},
}


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Study, Store]:
    study, store = small_study(tmp_path, arms=ARMS, seeds=[0, 1, 2]), Store(tmp_path / "out")
    finish_trials(study, store)
    finish_cells(study, store, {"base": 0.0, "lora": 0.5, "good": 0.8, "bad": 0.2}, seeds=(0, 1, 2))
    store.write_results(study, finished_cells(study, store))
    return study, store
