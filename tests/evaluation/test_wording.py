"""What reports say in words."""

from __future__ import annotations

import pytest

from dip_hf.evaluation.wording import Prediction, describe_items, describe_split


@pytest.mark.parametrize(
    ("limit", "sizes", "expected"),
    [
        (None, [200, 200], "200 items of each task, without a limit"),
        (None, [200, 1319], "200 to 1319 items of each task, without a limit"),
        (100, [100, 100], "the first 100 items of each task"),
        (500, [200, 200], "the first 200 items of each task"),
        (500, [200, 500], "at most the first 500 items of each task"),
        (500, [200, 300], "at most the first 300 items of each task"),
    ],
)
def test_items(limit: int | None, sizes: list[int], expected: str) -> None:
    assert describe_items(limit, sizes) == expected


@pytest.mark.parametrize(
    ("prediction", "expected", "averaged"),
    [
        (Prediction(), "one pass", False),
        (Prediction(temperature=1.234), "temperature 1.23", False),
        (Prediction(num_samples=10), "10 samples", True),
        (Prediction(num_samples=10, dropout=True), "10 dropout samples", True),
        (Prediction(adapters=3), "average of 3 adapters", True),
    ],
)
def test_predictions(prediction: Prediction, expected: str, averaged: bool) -> None:
    assert str(prediction) == expected
    assert prediction.is_averaged is averaged


def test_splits() -> None:
    assert describe_split("test") == ""
    assert "validation split" in describe_split("validation")
