"""The rewriting of GSM8K's answers, and its prompt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_hf.recipe.gsm8k import rewrite_solution, to_prompt_completion


def test_the_final_line_is_rewritten_and_nothing_else() -> None:
    solution = "He sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 48+24 = <<48+24=72>>72.\n#### 72"
    assert rewrite_solution(solution) == (
        "He sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 48+24 = <<48+24=72>>72.\nThe answer is 72"
    )


@pytest.mark.parametrize("answer", ["5", "-3", "1,080", "0.75", "$12"])
def test_answers_are_kept_as_written(answer: str) -> None:
    assert rewrite_solution(f"So.\n#### {answer}") == f"So.\nThe answer is {answer}"
    assert rewrite_solution(f"So.\n####{answer} \n") == f"So.\nThe answer is {answer}"


def test_a_solution_may_be_its_answer_alone() -> None:
    assert rewrite_solution("#### 7") == "The answer is 7"


def test_only_the_last_mark_is_the_answer() -> None:
    assert rewrite_solution("#### 1\n#### 2") == "#### 1\nThe answer is 2"


@pytest.mark.parametrize("solution", ["", "so 7", "#### ", "#### 7\nand then some"])
def test_a_solution_without_an_answer_is_refused(solution: str) -> None:
    with pytest.raises(ValueError, match="#### x"):
        rewrite_solution(solution)


@given(st.text(), st.integers())
def test_what_comes_before_the_answer_survives(worked: str, answer: int) -> None:
    rewritten = rewrite_solution(f"{worked}\n#### {answer}")
    assert rewritten.endswith(f"The answer is {answer}")
    assert rewritten.startswith(worked.rstrip())


def test_prompt_and_completion_join_as_one_text() -> None:
    row = to_prompt_completion(" How many? ", "One.\n#### 1")
    assert row["prompt"] + row["completion"] == "Q: How many?\nA: Let's think step by step. One.\nThe answer is 1"
