"""Folding m trajectories into the batch, from the first random block on: noised, or with a posterior."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from dip_hf.block_call import BY_HEAD, BlockCall
from dip_hf.noise_state import NoiseState


# Arguments of a block that count tokens of a padding-free batch in one dimension, by name because their shape cannot
# tell them from position indices.
_CUMULATIVE_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k")


def repeat_rows(tensor: Tensor, trajectories: int) -> Tensor:
    """Repeat along dimension 0, trajectory-major: (batch, ...) to (m · batch, ...), row j · batch + b is row b."""
    return tensor.repeat(trajectories, *[1] * (tensor.dim() - 1))


def _fold_argument(value: Any, batch: int, trajectories: int) -> Any:
    """Repeat batch-shaped tensors, inside tuples too; leave what is not batch-shaped (1-D, or of one row) alone."""
    if isinstance(value, tuple):
        return tuple(_fold_argument(item, batch, trajectories) for item in value)
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == batch > 1:
        return repeat_rows(value, trajectories)
    return value


def _fold_named(name: str, value: Any, batch: int, length: int, trajectories: int) -> Any:
    """`_fold_argument` for an argument of that name."""
    if name in _CUMULATIVE_LENGTHS and value is not None:
        return _fold_cumulative_lengths(value, trajectories)
    one_row = isinstance(value, Tensor) and value.shape[:1] == (batch,) == (1,)
    # What is broadcast has one row too: rows of the batch are told by the name, or by the shape of hidden states
    if one_row and (name == "attention_mask" or (value.dim() == 3 and value.shape[1] == length)):
        return repeat_rows(value, trajectories)
    return _fold_argument(value, batch, trajectories)


def check_trajectories(model: nn.Module, adapters: Iterable[LoraConfig], trajectories: int) -> None:
    """
    Args:
        model: whose blocks are to be folded.
        adapters: the active ones.
        trajectories: m > 1.

    Raises:
        ValueError: the model or an adapter counts its rows in front of the blocks, and not after them, or the model
            may leave blocks out.
    """
    if any(adapter.alora_invocation_tokens is not None for adapter in adapters):
        raise ValueError(
            f"trajectories={trajectories} with alora_invocation_tokens: aLoRA knows where a row's invocation is for "
            "the rows of the batch, not for their copies; leave alora_invocation_tokens unset, or set "
            "num_trajectories (or num_samples) to 1."
        )
    config = getattr(model, "config", None)
    if type(model).__name__.endswith("ForSequenceClassification"):
        raise ValueError(
            f"trajectories={trajectories}: {type(model).__name__} picks a last token for each row that it was given, "
            "and so the first trajectory's alone; sample one trajectory at a time, under keys of their own."
        )
    if model.training and (layerdrop := getattr(config, "layerdrop", 0)) > 0:
        raise ValueError(
            f"trajectories={trajectories} with layerdrop={layerdrop}: the block that repeats the batch may be "
            "left out; set the model's layerdrop to 0.0, or train one trajectory."
        )
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            f"output_router_logits=True with trajectories={trajectories}: the experts' balance loss counts the "
            "batch's rows once in every block; set output_router_logits=False, or train one trajectory."
        )
    if getattr(config, "_attn_implementation", None) == "flex_attention":
        raise ValueError(
            f"trajectories={trajectories} with attn_implementation='flex_attention': its masks know the batch's rows "
            "and cannot be repeated; use 'sdpa' or a flash attention, or sample one trajectory at a time."
        )
    if getattr(config, "model_type", None) == "gpt_bigcode":
        raise ValueError(
            f"trajectories={trajectories}: GPT-BigCode gives its output the shape of its input, which has fewer rows; "
            "set num_trajectories (or num_samples) to 1."
        )


def _check_foldable(hidden_states: Tensor, others: dict[str, Any], trajectories: int) -> None:
    """
    Raises:
        ValueError: the block takes something that has no rows to repeat.
    """
    by_head = [name for name in BY_HEAD if others.get(name) is not None]
    shared = [name for name, value in others.items() if isinstance(value, Mapping | list) and value]
    remedy = "set num_trajectories (or num_samples) to 1"
    if hidden_states.dim() > 3:
        reason = f"hidden states of shape {tuple(hidden_states.shape)}"
    elif by_head:
        reason = f"{by_head[0]}, with rows for each head"
    elif shared:
        reason = f"{shared[0]}, which the blocks below have filled"
        remedy += ", or begin at the first block (noise_blocks='all')"
    else:
        return
    raise ValueError(
        f"num_trajectories={trajectories}: the batch cannot be repeated in front of a block that takes {reason}; "
        f"{remedy}."
    )


def _fold_cumulative_lengths(lengths: Tensor, trajectories: int) -> Tensor:
    """Boundaries of m copies of a padding-free row laid end to end; shape (n+1,) to (m · n + 1,)."""
    offsets = torch.arange(trajectories, device=lengths.device, dtype=lengths.dtype) * lengths[-1]
    return torch.cat([lengths[:1], (lengths[1:] + offsets[:, None]).flatten()])


@contextmanager
def fold_trajectories(blocks: Sequence[nn.Module], trajectories: int, state: NoiseState) -> Iterator[None]:
    """Run `blocks` with m copies of the batch while the context is open.

    The first block's input is repeated m times; since every block is called with the original batch's masks and
    position embeddings, each repeats those. What follows the blocks (final norm, head) sees m · batch rows.

    Args:
        blocks: the first random block and all blocks after it, in order.
        trajectories: m ≥ 1.
        state: learns the number of tokens.
    """

    def fold(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        call = BlockCall(args, kwargs)
        states, is_first = call.hidden_states, block is blocks[0]
        batch = states.shape[0] // (1 if is_first else trajectories)
        if is_first:
            _check_foldable(states, call.others(block), trajectories)
            call = call.with_hidden_states(repeat_rows(states, trajectories))
            state.tokens = call.hidden_states.shape[:-1].numel()
        named = partial(_fold_named, batch=batch, length=states.shape[1], trajectories=trajectories)
        return call.changed(block, named)

    if trajectories > 1:
        state.tokens = 0  # until the first of the blocks has run
    with ExitStack() as hooks:
        for block in blocks if trajectories > 1 else ():
            hooks.enter_context(block.register_forward_pre_hook(fold, with_kwargs=True, prepend=True))
        yield
