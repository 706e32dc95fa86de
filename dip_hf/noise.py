"""Stateless Gaussian noise: a sample is a pure function of (seed, step, micro-step, rank, layer, trajectory).

Nothing here draws from a global generator, so a resumed run, a recomputed block and the backward pass see the very
noise that the first forward pass saw, and ranks differ because the rank is part of the key.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


_TABLE = 2**20
"""Samples in each of the CPU's two tables of noise; the second has one fewer, so that together they never repeat."""

_PIECE = 2**19
"""Most samples that the CPU adds up at a time, so that they stay in cache and out of the peak of memory."""


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
        return torch.tensor(self, dtype=torch.int64, device="cpu")


def derive_seed(key: Tensor, layer: int, trajectory: int) -> int:
    """A 64-bit seed from a `NoiseKey.tensor()` of shape (4,), a layer index and a trajectory index.

    BLAKE2b over the six integers: distinct tuples give unrelated seeds (this project's choice).
    """
    message = struct.pack("<6q", *key.tolist(), layer, trajectory)
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little", signed=True)


def _normal_quantiles(count: int) -> np.ndarray:
    """The `count` mid-point quantiles of N(0, 1), rescaled to unit variance; shape (count,), fp32."""
    quantiles = torch.special.ndtri((torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / count)
    scaled: np.ndarray = (quantiles / quantiles.square().mean().sqrt()).float().numpy()
    return scaled


@cache
def _few_quantiles() -> np.ndarray:
    """Those that 16 bits choose from."""
    return _normal_quantiles(2**16)


@cache
def _noise_table(count: int, seed: int) -> np.ndarray:
    """The quantiles of N(0, 1/2) in an order that `seed` gives, and the first `_PIECE` of them again, so that a window
    of so many may start anywhere. Shape (count + _PIECE,), fp32."""
    order = np.argsort(np.random.SFC64(seed).random_raw(count), kind="stable")  # bits that no release of numpy changes
    table = _normal_quantiles(count)[order] / np.float32(2**0.5)
    return np.resize(table, count + _PIECE)  # goes round


def _starts(seed: int, turn: int) -> tuple[int, int]:
    """Where the windows of `seed` start, in the first table and in the second, for its `turn`-th 2^20 samples."""
    message = struct.pack("<q", seed) + (struct.pack("<q", turn) if turn else b"")
    a, b = struct.unpack("<2Q", hashlib.blake2b(message, digest_size=16).digest())
    return a % _TABLE, b % (_TABLE - 1)


def _draw(seed: int, first: int, count: int) -> Tensor:
    """Samples `first` to `first + count - 1` of what `seed` stands for, shape (count,), fp32, on the CPU.

    Sample i is A[a + i] + B[b + i]: of either table a window that goes round, from a start that `seed` is hashed to,
    and from another one after every 2^20 samples, when the first table has gone round.

    Args:
        count: at most `_PIECE`.
    """
    turn, place = divmod(first, _TABLE)
    if place + count > _TABLE:
        rest = place + count - _TABLE
        return torch.cat([_draw(seed, first, count - rest), _draw(seed, first + count - rest, rest)])
    a, b = _starts(seed, turn)
    a, b = (a + place) % _TABLE, (b + place) % (_TABLE - 1)
    one, other = _noise_table(_TABLE, 0)[a : a + count], _noise_table(_TABLE - 1, 1)[b : b + count]
    return torch.from_numpy(one) + torch.from_numpy(other)


def gaussian(
    shape: torch.Size | tuple[int, ...], seed: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal noise of `shape`, a function of `seed`, `dtype` and the device (on CUDA, the GPU's model) alone.

    On an accelerator this is `torch.randn` with a private generator. On the CPU that would cost up to a fifth of a
    training step, so noise is read from tables, as in evolution strategies (arXiv 1703.03864, section 2.1): the sum of
    two windows at places that `seed` chooses, one of each of two shuffled tables of about a million quantiles of
    N(0, 1/2). A sample is within 2e-6 of N(0, 1) in distribution function, its support is ±6.9; samples of one draw
    share no table entry up to a million, from where on it is as if another draw began. Two draws of
    n samples overlap in a table with probability n/2^19, and always from n = 2^19 on: samples of theirs are then
    correlated by 1/2, at other positions (this project's choice).
    """
    if device.type != "cpu":
        return torch.randn(shape, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(seed))
    count = torch.Size(shape).numel()
    pieces = [_draw(seed, first, min(_PIECE, count - first)) for first in range(0, count, _PIECE)]
    return (torch.cat(pieces) if pieces else torch.empty(0, device=device)).view(shape).to(dtype)


def few_gaussians(count: int, seed: int) -> Tensor:
    """Standard normal noise, shape (count,), fp32, on the CPU, from the digests of `seed` and a counter.

    16 bits choose one of 65,536 quantiles: a distance of 1e-5 in distribution function, support ±4.3 (this project's
    choice). For a handful of numbers, where tables or a generator would be most of the cost.
    """
    digests = (hashlib.blake2b(struct.pack("<2q", seed, block)).digest() for block in range(-(-count // 32)))
    return torch.from_numpy(_few_quantiles()[np.frombuffer(b"".join(digests), np.uint16, count)])


def _noise_by_rows(like: Tensor, key: Tensor, layer: int, trajectories: int) -> Iterator[tuple[slice, Tensor]]:
    """Noise for `like` seen as rows of its last dimension: pairs of a range of rows and their noise.

    Trajectory j's rows get `gaussian(..., derive_seed(key, layer, j))`. On the CPU it comes in pieces of `_PIECE`
    samples or fewer.
    """
    size = like.shape[-1]
    rows = like.numel() // size // trajectories
    on_cpu = like.device.type == "cpu"
    together = max(1, _PIECE // size) if on_cpu else max(1, rows)
    for j in range(trajectories):
        seed = derive_seed(key, layer, j)
        for start in range(0, rows, together):
            count = min(together, rows - start)
            if on_cpu:
                noise = _draw(seed, start * size, count * size).view(count, size).to(like.dtype)
            else:
                noise = gaussian((count, size), seed, like.device, like.dtype)
            yield slice(j * rows + start, j * rows + start + count), noise


def _noised(hidden_states: Tensor, std: Tensor, key: Tensor, layer: int, trajectories: int) -> Tensor:
    """The value of `add_noise`."""
    scale = std.to(hidden_states.dtype)
    output = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    source, target = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (hidden_states, output))
    for rows, noise in _noise_by_rows(hidden_states, key, layer, trajectories):
        torch.addcmul(source[rows], noise, scale, out=target[rows])
    return output


def _noise_gradient(grad: Tensor, key: Tensor, layer: int, trajectories: int) -> Tensor:
    """Σ grad ⊙ ε over all dimensions but the last, shape (d,), fp32: the gradient of `add_noise` in `std`."""
    total = torch.zeros(grad.shape[-1], dtype=torch.float32, device=grad.device)
    source = grad.reshape(-1, grad.shape[-1])
    for rows, noise in _noise_by_rows(grad, key, layer, trajectories):
        weighted = noise.mul_(source[rows]).float()
        total += weighted.new_ones(weighted.shape[0]) @ weighted  # a BLAS call: on the CPU thrice as fast as sum(0)
    return total


# What `torch.compile` sees: opaque operators, whose wrappers would cost an eager pass more than the functions' Python.
# Not in a CUDA graph, which would replay one sample: a generator is seeded anew in each pass.
_OPAQUE: dict[str, Any] = {"mutates_args": (), "tags": (torch.Tag.cudagraph_unsafe,)}
noised = torch.library.custom_op("dip_hf::noised", _noised, **_OPAQUE)
noise_gradient = torch.library.custom_op("dip_hf::noise_gradient", _noise_gradient, **_OPAQUE)


@noised.register_fake
def _(hidden_states: Tensor, std: Tensor, key: Tensor, layer: int, trajectories: int) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


@noise_gradient.register_fake
def _(grad: Tensor, key: Tensor, layer: int, trajectories: int) -> Tensor:
    return grad.new_empty(grad.shape[-1], dtype=torch.float32)


class _AddNoise(torch.autograd.Function):
    """Not `register_autograd`, whose wrapper takes a tenth of a millisecond a call."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, std: Tensor, key: Tensor, layer: int, trajectories: int) -> Tensor:
        ctx.save_for_backward(key)
        ctx.layer, ctx.trajectories = layer, trajectories
        function = noised if torch.compiler.is_compiling() else _noised
        return function(hidden_states, std, key, layer, trajectories)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        grad_std = None
        if ctx.needs_input_grad[1]:
            function = noise_gradient if torch.compiler.is_compiling() else _noise_gradient
            grad_std = function(grad, ctx.saved_tensors[0], ctx.layer, ctx.trajectories)
        return grad, grad_std, None, None, None


def add_noise(hidden_states: Tensor, std: Tensor, key: Tensor, layer: int, trajectories: int) -> Tensor:
    """u = v + std ⊙ ε, ε ~ N(0, I): a sample of N(v, diag(std²)) (arXiv 2506.04690, projection at a layer's input).

    The backward pass regenerates ε from its seed, so the forward pass keeps nothing as large as `hidden_states`
    (this project's choice). Differentiable in `hidden_states` and `std`.

    Args:
        hidden_states: v, shape (trajectories · batch, ..., d), trajectory-major; any floating dtype.
        std: standard deviations, shape (d,), fp32.
        key: `NoiseKey.tensor()`, shape (4,), int64, on the CPU.
        layer: index of the block.
        trajectories: number of trajectories folded into dimension 0.

    Returns:
        u, shape and dtype of `hidden_states`, contiguous.
    """
    u: Tensor = _AddNoise.apply(hidden_states, std, key, layer, trajectories)
    return u
