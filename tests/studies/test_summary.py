"""The summary of a report."""

from pathlib import Path

from studies.compare import compare
from studies.plan import finished_cells
from studies.results import read_results
from studies.store import Store
from studies.summary import summary
from tests.studies.support import finish_cells, finish_trials, small_study


ARMS = {
    "base": {"untrained": True},
    "good": {"trials": [{"lora_dropout": 0.1}, {"lora_dropout": 0.2}]},
    "lora": {"trials": [{"learning_rate": 1e-3}, {"learning_rate": 1e-2}]},
    "alike": {"trials": [{"weight_decay": 0.1}, {"weight_decay": 0.2}]},
    "late": {"trials": [{"lora_r": 4}, {"lora_r": 8}]},
}


def test_values_of_the_reference_and_differences_to_it(tmp_path: Path) -> None:
    study, store = small_study(tmp_path, arms=ARMS, seeds=[0, 1, 2]), Store(tmp_path / "out")
    finish_trials(study, store)
    finish_cells(study, store, {"base": 0.0, "good": 0.8, "lora": 0.5, "alike": 0.5}, seeds=(0, 1, 2))
    results = read_results(study, store.write_results(study, finished_cells(study, store)))
    title, table = summary(compare(results, 8), study).split("\n\n")
    assert "the values of lora, and differences to it" in title
    header, _, *lines = (line.strip("| ").split(" | ") for line in table.splitlines())
    assert header == ["8 examples", "accuracy %", "harder settings", "NLL", "ECE %", "NLL, harder", "ECE %, harder"]
    rows = {line[0]: dict(zip(header[1:], line[1:], strict=True)) for line in lines}
    assert list(rows) == ["lora", "base", "good", "alike"]  # the reference first; what has not begun is left out
    assert rows["lora"]["accuracy %"] == "50.8" and rows["lora"]["NLL"] == "1.24"
    assert rows["good"]["accuracy %"].startswith("**+30.0 [") and rows["good"]["NLL"].startswith("**-0.45 [")
    assert set(rows["alike"].values()) == {"0"}
    assert rows["base"]["harder settings"].startswith("**-50.8 [")
