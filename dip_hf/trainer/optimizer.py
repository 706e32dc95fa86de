"""Parameter groups: the log-variances get a learning rate of their own and no weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer

from dip_hf.dipnet.export import NOISE_PREFIX
from dip_hf.trainer.config import DIPSFTConfig


def noise_group(groups: list[dict[str, Any]], model: nn.Module, args: DIPSFTConfig) -> dict[str, Any] | None:
    """Take the trainable log-variances out of `groups`, in place, into a group of their own.

    Args:
        groups: an optimiser's parameter groups.
        model: whose parameter names tell them.
        args: `noise_learning_rate`.

    Returns:
        The new group, not yet among `groups`; None where there is no trainable log-variance.
    """
    noise = [
        parameter
        for name, parameter in model.named_parameters()
        if f".{NOISE_PREFIX}" in name and parameter.requires_grad
    ]
    if not noise:
        return None
    known = {id(parameter) for parameter in noise}
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in known]
    return {"params": noise, "lr": args.noise_learning_rate, "weight_decay": 0.0}


def optimizer_groups(model: nn.Module, args: DIPSFTConfig) -> list[dict[str, Any]]:
    """The groups that `DIPSFTTrainer` would train `model` with, without a trainer; works on the meta device.

    Returns:
        Non-empty groups, each with `params`, `lr` and `weight_decay`: decayed, not decayed, log-variances.
    """
    # The method reads nothing of the trainer, so that its naming rules need no copy here.
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    groups: list[dict[str, Any]] = [
        {"params": [], "lr": args.learning_rate, "weight_decay": args.weight_decay},
        {"params": [], "lr": args.learning_rate, "weight_decay": 0.0},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name not in decayed]["params"].append(parameter)
    noise = noise_group(groups, model, args)
    return [group for group in [*groups, noise] if group and group["params"]]
