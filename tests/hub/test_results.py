"""Which results a push takes from a report, and what it publishes of how they were made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from dip_hf.hub.push import describe
from dip_hf.hub.results import Results, read_results
from dip_hf.hub.stage import Staging
from dip_hf.model_files import weight_digests
from tests.hub.test_stage import staged, write_report


def save_report(folder: Path, entry: dict[str, Any], limit: int | None = None, **settings: Any) -> Path:
    """A report whose checkpoint "mine" has `entry` among what is said of it."""
    path = folder / "report.json"
    report = write_report(path, folder, limit)
    report["checkpoints"][1] |= entry
    report["settings"] |= settings
    path.write_text(json.dumps(report))
    return path


def card_of(staging: Staging) -> ModelCard:
    return ModelCard(staging.files["README.md"].read_text())


@pytest.mark.parametrize(
    ("entry", "prediction", "averaged"),
    [
        ({"num_samples": 10, "dropout": False, "temperature": None}, "10 samples", True),
        ({"num_samples": 10, "dropout": True, "temperature": None}, "10 dropout samples", True),
        ({"num_samples": 0, "dropout": False, "temperature": 1.5}, "temperature 1.50", False),
        ({"num_samples": 0}, "one pass", False),
        ({"num_samples": 0, "path": "runs/a+runs/b"}, "average of 2 adapters", True),
        ({}, None, False),
    ],
)
def test_how_it_was_evaluated_is_published_with_the_results(
    run_folder: Path, tmp_path: Path, entry: dict[str, Any], prediction: str | None, averaged: bool
) -> None:
    save_report(run_folder, entry)
    staging = staged(run_folder, tmp_path / "work", checkpoint="mine", benchmarks=["gsm8k_cot=openai/gsm8k:gsm8k"])
    card = card_of(staging)
    cell = (prediction or "").replace(".", "\\.")
    assert f"| mine (this one) | {cell} | 51.2 ± 1.5 |" in card.text
    other = "A single pass, such as that of the plain LoRA copy, has other results."
    assert (other in card.text) is averaged
    (result,) = card.data.eval_results or []
    assert (result.metric_args or {}).get("prediction") == prediction
    (benchmark,) = yaml.safe_load(staging.files[".eval_results/gsm8k_cot.yaml"].read_text())
    assert benchmark["notes"].endswith(f"1.50, {prediction}" if prediction else "1.50")


def test_validation_results_are_published_as_such(run_folder: Path, tmp_path: Path) -> None:
    save_report(run_folder, {}, split="validation")
    card = card_of(staged(run_folder, tmp_path / "work"))
    (result,) = card.data.eval_results or []
    assert result.dataset_split == "validation"
    assert "On the validation split" in card.text and "no test results" in card.text
    with pytest.raises(ValueError, match=r"split='validation'; evaluate on the test split"):
        staged(run_folder, tmp_path / "two", benchmarks=["gsm8k_cot=openai/gsm8k:gsm8k"])
    for settings in ({"split": "test"}, {}):
        save_report(run_folder, {}, **settings)
        card = card_of(staged(run_folder, tmp_path / f"test-{len(settings)}"))
        (result,) = card.data.eval_results or []
        assert result.dataset_split is None and "validation" not in card.text


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (None, "1319 items of each task, without a limit"),
        (100, "the first 100 items"),
        (5000, "the first 1319 items"),
    ],
)
def test_the_card_claims_no_more_items_than_there_were(
    run_folder: Path, tmp_path: Path, limit: int | None, words: str
) -> None:
    save_report(run_folder, {}, limit)
    assert f"Scored on {words}" in card_of(staged(run_folder, tmp_path / "work")).text


def test_the_card_says_which_prompts_were_cut(run_folder: Path, tmp_path: Path) -> None:
    save_report(run_folder, {"cut_prompts": 3})
    text = card_of(staged(run_folder, tmp_path / "work")).text
    assert r" of which it read the end only\: 3 of mine\. The whole report" in text


def found(folder: Path, report: Path, **options: Any) -> Results:
    results = read_results(folder, str(report), **options)
    assert results is not None
    return results


def test_results_of_another_run_with_a_folder_of_the_same_name_are_refused(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Path(shutil.copytree(run_folder, tmp_path / "runA" / "final"))
    second = Path(shutil.copytree(run_folder, tmp_path / "runB" / "final"))
    for path in (str(first), "runA/final"):
        report = save_report(tmp_path, {"path": path})
        for place in (tmp_path, tmp_path / "runB"):  # a relative path is found from elsewhere too
            monkeypatch.chdir(place)
            assert found(first, report).origin == f"'mine' of {report}: evaluated from {path}"
            with pytest.raises(ValueError, match=rf"mine={path}'\] .*final is; give its name as checkpoint"):
                read_results(second, str(report))
            assert "as asked for" in found(second, report, checkpoint="mine").origin
    shutil.rmtree(first)  # as where the report was brought here from another machine
    staging = staged(second, tmp_path / "work", report=str(report))
    (line,) = (line for line in describe(staging) if line.lstrip().startswith("results"))
    assert "'mine'" in line and "runA/final is not on this machine, and has the same name" in line
    report = save_report(tmp_path, {"path": "gone/other+gone/final"})
    with pytest.raises(ValueError, match="does not say which"):  # an ensemble is not its last member
        read_results(second, str(report))


def test_a_report_on_earlier_weights_is_refused(run_folder: Path, tmp_path: Path) -> None:
    digests = weight_digests(run_folder)
    report = save_report(run_folder, {"weights": [digests]})
    text = staged(run_folder, tmp_path / "work").files["evaluation/report.json"].read_text()
    assert json.loads(text)["checkpoints"][1]["weights"] == [digests] and str(tmp_path) not in text
    member = {"path": f"gone+{run_folder}", "weights": [{"adapter_model.safetensors": "0"}, digests]}
    assert found(run_folder, save_report(tmp_path, member), checkpoint="mine").prediction is None
    save_report(run_folder, {"weights": [{"adapter_model.safetensors": "0"}]})
    for checkpoint in (None, "mine"):
        with pytest.raises(ValueError, match=r"'mine' with other weights than .* holds now; evaluate again"):
            read_results(run_folder, str(report), checkpoint)
    # Found in the folder, as after a further training, it is left out, and the push goes on
    staging = staged(run_folder, tmp_path / "again")
    assert not [name for name in staging.files if name.startswith("evaluation/")]
    assert "evaluate again" in staging.left_out["evaluation/report.json"]
    with pytest.raises(ValueError, match="with other weights"):
        staged(run_folder, tmp_path / "asked", report=str(report))


def test_the_base_s_results_are_no_adapter_s(run_folder: Path, base_folder: Path) -> None:
    report = save_report(run_folder, {"path": None, "weights": [weight_digests(base_folder)]})
    with pytest.raises(ValueError, match=r"checkpoint='mine': .* is the base alone, but .* holds an adapter"):
        read_results(run_folder, str(report), "mine")
    assert found(base_folder, report, checkpoint="mine").checkpoint == "mine"
    save_report(run_folder, {"path": None, "weights": [{"model.safetensors": "0"}]})
    with pytest.raises(ValueError, match="with other weights"):
        read_results(base_folder, str(report), "mine")


@pytest.mark.parametrize(
    "entry", [{"num_samples": "ten"}, {"num_samples": 0, "temperature": "hot"}, {"num_samples": 0, "path": 3}], ids=str
)
def test_a_damaged_entry_is_no_report(run_folder: Path, entry: dict[str, Any]) -> None:
    report = save_report(run_folder, entry)
    with pytest.raises(ValueError, match=r"is no report of recipes/evaluate\.py"):
        read_results(run_folder, str(report))
