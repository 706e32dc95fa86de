"""What a report says in words of how, and on what, it was made; the same in report.md and in a model card."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """How a checkpoint predicts; its text is for tables.

    Attributes:
        adapters: how many are averaged; 1 for any other checkpoint.
        num_samples: as averaged; 0 for a plain pass.
        dropout: whether the samples are those of a LoRA adapter's dropout.
        temperature: by which logits are divided; None for none.
    """

    adapters: int = 1
    num_samples: int = 0
    dropout: bool = False
    temperature: float | None = None

    @property
    def is_averaged(self) -> bool:
        """Whether it takes more than one pass, so that a single one has other results."""
        return self.adapters > 1 or self.num_samples > 0

    def __str__(self) -> str:
        if self.adapters > 1:
            return f"average of {self.adapters} adapters"
        if self.num_samples > 0:
            return f"{self.num_samples} {'dropout ' if self.dropout else ''}samples"
        return "one pass" if self.temperature is None else f"temperature {self.temperature:.2f}"


def describe_items(limit: int | None, sizes: Collection[int]) -> str:
    """Which items were used.

    Args:
        limit: the first so many of each task; None: all of them, which of questions that are drawn says no number.
        sizes: the number of each task's items that were used; at least one.
    """
    fewest, most = min(sizes), max(sizes)
    if limit is None:
        return f"{fewest}{'' if fewest == most else f' to {most}'} items of each task, without a limit"
    most = min(limit, most)  # a task may hold fewer
    return f"{'' if most <= fewest else 'at most '}the first {most} items of each task"


def describe_cut(prompts: Mapping[str, int]) -> str:
    """A warning where prompts were cut; else empty.

    Args:
        prompts: by checkpoint, the number of those longer than its context.
    """
    counts = ", ".join(f"{number} of {name}" for name, number in prompts.items() if number)
    return f"Prompts longer than the model's context, of which it read the end only: {counts}." if counts else ""


def describe_split(split: str) -> str:
    """A warning where it is not the test split; else empty."""
    return "" if split == "test" else f"On the {split} split, by which settings are chosen: these are no test results."
