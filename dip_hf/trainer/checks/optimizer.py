"""Checks of the optimiser that is to train noise and posteriors."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from dip_hf.dipnet.layer import LOG_VARIANCE
from dip_hf.ibvi.layer import COVARIANCE
from dip_hf.trainer.config import DIPSFTConfig
from dip_hf.trainer.optimizer import OTHER_OPTIMISER, trainable


_ADAM_FIELDS = ("adam_beta1", "adam_beta2", "adam_epsilon")
# Of transformers', those that step a parameter as its gradient comes, whatever groups the optimiser has
_OUTSIDE_OF_GROUPS = ("lomo", "adalomo")
_LAYERWISE = "_layerwise"


def check_posterior(model: nn.Module, args: DIPSFTConfig) -> None:
    """
    Raises:
        ValueError: an optimiser setting that contradicts `variational_optimizer`, weight decay, or DReS, whose coded
            samples would mix trajectories with weights of their own.
    """
    if not trainable(model, COVARIANCE):
        return
    if args.weight_decay != 0:
        raise ValueError(
            f"weight_decay={args.weight_decay} with variational_rank > 0: the posterior keeps its prior where the "
            "data say nothing, which decay undoes; set weight_decay to 0."
        )
    adamw = ("adamw_torch", "adamw_torch_fused")
    optim, faithful = str(args.optim.value), args.variational_optimizer == "faithful"
    if optim not in (*adamw, "sgd" if faithful else ""):
        raise ValueError(
            f"optim={optim!r} does not work with variational_optimizer={args.variational_optimizer!r}, which brings "
            f"its own; leave optim unset ({adamw[1]!r})."
        )
    defaults = {name: DIPSFTConfig.__dataclass_fields__[name].default for name in _ADAM_FIELDS}
    changed = [f"{name}={getattr(args, name)}" for name in _ADAM_FIELDS if getattr(args, name) != defaults[name]]
    if faithful and changed:
        raise ValueError(
            f"{', '.join(changed)}: AdamW's, but variational_optimizer='faithful' trains with SGD; leave them unset, "
            "or set variational_optimizer to 'hybrid'."
        )
    if args.dres_weight > 0 and args.num_trajectories > 1:
        raise ValueError(
            f"dres_weight={args.dres_weight} with num_trajectories={args.num_trajectories} and variational_rank > 0: "
            "trajectories have weights of their own, which coded samples would mix; set num_trajectories to 1."
        )


def check_own_optimizer(model: nn.Module, args: DIPSFTConfig, optimizer: Any, class_and_arguments: Any) -> None:
    """What trains the model in place of the optimiser that `compose_optimizer` would make; warns where the noise has
    no learning rate of its own under it.

    Args:
        model: with its adapter.
        args: the training arguments.
        optimizer: of the trainer's `optimizers`, or None.
        class_and_arguments: its `optimizer_cls_and_kwargs`, or None.

    Raises:
        ValueError: there is a posterior, whose covariance needs groups and SGD of its own; or learnable noise under
            an optimiser that heeds no groups.
    """
    deepspeed = "the optimizer section of DeepSpeed's configuration"
    named = {"optimizers": optimizer, "optimizer_cls_and_kwargs": class_and_arguments}
    given = [name for name, value in named.items() if value is not None]
    # Read where transformers reads it: `accelerate launch` can give it too
    if args.deepspeed_plugin is not None and "optimizer" in args.deepspeed_plugin.hf_ds_config.config:
        given.append(deepspeed)
    if given and trainable(model, COVARIANCE):
        raise ValueError(
            f"{given[0]} with variational_rank > 0: variational_optimizer={args.variational_optimizer!r} brings its "
            f"own optimiser, whose steps make the posterior what it is; leave {given[0]} unset."
        )
    if not trainable(model, LOG_VARIANCE):
        return
    if deepspeed in given:
        warnings.warn(
            f"noise_learning_rate={args.noise_learning_rate} has no effect: {deepspeed} trains the log-variances like "
            "all else, with its weight decay; remove that section.",
            stacklevel=3,
        )
    elif optimizer is not None:
        warnings.warn(
            f"noise_learning_rate={args.noise_learning_rate} has no effect: the log-variances are trained by the "
            "optimiser in `optimizers`, as it says; give them a group without weight decay there.",
            stacklevel=3,
        )
    elif class_and_arguments is None:
        optim = str(args.optim.value)
        if optim in _OUTSIDE_OF_GROUPS or optim.endswith(_LAYERWISE):
            raise ValueError(
                f"optim={optim!r} steps each parameter by itself, so that noise_learning_rate="
                f"{args.noise_learning_rate} has no effect; {OTHER_OPTIMISER}."
            )
