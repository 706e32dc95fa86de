"""Numeric answers in worked solutions."""

from __future__ import annotations

import pytest

from dip_hf.evaluation.answers import score_math_answer


@pytest.mark.parametrize(
    ("generated", "target"),
    [
        (" 3 + 15 = 18.\nThe answer is 18", "18"),
        ("So the answer is 18.", "18"),
        ("The answer is: 18", "18"),
        ("The answer is $18.", "18"),
        (r"The answer is \$18", "18"),
        ("The answer is 18 dollars.", "18"),
        ("The answer is 18.00", "18"),
        (r"The answer is $\boxed{18}$.", "18"),
        ("The answer is 1,250", "1250"),
        ("The answer is 1250", "1,250"),
        ("The answer is 1/2", "0.5"),
        ("The answer is -3", "-3"),
        ("The answer is 17. No: the answer is 18", "18"),
        ("The answer is 18\nQuestion 2 of 5", "18"),
        ("The answer is 18. She has 3 left.", "18"),
        ("The answer is 18 (9 eggs x 2).", "18"),
        ("The answer is 18, which is 6 more than 12.", "18"),
        ("The answer is $18, which is $6 more than $12.", "18"),
        ("The answer is, therefore, 18.", "18"),
        ("The answer is\n18", "18"),
        ("The answer is:\n\n\\[\n18\n\\]", "18"),
        ("The answer is 1,080, or 90 dozen.", "1080"),
        ("The answer is 3.5. Half of 7.", "3.5"),
        (r"The answer is $\frac{1}{2}$, which is less than 1.", "0.5"),
        (r"The answer is $x = 3$. Check: 9 - 6 = 3", "3"),
        (r"The answer is $(3, 4)$.", "$(3, 4)$"),
        (r"The answer is \boxed{18}. We had 20.", "18"),
        ("The answer is 3 + 15 = 18.", "18"),
        ("The answer is 16 - 3 - 4 = 9, so 9 * 2 = 18.", "18"),
        ("The answer is 18 dollars for 2 shirts.", "18"),
        ("The answer is $18 per day for 2 days.", "18"),
        ("The answer is \\( 18 \\) eggs in 2 boxes.", "18"),
        ("The answer is **18** eggs in 2 boxes.", "18"),
        ("The answer is 1/2 of the 8 apples.", "0.5"),
        (r"The answer is \boxed{18 \text{ dollars}}.", "18"),
        (r"The answer is \(18 \text{ dollars}\).", "18"),
        (r"The answer is \(\frac{3}{4} + 1\).", "7/4"),
        ("The answer is 20 -2 eggs.", "18"),
        ("The answer is $x$ equal to 18", "18"),
        ("The answer is 3 + 15 eggs.", "18"),
        ("The answer is that 2 shirts cost 18 dollars.", "18"),
        ("The answer is 18, leaving 20 - 18 = 2 apples.", "18"),
        ("The answer is 18 hours, so she earns 18 * 10 = 180 dollars.", "18"),
        ("The answer is 9 * 2 = 18, which is 6 more than 12. Check: 18 = 12 + 6", "18"),
        ("48/2 = <<48/2=24>>24", "24"),  # no cue: all of it is looked through
        (r"We get \boxed{18}.", "18"),
    ],
)
def test_right_answers_score(generated: str, target: str) -> None:
    assert score_math_answer(generated, target) == 1.0


@pytest.mark.parametrize(
    ("generated", "target"),
    [
        ("The answer is 17", "18"),
        ("The answer is 3", "-3"),
        ("18 is what I get. The answer is 19", "18"),
        ("The answer is unknown\n18", "18"),
        ("The answer is 12. It is not 18.", "18"),
        ("The answer is 12 dollars for 18 shirts.", "18"),
        ("The answer is 2, leaving 20 - 2 = 18 apples.", "18"),
        ("The answer is 12 (not 18)", "18"),
        ("The answer is $12, not $18.", "18"),
        ("The answer is\n12\n18", "18"),
        ("The answer is 1,080", "1"),
        ("The answer is 3.5", "3"),
        (r"The answer is $\frac{1}{2}$.", "1"),
        ("The answer is 1.250", "1250"),
        ("no number", "18"),
        ("", "18"),
    ],
)
def test_wrong_answers_do_not(generated: str, target: str) -> None:
    assert score_math_answer(generated, target) == 0.0


def test_a_target_without_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no mathematical expression"):
        score_math_answer("The answer is 18", "")
