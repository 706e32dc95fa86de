"""What DReS and ICP share: running blocks a second time beside a training step's own pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


IN_SECOND_PASS: ContextVar[bool] = ContextVar("in_second_pass", default=False)
"""Whether blocks run for the second time, on purpose with what the first time drew."""


class Surroundings(NamedTuple):
    """What a second pass needs to see besides its arguments, so that dropout and precision are those of the first.

    Attributes:
        states: per device, the state of its default random generator.
        autocast: per kind of device, whether autocast is on and its dtype. Accelerate turns it on in the wrapped
            model's `forward`, outside of which a second pass may happen.
    """

    states: dict[torch.device, Tensor]
    autocast: dict[str, tuple[bool, torch.dtype]]

    @classmethod
    def now(cls, devices: Iterable[torch.device]) -> Surroundings:
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
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            for device, state in self.states.items():
                if device.type == "cpu":
                    torch.set_rng_state(state)
                else:
                    stack.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
                    torch.get_device_module(device).set_rng_state(state, device)
            yield

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Generators as in `restored_generators`, and autocast as it was."""
        with ExitStack() as stack:
            stack.enter_context(self.restored_generators())
            for kind, (enabled, dtype) in self.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype, enabled))
            yield


def block_output(output: Any) -> Tensor:
    """The hidden states that a block returns, alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def is_handed_on(states: Tensor, output: Tensor | None) -> bool:
    """Whether a block's input is the output of the block before it, or a view of all of it: nothing came between.

    True too where it has other rows: a hook in front has folded trajectories into them.
    """
    if states is output:
        return True
    return output is not None and (states.shape != output.shape or states.data_ptr() == output.data_ptr())


def fit_mask(mask: Tensor, states: Tensor, in_front: bool) -> Tensor:
    """A mask of the batch for hidden states that may have more rows and positions.

    Rows are repeated for folded trajectories, trajectory-major. A mask has no entry for tokens that a prompt-learning
    adapter puts in front.

    Args:
        mask: shape (batch, length), bool.
        states: shape (m · batch, tokens in front + length, d).
        in_front: the mask's value at the tokens in front.

    Returns:
        Shape (m · batch, tokens in front + length), bool, on the device of `states`.
    """
    mask = pad(mask, (states.shape[1] - mask.shape[1], 0), value=in_front)
    return mask.repeat(states.shape[0] // mask.shape[0], 1).to(states.device)
