"""Procedural reasoning data from reasoning-gym: three groups of families, disjoint splits, their scorers."""

from .data import iterate_rows, make_split, split_of
from .families import FAMILIES, FINETUNING, PRETRAINING, UNSEEN, Family, get_family
from .prompts import ANSWER_CUE, INSTRUCTIONS, write_prompt
from .scoring import score_answer


__all__ = [
    "ANSWER_CUE",
    "FAMILIES",
    "FINETUNING",
    "INSTRUCTIONS",
    "PRETRAINING",
    "UNSEEN",
    "Family",
    "get_family",
    "iterate_rows",
    "make_split",
    "score_answer",
    "split_of",
    "write_prompt",
]
