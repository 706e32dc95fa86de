"""What an evaluation is asked for and what it yields; no lm-eval needed."""

from __future__ import annotations

from dataclasses import dataclass

from dip_hf.evaluation.checkpoints import Checkpoint


@dataclass(frozen=True)
class EvaluationSettings:
    """What is run, besides the checkpoints; every field goes into the report.

    Args:
        model: the base: a folder, or a name on the Hub.
        tasks: lm-eval tasks and groups.
        include_path: folder of task files besides lm-eval's own.
        families: fine-tuning families that the checkpoints were trained on; the others' tasks are left out. None: all.
        limit: the first so many items of each task; None: all of them.
        batch_size: prompts per forward pass.
        trajectories: noise trajectories averaged for checkpoints that have noise; 0 is the noise-free pass.
        noise_seed: seed of those trajectories.
        device: such as "cuda"; None: a GPU where there is one.
        dtype: such as "bfloat16"; "auto" is the checkpoint's own.
    """

    model: str
    tasks: tuple[str, ...]
    include_path: str | None = None
    families: tuple[str, ...] | None = None
    limit: int | None = None
    batch_size: int = 128
    trajectories: int = 0
    noise_seed: int = 0
    device: str | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1 item per task; leave it out for all items")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")
        if self.trajectories < 0:
            raise ValueError(f"trajectories={self.trajectories} must be 0 (noise-free) or the number to average over")


@dataclass(frozen=True)
class TaskScores:
    """One checkpoint's scores on one task.

    Attributes:
        task: lm-eval's name of it.
        task_set: the group it is averaged in, or its own name.
        metric: name of the score.
        scores: one per item, in the order of the items.
        items: lm-eval's hash of each item, by which checkpoints are paired.
    """

    task: str
    task_set: str
    metric: str
    scores: tuple[float, ...]
    items: tuple[str, ...]


@dataclass(frozen=True)
class CheckpointScores:
    """One checkpoint's scores on all tasks.

    Attributes:
        checkpoint: which one.
        kind: "base", "model", or the adapter's PEFT type.
        trajectories: as averaged for this one: 0 where it has no noise.
        seconds: time spent on loading, generating and scoring.
        tasks: in the order in which they were loaded.
    """

    checkpoint: Checkpoint
    kind: str
    trajectories: int
    seconds: float
    tasks: tuple[TaskScores, ...]
