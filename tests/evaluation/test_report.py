"""Reports from given scores."""

from __future__ import annotations

import json
import ntpath
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dip_hf.evaluation.checkpoints import Checkpoint
from dip_hf.evaluation.report import make_report, to_json, to_markdown, to_text
from dip_hf.evaluation.results import CheckpointScores, EvaluationSettings, TaskScores
from dip_hf.evaluation.write import write_report


SETTINGS = EvaluationSettings(model="recipes/base_model", tasks=("dip_reasoning",), limit=4)
ITEMS = ("a", "b", "c", "d")


def scores(name: str, first: str, second: str, third: str, items: tuple[str, ...] = ITEMS) -> CheckpointScores:
    """Scores on two tasks of one set and a task by itself, one digit per item."""
    tasks = [("lcm", "standard", first), ("gcd", "standard", second), ("alone", "alone", third)]
    return CheckpointScores(
        Checkpoint(name, None if name == "base" else f"runs/{name}"),
        kind="base" if name == "base" else "LORA",
        num_samples=0,
        seconds=1.25,
        tasks=tuple(
            TaskScores(task, group, "exact_match", tuple(map(float, digits)), items) for task, group, digits in tasks
        ),
    )


BASE = scores("base", "1000", "0000", "0000")
LORA = scores("lora", "1110", "1100", "0001")
DIPNET = scores("dipnet", "1111", "1100", "0011")


def test_sets_average_tasks_and_compare_with_every_earlier_checkpoint() -> None:
    report = make_report(SETTINGS, [BASE, LORA, DIPNET])
    standard, alone = report.sets
    assert (standard.name, standard.tasks, standard.items) == ("standard", 2, 8)
    assert (alone.name, alone.tasks, alone.items) == ("alone", 1, 4)
    assert [row.accuracy for row in standard.rows] == [0.125, 0.625, 0.75]
    assert [list(row.differences) for row in standard.rows] == [[], ["base"], ["base", "lora"]]
    assert standard.rows[2].differences["base"].points == 62.5
    assert standard.rows[2].differences["lora"].points == 12.5
    assert [block.name for block in report.tasks] == ["lcm", "gcd", "alone"]


def test_the_text_has_a_line_per_checkpoint_and_one_per_other_pair() -> None:
    text = to_text(make_report(SETTINGS, [BASE, LORA, DIPNET]))
    assert "standard (2 tasks)      8  base        12.5 ± 12.5" in text
    assert "dipnet      75.0 ± 14.4       +62.5  [" in text
    assert "dipnet - lora" in text
    assert "better / worse" not in to_text(make_report(SETTINGS, [BASE, LORA]))


def test_the_markdown_tables_are_whole() -> None:
    markdown = to_markdown(make_report(SETTINGS, [BASE, LORA, DIPNET]), "report.png")
    widths = {line.count("|") for line in markdown.splitlines() if line.startswith("| ") and "±" in line}
    assert widths == {7}
    assert "![Accuracy and paired differences](report.png)" in markdown
    assert "| lora | LORA | `runs/lora` | one pass | 1 |" in markdown


def test_a_report_on_the_validation_split_says_so(tmp_path: Path) -> None:
    test = make_report(SETTINGS, [BASE, LORA])
    validation = make_report(replace(SETTINGS, split="validation", families=("gcd", "lcm")), [BASE, LORA])
    warning = "On the validation split, by which settings are chosen: these are no test results."
    for write in (to_text, to_markdown):
        assert warning in write(validation) and "validation" not in write(test)
    assert to_text(validation).startswith(warning)
    assert "families gcd, lcm; split validation; the first 4 items of each task; dtype auto" in to_markdown(validation)
    assert "; split test; the first 4 items of each task; dtype auto;" in to_markdown(test)
    assert "families" not in to_markdown(test)
    pictures = [write_report(report, tmp_path / report.settings.split)[2] for report in (test, validation)]
    assert pictures[0].read_bytes() != pictures[1].read_bytes()


