"""The table of all studies at the head of the report."""

import re
from dataclasses import replace
from pathlib import Path

from studies.overview import overview_section
from studies.plan import finished_cells
from studies.results import Results, read_results
from studies.store import Store
from tests.studies.support import finish_cells, finish_trials, small_study


ARMS = {
    "base": {"untrained": True},
    "other": {"trials": [{"weight_decay": 0.1}, {"weight_decay": 0.2}]},
    "lora": {"trials": [{"learning_rate": 1e-3}, {"learning_rate": 1e-2}]},
    "good": {"trials": [{"lora_dropout": 0.1}, {"lora_dropout": 0.2}]},
}
SEEDS = (0, 1, 2)


def _results(folder: Path, name: str, arms: dict[str, float], size: int = 8, reference: str = "lora") -> Results:
    folder = folder / name
    folder.mkdir()
    declared = {arm: ARMS[arm] for arm in arms}
    study = small_study(
        folder, arms=declared, seeds=[*SEEDS], reference=reference, sizes={size: {"num_train_epochs": 1}}
    )
    study, store = replace(study, name=name), Store(study.output_dir)
    finish_trials(study, store)
    finish_cells(study, store, arms, seeds=SEEDS)
    return read_results(study, store.write_results(study, finished_cells(study, store)))


def _tables(text: str) -> dict[str, list[list[str]]]:
    """Per title, the header without it and the rows."""
    tables = [table.strip().splitlines() for table in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)]
    cells = [[[cell.strip() for cell in line.strip("|").split("|")] for line in table] for table in tables]
    return {table[0][0]: [table[0][1:], *table[2:]] for table in cells}


def test_differences_are_to_lora_whatever_a_studys_own_reference(tmp_path: Path) -> None:
    few = _results(tmp_path, "few", {"lora": 0.5, "good": 0.8}, reference="good")
    many = _results(tmp_path, "a_later", {"lora": 0.4, "good": 0.2}, size=1000)
    tables = _tables(overview_section([many, few]))
    assert list(tables) == ["Accuracy", "Accuracy, harder settings", "NLL", "ECE"]
    header, lora, good = tables["Accuracy"]
    assert header == ["few, 8", "a_later, 1,000"]  # by size
    assert lora == ["lora", "50.8", "40.8"]
    assert good[0] == "good" and good[1].startswith("**+30.0 [") and good[2].startswith("**-20.0 [")


def test_rows_are_the_arms_of_two_columns(tmp_path: Path) -> None:
    one = _results(tmp_path, "one", {"lora": 0.5, "good": 0.8, "other": 0.5})
    two = _results(tmp_path, "two", {"lora": 0.5, "good": 0.8})
    three = _results(tmp_path, "three", {"lora": 0.5, "base": 0.0})
    rows = _tables(overview_section([one, two, three]))["Accuracy"][1:]
    assert [row[0] for row in rows] == ["lora", "good"]
    assert [row[2] for row in rows] == ["50.8", ""]  # the third study, by name, lacks the arm
    assert overview_section([one, three]) == ""


def test_other_bases_are_named(tmp_path: Path) -> None:
    one, two, three = (_results(tmp_path, name, {"lora": 0.5, "good": 0.8}) for name in ("one", "two", "three"))
    assert "Bases:" not in overview_section([one, two])
    other = replace(three, study=replace(three.study, model="a/larger"))
    assert f" Bases: `{one.study.model}` of one, two; `a/larger` of three.\n" in overview_section([one, two, other])


def test_what_does_not_count(tmp_path: Path) -> None:
    """Studies of settings, studies without LoRA of its own choice, and too few seeds."""
    good = {"lora": 0.5, "good": 0.8}
    one, two = _results(tmp_path, "one", good), _results(tmp_path, "two", good)
    validation = replace(two.study, evaluation=replace(two.study.evaluation, split="validation"))
    assert overview_section([one, replace(two, study=validation)]) == ""
    without = _results(tmp_path, "without", {"other": 0.5, "good": 0.8}, reference="good")
    assert overview_section([one, without]) == ""
    few = {place: line for place, line in two.lines.items() if place[2] != 2}
    assert overview_section([one, replace(two, lines=few)]) == ""
    assert overview_section([one, two]) != ""
