"""What the reasoning tasks' YAML files refer to. Importing it registers the DIPNet adapter and the model "hf-dip"."""

from __future__ import annotations

from functools import cache
from typing import Any

from datasets import DatasetDict

import dip_hf.evaluation.lm  # noqa: F401  # registers both
from dip_hf.reasoning import make_split, score_answer
from dip_hf.reasoning.families import Level


ITEMS = 200
"""Test questions per family and level."""


@cache  # several checkpoints are evaluated on one data set
def _test_split(family: str, level: Level) -> DatasetDict:
    return DatasetDict(test=make_split(family, "test", ITEMS, level=level))


def load(family: str, level: Level, **_: Any) -> DatasetDict:
    """lm-eval's `custom_dataset`: the test split of one family at one level.

    Args:
        family: name in `dip_hf.reasoning.FAMILIES`.
        level: "standard" or "harder".
        **_: the task's metadata and the model's arguments, which lm-eval passes too.
    """
    return _test_split(family, level)


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """lm-eval's `process_results`: 1.0 where the family's own scorer gives full marks, else 0.0."""
    return {"exact_match": float(score_answer(doc["family"], results[0], doc) == 1.0)}
