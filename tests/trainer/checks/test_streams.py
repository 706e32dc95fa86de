"""Streams: rows that train nothing stop a run, those that pass in a dataset do not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback, TrainerControl

from dip_hf import DIPNetConfig
from tests.trainer.checks.test_data import GOOD
from tests.trainer.tiny import ADAPTER, losses, make_trainer


def stream(rows: list[dict[str, Any]]) -> IterableDataset:
    def generate() -> Iterator[dict[str, Any]]:
        yield from rows

    return IterableDataset.from_generator(generate)


def test_a_row_of_a_stream(tmp_path: Path) -> None:
    rows = [GOOD] * 9 + [{"input_ids": [3, 4], "labels": [3, -100]}]
    trainer = make_trainer(tmp_path, DIPNetConfig(**ADAPTER), {"max_steps": 2}, data=stream(rows))
    with pytest.raises(ValueError, match=r"train_dataset: a row of the stream has no label .*; filter such rows out"):
        trainer.train()
    assert trainer.state.global_step == 1
    trainer = make_trainer(tmp_path, DIPNetConfig(**ADAPTER), {"max_steps": 2}, data=stream([GOOD] * 16))
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([{"prompt": "abc def ghi jkl mno pqr" * 2, "completion": " ok"}], {"packing": True, "max_length": 16}),
        ([{"text": "abcde"}] * 3 + [{"text": "abcdef"}], {"packing": True, "max_length": 8}),
        ([{"text": "abc def"}, {"text": ""}], {}),
        ([{"text": "abc def"}, {"text": ""}], {"padding_free": True, "per_device_train_batch_size": 1}),
    ],
    ids=["a piece of a prompt", "a piece of one token", "an empty text", "an empty text without padding"],
)
def test_rows_of_a_stream_that_pass_in_a_dataset(
    rows: list[dict[str, Any]], options: dict[str, Any], tmp_path: Path
) -> None:
    options = {"packing_strategy": "wrapped", "max_steps": 2, "per_device_train_batch_size": 2, **options}
    data = Dataset.from_list(rows * 8)
    logged = [
        losses(run)
        for name, given in (("whole", data), ("stream", data.to_iterable_dataset()))
        if (run := make_trainer(tmp_path / name, None, options, data=given)).train()
    ]
    assert len(logged[0]) == len(logged[1]) == 2


def test_a_packed_stream_that_trains_nothing(tmp_path: Path) -> None:
    """Packing that cuts rows off, as its default does, loses their labels."""
    rows = stream([{"prompt": "abcdefgh", "completion": "i"}] * 8)
    trainer = make_trainer(tmp_path, None, {"max_length": 4, "packing": True, "max_steps": 1}, data=rows)
    with pytest.raises(
        ValueError, match=r"train_dataset(: a row of the stream has no label| gave 0 of the 1 batches)"
    ):
        trainer.train()


@pytest.mark.parametrize(
    ("data", "options", "given"),
    [
        (stream([{"prompt": "abcdefgh", "completion": "i"}] * 4), {}, "0 of the 1"),
        (stream([GOOD] * 4), {"gradient_accumulation_steps": 2}, "1 of the 2"),
        (Dataset.from_list([GOOD] * 4), {"dataloader_drop_last": True}, "0 of the 1"),
    ],
    ids=["cut off", "less than a step", "less than a batch"],
)
def test_data_that_make_no_step(data: Any, options: dict[str, Any], given: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, None, {"max_length": 4, **options}, data=data)
    with pytest.raises(ValueError, match=f"train_dataset gave {given} batches of the first step: max_length=4 cuts"):
        trainer.train()


class Stop(TrainerCallback):
    """Ends a run after its first micro-batch."""

    def on_substep_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = True


@pytest.mark.parametrize("data", [Dataset.from_list([GOOD] * 8), stream([GOOD] * 8)], ids=["whole", "stream"])
def test_a_run_that_a_callback_stops_before_its_first_step(data: Any, tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = make_trainer(tmp_path, None, options, data=data, callbacks=[Stop()])
    trainer.train()
    assert trainer.state.global_step == 0


def test_a_batch_that_a_transform_makes(tmp_path: Path) -> None:
    """Its rows are seen when they are collated, as those of images are."""

    def run(labels: list[int]) -> None:
        def transform(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            return {**batch, "labels": [labels for _ in batch["labels"]]}

        rows = Dataset.from_list([GOOD] * 8).with_transform(transform)
        make_trainer(tmp_path, None, {"dataset_kwargs": {"skip_prepare_dataset": True}}, data=rows).train()

    run(GOOD["labels"])
    with pytest.raises(
        ValueError, match=r"train_dataset: a row of the batch has no label .*; filter .* raise max_length"
    ):
        run([3, -100, -100])
