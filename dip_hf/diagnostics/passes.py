"""Forward passes of a model at given input embeddings, leaving the model as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dip_hf.diagnostics.functional import IGNORED
from dip_hf.noise import NoiseKey, derive_seed, gaussian


DEFAULT_KEY = NoiseKey(0)
"""Of everything drawn, where nothing else is asked for."""


class Batch(NamedTuple):
    """Examples padded on the right.

    Attributes:
        input_ids: shape (batch, length), int64.
        valid: which tokens are no padding, shape (batch, length), bool.
        labels: shape (batch, length), -100 where a token is not scored.
        first: index of the first example among all that are measured.
    """

    input_ids: Tensor
    valid: Tensor
    labels: Tensor
    first: int

    def prompt(self) -> Tensor:
        """The tokens in front of each example's first label, shape (batch, length), bool."""
        return self.valid & ((self.labels != IGNORED).cumsum(1) == 0)

    def noise(self, like: Tensor, key: NoiseKey, stream: int) -> Tensor:
        """Standard normal noise at valid tokens, 0 elsewhere; a function of the key, the stream and the example.

        It does not depend on the batch that an example is in. Shape and device of `like`, (batch, length, d), fp32.
        """
        noise = torch.zeros(like.shape, device=like.device)
        for row, valid in enumerate(self.valid):
            seed = derive_seed(key.tensor(), stream, self.first + row)
            noise[row, valid] = gaussian((int(valid.sum()), like.shape[-1]), seed, like.device)
        return noise


def prepare_batches(batches: Iterable[Mapping[str, Tensor]], device: torch.device) -> Iterator[Batch]:
    """Check batches and move each row's valid tokens to the left.

    What is measured then depends neither on the side of the padding nor on how absolute positions count it, and no
    row of an attention mask is empty, which gives NaN gradients in some implementations.

    Args:
        batches: dicts with `input_ids`, `attention_mask` (1 where valid) and `labels` (-100 where not scored), each of
            shape (batch, length).
        device: where they are needed.

    Raises:
        ValueError: no batch, a missing field, unequal shapes, or an example without a scored token.
    """
    first = 0
    for batch in batches:
        missing = [name for name in ("input_ids", "attention_mask", "labels") if name not in batch]
        if missing:
            raise ValueError(f"batches: a batch has no {', '.join(missing)}; it has {', '.join(batch)}.")
        ids, valid, labels = (batch[name].to(device) for name in ("input_ids", "attention_mask", "labels"))
        if ids.dim() != 2 or ids.shape != valid.shape or ids.shape != labels.shape:
            raise ValueError(
                f"batches: input_ids {tuple(ids.shape)}, attention_mask {tuple(valid.shape)} and labels "
                f"{tuple(labels.shape)} must all have the shape (batch, length)."
            )
        valid = valid.bool()
        order = (~valid).long().argsort(dim=1, stable=True)[:, : int(valid.sum(1).max())]
        ids, valid, labels = ids.gather(1, order), valid.gather(1, order), labels.gather(1, order)
        labels = labels.masked_fill(~valid, IGNORED)
        scored = (labels[:, 1:] != IGNORED).any(1)
        if not scored.all():
            row = int(scored.long().argmin())
            raise ValueError(f"batches: example {first + row} has no label (other than -100) after its first token.")
        yield Batch(ids, valid, labels, first)
        first += len(ids)
    if first == 0:
        raise ValueError("batches is empty: give at least one batch.")


class EmbeddingPass:
    """A model as a function of its input embeddings, the output of its input-embedding module.

    Args:
        model: a transformers model, or a PEFT model around one.

    Raises:
        ValueError: weights narrower than fp32, in which a second derivative or a small perturbation is lost.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        whole: Any = model
        self.base: Any = whole.get_base_model() if isinstance(model, PeftModel) else whole
        self.embedding: nn.Module = self.base.get_input_embeddings()
        self.device = next(self.embedding.parameters()).device
        for name, parameter in model.named_parameters():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"model: {name} is {parameter.dtype}, and diagnostics work in fp32; load the model with "
                    "dtype=torch.float32 and without quantisation."
                )

    @torch.no_grad()
    def embeddings(self, batch: Batch) -> Tensor:
        """Shape (batch, length, d), without gradient."""
        return self.embedding(batch.input_ids).detach().clone()

    def logits(self, batch: Batch, embeddings: Tensor) -> Tensor:
        """Shape (batch, length, vocabulary); differentiable in `embeddings`.

        Raises:
            ValueError: a prompt-learning adapter has put tokens in front.
        """
        # By hook and not as inputs_embeds: some models need the ids as well
        with self.embedding.register_forward_hook(lambda module, args, output: embeddings):
            output = self.model(input_ids=batch.input_ids, attention_mask=batch.valid.long(), use_cache=False)
        logits: Tensor = output.logits
        if logits.shape[1] != batch.input_ids.shape[1]:
            raise ValueError(
                f"model: its logits have {logits.shape[1]} positions for {batch.input_ids.shape[1]} tokens, as where "
                "a prompt-learning adapter puts tokens in front, which the diagnostics do not know; give an adapter "
                "of another kind."
            )
        return logits

    @contextmanager
    def twice_differentiable(self) -> Iterator[None]:
        """Forward passes inside have second derivatives: sdpa takes its plain kernel, which is slower.

        Raises:
            ValueError: an attention implementation that has none.
        """
        implementation = self.base.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"attn_implementation={implementation!r} has no second derivative; load the model with 'sdpa' or "
                "'eager'."
            )
        with sdpa_kernel(SDPBackend.MATH):
            yield
