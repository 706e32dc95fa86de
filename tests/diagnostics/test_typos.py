from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dip_hf.diagnostics import add_instruction_typos, add_typos
from dip_hf.reasoning import ANSWER_CUE, INSTRUCTIONS


RATES, SEEDS = st.floats(0, 1), st.integers(0, 10**9)
WORDS = re.compile(r"[^\W\d_]+")


def one_edit_apart(old: str, new: str) -> bool:
    """By the definition of the four errors, letter by letter."""
    if len(old) == len(new):
        places = [i for i in range(len(old)) if old[i] != new[i]]
        if len(places) == 2:
            i, j = places
            return j == i + 1 and old[i] == new[j] and old[j] == new[i]
        return len(places) == 1
    short, long = sorted((old, new), key=len)
    return len(long) == len(short) + 1 and any(long[:i] + long[i + 1 :] == short for i in range(len(long)))


@given(st.text(max_size=60), RATES, SEEDS)
@settings(max_examples=150, deadline=None)
def test_typos_touch_words_alone_and_each_once(text: str, rate: float, seed: int) -> None:
    result = add_typos(text, rate, seed)
    assert result == add_typos(text, rate, seed)
    assert WORDS.split(result) == WORDS.split(text)  # digits, signs and white space, in their order
    for old, new in zip(WORDS.findall(text), WORDS.findall(result), strict=True):
        assert new == old or (len(old) >= 4 and old[0] == new[0] and one_edit_apart(old, new))


@given(st.text(alphabet="abcdefgh XY.1", max_size=60), SEEDS)
@settings(max_examples=60, deadline=None)
def test_rate_is_a_share_and_grows(text: str, seed: int) -> None:
    assert add_typos(text, 0.0, seed) == text
    words = WORDS.findall(text)
    wrong = []
    for rate in (0.3, 0.7, 1.0):
        new = WORDS.findall(add_typos(text, rate, seed))
        wrong.append({(i, b) for i, (a, b) in enumerate(zip(words, new, strict=True)) if a != b})
    assert wrong[0] <= wrong[1] <= wrong[2]
    assert {i for i, _ in wrong[2]} == {i for i, word in enumerate(words) if len(word) >= 4}


def test_every_kind_of_error_occurs_and_the_rate_is_met() -> None:
    text = " ".join(["keyboard"] * 2000)
    new = add_typos(text, 0.5, 0).split(" ")
    assert sum(word != "keyboard" for word in new) == pytest.approx(1000, abs=100)
    kinds = {"swapped": "keybaord", "dropped": "keyboad", "doubled": "keyboarrd", "mistyped": "keyboaed"}
    assert all(word in new for word in kinds.values())
    assert add_typos(text, 0.5, 1).split(" ") != new


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_instruction_typos_leave_data_and_cue_alone(instruction: str) -> None:
    data = "word, 12 ascending larger"
    prompt = f"{instruction}{data}{ANSWER_CUE}"
    results = {add_instruction_typos(prompt, 1.0, seed) for seed in range(10)}
    assert prompt not in results and len(results) > 1
    assert all(result.endswith(f"{data}{ANSWER_CUE}") for result in results)
    # "Sort: " must not be taken for "Sort numbers ascending: ", nor any instruction become another
    assert not any(result.startswith(INSTRUCTIONS) for result in results)


def test_refusals() -> None:
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="rate="):
            add_typos("text", rate, 0)
    with pytest.raises(ValueError, match="none of the reasoning suite's"):
        add_instruction_typos("What is 2 + 2?", 0.5, 0)
