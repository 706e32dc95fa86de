"""How decoder blocks are called: what folds, codes or repeats a batch reads a block's arguments here alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import Cache


BY_HEAD = ("alibi", "position_bias")
"""Arguments of blocks with a row for each head, or each head of each example, and not for each row of the batch."""


class BlockCall(NamedTuple):
    """The arguments of a block's call. Its hidden states are the first of them, or the one of that name."""

    args: tuple
    kwargs: dict[str, Any]

    @property
    def hidden_states(self) -> Tensor:
        """The block's input."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def with_hidden_states(self, states: Tensor | None) -> BlockCall:
        """The same call with another input."""
        if self.args:
            return BlockCall((states, *self.args[1:]), self.kwargs)
        return BlockCall((), {**self.kwargs, "hidden_states": states})

    def others(self, block: nn.Module) -> dict[str, Any]:
        """All arguments but the hidden states, by name; those given by position have the names of `block.forward`."""
        given = zip(self._names(block), self.args[1:], strict=False)
        return {**dict(given), **{name: value for name, value in self.kwargs.items() if name != "hidden_states"}}

    def changed(self, block: nn.Module, change: Callable[[str, Any], Any]) -> BlockCall:
        """The same call with every argument but the hidden states as `change` makes it of its name and value.

        What was given by position stays there, where activation checkpointing looks for it.
        """
        rest = [change(name, value) for name, value in zip(self._names(block), self.args[1:], strict=True)]
        kwargs = {
            name: value if name == "hidden_states" else change(name, value) for name, value in self.kwargs.items()
        }
        return BlockCall((*self.args[:1], *rest), kwargs)

    def _names(self, block: nn.Module) -> list[str]:
        """Names of the arguments behind the first that were given by position; of a forward that takes any, none."""
        if len(self.args) < 2:
            return []
        names = list(inspect.signature(block.forward).parameters)[1 : len(self.args)]
        return names + [""] * (len(self.args) - 1 - len(names))


def cached_length(cache: Cache) -> int:
    """How many positions' keys and values a cache holds; 0 where it keeps states of recurrent layers alone."""
    try:
        return cache.get_seq_length()
    except ValueError:
        return 0


def uncached(name: str, value: Any) -> Any:
    """A block's argument for a second pass, which must not fill a cache again, whatever its name and place."""
    if name == "use_cache":
        return False
    return None if isinstance(value, Cache) else value
