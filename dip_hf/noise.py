"""Stateless Gaussian noise: a sample is a pure function of (seed, step, micro-step, rank, layer, trajectory).

Nothing here draws from a global generator, so a resumed run, a recomputed block and the backward pass see the very
noise that the first forward pass saw, and ranks differ because the rank is part of the key.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


_STREAM = 2**17
"""Most samples that the CPU takes from one stream of random bits: streams are drawn side by side."""

_PIECE = 2**20
"""Samples that the CPU draws at a time, so that a large block's noise is never in memory as a whole."""


class NoiseKey(NamedTuple):
    """What a noise sample depends on, besides its place in the model.

    Args:
        seed: the run's seed.
        step: optimiser step (or forward count outside a trainer).
        micro_step: index of the micro-batch inside the accumulation window.
        rank: process rank; ranks draw different noise.
    """

    seed: int
    step: int = 0
    micro_step: int = 0
    rank: int = 0

    def tensor(self) -> Tensor:
        """The key as an int64 tensor of shape (4,) on the CPU: data, not a constant, for `torch.compile`."""
        return torch.tensor(self, dtype=torch.int64)


def derive_seed(key: Tensor, layer: int, trajectory: int) -> int:
    """A 64-bit seed from a `NoiseKey.tensor()` of shape (4,), a layer index and a trajectory index.

    BLAKE2b over the six integers: distinct tuples give unrelated seeds (this project's choice).
    """
    message = struct.pack("<6q", *key.tolist(), layer, trajectory)
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little", signed=True)


@cache
def _normal_quantiles() -> np.ndarray:
    """The 2^16 mid-point quantiles of N(0, 1), rescaled to unit variance; shape (65536,), fp32."""
    levels = (torch.arange(65536, dtype=torch.float64, device="cpu") + 0.5) / 65536
    quantiles = torch.special.ndtri(levels)
    table: np.ndarray = (quantiles / quantiles.square().mean().sqrt()).float().numpy()
    return table


@cache
def _normal_pairs() -> np.ndarray:
    """2^16 points of the plane whose coordinates are the quantiles number i and number i with its bits reversed and
    every second one flipped (a Hammersley set, shifted so that its corners do not meet): either coordinate takes every
    quantile once, and they are independent up to the set's discrepancy. Shape (65536,), complex64: a pair is one item.
    """
    quantiles = _normal_quantiles()
    index = np.arange(65536)
    reversed_index = sum(((index >> bit) & 1) << (15 - bit) for bit in range(16))
    return np.stack([quantiles, quantiles[reversed_index ^ 0x5555]], axis=1).view(np.complex64)[:, 0]


class _Stream(NamedTuple):
    """Rows of noise that one stream of random bits makes: stream `number` of `seed`, rows `first` to `last` - 1."""

    first: int
    last: int
    seed: int
    number: int


