"""The report on made-up cells whose differences are known."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from studies.compare import Comparison, Measure, Row, compare, shown_difference
from studies.load import load_study
from studies.measure import pack
from studies.plan import finished_cells
from studies.report import main, write_report
from studies.results import read_results, time_ratio
from studies.spec import Study
from studies.statistics import Difference, least_shown
from studies.store import Store
from tests.studies.conftest import ARMS
from tests.studies.support import finish_cells, finish_trials, small_study, write_study


ACCURACY = Measure("standard", "accuracy")


def _compare(study: Study, store: Store) -> Comparison:
    return compare(read_results(study, store.results(study)), 8)


def test_differences_verdicts_and_pending_arms(finished: tuple[Study, Store]) -> None:
    comparison = _compare(*finished)
    rows = {row.arm: row for row in comparison.rows[ACCURACY]}
    assert {name: row.verdict(ACCURACY) for name, row in rows.items()} == {
        "base": "worse",
        "lora": "",
        "good": "better",
        "bad": "worse",
        "late": "pending",
    }
    assert [rows[name].seeds for name in rows] == [1, 3, 3, 3, 0]
    # Seed 1 has one item of 40 more right, in every arm alike but the base, which is the same for every seed
    assert rows["lora"].mean == pytest.approx(100 * (0.5 + 1 / 40 / 3))
    good, base = rows["good"].difference, rows["base"].difference
    assert good is not None and base is not None
    assert (good.value, good.seeds, good.higher) == (pytest.approx(30), 3, 3)
    assert base.value == pytest.approx(-100 * (0.5 + 1 / 40 / 3))
    assert 0 < good.low < 30 < good.high
    # Holm over the three arms that have a difference and the one that is pending
    p = sorted((row.difference.p, row.p) for row in rows.values() if row.difference is not None and row.p is not None)
    assert len(p) == 3 and p[0][1] == pytest.approx(4 * p[0][0])
    assert rows["base"].spread is None and rows["lora"].spread == pytest.approx(100 / 40 / 3**0.5)


def test_less_is_better_for_nll_and_calibration_error(finished: tuple[Study, Store]) -> None:
    comparison = _compare(*finished)
    nll = {row.arm: row for row in comparison.rows[Measure("standard", "nll")]}
    assert nll["good"].mean == pytest.approx(0.5 * (0.8 + 1 / 120) + 2 * (0.2 - 1 / 120), abs=1e-3)
    assert nll["good"].verdict(Measure("standard", "nll")) == "better"
    ece = {row.arm: row for row in comparison.rows[Measure("standard", "ece")]}
    assert ece["lora"].mean == pytest.approx(100 / 120, abs=1e-3)  # a confidence of .5 everywhere
    assert ece["bad"].verdict(Measure("standard", "ece")) == "worse"
    assert Measure("unseen", "accuracy") not in comparison.rows  # it was not measured


def test_brier_score_auroc_and_the_fitted_temperature(tmp_path: Path) -> None:
    arms = {"lora": {}, "cool": {"temperature": True}, "sure": {"lora_r": 4}}
    study, store = small_study(tmp_path, arms=arms), Store(tmp_path / "out")
    finish_cells(study, store, {"lora": 0.5, "cool": 0.5, "sure": 0.0}, seeds=(0,))
    finish_cells(study, store, {"lora": 0.5, "cool": 0.5}, seeds=(1,))
    lines = finished_cells(study, store)
    for line in lines:
        if line["arm"] == "cool":
            line["temperature"] = 1.25 + line["seed"]
            for tasks in line["sets"].values():
                for task in tasks.values():
                    right = np.array([int(digit) for digit in task["correct"]])
                    task["confidence"] = pack(np.where(right, 0.75, 0.25))
    comparison = compare(read_results(study, store.write_results(study, lines)), 8)
    almost = partial(pytest.approx, abs=0.01)
    assert comparison.settings["cool"] == {"temperature": 1.75} and comparison.settings["lora"] == {}
    assert comparison.discrimination["standard"] == {
        # E|X/40 - 1/2| of 40 fair coins, and of a seed's 20 or so in each of two bins (seed 1 has one more right)
        "lora": {"chance": almost((0.0627, 0.0)), "confidence": (0.5, 0.0), "brier": (0.25, 0.0), "auroc": (0.5, 0.0)},
        "cool": {
            "chance": almost((0.0766, 0.0)),
            "confidence": pytest.approx((0.50625, 0.00884), rel=1e-3),  # one more of 40 is right with seed 1
            "brier": (0.0625, 0.0),
            "auroc": (1.0, 0.0),
        },
        # nothing is right
        "sure": {"chance": almost((0.0627, None)), "confidence": (0.5, None), "brier": (0.25, None)},
    }


def test_an_arm_is_compared_in_the_seeds_that_both_have(tmp_path: Path) -> None:
    study, store = small_study(tmp_path, arms=ARMS, seeds=[0, 1, 2]), Store(tmp_path / "out")
    finish_trials(study, store)
    finish_cells(study, store, {"lora": 0.5}, seeds=(0, 1))
    finish_cells(study, store, {"good": 0.5}, seeds=(1, 2))
    store.write_results(study, finished_cells(study, store))
    rows = {row.arm: row for row in _compare(study, store).rows[ACCURACY]}
    difference = rows["good"].difference
    assert difference is not None and rows["good"].seeds == 2
    assert (difference.seeds, difference.value, difference.p) == (1, 0, 1)
    assert rows["good"].verdict(ACCURACY) == "too few seeds"


def test_a_verdict_takes_the_same_sign_in_each_of_a_few_seeds() -> None:
    def row(higher: int, lower: int, p: float, seeds: int = 5) -> Row:
        return Row("arm", seeds, 50.0, 1.0, Difference(1.0, 0.5, 1.5, p, seeds, higher, lower, 0.5), p)

    assert row(5, 0, 0.01).verdict(ACCURACY) == "better"
    assert row(5, 0, 0.01).verdict(Measure("standard", "nll")) == "worse"
    for mixed in (row(4, 1, 0.01), row(4, 0, 0.01), row(5, 0, 0.05)):
        assert mixed.verdict(ACCURACY) == "no difference shown"
    assert row(8, 2, 0.01, seeds=10).verdict(ACCURACY) == "better"
    assert row(8, 2, 0.05, seeds=10).verdict(ACCURACY) == "no difference shown"


def test_what_a_table_would_show_is_of_its_median_arm() -> None:
    def row(spread: float | None, seeds: int = 5, missing: int = 0) -> Row:
        return Row("arm", seeds, difference=Difference(1, 0, 2, 0.1, seeds, 5, 0, spread), p=0.1, missing=missing)

    rows = [Row("lora", 5, 50.0), row(1.0), row(4.0), row(2.0), row(9.0, seeds=4, missing=1)]
    assert shown_difference(rows) == least_shown(2.0, seeds=5, tests=4)
    assert shown_difference([rows[0], row(None, seeds=1), row(2.0, seeds=2)]) is None


def test_an_arm_that_lacks_a_seed_gets_no_verdict(finished: tuple[Study, Store], tmp_path: Path) -> None:
    """It may have diverged there."""
    _, store = finished
    more = small_study(tmp_path, arms=ARMS, seeds=[0, 1, 2, 3])
    finish_cells(more, store, {"lora": 0.5, "bad": 0.2}, seeds=(3,))
    store.write_results(more, finished_cells(more, store))
    rows = {row.arm: row for row in _compare(more, store).rows[ACCURACY]}
    assert {name: row.verdict(ACCURACY) for name, row in rows.items() if name in ("base", "good", "bad")} == {
        "base": "worse",
        "good": "seeds missing",
        "bad": "worse",
    }
    assert rows["good"].missing == 1 and rows["good"].seeds == 3
    write_report([more], tmp_path / "docs")  # draws it too


def test_the_files_of_a_report(finished: tuple[Study, Store], tmp_path: Path) -> None:
    study, store = finished
    docs = tmp_path / "docs"
    paths = write_report([study], docs)
    assert all(path.stat().st_size > 0 for path in paths)
    text = (docs / "results.md").read_text()
    assert "10 of 13 cells are finished. **Pending:** late (8): 3 seeds." in text
    assert "| bad | 3 | 20.8 ± 1.4 | -30.0 |" in text and "| late | 0 |  |  |  |  |  | pending |" in text
    tried = "noise_scale 0.1: 10.0, 1.00; noise_scale 0.3: 90.0, 1.00"
    assert f"| good | noise_scale 0.3 | {tried} | 1.00 |" in text
    assert "![Differences to lora](results/study-8.png)" in text
    assert "reference **lora**; 2 trials per arm, chosen with seeds 0. Scored on the test split." in text
    # A confidence of one half everywhere: Brier 1/4, AUROC 1/2
    assert (
        "**Calibration** on the trained families\n" in text and "| late | pending |  | pending |  |  |  |  |" in text
    )
    line = next(line for line in text.splitlines() if line.startswith("| good |") and "0.250 ±" in line)
    assert line.endswith("| 50.0 ± 0.0 | 0.250 ± 0.000 | 0.500 ± 0.000 |") and line.split("|")[3].startswith(" -0.45")
    for count, what in ((2, "teacher-forced exact match in %"), (1, "of the loss")):
        assert f"{what} {'on' if count == 2 else 'of'} {count} items" in text
    assert "| good | 1.500 ± 0.000 |" in text and "| arm | N = 10 | N = 16 |" in text
    assert "| good | 12.50 ± 0.00 | 6.25 ± 0.00 |" in text
    assert "| good | 2.000 ± 0.000 |  | 0.500 ± 0.000 |  |" in text
    content = json.loads((docs / "results" / "study.json").read_text())
    assert content["sizes"][0]["measures"]["standard accuracy"][2]["verdict"] == "better"
    # The copy of the cells gives the same report where the runs are not
    before = {path: path.read_bytes() for path in paths if path.suffix != ".png"}
    (store.results(study)).unlink()
    write_report([study], docs)
    assert before == {path: path.read_bytes() for path in before}


def test_a_report_says_whose_settings_were_given(tmp_path: Path) -> None:
    arms = {"base": {"untrained": True}, "lora": {"learning_rate": 1e-3}, "late": {"learning_rate": 1e-2}}
    chosen = "2 trials per arm, chosen with seeds 0 (settings given for lora, late). Scored"
    for folder, changed, reference, said in (
        ("none", arms, "lora", "settings given, none chosen. Scored"),
        ("some", {**arms, "good": ARMS["good"]}, "good", chosen),
    ):
        (tmp_path / folder).mkdir()
        study = small_study(tmp_path / folder, arms=changed, reference=reference)
        store = Store(tmp_path / folder / "out")
        finish_cells(study, store, {"base": 0.0})
        store.write_results(study, finished_cells(study, store))
        write_report([study], tmp_path / folder / "docs")
        assert said in (tmp_path / folder / "docs" / "results.md").read_text()


def test_the_training_time_ratio_is_paired_by_seed_and_a_median(tmp_path: Path) -> None:
    study, store = small_study(tmp_path, arms=ARMS, seeds=[0, 1, 2]), Store(tmp_path / "out")
    finish_trials(study, store)
    finish_cells(study, store, {"lora": 0.5, "good": 0.5}, seeds=(0, 1, 2))
    lines = finished_cells(study, store)
    for line in lines:
        if line["seed"] is not None:
            line["training"] = {"seconds": (line["seed"] + 1) * (3.0 if line["arm"] == "good" else 2.0)}
    lines[-1]["training"]["seconds"] *= 20  # something else had the machine
    results = read_results(study, store.write_results(study, lines))
    assert time_ratio(results, study.arm("good"), 8) == pytest.approx(1.5)
    assert time_ratio(results, study.arm("base"), 8) is None and time_ratio(results, study.arm("late"), 8) is None


def test_a_study_that_has_not_begun_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(tmp_path)
    main([str(path), "--docs", str(tmp_path / "docs")])
    assert "results.md" in capsys.readouterr().out
    text = (tmp_path / "docs" / "results.md").read_text()
    assert "Without a finished cell: study.\n" in text and "## study" not in text
    assert not (tmp_path / "docs" / "results").exists()
    study, store = load_study(path), Store(tmp_path / "out")
    finish_cells(study, store, {"base": 0.0})
    (line,) = finished_cells(study, store)
    store.write_results(study, [{**line, "cell_hash": "of another base"}])
    main([str(path), "--docs", str(tmp_path / "docs")])
    text = (tmp_path / "docs" / "results.md").read_text()
    assert "Without a finished cell: study (1 of an earlier declaration left out).\n" in text


def test_another_arm_may_be_the_reference(tmp_path: Path) -> None:
    path, docs = write_study(tmp_path), tmp_path / "docs"
    study, store = load_study(path), Store(tmp_path / "out")
    finish_trials(study, store)
    finish_cells(study, store, {"base": 0.0, "lora": 0.5, "neftune": 0.75})
    store.write_results(study, finished_cells(study, store))
    main([str(path), "--reference", "neftune", "--docs", str(docs)])
    content = json.loads((docs / "results" / "study.json").read_text())
    (lora,) = (row for row in content["sizes"][0]["measures"]["standard accuracy"] if row["arm"] == "lora")
    assert lora["difference"]["value"] == pytest.approx(-25.0)
    text = (docs / "results.md").read_text()
    assert "reference **neftune**" in text and "verdicts are not corrected for its choice" in text


def test_bad_input_stops_the_command(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--reference: 'neftun' is no trained arm of study; did you mean 'neftune'"):
        main([str(write_study(tmp_path)), "--reference", "neftun", "--docs", str(tmp_path)])
    for options in (["--reference", "neftune"], []):
        with pytest.raises(
            SystemExit, match=r"docs/results.md is of every study.*would be replaced: name another fol"
        ):
            main([str(write_study(tmp_path)), *options])
    with pytest.raises(SystemExit, match=r"studies.report: .*none\.yaml does not exist"):
        main([str(tmp_path / "none.yaml")])


def test_a_report_is_made_at_the_repositorys_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere the base is not found, and no cell would be of this base."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"model='recipes/base_model' is no folder here: run from"):
        main(["--docs", str(tmp_path / "docs")])
    assert not (tmp_path / "docs").exists()
