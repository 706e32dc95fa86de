"""Parameter groups: log-variances and posterior covariances get learning rates of their own and no weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

from dip_hf.dipnet.layer import LOG_VARIANCE
from dip_hf.ibvi.layer import COVARIANCE
from dip_hf.trainer.config import DIPSFTConfig
from dip_hf.trainer.hybrid import HybridOptimizer


MOMENTUM = 0.9
"""Of SGD on the posterior (arXiv 2505.20235)."""
OTHER_OPTIMISER = "take another optimiser, or use `DIPNetConfig(learn_noise=False)`"


def trainable(model: nn.Module, kind: str) -> dict[str, nn.Parameter]:
    """The trainable parameters, by name, of the modules that the tuner calls `kind`."""
    return {name: p for name, p in model.named_parameters() if f".{kind}." in name and p.requires_grad}


def _take(groups: list[dict[str, Any]], wanted: Callable[[nn.Parameter], bool]) -> list[nn.Parameter]:
    """Take parameters out of `groups`, in place, and return them."""
    taken = []
    for group in groups:
        taken += [parameter for parameter in group["params"] if wanted(parameter)]
        group["params"] = [parameter for parameter in group["params"] if not wanted(parameter)]
    return taken


def noise_group(groups: list[dict[str, Any]], model: nn.Module, args: DIPSFTConfig) -> dict[str, Any] | None:
    """Take the trainable log-variances out of `groups`, in place, into a group of their own.

    Args:
        groups: an optimiser's parameter groups.
        model: whose parameter names tell them.
        args: `noise_learning_rate`.

    Returns:
        The new group, not yet among `groups`; None where there is no trainable log-variance.
    """
    known = {id(parameter) for parameter in trainable(model, LOG_VARIANCE).values()}
    noise = _take(groups, lambda parameter: id(parameter) in known)
    return {"params": noise, "lr": args.noise_learning_rate, "weight_decay": 0.0} if noise else None


def posterior_groups(groups: list[dict[str, Any]], model: nn.Module, args: DIPSFTConfig) -> list[dict[str, Any]]:
    """Take what SGD trains out of `groups`, in place: covariances, and under `faithful` everything else in them.

    The covariances' learning rate is the mean's / R, R their rank (arXiv 2505.20235's authors' code), unless
    `variational_learning_rate` says otherwise. Nothing here decays.

    Args:
        groups: an optimiser's parameter groups, without the log-variances.
        model: whose parameter names tell the covariances.
        args: `learning_rate`, `variational_learning_rate` and `variational_optimizer`.

    Returns:
        The new groups, one for each rank; empty where there is no trainable covariance.
    """
    known = {id(parameter) for parameter in trainable(model, COVARIANCE).values()}
    covariances = _take(groups, lambda parameter: id(parameter) in known)
    if not covariances:
        return []
    mean = _take(groups, lambda parameter: True) if args.variational_optimizer == "faithful" else []
    found = [{"params": mean, "lr": args.learning_rate, "weight_decay": 0.0}] if mean else []
    for rank in sorted({len(parameter) for parameter in covariances}):
        rate = args.variational_learning_rate
        found.append(
            {
                "params": [parameter for parameter in covariances if len(parameter) == rank],
                "lr": args.learning_rate / rank if rate is None else rate,
                "weight_decay": 0.0,
            }
        )
    return found


def compose_optimizer(optimizer: Optimizer, model: nn.Module, args: DIPSFTConfig) -> Optimizer:
    """The optimiser that Trainer made, with log-variances and posteriors in groups of their own.

    Args:
        optimizer: over all trainable parameters of `model`; its groups are changed in place.
        model: the model that is trained.
        args: as for the groups.

    Returns:
        `optimizer`; or, with a trainable posterior, a `HybridOptimizer` of it and of SGD with momentum .9.

    Raises:
        ValueError: the log-variances are in none of its groups.
    """
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(parameter) not in known for parameter in trainable(model, LOG_VARIANCE).values()):
        raise ValueError(
            f"noise_learning_rate={args.noise_learning_rate} has no effect: {type(optimizer).__name__} has the "
            f"log-variances in none of its groups; {OTHER_OPTIMISER}."
        )
    noise = noise_group(optimizer.param_groups, model, args)
    posterior = posterior_groups(optimizer.param_groups, model, args)
    if noise is not None:
        optimizer.add_param_group(noise)
    if not posterior:
        return optimizer
    return HybridOptimizer([optimizer, torch.optim.SGD(posterior, lr=args.learning_rate, momentum=MOMENTUM)])


def optimizer_groups(model: nn.Module, args: DIPSFTConfig) -> list[dict[str, Any]]:
    """The groups that `DIPSFTTrainer` would train `model` with, without a trainer; works on the meta device.

    Returns:
        Non-empty groups, each with `params`, `lr` and `weight_decay`: decayed, not decayed, log-variances, and what
        SGD trains of a posterior, with `momentum` besides.
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
    posterior = [{**group, "momentum": MOMENTUM} for group in posterior_groups(groups, model, args)]
    return [group for group in [*groups, noise, *posterior] if group and group["params"]]
