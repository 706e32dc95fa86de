"""Tiny models and batches for the ICP tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from dip_hf.icp import FeatureLoss, ICPBranch, ICPOptions


VOCABULARY, HIDDEN, DEPTH = 24, 32, 4


def tiny_llama(**config: object) -> LlamaForCausalLM:
    """A random model in training mode; two calls give the same weights."""
    torch.manual_seed(0)
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "use_cache": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **config})).train()


def padded_batch(seed: int = 0, rows: int = 3, length: int = 10) -> dict[str, Tensor]:
    """Right-padded rows; the first 3 tokens of each are its prompt, the last row is 3 tokens shorter."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[-1, -3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def padding_free_batch() -> dict[str, Tensor]:
    """Documents of 5, 4 and 3 tokens in one row, without attention mask."""
    ids = torch.randint(3, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in (5, 4, 3)])[None]
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def task_loss(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the next token; `labels` replaces the batch's own where rows are folded."""
    forward = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**forward).logits[:, :-1]
    labels = inputs["labels"] if labels is None else labels
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@contextmanager
def replaced(model: nn.Module, start_block: int, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The oracle's own hook: put `replace(x)` in the place of the embeddings, or of a block's input."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if start_block == 0:
        handle = base.model.embed_tokens.register_forward_hook(lambda module, args, output: replace(output))
    else:
        handle = base.model.layers[start_block].register_forward_pre_hook(
            lambda module, args: (replace(args[0]), *args[1:]), prepend=True
        )
    try:
        yield
    finally:
        handle.remove()


def block_outputs(model: nn.Module, run: Callable[[], object]) -> list[Tensor]:
    """All blocks' outputs in one call of `run`."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    outputs: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, args, output: outputs.append(output)) for block in base.model.layers
    ]
    run()
    for handle in handles:
        handle.remove()
    return outputs


def with_lora(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    return get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, lora_dropout=dropout)).train()


def icp(model: nn.Module, inputs: dict[str, Tensor], **options: object) -> tuple[ICPBranch, FeatureLoss, Tensor]:
    branch = ICPBranch(model, ICPOptions(**options))
    with branch.clean() as record:
        task = task_loss(model, inputs)
    return branch, branch.loss(record, inputs, task, lambda: task_loss(model, inputs)), task
