"""Evaluating several checkpoints on the same items through lm-eval."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lm_eval.api.task
import torch
from lm_eval.evaluator import evaluate

from dip_hf.evaluation.checkpoints import Checkpoint, check_checkpoints
from dip_hf.evaluation.lm import DIPLM
from dip_hf.evaluation.results import CheckpointScores, EvaluationSettings, TaskScores
from dip_hf.evaluation.tasks import item_scores, keep_families, load_tasks, task_sets


def prepare_tasks(settings: EvaluationSettings, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """Check everything that can be checked without loading a model, and load the tasks with their items.

    Args:
        settings: tasks, limits, noise.
        checkpoints: at least one, with distinct names.

    Returns:
        lm-eval's `TaskDict`, for `evaluate_checkpoints`.

    Raises:
        ValueError: bad settings, checkpoints or task names; names the field, the value and the remedy.
    """
    check_checkpoints(checkpoints, settings.model)
    kinds = [checkpoint.kind for checkpoint in checkpoints]
    if settings.trajectories > 0 and "DIPNET" not in kinds:
        raise ValueError(
            f"trajectories={settings.trajectories} needs a checkpoint with a DIPNet adapter, got {', '.join(kinds)}: "
            "add one, or set trajectories=0"
        )
    with _quiet():
        loaded = load_tasks(settings.tasks, settings.include_path, settings.limit)
    if settings.families is not None:
        keep_families(loaded, settings.families)
    return loaded


def evaluate_checkpoints(
    settings: EvaluationSettings, checkpoints: Sequence[Checkpoint], tasks: dict[str, Any]
) -> list[CheckpointScores]:
    """Evaluate checkpoints on the same items, one after the other, with a progress bar each.

    Args:
        settings: as given to `prepare_tasks`.
        checkpoints: as given to `prepare_tasks`; the first is the reference of a report.
        tasks: what `prepare_tasks` returned.

    Returns:
        The scores, in the order of `checkpoints`.
    """
    results = []
    for index, checkpoint in enumerate(checkpoints, start=1):
        where = checkpoint.path or settings.model
        print(f"[{index}/{len(checkpoints)}] {checkpoint.name}: {checkpoint.kind}, {where}", flush=True)
        results.append(_evaluate_one(settings, checkpoint, tasks))
    return results


def _evaluate_one(settings: EvaluationSettings, checkpoint: Checkpoint, tasks: dict[str, Any]) -> CheckpointScores:
    start = time.perf_counter()
    kind = checkpoint.kind
    trajectories = settings.trajectories if kind == "DIPNET" else 0
    with _quiet():
        # The base is loaded anew for each: taking an adapter off again is exact for some kinds of adapter only
        model = DIPLM(
            pretrained=checkpoint.path if kind == "model" else settings.model,
            peft=checkpoint.path if checkpoint.is_adapter else None,
            trajectories=trajectories,
            noise_seed=settings.noise_seed,
            batch_size=settings.batch_size,
            device=settings.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            dtype=settings.dtype,
        )
        results = evaluate(lm=model, task_dict=tasks, limit=settings.limit, bootstrap_iters=0)
    assert results is not None  # None is for ranks other than 0
    sets = task_sets(tasks)
    scores = []
    for task, samples in results["samples"].items():
        metric, values = item_scores(samples)
        hashes = {row["doc_id"]: row["doc_hash"] for row in samples}
        scores.append(TaskScores(task, sets[task], metric, tuple(values), tuple(hashes[i] for i in sorted(hashes))))
    return CheckpointScores(checkpoint, kind, trajectories, time.perf_counter() - start, tuple(scores))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's log below errors, and its progress bar for each task's prompts, which take no time to build.

    The bar over the generated answers stays.
    """
    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, lm_eval.api.task.tqdm
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = lambda iterable, **_: iterable
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar
