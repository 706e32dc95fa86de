"""Evaluating several checkpoints on the same items through lm-eval."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lm_eval.api.task
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import AutoTokenizer

from dip_hf.environment import resolve_device
from dip_hf.evaluation.calibration_report import check_in_distribution
from dip_hf.evaluation.checkpoints import Checkpoint, check_checkpoints, common_revision
from dip_hf.evaluation.likelihoods import (
    answer_likelihoods,
    check_choices,
    check_output_types,
    check_right_or_wrong,
    check_validation,
    fit_to_validation,
)
from dip_hf.evaluation.lm import DIPLM
from dip_hf.evaluation.results import CheckpointScores, EvaluationSettings, TaskScores
from dip_hf.evaluation.tasks import item_scores, keep_families, load_tasks, scored_samples, seed_tasks, task_sets
from dip_hf.model_files import weight_digests


VALIDATION_ITEMS = 100
"""Validation items per task that a temperature is fitted on (this project's choice)."""


def prepare_tasks(settings: EvaluationSettings, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """Check everything that can be checked without loading a model, and load the tasks with their items.

    Args:
        settings: tasks, limits, samples.
        checkpoints: at least one, with distinct names.

    Returns:
        lm-eval's `TaskDict`, for `evaluate_checkpoints`.

    Raises:
        ValueError: bad settings, checkpoints or task names, or more than one process; names the field, the value and
            the remedy.
        ImportError: a task's scorer or the report needs a package that is not installed.
    """
    measures = ("torchmetrics", "sklearn", "scipy") if settings.calibration else ()
    if missing := [name for name in ("matplotlib", *measures) if find_spec(name) is None]:
        raise ImportError(f"the report needs {', '.join(missing)}: install dip_hf with its extra 'eval'")
    processes = os.environ.get("WORLD_SIZE", "1")  # of accelerate and torchrun
    if int(processes) > 1:
        raise ValueError(
            f"WORLD_SIZE={processes}: an evaluation is one process; start it with python rather than with a launcher, "
            "and for several GPUs start one evaluation on each, such as by device='cuda:1'"
        )
    check_checkpoints(checkpoints, settings.model, settings.num_samples)
    tempered = [checkpoint.name for checkpoint in checkpoints if checkpoint.temperature]
    if tempered and not settings.calibration:
        raise ValueError(
            f"checkpoints: {tempered[0]}: a temperature is there for calibration; set calibration=True, or remove it"
        )
    if tempered and settings.split == "validation":
        raise ValueError(f"split='validation': {tempered[0]}'s temperature is fitted on it; use the test split")
    with _quiet():
        loaded = load_tasks(settings.tasks, settings.include_path, settings.limit, split=settings.split)
    if settings.families is not None:
        keep_families(loaded, settings.families)
    if settings.calibration:
        check_output_types(loaded["tasks"].values())
        check_choices(loaded["tasks"].values(), settings.limit)
        home = _in_distribution(settings, loaded)
        if tempered:
            check_validation(loaded["tasks"][name] for name in home)
    return loaded


def evaluate_checkpoints(
    settings: EvaluationSettings, checkpoints: Sequence[Checkpoint], tasks: dict[str, Any]
) -> Iterator[CheckpointScores]:
    """Evaluate checkpoints on the same items, one after the other, with a progress bar each.

    Lazily, so that what is finished can be kept before the next one begins.

    Args:
        settings: as given to `prepare_tasks`.
        checkpoints: as given to `prepare_tasks`; the first is the reference of a report.
        tasks: what `prepare_tasks` returned.

    Yields:
        The scores, in the order of `checkpoints`.

    Raises:
        ValueError: a model cannot be loaded, or holds no answer of a task, or an answer cannot be calibrated.
    """
    revision = common_revision(checkpoints, settings.model)
    for index, checkpoint in enumerate(checkpoints, start=1):
        where = checkpoint.path or (f"{settings.model} at {revision}" if revision else settings.model)
        print(f"[{index}/{len(checkpoints)}] {checkpoint.name}: {checkpoint.kind}, {where}", flush=True)
        yield _evaluate_one(settings, checkpoint, tasks, revision)


def load_model(settings: EvaluationSettings, checkpoint: Checkpoint, revision: str | None = None) -> DIPLM:
    """A checkpoint as it predicts, with the tokenizer saved beside it (its first adapter), or else the base's.

    The base is loaded anew for each: taking an adapter off again is exact for some kinds of adapter only.

    Args:
        settings: of the evaluation.
        checkpoint: which one.
        revision: of a base on the Hub; None for main.

    Raises:
        ValueError: the base, the adapter or the tokenizer cannot be loaded, or cannot predict as asked, or not on the
            device that was asked for.
    """
    field, base, device = "model", settings.model, resolve_device(settings.device)
    if checkpoint.path is not None and not checkpoint.is_adapter:
        field, base = f"checkpoints: {checkpoint.name}", checkpoint.path
    tokenizer = _own_tokenizer(checkpoint)
    if tokenizer is None and base != settings.model:
        tokenizer = settings.model
    try:
        model = DIPLM(
            pretrained=base,
            revision=revision or "main",
            peft=checkpoint.path if checkpoint.is_adapter else None,
            tokenizer=tokenizer,
            num_samples=checkpoint.num_samples(settings.num_samples),
            noise_seed=settings.noise_seed,
            dropout=checkpoint.dropout,
            batch_size=settings.batch_size,
            device=device,
            dtype=settings.dtype,
            **({"use_safetensors": True} if Path(base).is_dir() else {}),
        )
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{field}={base!r} cannot be loaded ({reason}): give another folder or name") from error
    asked = torch.device(device)
    if asked.type != model.device.type or asked.index not in (None, model.device.index):
        raise ValueError(
            f"device={device!r}: lm-eval, which does not know it, took {str(model.device)!r}; name one that it knows, "
            "such as 'cpu', 'cuda' or 'cuda:0'"
        )
    return model


def _own_tokenizer(checkpoint: Checkpoint) -> Any | None:
    """The tokenizer saved beside a checkpoint (its first adapter), whose end of text may not be the base's."""
    if checkpoint.path is None or not (Path(checkpoint.folders[0]) / "tokenizer_config.json").is_file():
        return None
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folders[0], trust_remote_code=False)
    except Exception as error:  # damage shows as anything, from a JSONDecodeError to tokenizers' bare Exception
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"checkpoints: {checkpoint.name}: the tokenizer in {checkpoint.folders[0]} cannot be loaded ({reason}): "
            "save it again, or remove its tokenizer's files, and the base's is taken"
        ) from error


