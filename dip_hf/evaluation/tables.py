"""Tables of text, for a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Collection


Table = list[tuple[str, ...]]
"""Header and rows. A row whose first cell is empty belongs to the row above it."""


def plain(table: Table, right: Collection[int]) -> str:
    """The table for a terminal, a rule above each group of rows; `right` are the columns of numbers."""
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    texts: list[str] = []
    for line in table:
        if line[0] and texts:
            texts.append(rule)
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        texts.append("  ".join(cells).rstrip())
    return "\n".join(texts)


def markdown(table: Table, right: Collection[int]) -> str:
    """The table in Markdown; `right` are the columns of numbers."""
    rule = "|".join("---:" if column in right else "---" for column in range(len(table[0])))
    lines = ["| " + " | ".join(line) + " |" for line in table]
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])