def _streams(rows: int, size: int, seed: int, first: int = 0) -> list[_Stream]:
    """The streams of `rows` × `size` samples, as many rows each (a power of two) as `_STREAM` holds; one at least."""
    count = 1 << max(0, (_STREAM // max(size, 1)).bit_length() - 1)
    starts = range(0, rows, count)
    return [_Stream(first + start, first + min(start + count, rows), seed, start // count) for start in starts]


def _fill(samples: np.ndarray, seed: int, number: int) -> None:
    """Draw stream `number` of `seed`, sixteen bits for two samples, shape (n,), fp32. Leaves Python's lock."""
    bits = np.random.SFC64(np.random.SeedSequence(seed & (2**64 - 1), spawn_key=(number,)))
    words = bits.random_raw(-(-samples.size // 8)).view(np.uint16)
    table, pairs = _normal_pairs(), samples[: samples.size // 2 * 2].view(np.complex64)
    for start in range(0, pairs.size, 2**14):  # what stays in cache
        part = slice(start, min(start + 2**14, pairs.size))
        np.take(table, words[part], out=pairs[part], mode="clip")
    if samples.size % 2:
        samples[-1] = table[words[pairs.size]].real


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads that help to draw; a forked process, which inherits none, gets its own."""
    return ThreadPoolExecutor(threads, "dip_hf-noise")


def _draw(streams: Sequence[_Stream], size: int) -> Tensor:
    """Rows `streams[0].first` to `streams[-1].last` - 1 of noise, shape (rows, size), fp32, on the CPU.

    Drawn by as many threads as torch uses; the values do not depend on their number.
    """
    first = streams[0].first
    noise = np.empty((streams[-1].last - first, size), np.float32)

    def draw(share: Sequence[_Stream]) -> None:
        for stream in share:
            _fill(noise[stream.first - first : stream.last - first].reshape(-1), stream.seed, stream.number)

    threads = min(torch.get_num_threads(), len(streams))
    shares = [streams[i::threads] for i in range(threads)]
    helpers = [_pool(os.getpid(), torch.get_num_threads() - 1).submit(draw, share) for share in shares[1:]]
    draw(shares[0])
    for helper in helpers:
        helper.result()
    return torch.from_numpy(noise)


def gaussian(
    shape: torch.Size | tuple[int, ...], seed: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal noise of `shape`, a function of `seed`, `dtype` and the kind of device alone.

    On an accelerator this is `torch.randn` with a private generator. On the CPU that would cost up to a fifth of a
    training step, so 16 random bits choose one of 65,536 points instead, evenly spread over pairs of quantiles of
    N(0, 1), for each two neighbours, in independent streams for ranges of rows that several threads can draw: a
    distance of 1e-5 in distribution function, 5e-5 for the two together, support ±4.3 (this project's choice).
    """
    if device.type != "cpu":
        return torch.randn(shape, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(seed))
    size = shape[-1] if shape else 1
    streams = _streams(torch.Size(shape).numel() // max(size, 1), size, seed)
    return (_draw(streams, size) if streams else torch.from_numpy(np.empty(0))).view(shape).to(dtype)


def few_gaussians(count: int, seed: int) -> Tensor:
    """Standard normal noise, shape (count,), fp32, on the CPU, from the digests of `seed` and a counter.

    The distribution is `gaussian`'s on the CPU. For a handful of numbers, where a generator would be most of the cost.
    """
    digests = (hashlib.blake2b(struct.pack("<2q", seed, block)).digest() for block in range(-(-count // 32)))
    return torch.from_numpy(_normal_quantiles()[np.frombuffer(b"".join(digests), np.uint16, count)])


def _noise_by_rows(like: Tensor, key: Tensor, layer: int, trajectories: int) -> Iterator[tuple[slice, Tensor]]:
    """Noise for `like` seen as rows of its last dimension: pairs of a range of rows and their noise.

    Trajectory j's rows get `gaussian(..., derive_seed(key, layer, j))`. On the CPU it comes in pieces of `_PIECE`
    samples or fewer.
    """
    size = like.shape[-1]
    rows = like.numel() // size // trajectories
    seeds = [derive_seed(key, layer, j) for j in range(trajectories)]
    if like.device.type != "cpu":
        for j, seed in enumerate(seeds):
            yield slice(j * rows, (j + 1) * rows), gaussian((rows, size), seed, like.device, like.dtype)
        return
    streams = [stream for j, seed in enumerate(seeds) for stream in _streams(rows, size, seed, j * rows)]
    together = max(1, _PIECE // _STREAM)
    for start in range(0, len(streams), together):
        group = streams[start : start + together]
        yield slice(group[0].first, group[-1].last), _draw(group, size).to(like.dtype)


@torch.library.custom_op("dip_hf::add_noise", mutates_args=())
def add_noise(hidden_states: Tensor, std: Tensor, key: Tensor, layer: int, trajectories: int) -> Tensor:
    """u = v + std ⊙ ε, ε ~ N(0, I): a sample of N(v, diag(std²)) (arXiv 2506.04690, projection at a layer's input).

    The backward pass regenerates ε from its seed, so the forward pass keeps nothing as large as `hidden_states`
    (this project's choice). An opaque operator to `torch.compile`, differentiable in `hidden_states` and `std`.

    Args:
        hidden_states: v, shape (trajectories · batch, ..., d), trajectory-major; any floating dtype.
        std: standard deviations, shape (d,), fp32.
        key: `NoiseKey.tensor()`, shape (4,), int64, on the CPU.
        layer: index of the block.
        trajectories: number of trajectories folded into dimension 0.

    Returns:
        u, shape and dtype of `hidden_states`, contiguous.
    """
    scale = std.to(hidden_states.dtype)
    output = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    source, target = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (hidden_states, output))
    for rows, noise in _noise_by_rows(hidden_states, key, layer, trajectories):
        torch.addcmul(source[rows], noise, scale, out=target[rows])
    return output


@torch.library.custom_op("dip_hf::noise_gradient", mutates_args=())
def noise_gradient(grad: Tensor, key: Tensor, layer: int, trajectories: int) -> Tensor:
    """Σ grad ⊙ ε over all dimensions but the last, shape (d,), fp32: the gradient of `add_noise` in `std`."""
    total = torch.zeros(grad.shape[-1], dtype=torch.float32, device=grad.device)
    source = grad.reshape(-1, grad.shape[-1])
    for rows, noise in _noise_by_rows(grad, key, layer, trajectories):
        weighted = noise.mul_(source[rows]).float()
        total += weighted.new_ones(weighted.shape[0]) @ weighted  # a BLAS call: on the CPU thrice as fast as sum(0)
    return total


@add_noise.register_fake
def _(hidden_states: Tensor, std: Tensor, key: Tensor, layer: int, trajectories: int) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


@noise_gradient.register_fake
def _(grad: Tensor, key: Tensor, layer: int, trajectories: int) -> Tensor:
    return grad.new_empty(grad.shape[-1], dtype=torch.float32)


def _save_seed(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int, int], output: Tensor) -> None:
    _, _, key, ctx.layer, ctx.trajectories = inputs
    ctx.save_for_backward(key)


def _regenerate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
    grad_std = None
    if ctx.needs_input_grad[1]:
        grad_std = noise_gradient(grad, ctx.saved_tensors[0], ctx.layer, ctx.trajectories)
    return grad, grad_std, None, None, None


add_noise.register_autograd(_regenerate, setup_context=_save_seed)
