"""Scores of generated answers by each family's own reasoning-gym scorer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from dip_hf.reasoning.data import load_reasoning_gym
from dip_hf.reasoning.families import get_family


@cache
def _scorer(family_name: str) -> Any:
    # A scorer looks at the entry only, so one item of the standard level serves all questions.
    return load_reasoning_gym().create_dataset(family_name, size=1, seed=0, **get_family(family_name).settings())


def score_answer(family: str, answer_text: str, row: Mapping[str, Any]) -> float:
    """Score one generated answer.

    Args:
        family: the family's name.
        answer_text: the text after "Answer:", without special tokens; outer white space does not count.
        row: a row of `make_split`; its `metadata` holds the question's entry.

    Returns:
        reasoning-gym's score in [0, 1]; exactly 1.0 is an answer that it takes for correct, less is partial credit
        for form. Its scorer of number_sorting takes every number that is off by at most 1, where the list is sorted.
    """
    return float(_scorer(family).score_answer(answer_text.strip(), json.loads(row["metadata"])))
