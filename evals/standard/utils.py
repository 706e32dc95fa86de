"""What the standard suites' own tasks refer to. Importing it registers the DIPNet adapter and the model "hf-dip"."""

from __future__ import annotations

from typing import Any

import dip_hf.evaluation.lm  # noqa: F401  # registers both
from dip_hf.evaluation.answers import score_math_answer
from dip_hf.recipe.gsm8k import PROMPT


def doc_to_text(doc: dict[str, Any]) -> str:
    """The prompt that recipes/sft.py trains GSM8K with."""
    return PROMPT.format(question=doc["question"].strip())


def doc_to_target(doc: dict[str, Any]) -> str:
    """The number behind "####"."""
    return doc["answer"].rpartition("####")[2].strip()


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """lm-eval's `process_results`: 1.0 where Math-Verify finds the generated answer equal to the target."""
    return {"math_verify": score_math_answer(results[0], doc_to_target(doc))}
