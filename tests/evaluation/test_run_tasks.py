"""Tasks that an evaluation stops at, or says something of: a graded score, prompts and answers beyond the context."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from dip_hf.evaluation.checkpoints import Checkpoint
from dip_hf.evaluation.report import make_report, to_json
from tests.evaluation.test_run import evaluate, settings_for


def graded(folder: Path, questions: Sequence[str] = ("1 + 1 =",), max_gen_toks: int = 2) -> None:
    """A task that gives every answer one half."""
    (folder / "graded.py").write_text("def grade(doc, results):\n    return {'grade': 0.5}\n")
    (folder / "docs.json").write_text(json.dumps([{"question": question, "answer": "2"} for question in questions]))
    (folder / "graded.yaml").write_text(
        f"""
task: graded
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "docs.json"}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
process_results: !function graded.grade
generation_kwargs: {{until: ["\\n"], max_gen_toks: {max_gen_toks}}}
metric_list: [{{metric: grade, aggregation: mean, higher_is_better: true}}]
metadata: {{whole_answer: true}}
"""
    )


def test_a_graded_score_stops_a_calibration_after_the_first_checkpoint(
    base_folder: str, lora_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    graded(tmp_path)
    settings = settings_for(base_folder, tasks=("graded",), include_path=str(tmp_path), limit=1, calibration=True)
    with pytest.raises(ValueError, match=r"calibration: task graded has grade=0\.5 for an item"):
        evaluate(settings, [Checkpoint("base"), Checkpoint("lora", lora_folder)])
    assert "[2/2]" not in capfd.readouterr().out


def test_prompts_that_the_context_cuts_are_counted(base_folder: str, tmp_path: Path) -> None:
    graded(tmp_path, ["1" * 510, "1" * 511, "2" * 600], max_gen_toks=2)  # of 512 tokens, one a letter
    settings = settings_for(base_folder, tasks=("graded",), include_path=str(tmp_path))
    report = make_report(settings, evaluate(settings, [Checkpoint("base")]))
    assert json.loads(to_json(report))["checkpoints"][0]["cut_prompts"] == 2
    assert "of which it read the end only: 2 of base." in report.footnote


def test_answers_that_fill_the_context_are_refused_before_any_is_generated(base_folder: str, tmp_path: Path) -> None:
    graded(tmp_path, max_gen_toks=512)
    settings = settings_for(base_folder, tasks=("graded",), include_path=str(tmp_path))
    with pytest.raises(ValueError, match=r"tasks: graded generates up to 512 tokens .* context of 512; leave"):
        evaluate(settings, [Checkpoint("base")])
