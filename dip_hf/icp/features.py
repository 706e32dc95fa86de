"""Recording what a forward pass does in the decoder blocks, and doing it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle


class Call(NamedTuple):
    """The arguments of a module's call."""

    args: tuple
    kwargs: dict[str, Any]


def hidden_states(call: Call) -> Tensor:
    """A block's input: its first argument, or the one of that name."""
    return call.args[0] if call.args else call.kwargs["hidden_states"]


def with_hidden_states(call: Call, states: Any) -> Call:
    """The same call with another input."""
    if call.args:
        return Call((states, *call.args[1:]), call.kwargs)
    return Call((), {**call.kwargs, "hidden_states": states})


def block_output(output: Any) -> Tensor:
    """The hidden states that a block returns, alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


class Surroundings(NamedTuple):
    """What a rerun needs to see besides its arguments, so that dropout and precision are those of the first run.

    Attributes:
        states: per device, the state of its random generator.
        autocast: per kind of device, whether autocast is on and its dtype. Accelerate turns it on in the wrapped
            model's `forward`, outside of which a rerun happens.
    """

    states: dict[torch.device, Tensor]
    autocast: dict[str, tuple[bool, torch.dtype]]

    @classmethod
    def now(cls, devices: set[torch.device]) -> Surroundings:
        """Those of this moment, for the CPU and `devices`."""
        others = {device for device in devices if device.type not in ("cpu", "meta")}
        states = {device: torch.get_device_module(device).get_rng_state(device) for device in others}
        kinds = {device.type for device in others} | {"cpu"}
        return cls(
            {torch.device("cpu"): torch.get_rng_state(), **states},
            {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds},
        )

    @contextmanager
    def restored_generators(self) -> Iterator[None]:
        """Draw what was drawn from then on; afterwards the generators go on from where they were."""
        others: dict[str, list[torch.device]] = {}
        for device in self.states:
            if device.type != "cpu":
                others.setdefault(device.type, []).append(device)
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            for kind, devices in others.items():
                stack.enter_context(torch.random.fork_rng(devices=devices, device_type=kind))
            for device, state in self.states.items():
                if device.type == "cpu":
                    torch.set_rng_state(state)
                else:
                    torch.get_device_module(device).set_rng_state(state, device)
            yield

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Generators as in `restored_generators`, and autocast as it was."""
        with ExitStack() as stack:
            stack.enter_context(self.restored_generators())
            for kind, (enabled, dtype) in self.autocast.items():
                # Without the cache: a weight cast here, without gradient, must not serve a later training pass.
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            yield


@dataclass
class ICPRecord:
    """What the clean pass leaves behind.

    Attributes:
        start: surroundings in which the whole pass began.
        rerun: surroundings at the point from which the teacher's pass begins.
        site: what gets perturbed, shape (rows, length, d), a node of the clean graph.
        features: block index to its output, with gradient.
        backbone: the backbone's call.
        calls: block index to its call, without the hidden states; from the start block on.
    """

    start: Surroundings
    rerun: Surroundings | None = None
    site: Tensor | None = None
    features: dict[int, Tensor] = field(default_factory=dict)
    backbone: Call | None = None
    calls: dict[int, Call] = field(default_factory=dict)


@contextmanager
def removed_on_exit() -> Iterator[Callable[[RemovableHandle], None]]:
    """Hooks handed to what this yields are gone when the context closes."""
    handles: list[RemovableHandle] = []
    try:
        yield handles.append
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def keep_outputs(blocks: Mapping[int, nn.Module], into: dict[int, Tensor], with_grad: bool) -> Iterator[None]:
    """Put the blocks' outputs `into` a dictionary: the first of each, for other hooks may run a block once more.

    Args:
        blocks: index to block.
        into: index to output.
        with_grad: look at passes with gradient alone, or at passes without alone.
    """

    def keep(index: int) -> Callable[[nn.Module, tuple, Any], None]:
        def hook(block: nn.Module, args: tuple, output: Any) -> None:
            if torch.is_grad_enabled() == with_grad:
                into.setdefault(index, block_output(output))

        return hook

    with removed_on_exit() as remove_later:
        for index, block in blocks.items():
            remove_later(block.register_forward_hook(keep(index)))
        yield


def evenly_spaced(start: int, depth: int, n: int) -> list[int]:
    """The last block of each of n equal parts of the blocks `start` to `depth` - 1; all where there are no more."""
    span = depth - start
    n = min(n, span)
    return [start + -(-(k + 1) * span // n) - 1 for k in range(n)]


def fit_mask(mask: Tensor, states: Tensor) -> Tensor:
    """A mask of the batch, shape (batch, length), for hidden states that may have more rows and positions.

    Rows are repeated for folded trajectories; tokens put in front by a prompt-learning adapter are not in the mask.
    """
    mask = F.pad(mask, (states.shape[1] - mask.shape[1], 0))
    return mask.repeat(states.shape[0] // mask.shape[0], 1).to(states.device)
