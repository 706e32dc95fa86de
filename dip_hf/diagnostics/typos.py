"""Typing errors in words, and where in a prompt of the reasoning suite they leave the answer as it is."""

from __future__ import annotations

import re
from random import Random

from dip_hf.reasoning import ANSWER_CUE, INSTRUCTIONS


_WORD = re.compile(r"[^\W\d_]{4,}")  # letters only, four or more
_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def _neighbours(letter: str) -> list[str]:
    """Letters beside this one on a QWERTY keyboard, in its case; none for a letter that is not on it."""
    for row in _KEYBOARD:
        place = row.find(letter.lower())
        if place >= 0:
            near = [row[index] for index in (place - 1, place + 1) if 0 <= index < len(row)]
            return [other.upper() if letter.isupper() else other for other in near]
    return []


def _misspellings(word: str) -> list[list[str]]:
    """Every way to swap, drop, double or mistype one letter of a word, the first kept; by kind, none empty."""
    places = range(1, len(word))
    swapped = [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(1, len(word) - 1)]
    dropped = [word[:i] + word[i + 1 :] for i in places]
    doubled = [word[:i] + word[i] + word[i:] for i in places]
    mistyped = [word[:i] + other + word[i + 1 :] for i in places for other in _neighbours(word[i])]
    kinds = ([new for new in kind if new != word] for kind in (swapped, dropped, doubled, mistyped))
    return [kind for kind in kinds if kind]


def add_typos(text: str, rate: float, seed: int) -> str:
    """Give words of a text one typing error each.

    A word of four or more letters is misspelt with probability `rate`: two neighbouring letters swapped, one dropped,
    one doubled, or one replaced by its neighbour on a keyboard, the four kinds alike. Its first letter stays, so it
    stays readable. Digits, punctuation, white space and shorter words never change. All of this is this project's
    choice.

    Args:
        text: any text.
        rate: in [0, 1].
        seed: the errors are a function of the text, the rate and this seed; a word that is misspelt at one rate is
            misspelt, alike, at every higher one.

    Raises:
        ValueError: `rate` out of range.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate={rate} must lie in [0, 1]: the share of words that get a typing error.")
    random = Random(f"{seed} {text}")  # a generator of its own, seeded by the string's SHA-512

    def misspell(match: re.Match[str]) -> str:
        chance, kind, place = random.random(), random.random(), random.random()
        if chance >= rate:
            return match[0]
        kinds = _misspellings(match[0])
        words = kinds[int(kind * len(kinds))]
        return words[int(place * len(words))]

    return _WORD.sub(misspell, text)


def add_instruction_typos(prompt: str, rate: float, seed: int) -> str:
    """`add_typos` in the instruction of a reasoning prompt alone, so that the right answer stays the same.

    Everything after the instruction may be data (letters to count, words to sort, names of animals) and stays, like
    the answer cue. The embedded base's tokenizer has one token for most instructions, so one error there takes
    away a whole token; other models see a misspelt word.

    Args:
        prompt: as `dip_hf.reasoning.write_prompt` makes it.
        rate: as for `add_typos`.
        seed: as for `add_typos`.

    Raises:
        ValueError: the prompt is none of the suite's, or `rate` is out of range.
    """
    starts = [instruction for instruction in INSTRUCTIONS if prompt.startswith(instruction)]
    if not starts or not prompt.endswith(ANSWER_CUE):
        raise ValueError(
            f"prompt={prompt[:60]!r} is none of the reasoning suite's, so what may be misspelt in it is not known; "
            "use add_typos on the part that you know."
        )
    length = max(map(len, starts))
    # Of the whole prompt, so that prompts with one instruction get errors of their own
    random = Random(f"{seed} {prompt}")
    return add_typos(prompt[:length], rate, random.getrandbits(32)) + prompt[length:]
