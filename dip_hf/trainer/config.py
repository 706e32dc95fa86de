"""Configuration of `DIPSFTTrainer`."""

from __future__ import annotations

import copy
import math
from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from trl import SFTConfig

from dip_hf.blocks import parse_blocks
from dip_hf.dres.options import GRADIENTS, PLACEMENTS, DReSOptions
from dip_hf.icp.functional import DIRECTIONS, POSITIONS, UPDATES, WEIGHTINGS
from dip_hf.icp.options import ICPOptions


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
        stability_weight: λ_s, weight of the outputs' variance over trajectories; needs m ≥ 2. 0 is what the paper
            uses for fine-tuning.
        penalty_reduction: "mean" over blocks and dimensions, or the paper's "sum".
        penalty_unit: whether λ in the penalty is "relative" to the squared RMS of the block's input, or "absolute" as
            in the paper.
        noise_learning_rate: learning rate of the log-variances, which get no weight decay.
        variational_optimizer: how an adapter with a posterior is trained. "hybrid" (this project's departure from the
            paper): AdamW for the mean, SGD with momentum .9 for the covariances S. "faithful": SGD with momentum .9
            for all of it. Neither decays weights.
        variational_learning_rate: learning rate of S; unset for the mean's / R.
        dres_weight: μ, weight of DReS's reconstruction error (arXiv 2510.00253); 0 is off.
        dres_placement: "token" codes valid tokens through MLP sublayers; "sequence" codes rows of the batch through a
            range of blocks.
        dres_blocks: which blocks: "25%" for the last quarter, a number for the last n, indices, "all" or a pattern.
        dres_group_size: K, samples in a group.
        dres_oversampling: N/K, coded samples per sample.
        dres_share: share of the groups coded per step, a random sample of them; 1 is all.
        dres_gradient: "scale_free", so that shrinking f does not make the error smaller; "all" holds the variance that
            the error is divided by constant; "coded" f(x) too.
        icp_weight: w, weight of ICP's feature loss (arXiv 2505.14751); 0 is off.
        icp_steps: T, perturbation steps.
        icp_epsilon: ε, length of a step relative to the RMS of what it perturbs.
        icp_update: "normalised", "sign" or "adam".
        icp_direction: "descent", or one of its controls, "ascent" and "random".
        icp_positions: perturb "all" tokens, or those of the "prompt".
        icp_layers: number of block outputs compared.
        icp_start_block: 0 perturbs the embeddings; s > 0 the input of block s, rerunning only the blocks above.
        icp_interval: every n-th optimiser step only.
        icp_weighting: "additive" or "paper".
        icp_warmup: share of the run before the feature loss sets in.

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
        default=1e-3, metadata={"help": "Learning rate of the log-variances, without weight decay."}
    )

    variational_optimizer: str = field(
        default="hybrid",
        metadata={
            "help": "With a posterior: AdamW for the mean and SGD for the covariances, or SGD for both.",
            "choices": ["hybrid", "faithful"],
        },
    )
    variational_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the posterior's covariances; the mean's / R."}
    )

    dres_weight: float = field(default=0.0, metadata={"help": "μ, weight of DReS's reconstruction error; 0 is off."})
    dres_placement: str = field(
        default="token",
        metadata={"help": "Samples are valid tokens, or rows of the batch.", "choices": list(PLACEMENTS)},
    )
    dres_blocks: str = field(
        default="25%", metadata={"help": "The last blocks by a percentage or a number, 'all', '4,5,6' or a pattern."}
    )
    dres_group_size: int = field(default=8, metadata={"help": "K, samples in a group."})
    dres_oversampling: float = field(default=1.25, metadata={"help": "N/K, coded samples per sample."})
    dres_share: float = field(
        default=0.5, metadata={"help": "Share of the groups coded per step, a random sample of them."}
    )
    dres_gradient: str = field(
        default="scale_free",
        metadata={
            "help": "What of the error has a gradient: all of it (scale_free), all but the variance that divides it "
            "(all), or the coded branch alone (coded).",
            "choices": list(GRADIENTS),
        },
    )
    icp_weight: float = field(default=0.0, metadata={"help": "w, weight of ICP's feature loss; 0 is off."})
    icp_steps: int = field(default=1, metadata={"help": "T, perturbation steps."})
    icp_epsilon: float = field(default=0.03, metadata={"help": "ε, length of a step relative to the RMS."})
    icp_update: str = field(
        default="normalised",
        metadata={"help": "Direction of a step.", "choices": list(UPDATES)},
    )
    icp_direction: str = field(
        default="descent",
        metadata={"help": "Down the loss, or a control of it.", "choices": list(DIRECTIONS)},
    )
    icp_positions: str = field(default="all", metadata={"help": "Perturbed tokens.", "choices": list(POSITIONS)})
    icp_layers: int = field(default=4, metadata={"help": "Number of block outputs compared."})
    icp_start_block: int = field(default=0, metadata={"help": "0: the embeddings; s: the input of block s."})
    icp_interval: int = field(default=1, metadata={"help": "Every n-th optimiser step only."})
    icp_weighting: str = field(
        default="additive",
        metadata={"help": "(1, w(1-a)) or the paper's (a, w(1-a)).", "choices": list(WEIGHTINGS)},
    )
    icp_warmup: float = field(default=0.25, metadata={"help": "Share of the run before the feature loss sets in."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers()
        self.icp_options()
        self.dres_options()
        if not 0 <= self.dres_weight < math.inf:
            raise ValueError(f"dres_weight={self.dres_weight} must not be negative; 0 turns DReS off.")
        if self.num_trajectories < 1:
            raise ValueError(f"num_trajectories={self.num_trajectories} must be a whole number, at least 1.")
        for name in ("variance_weight", "log_variance_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be positive, or the variances vanish or explode; for noise of "
                    "fixed scale use `DIPNetConfig(learn_noise=False)`."
                )
        if not 0 <= self.stability_weight < math.inf:
            raise ValueError(f"stability_weight={self.stability_weight} must not be negative; 0 turns it off.")
        if self.stability_weight > 0 and self.num_trajectories < 2:
            raise ValueError(
                f"stability_weight={self.stability_weight} needs a variance over trajectories, but "
                f"num_trajectories={self.num_trajectories}; set num_trajectories to 2 or more, or the weight to 0."
            )
        for name in ("penalty_reduction", "penalty_unit", "variational_optimizer"):
            choices = DIPSFTConfig.__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(choices)}.")
        if not 0 < self.noise_learning_rate < math.inf:
            raise ValueError(
                f"noise_learning_rate={self.noise_learning_rate} must be positive; to freeze the noise use "
                "`DIPNetConfig(learn_noise=False)`."
            )
        rate = self.variational_learning_rate
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(
                f"variational_learning_rate={rate} must be positive; leave it unset for learning_rate / R, or use "
                "`DIPNetConfig(variational_scale=0)` for no covariance."
            )

        self._check_second_pass()

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: all but access tokens, as Trainer pushes its pickled arguments with every checkpoint."""
        return {name: None if name.endswith("hub_token") else value for name, value in vars(self).items()}

    # Copies would go through the pickled state too, but stay in this process, where they may push: transformers'
    # callback for W&B makes a Trainer of one. A process that unpickles a config takes HF_TOKEN or the Hub's login
    def __copy__(self) -> DIPSFTConfig:
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> DIPSFTConfig:
        memo[id(self)] = copied = object.__new__(type(self))
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        return copied

    def _check_numbers(self) -> None:
        """A number that is none would fail in a comparison, which names no field."""
        # As they stand above: transformers' parser writes over the types that `fields` gives
        for name, kind in DIPSFTConfig.__annotations__.items():
            value = getattr(self, name)
            if "int" in kind and (not isinstance(value, int) or isinstance(value, bool)):
                raise ValueError(f"{name}={value!r} must be a whole number.")
            optional = value is None and "None" in kind
            if "float" in kind and not optional and (not isinstance(value, int | float) or isinstance(value, bool)):
                raise ValueError(f"{name}={value!r} must be a number.")

    def _check_second_pass(self) -> None:
        """DReS and ICP pass through blocks twice, which some of Trainer's options do not bear."""
        given: dict[str, Any] = self.activation_checkpointing_kwargs or {}
        # What is not transformers' or TRL's own goes to torch's checkpoints, which are reentrant unless told otherwise
        of_torch = given.keys() - {"every_n_layers", "offload", "selective"}
        reentrant = of_torch and given.get("use_reentrant") is not False
        if self.activation_checkpointing and reentrant and (self.dres_weight > 0 or self.icp_weight > 0):
            raise ValueError(
                f"activation_checkpointing_kwargs={given} makes checkpoints reentrant, which does not work with "
                "dres_weight or icp_weight, which pass through blocks twice; set its use_reentrant to False."
            )
        if self.activation_checkpointing and given.get("selective") and self.icp_weight > 0:
            raise ValueError(
                f"activation_checkpointing_kwargs={given} does not work with icp_weight, which reads the saved "
                "activations twice; remove 'selective', or set icp_weight to 0."
            )
        if self.icp_weight > 0 and self.activation_offloading:
            raise ValueError(
                "activation_offloading=True does not work with icp_weight, which reads the saved activations twice; "
                "use activation_checkpointing=True instead, or set icp_weight to 0."
            )
        if self.icp_weight > 0 and self.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel=True does not work with icp_weight, which goes backward twice through one graph: "
                "Liger's MLPs write their gradients over what they saved; set it to False, or icp_weight to 0."
            )
        if (self.dres_weight > 0 or self.icp_weight > 0) and self.torch_compile:
            raise ValueError(
                "torch_compile=True does not work with dres_weight or icp_weight, whose hooks come and go between "
                "steps, which compiled code does not see; set torch_compile to False, or these weights to 0."
            )
        if self.icp_steps > 1 and self.loss_type != "nll" and self.icp_weight > 0:
            raise ValueError(
                f"icp_steps={self.icp_steps} descends on loss_type='nll', but loss_type={self.loss_type!r}; set "
                "icp_steps to 1."
            )

    def icp_options(self) -> ICPOptions:
        """The `icp_*` fields, checked."""
        names = [option.name for option in fields(ICPOptions)]
        return ICPOptions(**{name: getattr(self, f"icp_{name}") for name in names})

    def dres_options(self) -> DReSOptions:
        """The `dres_*` fields but the weight, checked."""
        given = {option.name: getattr(self, f"dres_{option.name}") for option in fields(DReSOptions)}
        return DReSOptions(**{**given, "blocks": parse_blocks(self.dres_blocks)})


def own_config(args: TrainingArguments) -> DIPSFTConfig:
    """The `DIPSFTConfig` with the fields of another config, such as TRL's `SFTConfig`, and the defaults for the rest.

    Raises:
        ValueError: `args` has fields that `DIPSFTConfig` lacks, which would be lost.
    """
    given = {field.name: getattr(args, field.name) for field in fields(args) if field.init}
    unknown = [name for name in given if name not in DIPSFTConfig.__dataclass_fields__]
    if unknown:
        raise ValueError(
            f"args={type(args).__name__} has the fields {', '.join(unknown)}, which DIPSFTConfig lacks; give a "
            "DIPSFTConfig, or a class of your own that is derived from it."
        )
    shared = {"parallelism_config": given["parallelism_config"]}  # holds processes, which have no copy
    return DIPSFTConfig(
        **copy.deepcopy({name: value for name, value in given.items() if name not in shared}), **shared
    )
