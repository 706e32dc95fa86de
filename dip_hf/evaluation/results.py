"""What an evaluation is asked for and what it yields; no lm-eval needed."""

from __future__ import annotations

from dataclasses import dataclass

from dip_hf.environment import resolve_device
from dip_hf.evaluation.checkpoints import Checkpoint
from dip_hf.evaluation.wording import Prediction


DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EvaluationSettings:
    """What is run, besides the checkpoints; every field goes into the report.

    Args:
        model: the base: a folder, or a name on the Hub.
        tasks: lm-eval tasks and groups.
        include_path: folder of task files besides lm-eval's own.
        families: fine-tuning families that the checkpoints were trained on; the others' tasks are left out. None: all.
        split: "test", or "validation" to choose settings by; this project's tasks only.
        limit: the first so many items of each task; None: all of them.
        batch_size: prompts per forward pass.
        num_samples: samples averaged over for checkpoints that have something to sample; 0 is the plain pass.
        noise_seed: seed of those samples.
        calibration: measure how well probabilities fit: one more pass over the answers of generation tasks.
        in_distribution: the task set that the others are a shift from; None: the first.
        device: such as "cuda"; None: a CUDA device where there is one.
        dtype: one of `DTYPES`; "auto" is the checkpoint's own.

    Raises:
        ValueError: a value that makes no sense, or a device that is not there; names field, value and remedy.
    """

    model: str
    tasks: tuple[str, ...]
    include_path: str | None = None
    families: tuple[str, ...] | None = None
    split: str = "test"
    limit: int | None = None
    batch_size: int = 128
    num_samples: int = 0
    noise_seed: int = 0
    calibration: bool = False
    in_distribution: str | None = None
    device: str | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in ("tasks", "families"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a tuple of names, if only of this one")
        for name in ("limit", "batch_size", "num_samples"):
            value = getattr(self, name)
            if not isinstance(value, int) and not (name == "limit" and value is None):
                raise ValueError(f"{name}={value!r} must be a whole number")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1 item per task; leave it out for all items")
        if self.split not in ("test", "validation"):
            raise ValueError(f"split={self.split!r} must be 'test' or 'validation'")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")
        resolve_device(self.device)
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")
        if self.num_samples < 0:
            raise ValueError(f"num_samples={self.num_samples} must be 0 (a plain pass) or the number to average over")
        if self.in_distribution is not None and not self.calibration:
            raise ValueError(f"in_distribution={self.in_distribution!r} is used by calibration only: turn that on too")


@dataclass(frozen=True)
class TaskScores:
    """One checkpoint's scores on one task.

    Attributes:
        task: lm-eval's name of it.
        task_set: the group it is averaged in, or its own name.
        metric: name of the score.
        scores: one per item, in the order of the items.
        items: lm-eval's hash of each item, by which checkpoints are paired.
        confidences: per item the probability that the model gives its own answer: of the generated one with its end,
            or of the chosen one among the choices. Empty without calibration.
        nlls: per item -ln of the probability of the reference answer with its end, or of the right choices among the
            choices, in nats. Empty without calibration.
    """

    task: str
    task_set: str
    metric: str
    scores: tuple[float, ...]
    items: tuple[str, ...]
    confidences: tuple[float, ...] = ()
    nlls: tuple[float, ...] = ()


@dataclass(frozen=True)
class CheckpointScores:
    """One checkpoint's scores on all tasks.

    Attributes:
        checkpoint: which one.
        kind: "base", "model", or the adapter's PEFT type.
        num_samples: as averaged for this one: 0 for a plain pass.
        seconds: time spent on loading, fitting, generating and scoring.
        tasks: in the order in which they were loaded.
        temperature: fitted, where one was asked for; else None.
        weights: for each folder that was loaded, its weight files' SHA-256; none for a base from the Hub.
    """

    checkpoint: Checkpoint
    kind: str
    num_samples: int
    seconds: float
    tasks: tuple[TaskScores, ...]
    temperature: float | None = None
    weights: tuple[dict[str, str], ...] = ()

    @property
    def prediction(self) -> Prediction:
        """How it predicts."""
        adapters = max(1, len(self.checkpoint.folders))
        return Prediction(adapters, self.num_samples, self.checkpoint.dropout, self.temperature)
