"""Numeric answers in free text, checked with Math-Verify."""

from __future__ import annotations

import re


# What the DIPNet paper rewrites GSM8K's "####" to (arXiv 2506.04690, experiments on language models)
_CUED_ANSWER = re.compile(r".*\bthe answer is[ :]*([^\n]*)", re.IGNORECASE | re.DOTALL)


def score_math_answer(generated: str, target: str) -> float:
    """1.0 where the answer of a worked solution equals the target as a mathematical expression, else 0.0.

    Scored with Math-Verify as in arXiv 2506.04690. Where the text says "the answer is", only what follows the last
    such words counts, up to the line's end; otherwise Math-Verify looks through all of it (this project's choice).

    Args:
        generated: the generated solution.
        target: the right answer, such as "18" or "1,250".

    Raises:
        ImportError: Math-Verify is not installed.
        ValueError: Math-Verify finds no expression in `target`.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError("scoring numeric answers needs Math-Verify: pip install 'dip_hf[eval]'") from error
    gold = parse(target)
    if not gold:
        raise ValueError(f"target={target!r} holds no mathematical expression")
    cued = _CUED_ANSWER.match(generated)
    answer = cued[1] if cued else generated
    # An escaped dollar sign is an amount of money, but Math-Verify reads it as the start of a formula
    return float(verify(gold, parse(answer.replace("\\$", ""))))
