"""What the reasoning tasks' YAML files refer to. Importing it registers the DIPNet adapter and the model "hf-dip"."""

from __future__ import annotations

from typing import Any

from datasets import DatasetDict

import dip_hf.evaluation.lm  # noqa: F401  # registers both
from dip_hf.reasoning import make_split, score_answer
from dip_hf.reasoning.data import Split
from dip_hf.reasoning.families import Level


ITEMS = 200
"""Test questions per family and level, where no other number is asked for."""


def load(
    family: str, level: Level, items: int = ITEMS, validation_items: int = 0, split: Split = "test", **_: Any
) -> DatasetDict:
    """lm-eval's `custom_dataset`: the test split of one family at one level, and a validation split where asked for.

    Args:
        family: name in `dip_hf.reasoning.FAMILIES`.
        level: "standard" or "harder".
        items: how many questions; the first are the same whatever their number.
        validation_items: questions to fit a temperature on.
        split: where the questions come from that are evaluated: "test", or "validation" to choose settings by.
        **_: the task's metadata and the model's arguments, which lm-eval passes too.
    """
    splits = DatasetDict(test=make_split(family, split, items, level=level))
    if validation_items > 0:
        splits["validation"] = make_split(family, "validation", validation_items, level=level)
    return splits


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """lm-eval's `process_results`: 1.0 where the family's own scorer gives full marks, else 0.0."""
    return {"exact_match": float(score_answer(doc["family"], results[0], doc) == 1.0)}
