"""What the random parts of one model share: the key of the current pass, and how many trajectories it has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dip_hf.noise import NoiseKey
from dip_hf.second_pass import IN_SECOND_PASS


def _recomputing() -> bool:
    """Whether this runs inside a backward pass: a checkpoint computes a part of the forward pass again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@dataclass
class NoiseState:
    """What all noise sites and posteriors of a model share; the tuner's `sampling` context sets it.

    Attributes:
        key: `NoiseKey.tensor()` of the current forward pass.
        posterior_key: the same for the posteriors, which may keep their sample while the noise changes.
        trajectories: m, the number of trajectories folded into the batch from the first random block on.
        averaged: whether whoever opened the context makes one output of the m trajectories', as generation needs.
        sampling: whether a `sampling` context is open: noise is then on in evaluation too, under that context's key.
        generating: whether text is being generated: a model in training mode then draws nothing of its own accord.
        visited: what drew noise outside such a context: who comes again belongs to a new forward pass, which gets a
            new key.
        tokens: number of tokens that the folded blocks see, over all trajectories; 0 before the first folded pass.
        last_sample: posterior key and m of the last forward pass, for the backward pass that recomputes it, when the
            `sampling` context may have closed.
        attention_mask: of the current forward pass, shape (batch, length), nonzero where valid; None where unknown.
        log_variances: per block index the log-variance of this context's pass, relative to the squared RMS, with its
            gradient, and that RMS. Written by the sites, because under FSDP and ZeRO-3 a parameter is whole only
            while its module runs.
    """

    key: Tensor = field(default_factory=lambda: NoiseKey(0).tensor())
    posterior_key: Tensor = field(default_factory=lambda: NoiseKey(0).tensor())
    trajectories: int = 1
    averaged: bool = False
    sampling: bool = False
    generating: bool = False
    visited: set[int] = field(default_factory=set)
    tokens: int = 0
    last_sample: tuple[Tensor, int] | None = None
    attention_mask: Tensor | None = None
    log_variances: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @contextmanager
    def passes_under(
        self, key: NoiseKey, posterior_key: NoiseKey, trajectories: int, averaged: bool
    ) -> Iterator[None]:
        """Forward passes inside are sampled, with these keys and m; contexts nest."""
        outer = (self.key, self.posterior_key, self.trajectories, self.averaged, self.sampling, self.log_variances)
        self.key, self.posterior_key = key.tensor(), posterior_key.tensor()
        self.trajectories, self.averaged = trajectories, averaged
        self.sampling, self.log_variances = True, {}
        self.last_sample = (self.posterior_key, trajectories)
        try:
            yield
        finally:
            self.key, self.posterior_key, self.trajectories, self.averaged, self.sampling, self.log_variances = outer

    def draws(self, training: bool, in_eval: bool) -> bool:
        """Whether a pass now draws noise or samples.

        Args:
            training: whether the module is in training mode.
            in_eval: whether the adapter draws in evaluation too.
        """
        return self.sampling or in_eval or (training and not self.generating)

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Forward passes inside generate text."""
        outer, self.generating = self.generating, True
        try:
            yield
        finally:
            self.generating = outer

    @contextmanager
    def masked(self, attention_mask: Tensor | None) -> Iterator[None]:
        """Forward passes inside have this mask."""
        outer, self.attention_mask = self.attention_mask, attention_mask
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
        if _recomputing():
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
            self.key = torch.cat([first, self.key[1:2] + 1, rest])
            self.posterior_key = self.key
            self.last_sample = (self.key, 1)
            self.visited = set()
        self.visited.add(layer)

    def posterior_sample(self, layer: int, seed: int) -> tuple[Tensor, int]:
        """The key and m of the posteriors' sample in this pass, or in the one that a backward pass recomputes.

        Args:
            layer: the posterior's number.
            seed: as for `enter_layer`.
        """
        if not self.sampling:
            if _recomputing() and self.last_sample is not None:
                return self.last_sample
            self.enter_layer(layer, seed)
        return self.posterior_key, self.trajectories
