"""Regularisers that are on and do nothing: refused where training starts, and said to be where it logs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig

from tests.trainer.methods import DRES, ICP, SEQUENCE
from tests.trainer.tiny import ADAPTER, make_trainer, tokenised


def said(trainer: Any, about: str) -> list[str]:
    """Train; the warnings that begin so."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return [str(one.message) for one in caught if str(one.message).startswith(about)]


def test_batches_that_become_too_small_for_a_group(tmp_path: Path) -> None:
    """`auto_find_batch_size` goes on with smaller ones after memory has run out."""
    options = {**SEQUENCE, "dres_group_size": 8, "auto_find_batch_size": True}
    trainer = make_trainer(tmp_path, LoraConfig(**ADAPTER), options)

    def run_out(module: Any, args: tuple) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.dres.blocks["model.layers.1"].register_forward_pre_hook(run_out)
    with pytest.raises(ValueError, match=r"dres_group_size=8 is more than the 7 rows .*auto_find_batch_size .*token'"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "rows", "times"),
    [
        ({**SEQUENCE, "logging_steps": 1}, 5, 1),  # the second batch has one row
        ({**SEQUENCE, "logging_steps": 2}, 5, 0),
        ({**DRES, "dres_group_size": 70}, 4, 2),
    ],
)
def test_batches_without_a_group(options: dict[str, Any], rows: int, times: int, tmp_path: Path) -> None:
    options = {**options, "max_steps": 2, "per_device_train_batch_size": 4}
    trainer = make_trainer(tmp_path, LoraConfig(**ADAPTER), options, data=tokenised(rows))
    found = said(trainer, "dres/error")
    size = options["dres_group_size"]
    message = f"dres/error is exactly 0: no batch since the last log filled a group of dres_group_size={size}; lower"
    assert len(found) == times and all(one.startswith(message) for one in found)


@pytest.mark.parametrize("positions", ["prompt", "all"])
@pytest.mark.parametrize("labelled", [True, False])
def test_streams_without_prompts(positions: str, labelled: bool, tmp_path: Path) -> None:
    """A stream cannot be looked through before training."""

    def rows() -> Iterator[dict[str, Any]]:
        for row in tokenised():
            yield {"input_ids": row["input_ids"], "labels": row["input_ids"] if labelled else row["labels"]}

    options = {**ICP, "icp_positions": positions, "max_steps": 3}
    trainer = make_trainer(tmp_path, LoraConfig(**ADAPTER), options, data=IterableDataset.from_generator(rows))
    found = said(trainer, "icp/features")
    values = [entry["icp/features"] for entry in trainer.state.log_history if "icp/features" in entry]
    idle = positions == "prompt" and labelled
    assert values and [value == 0 for value in values] == [idle] * len(values)
    assert len(found) == (len(values) if idle else 0)
    assert all("icp_positions='prompt' perturbs tokens without a label" in one for one in found)


def test_a_dataset_with_some_prompts(tmp_path: Path) -> None:
    """Steps without any are no fault while others have one."""
    rows = [
        {"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6] if index % 2 else [3, 4, 5, 6]} for index in range(8)
    ]
    options = {**ICP, "icp_positions": "prompt", "max_steps": 8, "logging_steps": 8, "per_device_train_batch_size": 1}
    trainer = make_trainer(tmp_path, LoraConfig(**ADAPTER), options, data=Dataset.from_list(rows))
    assert said(trainer, "icp/features") == []


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ({"icp_warmup": 1.0}, True),
        ({"icp_warmup": 0.7}, True),
        ({"icp_interval": 5, "icp_warmup": 0.1}, True),
        ({"icp_warmup": 0.5}, False),
        ({"icp_interval": 2, "icp_warmup": 0.5}, False),
    ],
    ids=str,
)
def test_a_feature_loss_that_never_sets_in(options: dict[str, Any], idle: bool, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, LoraConfig(**ADAPTER), {**ICP, **options, "max_steps": 3})
    found = said(trainer, f"icp_weight={trainer.args.icp_weight} has no effect in steps 0 to 2: icp_warmup=")
    assert len(found) == idle
    assert any("icp/features" in entry for entry in trainer.state.log_history) is not idle
