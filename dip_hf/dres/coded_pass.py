"""What the coded branches of both placements share."""

from __future__ import annotations

import contextvars
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle

from dip_hf.dres.functional import decode, group_permutation, reconstruction_error


@dataclass
class DReSRecord:
    """What one forward pass leaves behind.

    Attributes:
        errors: per coded submodule's name its reconstruction error, a scalar in fp32 (fp64 in an fp64 model), with
            its gradient.
        groups: number of groups of K samples; 0 where the batch was too small for one.
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
        return torch.stack(list(self.errors.values())).mean()


class RandomState:
    """The default generators' state at one moment, on the CPU and on a CUDA device.

    Args:
        device: the device that the model computes on.
    """

    def __init__(self, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Inside, random numbers start again from that moment; afterwards they go on as if nothing had been drawn."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def rerun(state: RandomState, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `function` once more without a trace in the main branch.

    Left untouched are the main branch's random numbers, and what transformers records of it (`output_router_logits`
    and the like), which it collects in a context variable: the call gets a context of its own.
    """
    with state.replay():
        return contextvars.Context().run(function, *args, **kwargs)


class CodedPass(ABC):
    """Hooks that run the coded branch inside one forward pass.

    Args:
        modules: the coded submodules by name, in order of depth.
        group_size: K.
        coded_size: N.
        key: `NoiseKey.tensor()`, which the groups depend on.
        mask: valid positions, shape (batch, length), bool; None for all.
        detach_target: whether f(x) is a constant in the error.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        group_size: int,
        coded_size: int,
        key: Tensor,
        mask: Tensor | None,
        detach_target: bool,
    ) -> None:
        self.modules = modules
        self.group_size = group_size
        self.coded_size = coded_size
        self.key = key
        self.mask = mask
        self.detach_target = detach_target
        self.record = DReSRecord()

    @abstractmethod
    def attach(self) -> list[RemovableHandle]:
        """Register the hooks."""

    def valid_positions(self, length: int) -> Tensor | None:
        """The mask at the blocks' own length: prompt tuning puts virtual tokens in front, which are all valid."""
        return None if self.mask is None else pad(self.mask, (length - self.mask.shape[1], 0), value=True)

    def choose_groups(self, count: int, device: torch.device) -> Tensor:
        """Indices of the grouped samples, shape (K · G,), K-major; `count` % K random ones are left out."""
        self.record.groups = count // self.group_size
        return group_permutation(self.key, count)[: self.group_size * self.record.groups].to(device)

    def compare(self, name: str, outputs: Tensor, coded: Tensor, valid: Tensor | None = None) -> None:
        """Note the error of f(x_k), shape (K, ..., d), against what f(coded), shape (N, ..., d), decodes to."""
        target = outputs.detach() if self.detach_target else outputs
        self.record.errors[name] = reconstruction_error(target, decode(coded, self.group_size), valid)
