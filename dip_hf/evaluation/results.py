"""What an evaluation is asked for and what it yields; no lm-eval needed."""

from __future__ import annotations

from dataclasses import dataclass, field

from dip_hf.environment import resolve_device
from dip_hf.evaluation.checkpoints import Checkpoint
from dip_hf.evaluation.wording import Prediction


DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EvaluationSettings:
    """What is run, besides the checkpoints; every field goes into the report, and is an option of recipes/evaluate.py.

    Raises:
        ValueError: a value that makes no sense, or a device that is not there; names field, value and remedy.
    """

    model: str = field(metadata={"help": "The base: a folder, or a name on the Hub."})
    tasks: list[str] = field(
        default_factory=lambda: ["dip_reasoning"],
        metadata={"help": "lm-eval tasks or groups: this project's (evals/) and lm-eval's own; patterns work."},
    )
    include_path: str | None = field(
        default=None, metadata={"help": "Folder of task files besides lm-eval's own; the recipe's default is evals/."}
    )
    families: list[str] | None = field(
        default=None,
        metadata={"help": "Fine-tuning families the checkpoints were trained on; the others' tasks are left out."},
    )
    split: str = field(
        default="test",
        metadata={"help": "`test`, or `validation` to choose settings by; of this project's tasks only."},
    )
    limit: int | None = field(
        default=None,
        metadata={"help": "The first so many items of each task; all if not given, of this project's tasks 200."},
    )
    batch_size: int = field(
        default=128,
        metadata={
            "help": "Prompts per forward pass. Where samples are averaged, they become num_samples x batch_size rows."
        },
    )
    num_samples: int = field(
        default=0,
        metadata={
            "help": "Samples to average over for DIPNet adapters and `,dropout` without `samples=` of their own; the "
            "probabilities are averaged for each token, given the tokens before it. 0 is the plain pass: noise-free, "
            "by the posterior's mean."
        },
    )
    noise_seed: int = field(default=0, metadata={"help": "Seed of those samples."})
    calibration: bool = field(
        default=False,
        metadata={
            "help": "Negative log-likelihood, calibration error, Brier score and AUROC of the answers, with a "
            "reliability diagram; takes one more pass over the answers."
        },
    )
    in_distribution: str | None = field(
        default=None,
        metadata={
            "help": "The task set that the others are a shift from, and whose validation split temperatures are "
            "fitted on; the first if not given. Used by calibration."
        },
    )
    device: str | None = field(
        default=None, metadata={"help": "Such as `cuda`; a CUDA device where there is one if not given."}
    )
    dtype: str = field(
        default="auto", metadata={"help": "`float32`, `bfloat16` or `float16`; `auto` is the checkpoint's own."}
    )

    def __post_init__(self) -> None:
        for name in ("tasks", "families"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a list of names, if only of this one")
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
        revision: of a base from the Hub, for all checkpoints alike; None for main.
        cut_prompts: number of prompts longer than the model's context, of which it read the end only.
    """

    checkpoint: Checkpoint
    kind: str
    num_samples: int
    seconds: float
    tasks: tuple[TaskScores, ...]
    temperature: float | None = None
    weights: tuple[dict[str, str], ...] = ()
    revision: str | None = None
    cut_prompts: int = 0

    @property
    def prediction(self) -> Prediction:
        """How it predicts."""
        adapters = max(1, len(self.checkpoint.folders))
        return Prediction(adapters, self.num_samples, self.checkpoint.dropout, self.temperature)
