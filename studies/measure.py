"""What is measured of one checkpoint, in the form that a result line keeps it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from dip_hf.diagnostics import (
    add_instruction_typos,
    make_batches,
    posterior_distance,
    reconstruction_errors,
    robustness,
    smoothness,
    suite_rows,
)
from dip_hf.evaluation.checkpoints import Checkpoint, check_checkpoints
from dip_hf.evaluation.results import EvaluationSettings, TaskScores
from dip_hf.evaluation.run import evaluate_checkpoints, prepare_tasks
from studies.spec import Arm, Study


EVALS = Path(__file__).parents[1] / "evals"
GROUP = "dip_reasoning_"
"""What lm-eval's name of a task set starts with."""
TYPO_SEED = 0


def prediction(arm: Arm, folders: Sequence[Path]) -> Checkpoint:
    """What lm-eval is to evaluate of an arm.

    Args:
        arm: how it predicts.
        folders: of its training runs; none is the base.
    """
    return Checkpoint(
        arm.name,
        "+".join(map(str, folders)) or None,
        samples=arm.num_samples,
        dropout=arm.dropout_at_test,
        temperature=arm.temperature,
    )


def measure(study: Study, arm: Arm, folders: Sequence[Path]) -> dict[str, Any]:
    """An arm's answers to the items of the study's split.

    Args:
        study: items, batch size.
        arm: how it predicts.
        folders: of its training runs; none is the base.

    Returns:
        `sets`: per task set and task, what `encode_task` returns; `temperature`, where one was fitted.
    """
    checkpoint = prediction(arm, folders)
    check_checkpoints([checkpoint], study.model)
    (scores,) = evaluate_checkpoints(_settings(study, tuple(study.evaluation.items)), [checkpoint], _tasks(study))
    sets: dict[str, dict[str, Any]] = {name: {} for name in study.evaluation.items}
    for task in scores.tasks:
        sets[task.task_set.removeprefix(GROUP)][task.task] = encode_task(task)
    return {"sets": sets} | ({} if scores.temperature is None else {"temperature": scores.temperature})


def _settings(study: Study, task_sets: tuple[str, ...]) -> EvaluationSettings:
    return EvaluationSettings(
        model=study.model,
        tasks=[GROUP + name for name in task_sets],
        include_path=str(EVALS),
        families=list(study.families),
        split=study.evaluation.split,
        limit=max(study.evaluation.items[name] for name in task_sets),
        batch_size=study.evaluation.batch_size,
        calibration=True,
        in_distribution=GROUP + "standard" if "standard" in task_sets else None,
        device=study.evaluation.device,
    )


@cache
def _tasks(study: Study) -> dict[str, Any]:
    """All task sets, each with its own number of items, which are the same for all cells of a study."""
    loaded: dict[str, dict[str, Any]] = {}  # lm-eval's tasks, groups, and members of groups, each by name
    for name in study.evaluation.items:
        for kind, found in prepare_tasks(_settings(study, (name,)), [Checkpoint("base")]).items():
            loaded.setdefault(kind, {}).update(found)
    return loaded


def probe(study: Study, model: Any) -> dict[str, Any]:
    """Robustness and smoothness on the standard level's items, teacher-forced.

    Args:
        study: items, batch size, rates.
        model: in fp32, noise-free.

    Returns:
        `robustness` and `smoothness`, where they are on; with the latter `reconstruction`, DReS's error by N, and
        `posterior`, how far IBVI's has moved, of an adapter that has one.
    """
    tokenizer, evaluation = AutoTokenizer.from_pretrained(study.model), study.evaluation
    result: dict[str, Any] = {}
    if evaluation.probe_items > 0:
        rows = suite_rows(study.families, evaluation.split, evaluation.probe_items)
        result["robustness"] = robustness(model, make_batches(rows, tokenizer, evaluation.batch_size))
        misspelt = [
            row | {"prompt": add_instruction_typos(row["prompt"], evaluation.typo_rate, TYPO_SEED)} for row in rows
        ]
        batches = make_batches(misspelt, tokenizer, evaluation.batch_size)
        result["robustness"]["typos"] = robustness(model, batches, noise_scales=(), fgsm_scales=())["none"]
    if evaluation.smoothness_items > 0:
        rows = suite_rows(study.families, evaluation.split, evaluation.smoothness_items)
        batches = make_batches(rows, tokenizer, evaluation.batch_size)
        result["smoothness"] = smoothness(model, batches)
        result["reconstruction"] = {str(size): own for size, own in reconstruction_errors(model, batches).items()}
        if distances := posterior_distance(model):
            result["posterior"] = distances
    return result


def encode_task(task: TaskScores) -> dict[str, Any]:
    """A task's items, compactly: `items`, a hash of which they are; `correct`, a digit per item; `nll` and
    `confidence`, see `pack`.

    Raises:
        ValueError: a score is neither right nor wrong.
    """
    if not set(task.scores) <= {0.0, 1.0}:
        raise ValueError(f"task {task.task!r}: scores of a study must be 0 or 1, got {sorted(set(task.scores))}")
    return {
        "items": hashlib.sha256("".join(task.items).encode()).hexdigest()[:16],
        "correct": "".join("1" if score else "0" for score in task.scores),
        "nll": pack(task.nlls),
        "confidence": pack(task.confidences),
    }


def pack(values: Sequence[float]) -> str:
    """Numbers as base64 of little-endian float16, three significant digits, clipped to its range."""
    halves = np.clip(np.asarray(values, dtype=np.float64), -65504, 65504).astype("<f2")
    return base64.b64encode(halves.tobytes()).decode()


def unpack(text: str) -> NDArray[np.float64]:
    """What `pack` wrote, shape (items,)."""
    return np.frombuffer(base64.b64decode(text), dtype="<f2").astype(np.float64)
