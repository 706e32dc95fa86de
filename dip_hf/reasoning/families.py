"""Three groups of reasoning-gym families: what the embedded base learns, what adapters learn, what nobody learns.

Every family has a standard configuration and a harder one (longer inputs, larger numbers, or numbers that lie
closer), so that one family gives an in-distribution test set and a shifted one, and the unseen group gives a far one.
The choice of families and numbers is this project's: small enough that a model of two million parameters learns them
on two CPU cores. Such a model hardly answers inputs longer than any it was trained on, so the harder settings of the
fine-tuning families mix those with the longest of training, or leave the length alone: something of what fine-tuning
gave is then left to be measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


Level = Literal["standard", "harder"]


@dataclass(frozen=True)
class Family:
    """One reasoning-gym family with its two difficulty settings.

    Args:
        name: reasoning-gym's name of the family.
        config: keyword arguments of the standard level, as `reasoning_gym.create_dataset` takes them.
        harder: keyword arguments that replace those of `config` at the harder level.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    harder: dict[str, Any] = field(default_factory=dict)

    def settings(self, level: Level = "standard") -> dict[str, Any]:
        """Return the keyword arguments of `level`; raise `ValueError` for any other word."""
        if level == "standard":
            return dict(self.config)
        if level == "harder":
            return {**self.config, **self.harder}
        raise ValueError(f"level must be 'standard' or 'harder', got {level!r}")


PRETRAINING: tuple[Family, ...] = (
    Family(
        "chain_sum",
        {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
        {"min_terms": 3, "max_terms": 3},
    ),
    Family(
        "simple_equations",
        {"min_terms": 2, "max_terms": 2, "min_value": 1, "max_value": 15},
        {"min_value": 10, "max_value": 30},
    ),
    Family("gcd", {"min_value": 1, "max_value": 99}, {"min_value": 100, "max_value": 300}),
    Family("spell_backward", {"min_word_len": 3, "max_word_len": 8}, {"min_word_len": 9, "max_word_len": 10}),
    Family("letter_counting", {"min_words": 1, "max_words": 3}, {"min_words": 5, "max_words": 6}),
    Family(
        "number_filtering",
        {"min_numbers": 3, "max_numbers": 5, "max_decimals": 0, "min_value": 0, "max_value": 99},
        {"min_numbers": 6, "max_numbers": 7},
    ),
    Family(
        "word_sorting",
        {"min_words": 3, "max_words": 3, "min_word_length": 3, "max_word_length": 6},
        {"min_words": 4, "max_words": 5},
    ),
    Family("rotate_matrix", {"min_n": 2, "max_n": 3, "max_rotations": 3}, {"min_n": 4, "max_n": 4}),
    Family(
        "leg_counting",
        {"min_animals": 1, "max_animals": 2, "max_instances": 5},
        {"min_animals": 3, "max_animals": 3},
    ),
)

# These weights enter a softmax: -20 leaves two in a billion.
_MIRRORS_ALONE = {
    f"w_{transform}": -20
    for transform in ("rotate", "map", "crop", "remove_every_nth_row", "remove_every_nth_col", "zero_divisible")
}

FINETUNING: tuple[Family, ...] = (
    # Harder: half of the lists have the 4 words that are the longest in training, half have 5.
    Family("word_sequence_reversal", {"min_words": 2, "max_words": 4}, {"min_words": 4, "max_words": 5}),
    # The four mirrors, of shapes 2 x 2 to 3 x 3. Harder: five of nine shapes have a side of 4; the other
    # items, two fifths, are those of the standard level at the same places.
    Family(
        "manipulate_matrix",
        {**_MIRRORS_ALONE, "min_rows": 2, "max_rows": 3, "min_cols": 2, "max_cols": 3, "max_transforms": 1},
        {"max_rows": 4, "max_cols": 4},
    ),
    # Harder: half have the 6 letters that are the longest in training, half have 7.
    Family("palindrome_generation", {"min_length": 3, "max_length": 6}, {"min_length": 6, "max_length": 7}),
    # Harder: as many numbers, but most of them share their first digit with another.
    Family(
        "number_sorting",
        {"min_numbers": 3, "max_numbers": 4, "max_decimals": 0, "min_value": 0, "max_value": 99},
        {"min_value": 20, "max_value": 39},
    ),
)

UNSEEN: tuple[Family, ...] = (
    Family("products", {"min_digits": 1, "max_digits": 2}, {"min_digits": 3, "max_digits": 3}),
    Family(
        "base_conversion",
        {"min_base": 2, "max_base": 4, "min_value": 1, "max_value": 999},
        {"min_value": 1000, "max_value": 9999},
    ),
    Family("count_primes", {"max_n": 200}, {"min_n": 200, "max_n": 1000}),
    Family("time_intervals", {"task_types": ["time"]}, {"task_types": ["time_seconds"]}),
)

FAMILIES: dict[str, Family] = {family.name: family for family in PRETRAINING + FINETUNING + UNSEEN}


def get_family(name: str) -> Family:
    """Return the family called `name`; raise `ValueError` that lists the known ones."""
    if name not in FAMILIES:
        raise ValueError(f"unknown reasoning family {name!r}; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]