def test_no_more_items_are_claimed_than_there_were() -> None:
    assert "; the first 4 items of each task;" in to_markdown(make_report(replace(SETTINGS, limit=500), [LORA]))


def test_the_json_holds_settings_counts_and_no_single_item() -> None:
    content = json.loads(to_json(make_report(SETTINGS, [BASE, LORA])))
    assert content["settings"]["limit"] == 4
    assert content["reference"] == "base"
    assert content["checkpoints"][1] == {
        "name": "lora",
        "path": "runs/lora",
        "kind": "LORA",
        "num_samples": 0,
        "dropout": False,
        "temperature": None,
        "weights": [],
        "cut_prompts": 0,
        "seconds": 1.2,
    }
    assert content["environment"]["packages"]["torch"]
    assert content["tasks"][0]["task_set"] == "standard"
    row = content["task_sets"][0]["rows"][1]
    assert row["accuracy"] == 0.625
    assert row["differences"]["base"]["better"] == 4
    assert "scores" not in to_json(make_report(SETTINGS, [BASE, LORA]))


def test_one_item_has_no_standard_error() -> None:
    single = CheckpointScores(
        Checkpoint("base"), "base", 0, 1.0, (TaskScores("t", "t", "exact_match", (1.0,), ("a",)),)
    )
    report = make_report(SETTINGS, [single])
    assert json.loads(to_json(report))["tasks"][0]["rows"][0]["standard_error"] is None
    assert "100.0 ± n/a" in to_text(report)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_files_are_written(count: int, tmp_path: Path) -> None:
    results = [BASE, LORA, DIPNET, scores("other", "0000", "1111", "0000")][:count]
    paths = write_report(make_report(SETTINGS, results), tmp_path / "runs" / "new")
    assert [path.name for path in paths] == ["report.json", "report.md", "report.png"]
    with Image.open(paths[2]) as picture:
        assert picture.width > 500 and picture.height > 300
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_checkpoints_scored_on_other_items_are_refused() -> None:
    with pytest.raises(ValueError, match="'lora' was not scored on the items of 'base'"):
        make_report(SETTINGS, [BASE, scores("lora", "1111", "1111", "1111", items=("a", "b", "c", "e"))])
    with pytest.raises(ValueError, match="results is empty"):
        make_report(SETTINGS, [])


def test_task_files_on_another_drive(monkeypatch: pytest.MonkeyPatch) -> None:
    def relpath(path: str) -> str:
        return ntpath.relpath(path, "D:\\work")  # raises across drives, as on Windows

    monkeypatch.setattr("os.path.relpath", relpath)
    report = make_report(replace(SETTINGS, include_path="C:\\src\\evals"), [BASE, LORA])
    assert "evals" in json.loads(to_json(report))["settings"]["include_path"]


def test_an_interval_without_width_is_drawn(tmp_path: Path) -> None:
    """Of scores of thirds on one item, the bounds lie a rounding error on the wrong side of the difference."""
    tasks = tuple(TaskScores(f"t{i}", "all", "grade", (score,), ("a",)) for i, score in enumerate((1 / 3, 0.1, 0.7)))
    others = tuple(replace(task, scores=(task.scores[0] / 3,)) for task in tasks)
    results = [replace(BASE, tasks=others), replace(LORA, tasks=tasks)]
    assert write_report(make_report(SETTINGS, results), tmp_path)


def test_a_report_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(make_report(SETTINGS, [BASE, LORA]), tmp_path)
    before = (tmp_path / "report.json").read_text()

    def cut_short(path: Path, text: str, **_: object) -> None:
        path.write_bytes(text[:9].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut_short)
    with pytest.raises(KeyboardInterrupt):
        write_report(make_report(SETTINGS, [BASE, LORA, DIPNET]), tmp_path)
    assert (tmp_path / "report.json").read_text() == before
