"""Which of the cells at hand are a study's."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from studies.compare import Measure, compare
from studies.report import write_report
from studies.results import read_results
from studies.spec import Study
from studies.store import Store, write_lines
from tests.studies.conftest import ARMS
from tests.studies.support import small_study


ACCURACY = Measure("standard", "accuracy")


def test_cells_of_an_earlier_declaration_are_left_out(finished: tuple[Study, Store], tmp_path: Path) -> None:
    _, store = finished
    arms = {**ARMS, "good": {"adapter": "dipnet", "trials": [{"noise_scale": 0.2}, {"noise_scale": 0.4}]}}
    changed = small_study(tmp_path, arms=arms, seeds=[0, 1, 2])
    results = read_results(changed, store.results(changed))
    assert results.stale == 3 and results.seeds(changed.arm("good"), 8) == []
    write_report([changed], tmp_path / "docs")
    assert "3 finished cells of an earlier declaration are left out" in (tmp_path / "docs" / "results.md").read_text()


@pytest.mark.parametrize(
    "trials",
    [
        [{"noise_scale": 0.2}, {"noise_scale": 0.3}],
        [{"noise_scale": 0.3}],
        [{"noise_scale": 0.3}, {"noise_scale": 0.1}],
    ],
    ids=["another", "one", "order"],
)
def test_cells_whose_setting_was_chosen_among_others_are_left_out(
    finished: tuple[Study, Store], tmp_path: Path, trials: list[dict[str, float]]
) -> None:
    """The report says what was tried: never what this declaration would have tried."""
    _, store = finished
    changed = small_study(tmp_path, arms={**ARMS, "good": {"adapter": "dipnet", "trials": trials}}, seeds=[0, 1, 2])
    results = read_results(changed, store.results(changed))
    assert results.stale == 3 and results.seeds(changed.arm("lora"), 8) == [0, 1, 2]
    more = small_study(tmp_path, arms=ARMS, seeds=[0, 1, 2], selection={"seeds": [0, 1], "examples": 4})
    assert read_results(more, store.results(more)).stale == 9


def test_what_is_here_and_what_came_with_the_repository_are_put_together(
    finished: tuple[Study, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of a few cells never replaces a copy that has more; nor does a copy hide what was run since."""
    study, store = finished
    lines = [json.loads(line) for line in store.results(study).read_text().splitlines()]
    archive, docs = tmp_path / "archive", tmp_path / "docs"
    monkeypatch.setattr("studies.results.ARCHIVE", archive)
    write_lines(archive / "study.jsonl", lines[2:])
    store.write_results(study, lines[:4])
    write_report([study], docs)
    assert [json.loads(line) for line in (docs / "results" / "study.jsonl").read_text().splitlines()] == lines
    shutil.rmtree(store.folder)  # as in a fresh clone
    write_report([study], tmp_path / "elsewhere")
    assert "8 of 13 cells are finished" in (tmp_path / "elsewhere" / "results.md").read_text()


def test_cells_scored_on_other_items_are_refused(finished: tuple[Study, Store]) -> None:
    study, store = finished
    path = store.results(study)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2]["sets"]["standard"]["dip_standard_number_sorting"]["items"] = "f" * 16
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="'good' was scored on other items"):
        read_results(study, path)


def test_an_arm_is_of_one_choice_where_results_of_two_machines_meet(
    finished: tuple[Study, Store], tmp_path: Path
) -> None:
    """Trials that scored otherwise on another machine chose another setting; a difference is of one of them."""
    study, store = finished
    lines = [json.loads(line) for line in store.results(study).read_text().splitlines()]
    elsewhere = tmp_path / "elsewhere.jsonl"
    others = [{"exact_match": 0.9, "nll": 1.0}] * 2
    scored = [{**line, "trial_scores": others} for line in lines if line["arm"] == "good"]
    write_lines(elsewhere, scored)
    write_lines(store.results(study), [line for line in lines if line["arm"] != "good" or line["seed"] < 2])
    good = study.arm("good")
    results = read_results(study, elsewhere, store.results(study))
    assert (results.seeds(good, 8), results.stale) == ([0, 1], 1)
    assert [results.line(good, 8, seed)["trial_scores"] for seed in (0, 1)] == [lines_of(lines, "good")] * 2
    results = read_results(study, store.results(study), elsewhere)
    assert (results.seeds(good, 8), results.stale) == ([0, 1, 2], 0)


def lines_of(lines: list[dict[str, Any]], arm: str) -> Any:
    return next(line["trial_scores"] for line in lines if line["arm"] == arm)


def test_an_arm_that_is_not_finished_does_not_help_the_others(finished: tuple[Study, Store], tmp_path: Path) -> None:
    """With one seed its own p is of items alone, and may be any; finished, it would take a verdict back."""
    study, store = finished
    lines = [json.loads(line) for line in store.results(study).read_text().splitlines()]

    def adjusted(kept: list[dict[str, Any]]) -> dict[str, float | None]:
        path = tmp_path / "kept.jsonl"
        write_lines(path, kept)
        return {row.arm: row.p for row in compare(read_results(study, path), 8).rows[ACCURACY]}

    partly = adjusted([line for line in lines if line["arm"] != "bad" or line["seed"] == 0])
    pending = adjusted([line for line in lines if line["arm"] != "bad"])
    assert partly["good"] == pending["good"] and partly["bad"] == 1
