"""Sequence placement: a sample is a row of the batch, f a range of decoder blocks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from dip_hf.block_call import BY_HEAD, BlockCall, cached_length, uncached
from dip_hf.dres.coded_pass import CodedPass, rerun
from dip_hf.dres.functional import encode
from dip_hf.second_pass import Surroundings, block_output, is_handed_on


@dataclass
class MainCall:
    """One block's call in the main branch.

    Attributes:
        hidden_states: what the block computes on, after all hooks; shape (rows, length, d).
        before: the hidden states before the hooks, where a hook changed them (a sample of DIPNet's noise).
        arguments: the other arguments, by name.
    """

    hidden_states: Tensor
    before: Tensor | None
    arguments: dict[str, Any]


class SequencePass(CodedPass):
    """The main branch goes through the range as always; after its last block, coded rows go through it once more.

    Rows are coded position by position, and what hooks add to the hidden states between the blocks (DIPNet's noise) is
    coded with them: it belongs to the sample, so that both branches evaluate one and the same f.
    """

    def attach(self, hooks: ExitStack) -> None:
        self.calls: list[MainCall] = []
        blocks = list(self.modules.values())
        for block in blocks:
            # The first and the last of the block's pre-hooks, so that what the others do is seen.
            hooks.enter_context(block.register_forward_pre_hook(self._before_hooks, with_kwargs=True, prepend=True))
            hooks.enter_context(block.register_forward_pre_hook(self._after_hooks, with_kwargs=True))
            hooks.enter_context(block.register_forward_hook(self._hand_on))
        hooks.enter_context(blocks[-1].register_forward_hook(self._run))

    def _before_hooks(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.before: Tensor = BlockCall(args, kwargs).hidden_states
        if self.calls and not is_handed_on(self.before, self.handed_on):
            raise ValueError(
                "dres_placement='sequence': the model changes the hidden states between its blocks (as where features "
                f"of images enter there), in front of block {len(self.calls)} of dres_blocks, and DReS runs them again"
                " without that; take later blocks, or use dres_placement='token'."
            )

    def _hand_on(self, block: nn.Module, args: tuple, output: Any) -> None:
        self.handed_on = block_output(output)

    def _after_hooks(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = BlockCall(args, kwargs)
        hidden_states = call.hidden_states
        if hidden_states.dim() != 3:
            raise ValueError(
                f"dres_placement='sequence': blocks' inputs have shape {tuple(hidden_states.shape)} and not (rows, "
                "length, size); use dres_placement='token', or, where that is refused too, set dres_weight to 0."
            )
        if not self.calls:
            devices = {next(block.parameters()).device for block in self.modules.values()}
            self.surroundings = Surroundings.now({hidden_states.device, *devices})
        # What hooks add to the range's own input is part of its input.
        changed = self.calls and hidden_states is not self.before
        self.calls.append(MainCall(hidden_states, self.before if changed else None, call.others(block)))

    def _run(self, block: nn.Module, args: tuple, output: Any) -> None:
        outputs = block_output(output)
        order = self.choose_groups(outputs.shape[0], outputs.device)
        names = list(self.modules)
        name = f"{names[0]}..{names[-1]}"
        if not self.record.groups:
            self.record.errors[name] = outputs.new_zeros((), dtype=torch.float32)
            self.calls.clear()
            return
        mask = self.valid_positions(outputs)
        valid = None if mask is None else self._group(mask, order).all(0)
        self.compared = valid
        coded = rerun(self.surroundings, self._run_coded, order)
        self.compare(name, self._group(outputs, order), coded.unflatten(0, (self.options.coded_size, -1)), valid)
        if mask is not None and valid is not None and self.options.share < 1:
            # A mean over the places of all groups, estimated without bias: not a quotient of two random sums.
            everything = self.all_groups(outputs.shape[0])
            per_group = self._group(mask, everything.flatten().to(mask.device)).all(0).sum() / everything.shape[1]
            correction = valid.sum() / (self.record.groups * per_group.clamp(min=1e-9))
            self.record.errors[name] = self.record.errors[name] * correction
        self.calls.clear()

    def _group(self, rows: Tensor, order: Tensor) -> Tensor:
        """Shape (K, G, ...) from (rows, ...).

        Below the block that folds DIPNet's trajectories in there are fewer rows: row b stands for rows j · batch + b.
        """
        return rows.index_select(0, (order % rows.shape[0]).to(rows.device)).unflatten(
            0, (self.options.group_size, -1)
        )

    def _encode(self, groups: Tensor) -> Tensor:
        """(K, G, ...) to coded rows, (N · G, ...)."""
        return encode(groups, self.options.coded_size).flatten(0, 1)

    def _run_coded(self, order: Tensor) -> Tensor:
        """f(coded rows), shape (N · G, length, d)."""
        coded = self._encode(self._group(self.calls[0].hidden_states, order))
        for block, call in zip(self.modules.values(), self.calls, strict=True):
            if call.before is not None:
                added = self._group(call.hidden_states, order) - self._group(call.before, order)
                coded = coded + self._encode(added)
            rows = call.hidden_states.shape[0]
            arguments = {name: self._code(name, value, rows, order) for name, value in call.arguments.items()}
            # `forward` rather than a call: the hooks on a block belong to the main branch.
            coded = block_output(block.forward(coded, **arguments))
        return coded

    def _agree(self, groups: Tensor) -> bool:
        """Whether integers, shape (K, G, ...), are the same in all rows of a group at the positions compared."""
        differs = (groups != groups[:1]).any(0)
        if self.compared is not None and differs.shape == self.compared.shape:
            differs = differs & self.compared.to(differs.device)
        return not differs.any()

    def _code(self, name: str, value: Any, rows: int, order: Tensor) -> Any:
        """A block's argument for the coded rows.

        A mask holds where it holds in every row of the group; other floating tensors are coded like the samples;
        integers (positions) must agree within a group, but where a row has padding; what has no row dimension stays as
        it is.

        Args:
            name: the argument's name.
            value: its value in the main branch.
            rows: number of rows in that call.
            order: the grouped rows.

        Raises:
            ValueError: the argument cannot be coded.
        """
        if isinstance(value, Cache) and cached_length(value) > self.calls[0].hidden_states.shape[1]:
            raise ValueError(
                "dres_placement='sequence' does not work with keys and values from elsewhere (prefix tuning); use "
                "dres_placement='token'."
            )
        value = uncached(name, value)  # the main branch has filled it
        if isinstance(value, Mapping) and value:
            raise ValueError(
                f"dres_placement='sequence': the blocks hand {name!r} on to one another beside their hidden states; "
                "use dres_placement='token'."
            )
        if isinstance(value, tuple):
            return tuple(self._code(name, item, rows, order) for item in value)
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] == 1:
            return value
        if value.shape[0] != rows or name in BY_HEAD:
            raise ValueError(
                f"dres_placement='sequence': the blocks' argument {name!r}, of shape {tuple(value.shape)}, cannot be "
                f"split into the batch's {rows} rows; use dres_placement='token', or, where that is refused too, set "
                "dres_weight to 0."
            )
        groups = self._group(value, order)
        if "mask" not in name and value.is_floating_point():
            return self._encode(groups)
        if "mask" in name:
            shared = groups.all(0) if value.dtype == torch.bool else groups.amin(0)
        elif self._agree(groups):
            shared = groups[0]
        else:
            raise ValueError(
                f"dres_placement='sequence': {name!r} differs between the rows of a batch, so that their positions "
                "cannot be compared; pad on the right, or use dres_placement='token'."
            )
        return shared.repeat(self.options.coded_size, *[1] * (shared.dim() - 1))
