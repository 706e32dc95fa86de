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
_SENTENCE_END = r"[.!?;](?:\s|$)"
# Behind a comma the sentence may go on to compute: "16 - 3 - 4 = 9, so 9 * 2 = 18"
_COMPUTED = rf"(?:(?!{_SENTENCE_END}).)*="


def _value_up_to(clause_end: str) -> re.Pattern[str]:
    """The first formula or number of a line, up to the end of its sentence or clause, or a remark in parentheses."""
    return re.compile(rf"(?:(?!{_FORMULA})\D)*(?:{_FORMULA}|\d)(?:(?!{_SENTENCE_END}|{clause_end}|\s\().)*")


_CLAUSE = _value_up_to(r",\s")
_COMPUTATION = _value_up_to(rf",\s(?!{_COMPUTED})")
# A value that opens the clause, perhaps behind a bracket of its own, or in bold
_FIRST = re.compile(rf"\s*(?:[^\w\s]+\s+)?[*_`]*({_FORMULA}|\S*?\d\S*?)[*_`]*(?:\s|$)")
_OPERATOR = re.compile(r"\d\s*[*+×÷^]\s*[\d$(]|\d(?:\s+[-−–/x]\s*|[-−–/x]\s+)[\d$(]|\d\s+\d")
_BRACKETS = (("{", "}"), ("(", ")"), ("[", "]"))
_WORD = re.compile(r"[^\W\d_]{2,}")


def score_math_answer(generated: str, target: str) -> float:
    """1.0 where the answer of a worked solution equals the target as a mathematical expression, else 0.0.

    Scored with Math-Verify as in arXiv 2506.04690. Where the text says "the answer is", only the number or formula
    behind the last such words counts: a computation to its end, else a value that stands there at once, else the
    last one of the clause ("that 2 shirts cost 18 dollars"). Otherwise, or where neither a value nor a word stands
    there, Math-Verify looks through all of it (this project's choice).

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
    answer = parse(_value(line))
    return float(verify(gold, answer if answer or _WORD.search(line) else parse(text)))


def _value(line: str) -> str:
    """The part of a line that is its answer; all of it where it holds no value."""
    clause = _CLAUSE.match(line)
    if clause is None:
        return line
    if "=" in clause[0]:
        return (_COMPUTATION.match(line) or clause)[0]
    match = _FIRST.match(clause[0])
    first = match[1] if match else ""
    is_whole = all(first.count(left) == first.count(right) for left, right in _BRACKETS)
    # A formula of letters says what the value is of: "$x$ equal to 18"
    return first if is_whole and re.search(r"\d", first) and not _OPERATOR.search(clause[0]) else clause[0]
