"""Studies of the same settings in other seeds, taken together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from studies.load import load_study
from studies.plan import finished_cells
from studies.pool import main, pooled_table
from studies.results import read_results
from studies.store import ARCHIVE, Store
from tests.studies.support import finish_cells, small_study


ROOT = Path(__file__).parents[2]
ARMS = {"lora": {}, "a": {"neftune_noise_alpha": 1.0}, "b": {"neftune_noise_alpha": 2.0}}


def finished_study(
    folder: Path, seeds: list[int], accuracies: dict[str, float], arms: dict[str, Any] = ARMS, **changes: Any
) -> str:
    """A study whose cells are all there; return its file."""
    folder.mkdir()
    study = small_study(folder, seeds=seeds, selection={"seeds": seeds[:1], "examples": 4}, arms=arms, **changes)
    store = Store(study.output_dir)
    finish_cells(study, store, accuracies, tuple(seeds))
    store.write_results(study, finished_cells(study, store))
    return str(folder / "study.yaml")


def test_the_mean_and_its_t_interval_are_over_the_seeds_of_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = finished_study(tmp_path / "first", [0, 1], {"lora": 0.5, "a": 0.6, "b": 0.5})
    second = finished_study(tmp_path / "second", [2, 3], {"lora": 0.5, "a": 0.7})
    main([first, second])
    # 10, 10, 20 and 20 points: a standard deviation of 5.77, and t = 3.182 with three degrees of freedom
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert rows == [
        "| a | 4 | +15.0 [+5.8, +24.2] | +15.0 [+5.8, +24.2] |",
        "| b | 2 | +0.0 [+0.0, +0.0] | +0.0 [+0.0, +0.0] |",
    ]
    main([first, second, "--reference", "a"])
    assert "| lora | 4 | -15.0 [-24.2, -5.8] | -15.0 [-24.2, -5.8] |" in capsys.readouterr().out


def test_arms_of_other_settings_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {"lora": 0.5, "a": 0.6, "b": 0.5}
    first = finished_study(tmp_path / "first", [0, 1], scores)
    other = {**ARMS, "a": {"neftune_noise_alpha": 3.0}, "b": ARMS["b"] | {"num_samples": 0}}
    main([first, finished_study(tmp_path / "second", [2, 3], scores, other)])
    out = capsys.readouterr().out
    assert "| b |" in out and "| a |" not in out


@pytest.mark.parametrize(
    ("seeds", "changes", "words", "message"),
    [
        ([1, 2], {}, [], "seeds: 1 is in two studies"),
        ([2, 3], {"sizes": {9: {"num_train_epochs": 1}}}, [], r"sizes=\[8, 9\]: pool studies of one"),
        ([2, 3], {}, ["--reference", "c"], "reference='c' is no arm with .* study, study: name one of lora, a, b by"),
        ([2, 3], {"families": ["manipulate_matrix"]}, [], "reference='lora' .*: name one of none by --reference$"),
        ([2, 3], {"weights": "0" * 64}, [], "reference='lora' .*: name one of none by --reference$"),
        ([2, 3], {}, [], "no seed of lora and another shared arm is finished; run the studies first$"),
    ],
)
def test_what_cannot_be_pooled_is_refused(
    tmp_path: Path, seeds: list[int], changes: dict[str, Any], words: list[str], message: str
) -> None:
    files = [finished_study(tmp_path / "first", [0, 1], {}), finished_study(tmp_path / "second", seeds, {}, **changes)]
    with pytest.raises(SystemExit, match=message):
        main([*files, *words])


def test_a_set_that_not_all_have_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {"lora": 0.5, "a": 0.6}
    first = finished_study(tmp_path / "first", [0, 1], scores)
    second = finished_study(tmp_path / "second", [2, 3], scores, evaluation={"items": {"standard": 4}})
    main([first, second])
    assert "| a | 4 | +10.0 [+10.0, +10.0] |" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("reference", ["lora_dropout", "lora_dropout_tenth_more"])
def test_what_is_written_of_twenty_seeds_is_the_results(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    studies = [load_study(f"studies/{name}.yaml") for name in ("confirmation", "addition")]
    finished = [read_results(study, ARCHIVE / f"{study.name}.jsonl") for study in studies]
    head, _, *rows = pooled_table(finished, reference).splitlines()
    table = re.search(rf"^{re.escape(head)}\n.*\n((?:\|.*\n)+)", (ROOT / "docs/findings.md").read_text(), re.MULTILINE)
    assert table is not None
    kept = table.group(1).splitlines()
    assert kept and set(kept) <= set(rows)
