"""Procedural reasoning data from reasoning-gym: three groups of families, disjoint splits, their scorers."""

from dip_hf.reasoning.data import iterate_rows, make_split, split_of
from dip_hf.reasoning.families import FAMILIES, FINETUNING, PRETRAINING, UNSEEN, Family, get_family
from dip_hf.reasoning.prompts import ANSWER_CUE, INSTRUCTIONS, write_prompt
from dip_hf.reasoning.scoring import score_answer


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
