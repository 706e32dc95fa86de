"""A Markdown table."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    """A table; `right` are the columns of numbers."""
    rule = "|".join("---:" if column in right else "---" for column in range(len(header)))
    rows = ["| " + " | ".join(cells) + " |" for cells in (header, *lines)]
    return "\n".join([rows[0], f"|{rule}|", *rows[1:]])
