"""What DReS and ICP do not do: anything at strength 0, and a second pass in steps without a term."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from dip_hf import DIPNetConfig
from tests.trainer.methods import DRES, ICP
from tests.trainer.tiny import ADAPTER, losses, make_trainer, tokenised


OTHER_FIELDS = {
    "dres_placement": "sequence",
    "dres_blocks": "0,1",
    "dres_group_size": 3,
    "dres_oversampling": 1.5,
    "dres_share": 0.25,
    "dres_gradient": "coded",
    "icp_steps": 3,
    "icp_epsilon": 0.2,
    "icp_update": "adam",
    "icp_direction": "random",
    "icp_positions": "prompt",
    "icp_layers": 2,
    "icp_start_block": 1,
    "icp_interval": 2,
    "icp_weighting": "paper",
    "icp_warmup": 0.0,
}


@pytest.mark.parametrize("adapter", [LoraConfig, DIPNetConfig])
def test_strength_0_is_off(adapter: Any, tmp_path: Path) -> None:
    """20 steps give the losses and the weights of a run without the fields to the last bit, dropout included."""
    runs = []
    for options in ({}, {**OTHER_FIELDS, "dres_weight": 0.0, "icp_weight": 0.0}):
        options = {"max_steps": 20, "per_device_train_batch_size": 2, **options}
        trainer = make_trainer(tmp_path, adapter(**ADAPTER, lora_dropout=0.1), options)
        trainer.train()
        runs.append((losses(trainer), dict(trainer.model.named_parameters())))
    (expected, weights), (found, found_weights) = runs
    assert len(expected) == 20 and found == expected
    assert all(torch.equal(found_weights[key], weights[key]) for key in weights)


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"icp_warmup": 0.5}, [1, 1, 1, 1, 1, 2, 2, 2]),
        ({"icp_interval": 3}, [1, 1, 1, 2, 1, 1, 2, 1]),
        ({"icp_warmup": 0.5, "icp_interval": 2, **DRES}, [1, 1, 1, 1, 1, 1, 2, 1]),
        ({"icp_warmup": 1.0}, [1] * 8),
        ({"icp_steps": 2}, [1, 3, 3, 3, 3, 3, 3, 3]),
        ({"icp_start_block": 1}, [1, 2, 2, 2, 2, 2, 2, 2]),
    ],
    ids=["warm-up", "interval", "both", "never", "two steps", "late"],
)
def test_passes_of_each_step(options: dict[str, Any], passes: list[int], tmp_path: Path) -> None:
    """A step of the warm-up, or between two of the interval, runs every block once; below the start block all do."""
    trainer = make_trainer(tmp_path, LoraConfig(**ADAPTER), {"max_steps": 8, **ICP, **options})
    blocks = trainer.model.get_base_model().model.layers
    count = {blocks[0]: [0] * 8, blocks[-1]: [0] * 8}

    def called(block: nn.Module, args: tuple) -> None:
        count[block][trainer.state.global_step] += 1

    for block in count:
        block.register_forward_pre_hook(called)
    trainer.train()
    assert count[blocks[-1]] == passes
    assert count[blocks[0]] == ([1] * 8 if "icp_start_block" in options else passes)


@pytest.mark.parametrize("weighting", ["additive", "paper"])
def test_log_and_weighting(weighting: str, tmp_path: Path) -> None:
    """Terms add up to the loss; "paper" scales the task term by a, and not in steps that the interval leaves out."""
    options = {**DRES, **ICP, "icp_warmup": 0.25, "icp_interval": 2, "icp_weighting": weighting, "max_steps": 8}
    trainer = make_trainer(tmp_path, LoraConfig(**ADAPTER), options)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step, entry in enumerate(steps):
        a = 1.0
        if step in (4, 6):
            a = math.cos(math.pi * (step / 8 - 0.25) / (2 * 0.75))
            assert entry["icp/features_weighted"] == pytest.approx(0.5 * (1 - a) * entry["icp/features"], rel=1e-4)
        assert ("icp/features" in entry) == (step in (4, 6))
        task = a * entry["task"] if weighting == "paper" else entry["task"]
        assert entry["task_weighted"] == pytest.approx(task, rel=1e-4)
        assert entry["dres/error_weighted"] == pytest.approx(0.5 * entry["dres/error"], rel=1e-4)
        assert entry["loss"] == pytest.approx(_weighted(entry), rel=1e-4)


def _weighted(entry: dict[str, float]) -> float:
    return sum(value for name, value in entry.items() if name.endswith("_weighted"))


def test_terms_of_steps_of_unequal_length_add_up_to_the_loss(tmp_path: Path) -> None:
    """Three micro-batches in the epoch's first step, two in its last."""
    options = {**DRES, "gradient_accumulation_steps": 3, "num_train_epochs": 2, "max_steps": -1, "logging_steps": 2}
    trainer = make_trainer(tmp_path, DIPNetConfig(**ADAPTER), options, data=tokenised(40))
    trainer.train()
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(lines) == trainer.state.max_steps / 2 == 2
    for line in lines:
        assert line["dres/error"] > 0 and line["loss"] == pytest.approx(_weighted(line), rel=1e-4)


@pytest.mark.parametrize("weighting", ["additive", "paper"])
def test_terms_of_a_line_over_several_steps_add_up_to_its_loss(weighting: str, tmp_path: Path) -> None:
    """Of which ICP acts in some only, and weighs the task in some only."""
    options = {**DRES, **ICP, "icp_warmup": 0.25, "icp_interval": 2, "icp_weighting": weighting, "logging_steps": 8}
    trainer = make_trainer(tmp_path, DIPNetConfig(**ADAPTER), {**options, "max_steps": 8})
    trainer.train()
    (line,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert line["icp/features_weighted"] > 0 and line["loss"] == pytest.approx(_weighted(line), rel=1e-4)
