"""Running a study: workers that die, jobs that fail, and what the next run makes of it."""

import json
import shutil
from pathlib import Path

import pytest

from studies.plan import Work
from studies.run import Progress, main, run
from studies.store import locked, read_lines
from tests.studies.support import BASE, small_study, write_study
from tests.studies.workload import do


def _calls(folder: Path) -> list[str]:
    path = folder / "calls"
    calls = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return calls


def test_a_study_survives_a_killed_worker_and_a_failed_job(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    study, out = small_study(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "kill-lora").touch()
    (out / "raise-neftune").touch()
    (out / "cells").mkdir()
    (out / "cells" / "left-by-a-kill.part").touch()
    assert run(study, do, 2) == 2  # neftune's two trials
    first = _calls(out)
    tried = sum(call.startswith("trial lora size 8") for call in first)
    assert tried == 3  # one of two was killed, and tried again
    assert not [call for call in first if call.startswith("cell neftune")]
    lines = [json.loads(line) for line in (out / "study.jsonl").read_text().splitlines()]
    assert [(line["arm"], line["size"], line["seed"]) for line in lines] == [
        ("base", None, None),
        ("lora", 8, 0),
        ("lora", 8, 1),
    ]
    assert lines[1]["trial_overrides"] == {"learning_rate": 1e-3}
    assert "asked to fail" in next((out / "failures").iterdir()).read_text()
    assert not list(out.glob("*/*.part"))
    printed = capfd.readouterr().out
    assert "the worker died with exit code -9" in printed and "min left" in printed
    assert "3 of 5 cells are finished" in printed

    (out / "raise-neftune").unlink()
    assert run(study, do, 1, hours=0) == 0 and _calls(out) == []  # no time, no job
    assert run(study, do, 1) == 0
    assert _calls(out) == [
        *(f"trial neftune size 8 seed 0 trial {trial}" for trial in (0, 1)),
        *(f"cell neftune size 8 seed {seed}" for seed in (0, 1)),
    ]
    assert not list((out / "failures").iterdir())
    assert run(study, do, 1) == 0 and _calls(out) == []  # nothing is left
    assert len((out / "study.jsonl").read_text().splitlines()) == 5


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    path = write_study(tmp_path, model=BASE)
    with locked(tmp_path / "out" / "lock", wait=False), pytest.raises(SystemExit, match="another study is running"):
        main([str(path)])


def test_an_output_dir_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = write_study(tmp_path, model=BASE)
    path.write_text(path.read_text().replace(str(tmp_path / "out"), str(tmp_path / "file" / "out")))
    with pytest.raises(SystemExit, match=r"^studies\.run: output_dir='.*out': .*; name a folder that can be made"):
        main([str(path)])


def test_a_line_that_is_no_cell_is_named(tmp_path: Path) -> None:
    (tmp_path / "cells.jsonl").write_text('{"arm": "x"}\n<<<<<<<\n')
    with pytest.raises(ValueError, match=r"cells\.jsonl, line 2, is no finished cell .*; restore or remove it"):
        read_lines(tmp_path / "cells.jsonl")


def test_a_study_is_done_in_parts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    study, out = small_study(tmp_path), tmp_path / "out"
    out.mkdir()
    assert run(study, do, 1, only=["neftune"]) == 0
    assert "2 of 2 cells of neftune are finished" in capfd.readouterr().out
    assert {call.split()[1] for call in _calls(out)} == {"neftune"}
    assert run(study, do, 1, only=["base", "neftune"]) == 0
    assert _calls(out) == ["cell base"]
    lines = [json.loads(line) for line in (out / "study.jsonl").read_text().splitlines()]
    assert [line["arm"] for line in lines] == ["base", "neftune", "neftune"]  # the first part's stay


def test_a_fresh_clone_goes_on_from_the_committed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out, archive = write_study(tmp_path, model=BASE), tmp_path / "out", tmp_path / "archive"
    monkeypatch.setattr("studies.run.ARCHIVE", archive)
    monkeypatch.setattr("studies.run.run_job", do)
    out.mkdir()
    assert main([str(path), "--arms", "lora"]) == 0
    lines = (out / "study.jsonl").read_text()
    shutil.rmtree(out)  # as where nothing was run yet
    archive.mkdir()
    (archive / "another.jsonl").write_text(lines)  # a study that has this arm too
    out.mkdir()
    assert main([str(path)]) == 0
    assert {call.split()[1] for call in _calls(out)} == {"base", "neftune"}
    again = [json.loads(line) for line in (out / "study.jsonl").read_text().splitlines()]
    assert [line for line in again if line["arm"] == "lora"] == [json.loads(line) for line in lines.splitlines()]
    # Another setting is another run, whatever the archive holds
    arms = {"lora": {"trials": [{"learning_rate": 1e-3}, {"learning_rate": 5e-2}]}, "neftune": {}}
    assert main([str(write_study(tmp_path, model=BASE, arms=arms)), "--arms", "lora"]) == 0
    assert _calls(out) == ["trial lora size 8 seed 0 trial 1"]


def test_the_time_left_is_estimated_from_the_nearest_jobs() -> None:
    progress = Progress(workers=2)
    rest = [
        Work("cell", True, "lora", 8),
        Work("cell", True, "neftune", 8),
        Work("cell", False, "neftune", 8),
        Work("trial", True, "neftune", 8),
        Work("trial", False, "lora", 99),
    ]
    assert progress.left(rest) is None
    for kind, trains, arm, seconds in (
        ("cell", True, "lora", 10.0),
        ("cell", True, "dipnet", 30.0),
        ("cell", False, "lora", 3.0),
        ("trial", True, "lora", 5.0),
    ):
        progress.note(Work(kind, trains, arm, 8), seconds)
    expected = [10.0, (10 + 30) / 2, 3.0, 5.0, (10 + 30 + 3 + 5) / 4]
    assert progress.left(rest) == pytest.approx(sum(expected) / 2)
    only_trials = Progress(workers=1)
    only_trials.note(Work("trial", True, "lora", 8), 5.0)
    only_trials.note(Work("cell", False, "lora", 8), 1.0)
    assert only_trials.left([Work("cell", True, "lora", 8)]) == 5.0  # what trains takes longer than what does not
    assert progress.left([]) == 0


def test_bad_input_stops_the_command(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"studies.run: --workers 0 must be at least 1"):
        main([str(write_study(tmp_path)), "--workers", "0"])
    with pytest.raises(SystemExit, match=r"studies.run: --arms: 'neftun' is no arm of .*; did you mean 'neftune'"):
        main([str(write_study(tmp_path)), "--arms", "lora", "neftun"])
    with pytest.raises(SystemExit, match=r"studies.run: .*seeds=\[\] must be a list"):
        main([str(write_study(tmp_path, seeds=[]))])
