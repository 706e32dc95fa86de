"""Prompt-completion datasets from reasoning-gym, no prompt of which is in two splits.

Item i of a reasoning-gym dataset is drawn with seed + i, so that nearby seeds repeat each other almost entirely, and
small families repeat their questions under any seed. A prompt therefore belongs to the split that its hash names,
whatever seed, size, level or wording produced it: no list of earlier questions is needed, and splits of any size stay
apart. What is asked may be the same in other words: some palindromes of the test split have the letters of a
training example in another order, and so its answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Literal

from datasets import Dataset

from dip_hf.reasoning.families import PRETRAINING, Level, get_family
from dip_hf.reasoning.prompts import write_prompt


Split = Literal["pretrain", "train", "validation", "test"]

# Shares of the questions in per cent (this project's choice), cumulative.
_UPPER_BOUNDS: dict[str, int] = {"pretrain": 55, "train": 80, "validation": 85, "test": 100}
_SEED_STRIDE = 10_000_000
_DATED = ("start_time", "end_time")  # of time_intervals, which reads its times as of the day that it is drawn on


def load_reasoning_gym() -> ModuleType:
    """Import reasoning_gym, which is optional; raise `ImportError` that names the extra."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError("dip_hf.reasoning needs reasoning-gym: install dip_hf with its extra 'reasoning'") from error
    return reasoning_gym


def split_of(prompt: str) -> str:
    """Return the split that owns `prompt`, from its SHA-256."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 100
    return next(split for split, upper in _UPPER_BOUNDS.items() if bucket < upper)


def iterate_rows(
    family_name: str, split: Split, level: Level = "standard", seed: int = 0, limit: int = 1_000_000
) -> Iterator[dict[str, str]]:
    """Yield rows of one split in a fixed order, repeated questions included, from at most `limit` drawn items.

    Yields:
        Dicts with the string columns that `make_split` describes.
    """
    family = get_family(family_name)
    if split not in _UPPER_BOUNDS:
        raise ValueError(f"split must be one of {', '.join(_UPPER_BOUNDS)}, got {split!r}")
    if split == "pretrain" and family not in PRETRAINING:
        raise ValueError(f"family {family_name!r} is not in the pretraining group")
    if not 0 < limit <= _SEED_STRIDE:
        raise ValueError(f"limit must be in 1..{_SEED_STRIDE}, got {limit}")
    first_seed = (seed * len(_UPPER_BOUNDS) + list(_UPPER_BOUNDS).index(split)) * _SEED_STRIDE
    items = load_reasoning_gym().create_dataset(family_name, size=limit, seed=first_seed, **family.settings(level))
    for index in range(limit):
        item: dict[str, Any] = items[index]
        prompt = write_prompt(family_name, item["question"])
        if item["answer"] is None or split_of(prompt) != split:
            continue
        yield {
            "prompt": prompt,
            "completion": f" {item['answer']}",
            "family": family_name,
            "metadata": json.dumps(_entry(item), default=str),
        }


def _entry(item: dict[str, Any]) -> dict[str, Any]:
    """What scoring needs of an item, which is the same on every day: without the dates, which no question mentions."""
    metadata = {key: value for key, value in item["metadata"].items() if key not in _DATED}
    return {"question": item["question"], "answer": item["answer"], "metadata": metadata}


def make_split(family_name: str, split: Split, size: int, level: Level = "standard", seed: int = 0) -> Dataset:
    """Build `size` distinct questions of one family, the same ones for the same arguments on every machine.

    Args:
        family_name: a name in `dip_hf.reasoning.FAMILIES`.
        split: "pretrain" (pretraining families only), "train", "validation" or "test".
        size: number of rows.
        level: "standard" or "harder".
        seed: picks other questions of the same split, as far as the family has others.

    Returns:
        Dataset with string columns `prompt` (ends in "\\nAnswer:"), `completion` (a space and the answer), `family`
        and `metadata` (JSON from which `score_answer` scores).

    Raises:
        ValueError: an argument is out of range, or the family has fewer than `size` such questions.
        ImportError: reasoning-gym is not installed.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    rows: dict[str, dict[str, str]] = {}
    # 100 draws per row: the validation split owns one prompt in twenty, and a small family repeats itself.
    for row in iterate_rows(family_name, split, level, seed, limit=min(20_000 + 100 * size, _SEED_STRIDE)):
        rows.setdefault(row["prompt"], row)
        if len(rows) == size:
            return Dataset.from_list(list(rows.values()))
    raise ValueError(
        f"family {family_name!r} ({level}) gave {len(rows)} distinct questions for split {split!r}, wanted {size}"
    )
