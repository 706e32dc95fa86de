"""What the random parts of one model share: the key of the current pass, and how many trajectories it has."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dip_hf.noise import NoiseKey
from dip_hf.second_pass import IN_SECOND_PASS


@torch.compiler.disable
def recomputing() -> bool:
    """Whether this runs inside a backward pass: a checkpoint computes a part of the forward pass again.

    Asked in compiled code too, at the cost of a break in its graph: a compiled part of a block that is recomputed
    would otherwise draw anew.
    """
    return torch._C._current_graph_task_id() != -1


def given_mask(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """Which tokens of the decoder are no padding, in the arguments of a call of `model`, by name or by position.

    None where nothing says so, or masks of other shapes than (batch, length) do.
    """
    if len(args) > 1:  # more than the tokens
        kwargs = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
    has_encoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    mask = kwargs.get("decoder_attention_mask" if has_encoder else "attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


@dataclass(frozen=True)
class Sampling:
    """How the forward passes inside one `sampling` context draw.

    Attributes:
        key: `NoiseKey.tensor()` of the noise.
        posterior_key: the same for the posteriors, which may keep their sample while the noise changes.
        trajectories: m, the number of trajectories folded into the batch from the first random block on.
        averaged: whether whoever opened the context makes one output of the m trajectories', as generation needs.
        everywhere: whether noise is on in evaluation too, or only where it is by itself.
        log_variances: per block index the log-variance of the last pass, relative to the squared RMS, with its
            gradient, and that RMS. Written by the sites, because under FSDP and ZeRO-3 a parameter is whole only
            while its module runs.
    """

    key: Tensor
    posterior_key: Tensor
    trajectories: int
    averaged: bool
    everywhere: bool
    log_variances: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass
class NoiseState:
    """What all noise sites and posteriors of a model share.

    Attributes:
        sampling: of the `sampling` context that is open; None outside of one, where every forward pass that draws gets
            a key of its own.
        own_key: that key, of the last such pass.
        visited: what drew in that pass: who comes again belongs to a new one.
        generating: whether text is being generated: a model in training mode then draws nothing of its own accord.
        kept_sample: key of the posteriors' sample in the text that is being generated; None before its first token.
        tokens: number of tokens that the folded blocks see, over all trajectories; 0 before the first folded pass.
        attention_mask: of the current forward pass, shape (batch, length), nonzero where valid; None where unknown.
    """

    sampling: Sampling | None = None
    own_key: Tensor = field(default_factory=lambda: NoiseKey(0).tensor())
    visited: set[int] = field(default_factory=set)
    generating: bool = False
    kept_sample: Tensor | None = None
    tokens: int = 0
    attention_mask: Tensor | None = None

    @property
    def key(self) -> Tensor:
        """The noise's key in the current pass."""
        return self.own_key if self.sampling is None else self.sampling.key

    @property
    def trajectories(self) -> int:
        """m; 1 outside of `sampling`."""
        return 1 if self.sampling is None else self.sampling.trajectories

    @contextmanager
    def passes_under(self, sampling: Sampling) -> Iterator[None]:
        """Forward passes inside draw so; contexts nest."""
        outer, self.sampling = self.sampling, sampling
        try:
            yield
        finally:
            self.sampling = outer

    def draws(self, training: bool, in_eval: bool) -> bool:
        """Whether a pass now draws noise or samples.

        Args:
            training: whether the module is in training mode.
            in_eval: whether the adapter draws in evaluation too.
        """
        everywhere = self.sampling is not None and self.sampling.everywhere
        return everywhere or in_eval or (training and not self.generating)

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Forward passes inside generate text: outside of `sampling` with one and the same sample of the posteriors,
        for the cache holds keys and values of all of them."""
        outer = (self.generating, self.kept_sample)
        self.generating, self.kept_sample = True, None
        try:
            yield
        finally:
            self.generating, self.kept_sample = outer

    @contextmanager
    def masked(self, attention_mask: Tensor | None) -> Iterator[None]:
        """A forward pass inside has this mask; outside of `sampling` it is a new one, whoever drew in the last."""
        outer, self.attention_mask = self.attention_mask, attention_mask
        self.visited = set()
        try:
            yield
        finally:
            self.attention_mask = outer

    def enter_layer(self, layer: int, seed: int) -> None:
        """Outside any `sampling` context: on a new forward pass, go on to the next step of `seed` and this rank.

        Args:
            layer: index of the block, or a posterior's number.

        Raises:
            RuntimeError: called while a backward pass recomputes activations, whose noise it could not repeat, or in
                a second pass, which must see the first one's sample.
        """
        if recomputing():
            raise RuntimeError(
                "a checkpoint around a decoder block recomputes its noise, which would differ from the forward "
                "pass's; use `model.gradient_checkpointing_enable()`, which leaves the block's hooks outside, or keep "
                "the `sampling` context open through the backward pass."
            )
        if not torch.compiler.is_compiling() and IN_SECOND_PASS.get():
            raise RuntimeError(
                "DReS's coded branch would draw another sample of the posterior than the pass beside it; open the "
                "adapter's `sampling` context around the pass."
            )
        if layer in self.visited or not self.visited:
            rank = dist.get_rank() if dist.is_initialized() else 0
            first, rest = (torch.tensor(part, device="cpu") for part in ([seed], [0, rank]))
            self.own_key = torch.cat([first, self.own_key[1:2] + 1, rest])
            if self.generating and self.kept_sample is None:
                self.kept_sample = self.own_key
            self.visited = set()
        self.visited.add(layer)

    def posterior_sample(self, layer: int, seed: int) -> tuple[Tensor, int]:
        """The key and m of the posteriors' sample in this pass.

        Args:
            layer: the posterior's number.
            seed: as for `enter_layer`.
        """
        if self.sampling is not None:
            return self.sampling.posterior_key, self.sampling.trajectories
        self.enter_layer(layer, seed)
        return self.own_key if self.kept_sample is None else self.kept_sample, 1
