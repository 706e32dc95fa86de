"""Configuration of `DIPSFTTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import SFTConfig


@dataclass
class DIPSFTConfig(SFTConfig):
    """TRL's `SFTConfig`, and the strengths of this project's regularisers.

    Every auxiliary loss is off by default. DIPNet's objective (arXiv 2506.04690, Eq. 4) is on when the adapter is a
    DIPNet one, and off otherwise, whatever its fields say.

    Args:
        num_trajectories: m, noise samples per example and step. The cost grows with m only above the first noised
            block.
        variance_weight: α, weight of the variances; positive.
        log_variance_weight: β, weight of the log-variances; positive. The penalty alone is stationary at λ = β/α.
        stability_weight: λ_s, weight of the outputs' variance over trajectories; needs m ≥ 2. The paper's 0 is best
            for fine-tuning.
        penalty_reduction: "mean" over blocks and dimensions, or the paper's "sum".
        penalty_unit: whether λ in the penalty is "relative" to the squared RMS of the block's input, or "absolute" as
            in the paper.
        noise_learning_rate: learning rate of the log-variances, which get no weight decay.

    Raises:
        ValueError: a field's value makes no sense; the message names field, value and remedy.
    """

    num_trajectories: int = field(default=1, metadata={"help": "m, noise samples per example and step."})
    variance_weight: float = field(default=0.1, metadata={"help": "α, weight of the variances in DIPNet's penalty."})
    log_variance_weight: float = field(
        default=0.2, metadata={"help": "β, weight of the log-variances in DIPNet's penalty."}
    )
    stability_weight: float = field(
        default=0.0, metadata={"help": "λ_s, weight of the outputs' variance over trajectories (needs m ≥ 2)."}
    )
    penalty_reduction: str = field(
        default="mean",
        metadata={"help": "Reduction of DIPNet's penalty over blocks and dimensions.", "choices": ["mean", "sum"]},
    )
    penalty_unit: str = field(
        default="relative",
        metadata={"help": "Unit of the penalised variance.", "choices": ["relative", "absolute"]},
    )
    noise_learning_rate: float = field(
        default=1e-2, metadata={"help": "Learning rate of the log-variances, without weight decay."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_trajectories < 1:
            raise ValueError(f"num_trajectories={self.num_trajectories} must be at least 1.")
        for name in ("variance_weight", "log_variance_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be positive, or the variances vanish or explode; for noise of "
                    "fixed scale use `DIPNetConfig(learn_noise=False)`."
                )
        if not self.stability_weight >= 0:
            raise ValueError(f"stability_weight={self.stability_weight} must not be negative; 0 turns it off.")
        if self.stability_weight > 0 and self.num_trajectories < 2:
            raise ValueError(
                f"stability_weight={self.stability_weight} needs a variance over trajectories, but "
                f"num_trajectories={self.num_trajectories}; set num_trajectories to 2 or more, or the weight to 0."
            )
        for name, choices in (("penalty_reduction", ("mean", "sum")), ("penalty_unit", ("relative", "absolute"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(choices)}.")
        if not self.noise_learning_rate > 0:
            raise ValueError(
                f"noise_learning_rate={self.noise_learning_rate} must be positive; to freeze the noise use "
                "`DIPNetConfig(learn_noise=False)`."
            )
