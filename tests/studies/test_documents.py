"""README's and docs/findings.md's copies of the report's tables."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
COPIED = re.compile(r"^\| (?:[\d,]+ examples|Accuracy(?:, harder settings)?) \|.*\n(?:\|.*\n)+", re.MULTILINE)


def _tables(path: str) -> list[list[str]]:
    return [table.splitlines() for table in COPIED.findall((ROOT / path).read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("path", "number"), [("README.md", 1), ("docs/findings.md", 12)])
def test_tables_are_the_reports(path: str, number: int) -> None:
    """Of the long ones a document has a selection of rows, in their order."""
    whole, tables = _tables("docs/results.md"), _tables(path)
    assert len(tables) == number
    for head, rule, reference, *rows in tables:
        assert len(rows) >= 2
        assert any(
            table[:3] == [head, rule, reference] and rows == [row for row in table[3:] if row in rows]
            for table in whole
        ), head
