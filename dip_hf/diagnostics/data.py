"""Prompt-completion rows for the diagnostics, and batches of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dip_hf.diagnostics.functional import IGNORED
from dip_hf.reasoning import get_family, make_split
from dip_hf.reasoning.families import Level


def suite_rows(
    families: Sequence[str], split: Literal["validation", "test"], size: int, level: Level = "standard", seed: int = 0
) -> list[dict[str, str]]:
    """`size` questions of each family, as `prompt` and `completion`; arguments as for `dip_hf.reasoning.make_split`.

    Raises:
        ValueError: no family or an unknown one, or a family with fewer such questions.
        ImportError: reasoning-gym is not installed.
    """
    if not families:
        raise ValueError("families is empty: name at least one reasoning family.")
    for family in families:
        get_family(family)  # refuses an unknown one before any is made
    return [
        {"prompt": row["prompt"], "completion": row["completion"]}
        for family in families
        for row in make_split(family, split, size, level=level, seed=seed)
    ]


def file_rows(path: str | Path, limit: int | None = None) -> list[dict[str, str]]:
    """Rows of a JSON Lines file with the string columns `prompt` and `completion`; others are left out.

    Args:
        path: the file.
        limit: the first so many rows; None for all.

    Raises:
        ValueError: the file is missing or has no rows, or one that is no such object; names the line.
    """
    if not Path(path).is_file():
        raise ValueError(f"dataset={str(path)!r} is no file: give JSON Lines with prompt and completion.")
    rows: list[dict[str, str]] = []
    # Not splitlines, which also ends lines at characters that JSON allows within strings, such as U+2028
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"dataset={str(path)!r}, line {number}: no valid JSON ({error}).") from error
        if not isinstance(row, dict) or any(
            not isinstance(row.get(name), str) or not row[name] for name in ("prompt", "completion")
        ):
            raise ValueError(
                f"dataset={str(path)!r}, line {number}: must be an object whose prompt and completion are text."
            )
        rows.append({"prompt": row["prompt"], "completion": row["completion"]})
        if len(rows) == limit:
            break
    if not rows:
        raise ValueError(f"dataset={str(path)!r} has no rows; give JSON Lines with prompt and completion.")
    return rows


def make_batches(
    rows: Sequence[Mapping[str, str]], tokenizer: Any, batch_size: int, positions: int | None = None
) -> list[dict[str, Tensor]]:
    """Tokenize rows as TRL's SFTTrainer does under a completion-only loss.

    The end-of-sequence token is added to a completion that lacks it; labels start where the tokens of prompt and
    completion together leave those of the prompt alone.

    Args:
        rows: each with `prompt` and `completion`.
        tokenizer: the model's.
        batch_size: rows per batch; the last batch may be smaller.
        positions: how many the model has; None where it says none.

    Returns:
        Dicts with `input_ids`, `attention_mask` and `labels`, shape (batch, length), padded on the right.

    Raises:
        ValueError: `batch_size` < 1, or a row with more tokens than the model has positions.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    examples = []
    for number, row in enumerate(rows, 1):
        completion = row["completion"]
        if tokenizer.eos_token is not None and not completion.endswith(tokenizer.eos_token):
            completion += tokenizer.eos_token
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + completion)["input_ids"]
        if positions is not None and len(ids) > positions:
            raise ValueError(
                f"rows: row {number}, {row['prompt'][:40]!r}..., has {len(ids)} tokens, and the model {positions} "
                "positions: shorten it, or leave it out."
            )
        shared = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
        examples.append((torch.tensor(ids), shared))
    pad = partial(pad_sequence, batch_first=True)
    batches = []
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        labels = [torch.cat([torch.full((shared,), IGNORED), ids[shared:]]) for ids, shared in part]
        batches.append(
            {
                "input_ids": pad([ids for ids, _ in part]),  # masked at padding, so any token will do
                "attention_mask": pad([torch.ones_like(ids) for ids, _ in part]),
                "labels": pad(labels, padding_value=IGNORED),
            }
        )
    return batches
