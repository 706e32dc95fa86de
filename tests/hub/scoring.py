"""lm-eval on one task file, with or without dip_hf."""

from __future__ import annotations

from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager


def score(model: Any, model_args: Any, task_folder: str, task: str) -> dict[str, Any]:
    """The task's accuracy, and each item's log-likelihoods of its choices."""
    result = simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=[task],
        task_manager=TaskManager(include_path=task_folder, include_defaults=False),
        limit=3,
        bootstrap_iters=0,
    )
    items = [[answer[0][0] for answer in sample["resps"]] for sample in result["samples"][task]]
    return {"accuracy": result["results"][task]["acc,none"], "log_likelihoods": items}
