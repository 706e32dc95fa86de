"""Splits of reasoning-gym questions: disjoint, repeatable, complete or refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import date

import pytest


pytest.importorskip("reasoning_gym")

from dip_hf.reasoning import (
    ANSWER_CUE,
    FAMILIES,
    FINETUNING,
    INSTRUCTIONS,
    PRETRAINING,
    UNSEEN,
    get_family,
    iterate_rows,
    make_split,
    score_answer,
    split_of,
    write_prompt,
)


LEVELS = ("standard", "harder")


def test_groups_share_no_family():
    groups = [{family.name for family in group} for group in (PRETRAINING, FINETUNING, UNSEEN)]
    assert sum(map(len, groups)) == len(set().union(*groups)) == len(FAMILIES)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_makes_short_prompts_with_scorable_answers(name: str, level: str):
    for row in make_split(name, "test", 8, level):
        assert row["prompt"].startswith(INSTRUCTIONS)
        assert row["prompt"].endswith(ANSWER_CUE)
        assert row["completion"].startswith(" ") and row["family"] == name
        assert score_answer(name, row["completion"], row) == 1.0
        assert score_answer(name, "", row) < 1.0
        assert score_answer(name, "nonsense", row) < 1.0
        assert str(date.today()) not in row["metadata"]  # or tomorrow's items would be others, to whoever pairs them


@pytest.mark.parametrize("name", [family.name for family in FINETUNING])
def test_splits_of_a_family_do_not_meet_for_any_seed_or_level(name: str):
    seen: dict[str, str] = {}
    for split in ("train", "validation", "test"):
        for level in LEVELS:
            for seed in (0, 1):
                for prompt in make_split(name, split, 15, level, seed)["prompt"]:
                    assert seen.setdefault(prompt, split) == split


@pytest.mark.parametrize("name", ["gcd", "chain_sum"])
def test_pretraining_questions_stay_out_of_the_test_split(name: str):
    tested = set(make_split(name, "test", 300)["prompt"])
    pretrained = {row["prompt"] for row in iterate_rows(name, "pretrain", limit=10_000)}
    assert pretrained and not pretrained & tested


def test_an_equation_is_the_same_under_another_letter():
    prompts = {write_prompt("simple_equations", f"Solve for {letter}: 4*{letter} + 3 = 11") for letter in "aqx"}
    assert prompts == {"Solve: 4*x + 3 = 11" + ANSWER_CUE}


def test_splits_are_repeatable_and_follow_the_seed():
    first, again, other = (make_split("spell_backward", "train", 30, seed=seed) for seed in (3, 3, 4))
    assert first.to_list() == again.to_list()
    assert len(set(first["prompt"])) == 30
    assert set(first["prompt"]) != set(other["prompt"])
    assert make_split("spell_backward", "train", 10, seed=3)["prompt"][:] == first["prompt"][:10]


def test_splits_do_not_depend_on_the_hash_seed():
    code = (
        "import hashlib, json; from dip_hf.reasoning import FAMILIES, make_split;"
        "rows = [make_split(name, 'train', 3).to_list() for name in sorted(FAMILIES)];"
        "print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_too_small_a_family_is_refused_with_numbers():
    with pytest.raises(ValueError, match=r"family 'gcd' \(standard\) gave \d+ .* wanted 5000"):
        make_split("gcd", "validation", 5000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing", "test", 5), "unknown reasoning family"),
        (("gcd", "dev", 5), "split must be one of"),
        (("gcd", "test", 0), "size must be at least 1"),
        (("gcd", "test", 5, "hardest"), "level must be"),
        ((FINETUNING[0].name, "pretrain", 5), "not in the pretraining group"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        make_split(*arguments)


def test_a_changed_wording_is_refused():
    with pytest.raises(ValueError, match="does not match"):
        write_prompt("gcd", "What divides 4 and 6?")


def test_harder_settings_differ_and_keep_the_rest():
    for family in FAMILIES.values():
        assert family.settings("harder") != family.settings()
        assert family.settings("harder").keys() >= family.settings().keys()
    assert get_family("gcd").settings() is not get_family("gcd").config


def test_shares_of_the_splits():
    owners = [split_of(f"question {index}") for index in range(4000)]
    for split, share in (("pretrain", 0.55), ("train", 0.25), ("validation", 0.05), ("test", 0.15)):
        assert abs(owners.count(split) / 4000 - share) < 0.03


def test_scores_follow_the_answer():
    row = next(iterate_rows("chain_sum", "test"))
    answer = json.loads(row["metadata"])["answer"]
    assert score_answer("chain_sum", f"  {answer}\n", row) == 1.0
    assert score_answer("chain_sum", f"{int(answer) + 1}", row) < 1.0


def test_the_scorer_of_number_sorting_takes_numbers_that_are_off_by_one():
    """reasoning-gym's own, which is kept; see `score_answer`."""
    row = make_split("number_sorting", "test", 1)[0]
    numbers = [float(number) for number in json.loads(row["completion"].replace("'", '"'))]
    for shift, score in ((0, 1.0), (1, 1.0), (-1, 1.0), (1.01, 0.0)):
        assert score_answer("number_sorting", json.dumps([str(number + shift) for number in numbers]), row) == score


def test_without_reasoning_gym_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match="install dip_hf with its extra 'reasoning'"):
        make_split("gcd", "test", 1)
