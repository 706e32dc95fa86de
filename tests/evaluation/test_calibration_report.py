"""The report's calibration from given confidences."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dip_hf.evaluation.calibration_report import MEASURES, CalibrationBlock, make_calibration
from dip_hf.evaluation.checkpoints import Checkpoint
from dip_hf.evaluation.report import make_report, to_json, to_markdown, to_text
from dip_hf.evaluation.results import CheckpointScores, EvaluationSettings, TaskScores
from dip_hf.evaluation.write import write_report


SETTINGS = EvaluationSettings(model="recipes/base_model", tasks=("dip_reasoning",), calibration=True)
TASKS = {"one": "standard", "two": "standard", "three": "harder"}


def scores(name: str, seed: int, sharpness: float = 1.0, items: int = 30) -> CheckpointScores:
    """The items are right with the probability of their confidence, where `sharpness` is 1."""
    rng = np.random.default_rng(seed)
    tasks = []
    for task, group in TASKS.items():
        share = rng.random(items) * (0.5 if group == "harder" else 1.0)
        right = (rng.random(items) < share).astype(float)
        confidences, hashes = share**sharpness, [f"{task}{index}" for index in range(items)]
        nlls = -np.log(confidences + 1e-6)
        values = [tuple(map(float, array)) for array in (right, confidences, nlls)]
        tasks.append(TaskScores(task, group, "exact_match", values[0], tuple(hashes), *values[1:]))
    return CheckpointScores(Checkpoint(name), "base", 0, 1.0, tuple(tasks))


FIRST, SHARP, FLAT = scores("first", 0), scores("sharp", 0, 3.0), scores("flat", 1, 0.2)


@pytest.fixture(scope="module")
def blocks() -> tuple[CalibrationBlock, ...]:
    return make_calibration([FIRST, SHARP, FLAT], None, resamples=400)


def test_a_set_pools_its_items(blocks: tuple[CalibrationBlock, ...]) -> None:
    standard, harder = blocks
    assert (standard.name, standard.items, harder.name, harder.items) == ("standard", 60, "harder", 30)
    measures = standard.rows[0].measures
    tasks = FIRST.tasks[:2]
    pooled = [np.concatenate([getattr(task, field) for task in tasks]) for field in ("confidences", "scores", "nlls")]
    assert math.isclose(measures["nll"].value, pooled[2].mean())
    assert math.isclose(measures["brier"].value, ((pooled[0] - pooled[1]) ** 2).mean())
    assert sum(standard.rows[0].bins.count) == 60
    pairs = [a > b for a in pooled[0] for b in FIRST.tasks[2].confidences]
    assert math.isclose(harder.rows[0].measures["shift_auroc"].value, np.mean(pairs))
    assert "shift_auroc" not in measures


def test_changes_are_to_every_earlier_checkpoint_on_the_same_items(blocks: tuple[CalibrationBlock, ...]) -> None:
    first, sharp, flat = blocks[0].rows
    for key in ("nll", "calibration_error", "brier", "auroc"):
        assert first.measures[key].changes == {}
        assert list(flat.measures[key].changes) == ["first", "sharp"]
        change = sharp.measures[key].changes["first"]
        assert math.isclose(change.difference, sharp.measures[key].value - first.measures[key].value)
        assert change.low <= change.difference <= change.high
    # The order of confidences is the same, and so is every bootstrap sample's: paired, the interval has no width
    change = sharp.measures["auroc"].changes["first"]
    assert (change.difference, change.low, change.high) == (0, 0, 0)
    assert blocks[0].rows[1].measures["nll"].changes["first"].low > 0


def test_the_interval_is_that_of_resampled_items(blocks: tuple[CalibrationBlock, ...]) -> None:
    rng = np.random.default_rng(5)
    ours, theirs = ([np.array(task.nlls) for task in result.tasks[:2]] for result in (SHARP, FIRST))
    means = []
    for _ in range(4000):
        picked = [rng.integers(0, 30, 30) for _ in range(2)]
        means.append(np.mean([(a[i] - b[i]).mean() for a, b, i in zip(ours, theirs, picked, strict=True)]))
    change = blocks[0].rows[1].measures["nll"].changes["first"]
    width = change.high - change.low
    expected = 2 * change.difference - np.percentile(means, [97.5, 2.5])
    np.testing.assert_allclose([change.low, change.high], expected, atol=0.12 * width)


def test_another_set_may_be_the_one_without_shift() -> None:
    standard, harder = make_calibration([FIRST], "harder", resamples=10)
    assert "shift_auroc" in standard.rows[0].measures and "shift_auroc" not in harder.rows[0].measures
    with pytest.raises(ValueError, match="in_distribution='easier' is none of the task sets standard, harder"):
        make_calibration([FIRST], "easier")


def test_where_nothing_is_wrong_separation_is_unknown() -> None:
    perfect = tuple(replace(task, scores=(1.0,) * 30) for task in FIRST.tasks)
    report = make_report(SETTINGS, [replace(FIRST, tasks=perfect), SHARP])
    content = json.loads(to_json(report))["calibration"]["task_sets"][0]["rows"]
    assert content[0]["measures"]["auroc"]["value"] is None
    assert content[1]["measures"]["auroc"]["changes"] == {}
    assert "n/a" in to_text(report)


def test_resamples_without_a_wrong_answer_are_left_out_of_the_interval() -> None:
    """With one wrong answer of thirty a third of the resamples has none, and separates nothing."""
    one_wrong = tuple(replace(task, scores=(0.0,) + (1.0,) * 29) for task in FIRST.tasks)
    few = [replace(result, tasks=one_wrong[:1]) for result in (FIRST, SHARP)]
    few[1] = replace(few[1], tasks=(replace(one_wrong[0], confidences=tuple(reversed(one_wrong[0].confidences))),))
    (block,) = make_calibration(few, None, resamples=200)
    change = block.rows[1].measures["auroc"].changes["first"]
    assert math.isfinite(change.low) and math.isfinite(change.high) and change.low < change.high


def test_a_partial_score_is_refused() -> None:
    halved = tuple(replace(task, scores=(0.5,) * 30) for task in FIRST.tasks)
    with pytest.raises(ValueError, match=r"correct must hold 0 and 1 only, got 0\.5"):
        make_calibration([replace(FIRST, tasks=halved)], None)


def test_text_markdown_and_json_have_every_measure(tmp_path: Path) -> None:
    report = make_report(SETTINGS, [FIRST, SHARP, FLAT])
    paths = write_report(report, tmp_path)
    assert [path.name for path in paths] == ["report.json", "report.md", "report.png", "report_calibration.png"]
    text, markdown, content = to_text(report), paths[1].read_text(), json.loads(paths[0].read_text())
    for heading, *_ in MEASURES.values():
        assert heading in text and heading in markdown
    assert "minus first" in text
    assert "![Reliability diagrams](report_calibration.png)" in markdown
    rows = {
        line.count("|")
        for line in markdown.split("## Calibration")[1].split("## Check")[0].splitlines()
        if line[:2] == "| "
    }
    assert rows == {9, 8}
    sharp = content["calibration"]["task_sets"][1]["rows"][1]
    assert set(sharp["measures"]) == set(MEASURES)
    assert set(sharp["measures"]["nll"]["changes"]["first"]) == {"difference", "low", "high"}
    assert sum(sharp["bins"]["count"]) == 30
    with Image.open(paths[3]) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
    write_report(replace(report, calibration=None), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md", "report.png"]


def test_one_set_alone_is_no_shift() -> None:
    report = make_report(SETTINGS, [replace(result, tasks=result.tasks[:2]) for result in (FIRST, SHARP)])
    for text in (to_text(report), to_markdown(report)):
        assert "AUROC right/wrong" in text and "shift" not in text
        assert "right against wrong answers; 0.5 where" in " ".join(text.split())


def test_without_confidences_the_report_says_nothing_of_calibration() -> None:
    bare = tuple(replace(task, confidences=(), nlls=()) for task in FIRST.tasks)
    report = make_report(replace(SETTINGS, calibration=False), [replace(FIRST, tasks=bare)])
    assert report.calibration == ()
    for text in (to_text(report), to_markdown(report)):
        assert "Calibration" not in text and "ECE" not in text
    assert "task_sets" in json.loads(to_json(report)) and "calibration" not in json.loads(to_json(report))
