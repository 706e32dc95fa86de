"""Regularisers that are on and do nothing, which only shows when training runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dip_hf.dipnet.config import DIPNetConfig
from dip_hf.dipnet.layer import LOG_VARIANCE
from dip_hf.dres import DReSBranch
from dip_hf.ibvi.layer import COVARIANCE
from dip_hf.icp import ICPOptions
from dip_hf.trainer.config import DIPSFTConfig
from dip_hf.trainer.objective import own_parameters
from dip_hf.trainer.optimizer import trainable


_OF_ADAPTER = ("num_trajectories", "stability_weight")
_OF_LEARNED_NOISE = (
    "variance_weight",
    "log_variance_weight",
    "penalty_reduction",
    "penalty_unit",
    "noise_learning_rate",
)
_OF_POSTERIOR = ("variational_optimizer", "variational_learning_rate")


def warn_of_idle_fields(model: nn.Module, args: DIPSFTConfig) -> None:
    """Warn of what was asked of a method that is off: LoRA as a baseline is no mistake, to have forgotten
    `DIPNetConfig`, one of its fields or a weight is one.

    Args:
        model: the trained one, with its adapter.
        args: of the trainer; a field says something where it has another value than by default.
    """
    names = DIPSFTConfig.__dataclass_fields__
    for present, of_method, lacking in (
        (own_parameters(model), _OF_ADAPTER, "DIPNet adapter; pass peft_config=DIPNetConfig(...)"),
        (trainable(model, LOG_VARIANCE), _OF_LEARNED_NOISE, "noise that learns; see DIPNetConfig(noise_blocks=...)"),
        (trainable(model, COVARIANCE), _OF_POSTERIOR, "posterior; set DIPNetConfig(variational_rank=...)"),
    ):
        asked = _asked(args, of_method)
        if asked and not present:
            warnings.warn(f"{asked} without effect: the model has no {lacking}.", stacklevel=3)
    off = [
        (args, [name for name in names if name.startswith("dres_")], "dres_weight"),
        (args, [name for name in names if name.startswith("icp_")], "icp_weight"),
    ]
    if isinstance(model, PeftModel):
        configs = [config for config in model.peft_config.values() if isinstance(config, DIPNetConfig)]
        off += [(config, ["variational_scale", "variational_blocks"], "variational_rank") for config in configs]
    for settings, asked_of, strength in off:
        asked = _asked(settings, asked_of)
        if asked and getattr(settings, strength) == 0:
            warnings.warn(f"{asked} without effect: {strength}={getattr(settings, strength)} is off.", stacklevel=3)


def _asked(settings: Any, names: Iterable[str]) -> str:
    """Those fields of a dataclass that have another value than by default."""
    fields = settings.__dataclass_fields__
    changed = [name for name in names if getattr(settings, name) != fields[name].default]
    return " and ".join(f"{name}={getattr(settings, name)}" for name in changed)


def warn_of_idle_terms(metrics: Mapping[str, Sequence[float]], args: DIPSFTConfig, dres: DReSBranch | None) -> None:
    """Warn of terms that do not train what they were to.

    Args:
        metrics: each term's values since the last log line.
        args: of the trainer.
        dres: its branch, or None.
    """
    errors, features = metrics.get("dres/error"), metrics.get("icp/features")
    if dres is not None and errors and not any(errors):
        warnings.warn(
            f"dres/error is exactly 0: no batch since the last log filled a group of dres_group_size="
            f"{dres.options.group_size}; lower it, or give larger batches.",
            stacklevel=3,
        )
    elif dres is not None and errors and fmean(errors) < dres.floor / 10:
        other = "" if args.dres_gradient == "scale_free" else ", or set dres_gradient='scale_free'"
        warnings.warn(
            f"dres/error is less than a tenth of {dres.floor:.4f}, the error of a linear map: what "
            f"DReS codes has become as good as constant, which is not smoothing; lower dres_weight{other}.",
            stacklevel=3,
        )
    if args.icp_positions == "prompt" and features and not any(features):
        warnings.warn(
            "icp/features is exactly 0: icp_positions='prompt' perturbs tokens without a label, of which no batch "
            "since the last log had one; give prompts and completions, or set icp_positions to 'all'.",
            stacklevel=3,
        )


class IdleICP(TrainerCallback):
    """Warns when training begins of an ICP that will not act in any of its steps.

    Args:
        options: ICP's.
    """

    def __init__(self, options: ICPOptions) -> None:
        self.options = options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        options, last = self.options, state.max_steps
        steps = range(state.global_step, last)
        if steps and not any(options.due(step) and options.term_weights(step / last)[1] > 0 for step in steps):
            warnings.warn(
                f"icp_weight={options.weight} has no effect in steps {steps.start} to {steps.stop - 1}: "
                f"icp_warmup={options.warmup} and icp_interval={options.interval} leave it none; lower them, or train "
                "longer.",
                stacklevel=2,
            )
