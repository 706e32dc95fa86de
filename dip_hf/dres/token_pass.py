"""Token placement: a sample is a valid token, f an MLP sublayer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dip_hf.dres.coded_pass import CodedPass, rerun
from dip_hf.dres.functional import encode
from dip_hf.second_pass import Surroundings


class TokenPass(CodedPass):
    """After each chosen block, coded tokens go through its MLP once more, all groups at once.

    Args:
        blocks: the block of each of the modules, in order.
        *args: as for `CodedPass`.
    """

    def __init__(self, blocks: Sequence[nn.Module], *args: Any) -> None:
        super().__init__(*args)
        self.blocks = blocks
        self.with_gradient = torch.is_grad_enabled()
        self.orders: dict[int, Tensor] = {}  # by number of tokens, which grows where trajectories are folded in

    def attach(self, hooks: ExitStack) -> None:
        for (name, mlp), block in zip(self.modules.items(), self.blocks, strict=True):
            hooks.enter_context(mlp.register_forward_pre_hook(self._before_mlp))
            hooks.enter_context(mlp.register_forward_hook(self._after_mlp))
            # Not in the MLP's own hook, which runs inside the block's activation checkpoint: recomputation, when these
            # hooks are gone, would find another graph than the forward pass.
            hooks.enter_context(block.register_forward_hook(partial(self._run, name, mlp)))

    def _before_mlp(self, mlp: nn.Module, args: tuple) -> None:
        self.surroundings = Surroundings.now([args[0].device])

    def _after_mlp(self, mlp: nn.Module, args: tuple, output: Tensor) -> None:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"dres_placement='token': {type(mlp).__name__} returns a {type(output).__name__}, not its output "
                "alone; use dres_placement='sequence', or other dres_blocks."
            )
        if self.with_gradient and not torch.is_grad_enabled():
            raise ValueError(
                "dres_placement='token' sees no gradient inside reentrant activation checkpoints; set "
                "activation_checkpointing_kwargs={'use_reentrant': False}."
            )
        # A copy, since a block may add to its MLP's output in place (Falcon's does)
        self.inputs, self.outputs = args[0], output.clone()

    def _run(self, name: str, mlp: nn.Module, block: nn.Module, args: tuple, output: Any) -> None:
        inputs, outputs = self.inputs, self.outputs
        del self.inputs, self.outputs
        order = self._tokens(inputs)
        if not self.record.groups:
            self.record.errors[name] = outputs.new_zeros((), dtype=torch.float32)
            return
        coded = encode(self._group(inputs, order), self.options.coded_size).flatten(0, 1)[None]
        # `forward` rather than a call: the hooks on the MLP belong to the main branch.
        function = mlp.forward
        if getattr(block, "gradient_checkpointing", False) and block.training:
            function = partial(checkpoint, mlp.forward, use_reentrant=False)
        result = rerun(self.surroundings, function, coded)[0]
        self.compare(name, self._group(outputs, order), result.unflatten(0, (self.options.coded_size, -1)))

    def _group(self, tokens: Tensor, order: Tensor) -> Tensor:
        """Shape (K, G, d) from (rows, length, d)."""
        return (
            tokens.flatten(0, -2).index_select(0, order.to(tokens.device)).unflatten(0, (self.options.group_size, -1))
        )

    def _tokens(self, inputs: Tensor) -> Tensor:
        """Indices of the grouped tokens among all, shape (K · G,); the same in all blocks with as many rows."""
        rows, length = inputs.shape[:2]
        if rows * length not in self.orders:
            mask = self.valid_positions(inputs)
            if mask is None:
                mask = torch.ones(rows, length, dtype=torch.bool, device=inputs.device)
            valid = mask.flatten().nonzero()[:, 0]
            self.orders[rows * length] = valid[self.choose_groups(valid.shape[0], inputs.device)]
        return self.orders[rows * length]
