"""`accelerate launch --dynamo_backend`, which compiles the model behind the trainer's back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
from pathlib import Path
from tests.trainer.methods import METHODS
from tests.trainer.tiny import base_model, make_trainer, tokenised

found = {}
for name in sys.argv[2:]:
    method = METHODS[name]
    options = {**method.options, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    try:
        trainer = make_trainer(Path(sys.argv[1]), method.config(), options, base_model(), eval_dataset=tokenised(4))
    except ValueError as error:
        found[name] = str(error)
        continue
    trainer.train()
    found[name] = [{k: v for k, v in entry.items() if k == "loss" or k.startswith("dipnet")}
                   for entry in trainer.state.log_history if "loss" in entry]
print("FOUND", json.dumps(found))
"""


def run(folder: Path, *names: str, **variables: str) -> dict[str, Any]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder), *names]
    environment = os.environ | offline | variables
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.partition("FOUND ")[2])


def test_regional_compilation_keeps_the_objective_after_an_evaluation(tmp_path: Path) -> None:
    names = ("dipnet", "ibvi")
    regional = {"ACCELERATE_DYNAMO_BACKEND": "EAGER", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true"}
    compiled, plain = run(tmp_path, *names, **regional), run(tmp_path, *names)
    for name in names:
        assert len(plain[name]) == 4
        for found, expected in zip(compiled[name], plain[name], strict=True):
            assert found == pytest.approx(expected, rel=1e-5)


def test_dres_and_icp_are_refused(tmp_path: Path) -> None:
    found = run(tmp_path, "dres token", "icp", ACCELERATE_DYNAMO_BACKEND="EAGER")
    for message in found.values():
        assert "dynamo_backend=EAGER of accelerate does not work with dres_weight or icp_weight" in message