def _evaluate_one(
    settings: EvaluationSettings, checkpoint: Checkpoint, tasks: dict[str, Any], revision: str | None
) -> CheckpointScores:
    folders = checkpoint.folders or ([settings.model] if Path(settings.model).is_dir() else [])
    weights = tuple(weight_digests(folder) for folder in folders)
    start = time.perf_counter()
    temperature = None
    with _quiet():
        model = load_model(settings, checkpoint, revision)
        _check_room(model, tasks["tasks"])
        if checkpoint.temperature:
            home = _in_distribution(settings, tasks)
            held_out = load_tasks(home, settings.include_path, limit=1, validation_items=VALIDATION_ITEMS)["tasks"]
            temperature = fit_to_validation(model, [held_out[name] for name in home], VALIDATION_ITEMS)
        seed_tasks(tasks["tasks"])
        results = evaluate(lm=model, task_dict=tasks, limit=settings.limit, bootstrap_iters=0)
        assert results is not None  # None is for ranks other than 0, which `prepare_tasks` refuses
        scores = [_task_scores(settings, model, tasks, *named) for named in results["samples"].items()]
    num_samples, seconds = checkpoint.num_samples(settings.num_samples), time.perf_counter() - start
    return CheckpointScores(
        checkpoint=checkpoint,
        kind=checkpoint.kind,
        num_samples=num_samples,
        seconds=seconds,
        tasks=tuple(scores),
        temperature=temperature,
        weights=weights,
        revision=revision,
        cut_prompts=len(model.cut_prompts),
    )


def _check_room(model: DIPLM, tasks: dict[str, Any]) -> None:
    """Refuse tasks whose answers may fill the whole context, where lm-eval would stop amid its work."""
    for name, task in tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            tokens = normalize_gen_kwargs(task.config.generation_kwargs or {}, model.max_gen_toks)["max_gen_toks"]
            if tokens >= model.max_length:
                raise ValueError(
                    f"tasks: {name} generates up to {tokens} tokens (max_gen_toks), which leaves no room for a prompt "
                    f"in the model's context of {model.max_length}; leave the task out, or evaluate another model"
                )


def _task_scores(
    settings: EvaluationSettings, model: DIPLM, tasks: dict[str, Any], name: str, samples: list[dict[str, Any]]
) -> TaskScores:
    metric, values = item_scores(samples)
    chosen, rows = scored_samples(samples)
    confidences: tuple[float, ...] = ()
    nlls: tuple[float, ...] = ()
    if settings.calibration:
        check_right_or_wrong(name, metric, values)
        confidences, nlls = answer_likelihoods(model, tasks["tasks"][name], rows, chosen)
    items = tuple(row["doc_hash"] for row in rows)
    return TaskScores(name, task_sets(tasks)[name], metric, tuple(values), items, confidences, nlls)


def _in_distribution(settings: EvaluationSettings, tasks: dict[str, Any]) -> list[str]:
    """Names of the tasks in the set that the others are a shift from."""
    sets = task_sets(tasks)
    home = check_in_distribution(settings.in_distribution, list(dict.fromkeys(sets.values())))
    return [name for name in sets if sets[name] == home]


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
