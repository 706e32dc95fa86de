"""Numeric answers in free text, checked with Math-Verify."""

from __future__ import annotations

import re


try:
    from math_verify import parse, verify
except ImportError as error:
    raise ImportError("scoring numeric answers needs Math-Verify: install dip_hf with its extra 'eval'") from error


# What the DIPNet paper rewrites GSM8K's "####" to (arXiv 2506.04690, experiments on language models)
_CUED_LINE = re.compile(r".*\bthe answer is[:\s]*([^\n]*)", re.IGNORECASE | re.DOTALL)
# A formula has no blank inside of its dollars, as amounts of money have: "$18, which is $6 more"
_FORMULA = r"\$(?!\s)[^$]*(?<!\s)\$(?!\d)"
# Behind a comma the sentence may go on to compute: "16 - 3 - 4 = 9, so 9 * 2 = 18"
_CLAUSE_END = r",\s(?!(?:(?![.!?;](?:\s|$)).)*=)"
# The first formula or number of a line, up to the end of its sentence or clause, or a remark in parentheses
_VALUE = re.compile(rf"(?:(?!{_FORMULA})\D)*(?:{_FORMULA}|\d)(?:(?![.!?;](?:\s|$)|{_CLAUSE_END}|\s\().)*")
_WORD = re.compile(r"[^\W\d_]{2,}")


def score_math_answer(generated: str, target: str) -> float:
    """1.0 where the answer of a worked solution equals the target as a mathematical expression, else 0.0.

    Scored with Math-Verify as in arXiv 2506.04690. Where the text says "the answer is", only the number or formula
    behind the last such words counts, with what belongs to it in its clause; otherwise, or where neither a value nor
    a word stands there, Math-Verify looks through all of it (this project's choice).

    Args:
        generated: the generated solution.
        target: the right answer, such as "18" or "1,250".

    Raises:
        ValueError: Math-Verify finds no expression in `target`.
    """
    gold = parse(target)
    if not gold:
        raise ValueError(f"target={target!r} holds no mathematical expression")
    # An escaped dollar sign is an amount of money, but Math-Verify reads it as the start of a formula
    text = generated.replace("\\$", "")
    cued = _CUED_LINE.match(text)
    line = cued[1] if cued else ""
    value = _VALUE.match(line)
    answer = parse(value[0] if value else line)
    return float(verify(gold, answer if answer or _WORD.search(line) else parse(text)))
