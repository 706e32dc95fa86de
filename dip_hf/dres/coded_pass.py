"""What the coded branches of both placements share."""

from __future__ import annotations

import contextvars
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dip_hf.dres.functional import decode, group_permutation, reconstruction_error
from dip_hf.dres.options import DReSOptions
from dip_hf.second_pass import IN_SECOND_PASS, Surroundings, fit_mask


@dataclass
class DReSRecord:
    """What one forward pass leaves behind.

    Attributes:
        errors: per coded submodule's name its reconstruction error, a scalar in fp32 (fp64 in an fp64 model), with
            its gradient.
        groups: number of coded groups of K samples; 0 where the batch was too small for one.
    """

    errors: dict[str, Tensor] = field(default_factory=dict)
    groups: int = 0

    @property
    def error(self) -> Tensor:
        """The raw term: the mean of the errors, 0 where there was no group.

        Raises:
            RuntimeError: no forward pass has run.
        """
        if not self.errors:
            raise RuntimeError("DReS: no forward pass has run inside `attached`, so there is no error yet.")
        errors = list(self.errors.values())
        device = errors[0].device  # a model may be split over several
        return torch.stack([error.to(device) for error in errors]).mean()


def rerun(surroundings: Surroundings, function: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
    """Call `function` once more without a trace in the main branch.

    Left untouched are the main branch's random numbers, and what transformers records of it (`output_router_logits`
    and the like), which it collects in a context variable: the call gets a context of its own.
    """
    context = contextvars.Context()
    context.run(IN_SECOND_PASS.set, True)
    with surroundings.restored_generators():
        return context.run(function, given)


class CodedPass(ABC):
    """Hooks that run the coded branch inside one forward pass.

    Args:
        modules: the coded submodules by name, in order of depth.
        options: as for `DReSBranch`.
        key: `NoiseKey.tensor()`, which the groups depend on.
        mask: valid positions, shape (batch, length), bool; None for all.
    """

    def __init__(self, modules: dict[str, nn.Module], options: DReSOptions, key: Tensor, mask: Tensor | None) -> None:
        self.modules = modules
        self.options = options
        self.key = key
        self.mask = mask
        self.record = DReSRecord()

    @abstractmethod
    def attach(self, hooks: ExitStack) -> None:
        """Register the hooks, which are gone when `hooks` closes."""

    def valid_positions(self, states: Tensor) -> Tensor | None:
        """The mask for `states`, shape (rows, length); virtual tokens in front, from prompt tuning, are all valid."""
        return None if self.mask is None else fit_mask(self.mask, states, in_front=True)

    def all_groups(self, count: int) -> Tensor:
        """Indices of `count` samples in groups, shape (K, G), on the CPU; `count` % K random ones are left out."""
        return group_permutation(self.key, count)[: count - count % self.options.group_size].unflatten(
            0, (self.options.group_size, -1)
        )

    def choose_groups(self, count: int, device: torch.device) -> Tensor:
        """Indices of the samples in the coded groups, shape (K · C,), K-major: a random share of all groups."""
        groups = self.all_groups(count)
        self.record.groups = min(groups.shape[1], max(1, math.ceil(round(self.options.share * groups.shape[1], 9))))
        return groups[:, : self.record.groups].flatten().to(device)

    def compare(self, name: str, outputs: Tensor, coded: Tensor, valid: Tensor | None = None) -> None:
        """Note the error of f(x_k), shape (K, ..., d), against what f(coded), shape (N, ..., d), decodes to."""
        target = outputs.detach() if self.options.gradient == "coded" else outputs
        decoded = decode(coded, self.options.group_size)
        scale_free = self.options.gradient == "scale_free"
        self.record.errors[name] = reconstruction_error(target, decoded, valid, detach_variance=not scale_free)
