"""Recording what a forward pass does in the decoder blocks, and doing it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dip_hf.block_call import BlockCall, uncached
from dip_hf.second_pass import Surroundings, block_output, is_handed_on


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
    backbone: tuple[tuple, dict[str, Any]] | None = None
    calls: dict[int, BlockCall] = field(default_factory=dict)
    handed_on: Tensor | None = None


@contextmanager
def keep_outputs(blocks: Mapping[int, nn.Module], into: dict[int, Tensor]) -> Iterator[None]:
    """Put the outputs of the pass that runs inside `into` a dictionary.

    Args:
        blocks: index to block.
        into: index to output.
    """

    def keep(index: int) -> Callable[[nn.Module, tuple, Any], None]:
        def hook(block: nn.Module, args: tuple, output: Any) -> None:
            into[index] = block_output(output)

        return hook

    with ExitStack() as hooks:
        for index, block in blocks.items():
            hooks.enter_context(block.register_forward_hook(keep(index)))
        yield


def watch_backbone(
    record: ICPRecord, start_block: int, surroundings: Callable[[], Surroundings]
) -> Callable[[nn.Module, tuple, dict[str, Any]], None]:
    """A pre-hook that records the backbone's call, which has a gradient.

    Args:
        record: where to.
        start_block: 0 for the embeddings, so that the teacher's pass begins with this call.
        surroundings: takes down the present ones.

    Raises:
        ValueError: by the hook, where the blocks cannot be run a second time on the same arguments.
    """

    def watch(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        if kwargs.get("past_key_values") is not None:
            raise ValueError(
                "icp_weight: ICP runs the blocks twice, and cannot with past_key_values, which a prefix-tuning "
                "adapter passes; use an adapter without a cache, such as LoRA, or set icp_weight to 0."
            )
        if start_block == 0:
            if kwargs.get("inputs_embeds") is not None:
                raise ValueError(
                    "icp_start_block=0 perturbs what the model makes of input_ids, but it is given inputs_embeds "
                    "(a prompt-learning adapter does that); set icp_start_block to 1 or more."
                )
            record.rerun = surroundings()
        record.backbone = (args, kwargs)

    return watch


def watch_block(record: ICPRecord, index: int, start_block: int) -> Callable[[nn.Module, tuple, dict[str, Any]], None]:
    """A pre-hook that records the call of block `index`, which has a gradient, without its cache.

    Raises:
        ValueError: by the hook, where its input is not the output of the block in front of it, as `watch_output` saw.
    """

    def watch(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        call = BlockCall(args, kwargs)
        if index > start_block and not is_handed_on(call.hidden_states, record.handed_on):
            raise ValueError(
                f"icp_start_block={start_block}: the model changes the hidden states between its blocks, in front of "
                f"block {index} (as where features of images enter there), and ICP runs the blocks again without "
                "that; set icp_start_block to 0."
            )
        # A plain transformers call makes a cache by default
        record.calls[index] = call.with_hidden_states(None).changed(block, uncached)

    return watch


def watch_output(record: ICPRecord) -> Callable[[nn.Module, tuple, Any], None]:
    """A hook that takes down what a block has handed on to the next one."""

    def watch(block: nn.Module, args: tuple, output: Any) -> None:
        if torch.is_grad_enabled():
            record.handed_on = block_output(output)

    return watch


def evenly_spaced(start: int, depth: int, n: int) -> list[int]:
    """The last block of each of n equal parts of the blocks `start` to `depth` - 1; all where there are no more."""
    span = depth - start
    n = min(n, span)
    return [start + -(-(k + 1) * span // n) - 1 for k in range(n)]
