"""GSM8K as the DIPNet paper trains on it.

Source: arXiv 2506.04690, experiments on language models: "#### x" is rewritten as "The answer is x", and the prompt is
zero-shot chain-of-thought. The prompt's wording is this project's choice, that of lm-eval's `gsm8k_cot_zeroshot`, so
that a model is evaluated on the prompt that it was trained on.
"""

from __future__ import annotations

import re


PROMPT = "Q: {question}\nA: Let's think step by step."
ANSWER = "The answer is {answer}"
TRAIN_ROWS = 7473
"""Rows of the published training split, by which a dry run can count steps without the data."""

_FINAL_ANSWER = re.compile(r"\s*#### *(?P<answer>\S[^\n]*?)\s*\Z")


def rewrite_solution(solution: str) -> str:
    """Replace a solution's closing line "#### x" by "The answer is x" and leave the rest as it is.

    Args:
        solution: a worked solution whose last line is "#### x".

    Returns:
        The solution with its last line rewritten. Calculator annotations such as <<48/2=24>> stay: the paper names no
        other change.

    Raises:
        ValueError: the solution does not end in such a line, so that its answer is unknown.
    """
    match = _FINAL_ANSWER.search(solution)
    if match is None:
        raise ValueError(f"a GSM8K solution must end in a line '#### x', got {solution[-80:]!r}")
    closing = ANSWER.format(answer=match["answer"])
    worked = solution[: match.start()]
    return f"{worked}\n{closing}" if worked else closing


def to_prompt_completion(question: str, solution: str) -> dict[str, str]:
    """Return the `prompt` and `completion` of one GSM8K row, in TRL's prompt-completion format.

    Args:
        question: the row's `question`.
        solution: the row's `answer`, the worked solution with its "#### x" line.
    """
    # The space belongs to the completion: byte-level tokenizers join it to the word that follows
    return {"prompt": PROMPT.format(question=question.strip()), "completion": " " + rewrite_solution(solution)}
