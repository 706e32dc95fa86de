"""Loading lm-eval tasks by name, and what this project reads from them: the set and the score a task stands for."""

from __future__ import annotations

import difflib
import fnmatch
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.group import Group
from lm_eval.tasks import TaskManager


# Scores that beat the first one in a task's own list (this project's choice): string equality undercounts mathematics.
_PREFERRED_METRICS = ("math_verify",)


def load_tasks(
    names: Sequence[str],
    include_path: str | Path | None = None,
    limit: int | None = None,
    validation_items: int = 0,
    split: str = "test",
) -> dict[str, Any]:
    """Load tasks and groups with their data.

    Args:
        names: task or group names; patterns such as "dip_unseen_*" work. A member of a group that is named too counts
            in that group alone.
        include_path: folder of task files besides lm-eval's own.
        limit: number of items that will be used of each task, so that no more need be generated; None: all.
        validation_items: number of validation items to generate for each of this project's tasks.
        split: "validation" evaluates this project's tasks on their validation questions in the place of the test's.

    Returns:
        lm-eval's `TaskDict`: "tasks" by name, "groups" by name.

    Raises:
        ValueError: no name, a name that is no task, `include_path` is no folder, or another split is asked of a task
            that is not this project's.
    """
    if not names:
        raise ValueError("tasks is empty: name at least one task or group, such as dip_reasoning")
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path={str(include_path)!r} is no folder: give the folder that holds the task files")
    # lm-eval's own index takes some 20 seconds to read, so it is read only where something is not found in ours
    # Reaches a task's function that makes its data set
    metadata: dict[str, Any] = {"validation_items": validation_items, "split": split}
    if limit is not None:
        metadata["items"] = limit
    manager = TaskManager(include_path=include_path, include_defaults=False, metadata=metadata)
    if any(missing for name in names for missing in _missing(name, manager)):
        manager = TaskManager(include_path=include_path, metadata=metadata)
    for name in names:
        if not fnmatch.filter(manager.all_tasks, name):
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` lists lm-eval's own"
            raise ValueError(f"tasks: {name!r} is neither a task nor a group; {hint}")
    matched = dict.fromkeys(match for name in names for match in fnmatch.filter(manager.all_tasks, name))
    held = {member for name in matched for member in _members(name, manager)}
    seed_tasks({})
    loaded: dict[str, Any] = manager.load([name for name in matched if name not in held])
    for name, task in loaded["tasks"].items():
        if split != "test" and "family" not in (task.config.dataset_kwargs or {}):
            raise ValueError(f"split={split!r}: task {name} is lm-eval's own, on a split of its own; use split='test'")
        # What lm-eval's `simple_evaluate` does to its tasks; it also spends seconds on collecting the environment.
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    seed_tasks(loaded["tasks"])
    return loaded


def seed_tasks(tasks: Mapping[str, Any]) -> None:
    """Begin the tasks' random choices anew, with lm-eval's own default seeds.

    Before tasks are loaded, since some shuffle their choices by the global generators, and before each checkpoint,
    since the examples in front of a few-shot question are drawn as prompts are built: every checkpoint is to see the
    same.

    Args:
        tasks: those that are loaded, by name.
    """
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)
    for task in tasks.values():
        task.set_fewshot_seed(seed=1234)


def _missing(name: str, manager: TaskManager) -> Iterator[str]:
    """Names under `name` that the index lacks."""
    matches = fnmatch.filter(manager.all_tasks, name)
    if not matches:
        yield name
    for match in matches:
        yield from (member for member in _members(match, manager) if member not in manager.task_index)


def _members(name: str, manager: TaskManager) -> Iterator[str]:
    """What a group or a tag holds by name, at any depth."""
    if name in manager.all_tags:
        yield from manager.task_index[name].tags
    elif name in manager.task_index:
        yield from _listed((manager.task_index[name].cfg or {}).get("task"), manager)


def _listed(members: Any, manager: TaskManager) -> Iterator[str]:
    """The same of a group's list; a task has none."""
    for member in members if isinstance(members, list) else ():
        fields = member if isinstance(member, dict) else {"task": member}
        inner = fields["group"] if "group" in fields else fields["task"]
        if "group" in fields and inner not in manager.task_index:  # a group that is made in this list
            yield from _listed(fields.get("task"), manager)
        else:
            yield inner
            yield from _members(inner, manager)


def keep_families(loaded: dict[str, Any], families: Iterable[str]) -> None:
    """Drop the tasks of fine-tuning families other than `families`, in place; all other tasks stay.

    Args:
        loaded: what `load_tasks` returned.
        families: the fine-tuning families that the checkpoints were trained on.

    Raises:
        ValueError: a name is no fine-tuning family, or no task is left.
    """
    from dip_hf.reasoning import FINETUNING  # reasoning-gym is an optional dependency

    known, kept = {family.name for family in FINETUNING}, set(families)
    if not kept <= known:
        raise ValueError(
            f"families: {sorted(kept - known)[0]!r} is no fine-tuning family; known: {', '.join(sorted(known))}"
        )
    for name, task in list(loaded["tasks"].items()):
        family = (task.config.dataset_kwargs or {}).get("family")
        if family in known - kept:
            del loaded["tasks"][name]
            for group in loaded["groups"].values():
                group.pop(name)
    if not loaded["tasks"]:
        raise ValueError(f"families={sorted(kept)} leaves no task to evaluate; name other tasks or families")


def task_sets(loaded: dict[str, Any]) -> dict[str, str]:
    """Map every task to the set that it is averaged in: its group, where that one averages, or itself."""
    averaging: list[Group] = [group for group in loaded["groups"].values() if group.has_aggregation]
    # The innermost group comes last where groups are nested, and wins
    parents = {task.task_name: group.name for group in averaging for task in group.get_all_tasks()}
    return {name: parents.get(name, name) for name in loaded["tasks"]}


def scored_samples(samples: Sequence[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Return the name of the score that counts and one logged sample per item, in order; see `item_scores`."""
    metrics = samples[0]["metrics"]
    metric = next((name for name in _PREFERRED_METRICS if name in metrics), metrics[0])
    chosen = samples[-1]["filter"]
    return metric, sorted((row for row in samples if row["filter"] == chosen), key=lambda row: row["doc_id"])


def item_scores(samples: Sequence[dict[str, Any]]) -> tuple[str, list[float]]:
    """Return the name of a task's score and its value per item, in the order of the items.

    Args:
        samples: lm-eval's logged samples of one task. Where it scores an answer in several ways, Math-Verify's verdict
            is preferred, then the first; where several filters extract the answer, the last, lm-eval's most lenient.

    Raises:
        ValueError: the score is not a number per item.
    """
    metric, rows = scored_samples(samples)
    chosen = rows[0]["filter"]
    scores = [row[metric] for row in rows]
    if not all(isinstance(score, (int, float)) for score in scores):
        raise ValueError(f"the score {metric!r} is not a number per item, so that it has no mean over items")
    return (metric if chosen == "none" else f"{metric} ({chosen})"), [float(score) for score in scores]
