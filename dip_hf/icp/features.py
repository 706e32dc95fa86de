"""Recording what a forward pass does in the decoder blocks, and doing it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dip_hf.second_pass import Surroundings, block_output


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
        handed_on: output of the last block that has run, where blocks are to run again one after the other.
    """

    start: Surroundings
    rerun: Surroundings | None = None
    site: Tensor | None = None
    features: dict[int, Tensor] = field(default_factory=dict)
    backbone: Call | None = None
    calls: dict[int, Call] = field(default_factory=dict)
    handed_on: Tensor | None = None


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
