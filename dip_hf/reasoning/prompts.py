"""Short prompts: reasoning-gym's boilerplate replaced by a few words, the data of each question kept as it is.

A model of two million parameters spends its time on tokens, and the boilerplate is up to nine tenths of a question.
Each instruction below is one token of the tokenizer that recipes/pretrain.py makes. Other models read the same prompts
as plain English.
"""

from __future__ import annotations

import re


ANSWER_CUE = "\nAnswer:"
"""The end of every prompt; a completion is a space and the answer."""

# Family -> a pattern of the whole question and the prompt that it becomes.
_RULES: dict[str, tuple[str, str]] = {
    "chain_sum": (r"State the final answer .*?: (.*?) =?", r"Compute: \1"),
    "products": (r"Solve the following multiplication: (.*?)\. Give .*", r"Multiply: \1"),
    "simple_equations": (r".*?: (.*)", r"Solve: \1"),
    "gcd": (r"Find the Greatest .*?: (.*?)\. Give .*", r"Greatest common divisor: \1"),
    "spell_backward": (r".*\): (.*)", r"Spell backward: \1"),
    "letter_counting": (r"How .* \"(.)\" appear in the text: (\".*\")\?", r"Count letter: \1 in \2"),
    "number_filtering": (
        r"(Keep|Remove) all numbers (larger|smaller) than (\S+) in this list: (.*)\nReturn .*",
        r"\1 \2: \3 in \4",
    ),
    "word_sorting": (r".*words in (\w+) order \(using .*list: (.*)", r"Sort \1: \2"),
    "rotate_matrix": (r".*below by (\d+) degrees clockwise:\n(.*)", r"Rotate clockwise: \1\n\2"),
    "word_sequence_reversal": (r".*Reverse this list of words: (.*)", r"Reverse list: \1"),
    "manipulate_matrix": (
        r"For the following matrix:\n(.*?)\n\nPerform .*\n"
        r"- (?:(Horizontally|Vertically) mirror the matrix|Mirror the matrix along the (diagonal|counterdiagonal))",
        r"Mirror \2\3:\n\1",
    ),
    "palindrome_generation": (r".*the following letters: (.*)", r"Form palindrome: \1"),
    "leg_counting": (r".*if you have (.*)\?", r"Count legs: \1"),
    "base_conversion": (r".*convert the (.*) number (\w+) to (.*)", r"Convert base: \2 from \1 to \3"),
    "count_primes": (r".*between (\d+) and (\d+) .*", r"Count primes: \1 to \2"),
    "number_sorting": (r"Sort these numbers in (\w+) order: (.*?)\n.*", r"Sort numbers \1: \2"),
    "time_intervals": (r"\D*([\d:]+)\D+([\d:]+)\D.*", r"Elapsed: \1 to \2"),
}

INSTRUCTIONS: tuple[str, ...] = (
    "Compute: ",
    "Multiply: ",
    "Solve: ",
    "Greatest common divisor: ",
    "Spell backward: ",
    "Count letter: ",
    "Keep larger: ",
    "Keep smaller: ",
    "Remove larger: ",
    "Remove smaller: ",
    "Sort ascending: ",
    "Sort descending: ",
    "Rotate clockwise: ",
    "Reverse list: ",
    "Mirror Horizontally:\n",
    "Mirror Vertically:\n",
    "Mirror diagonal:\n",
    "Mirror counterdiagonal:\n",
    "Form palindrome: ",
    "Count legs: ",
    "Convert base: ",
    "Count primes: ",
    "Sort numbers ascending: ",
    "Sort numbers descending: ",
    "Elapsed: ",
    "Copy: ",
)
"""Every instruction a prompt can start with, the last in pretraining alone; recipes/pretrain.py gives the tokenizer a
token for each."""


def write_prompt(family: str, question: str) -> str:
    """Return the short prompt of a reasoning-gym question, ending in `ANSWER_CUE`.

    Raises:
        ValueError: the family's rule does not match, which means that reasoning-gym changed its wording.
    """
    pattern, template = _RULES[family]
    match = re.fullmatch(pattern, question.strip(), flags=re.DOTALL)
    if match is None:
        raise ValueError(f"the prompt rule of family {family!r} does not match the question {question!r}")
    prompt = match.expand(template).rstrip() + ANSWER_CUE
    # One name for every unknown, or a test equation could be a training equation with another letter.
    return re.sub(r"\b[a-z]\b", "x", prompt) if family == "simple_equations" else prompt
