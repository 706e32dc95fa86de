"""DReS's formulas as pure functions (Dual Reconstruction Smoothing, arXiv 2510.00253).

The paper's body was not read: that samples are coded by one spline and decoded by a second one, at fixed
Chebyshev-type nodes, is from its abstract and published summaries. Which splines, which nodes and which loss is this
project's choice.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from dip_hf.noise import derive_seed


VARIANCE_FLOOR = 1e-3
"""Least variance that an error is divided by, relative to the mean square of the outputs (this project's choice)."""

_STREAM = int.from_bytes(b"dres", "little")  # keeps the permutation's seed apart from every other method's
_CPU = torch.device("cpu")


def sample_nodes(group_size: int) -> Tensor:
    """α_k = cos((2k-1)π/2K), k = 1..K: where the samples sit on the path; shape (K,), float64, descending."""
    return torch.cos((2 * torch.arange(1, group_size + 1, dtype=torch.float64) - 1) * (math.pi / (2 * group_size)))


def coded_nodes(coded_size: int) -> Tensor:
    """β_n = cos((n-1)π/(N-1)), n = 1..N, N ≥ 2: where coded samples are taken; shape (N,), float64, descending."""
    return torch.cos(torch.arange(coded_size, dtype=torch.float64) * (math.pi / (coded_size - 1)))


def natural_spline_matrix(knots: Tensor, points: Tensor) -> Tensor:
    """W with W @ y = s(points), where s is the natural cubic spline through (knots, y), linear outside the knots.

    Between knots t_i and t_{i+1}, h apart, with second derivatives M (0 at both ends),
    s(x) = [r y_i + l y_{i+1}]/h + [r³/h - h r] M_i/6 + [l³/h - h l] M_{i+1}/6 with l = x - t_i and r = t_{i+1} - x.

    Args:
        knots: shape (n,), n ≥ 2, distinct, in any order.
        points: shape (p,).

    Returns:
        Shape (p, n), float64; every row sums to 1.
    """
    t, order = knots.double().sort()
    x, size = points.double(), len(t)
    h, identity = t.diff(), torch.eye(size, dtype=torch.float64)
    slopes = identity.diff(dim=0) / h[:, None]  # (n-1, n): chord slopes as a function of y
    system = torch.diag(2 * (h[:-1] + h[1:])) + torch.diag(h[1:-1], 1) + torch.diag(h[1:-1], -1)
    second = torch.zeros_like(identity)  # M as a function of y
    second[1:-1] = torch.linalg.solve(system, 6 * slopes.diff(dim=0))

    i = (torch.searchsorted(t, x, right=True) - 1).clamp(0, size - 2)
    step, left, right = h[i], (x - t[i]).clamp(min=0), (t[i + 1] - x).clamp(min=0)
    left, right = left.minimum(step), right.minimum(step)  # outside the knots: the value at the nearest one ...
    matrix = (
        (right / step)[:, None] * identity[i]
        + (left / step)[:, None] * identity[i + 1]
        + ((right**3 / step - step * right) / 6)[:, None] * second[i]
        + ((left**3 / step - step * left) / 6)[:, None] * second[i + 1]
    )
    first_slope = slopes[0] - h[0] / 6 * second[1]
    last_slope = slopes[-1] + h[-1] / 6 * second[-2]
    matrix += (x - t[0]).clamp(max=0)[:, None] * first_slope + (x - t[-1]).clamp(min=0)[
        :, None
    ] * last_slope  # ... + slope
    return torch.empty_like(matrix).index_copy_(1, order, matrix)


def spline_codec(samples: Tensor, coded: Tensor) -> tuple[Tensor, Tensor]:
    """Encoding and decoding matrix for two grids of nodes: f̂ = D · f(E · x) reconstructs f(x).

    Args:
        samples: α, shape (K,), K ≥ 2.
        coded: β, shape (N,), N ≥ K.

    Returns:
        E, shape (N, K), and D, shape (K, N), both float64 with rows that sum to 1.

    Raises:
        ValueError: a choice whose reconstruction error says nothing about f.
    """
    if len(samples) < 2:
        raise ValueError(f"group_size={len(samples)} must be at least 2: one sample leaves no path to smooth along.")
    if len(coded) < len(samples):
        raise ValueError(
            f"coded_size={len(coded)} is below group_size={len(samples)}: decoding then loses information even for a "
            "linear f, so the error measures the interpolation and not the curvature of f; use an oversampling ≥ 1."
        )
    if ((samples[:, None] - coded).abs().min(1).values < 1e-9).all():
        raise ValueError(
            f"group_size={len(samples)} with coded_size={len(coded)}: every sample's node is a coded sample's node "
            "too, so the reconstruction is exact for every f and its error is always 0; change the oversampling."
        )
    return natural_spline_matrix(samples, coded), natural_spline_matrix(coded, samples)


@cache
def coding_matrices(
    group_size: int, coded_size: int, dtype: torch.dtype = torch.float64, device: torch.device = _CPU
) -> tuple[Tensor, Tensor]:
    """E and D for this project's nodes; built in float64, then cast. Cached: do not write to them.

    Args:
        group_size: K ≥ 2.
        coded_size: N ≥ K, but not N = 2K·j + 1, whose coded nodes contain all samples' nodes.
        dtype: what they are used in.
        device: where they are used.

    Returns:
        E, shape (N, K), and D, shape (K, N). Rows sum to 1.

    Raises:
        ValueError: as `spline_codec`.
    """
    with torch.inference_mode(False), torch.device("cpu"):  # they outlast the mode in which they are first asked for
        encoder, decoder = spline_codec(sample_nodes(group_size), coded_nodes(max(coded_size, 2)))
        return encoder.to(device, dtype), decoder.to(device, dtype)


def affine_error(group_size: int, coded_size: int) -> float:
    """‖I - DE‖²_F / K: what `reconstruction_error` gives for affine f, on average over the permutations of a group."""
    encoder, decoder = coding_matrices(group_size, coded_size)
    return (torch.eye(group_size, dtype=torch.float64) - decoder @ encoder).square().sum().item() / group_size


def _mix(matrix: Tensor, samples: Tensor) -> Tensor:
    with torch.autocast(samples.device.type, enabled=False):  # which would round the matrices' rows off their sum of 1
        return (matrix @ samples.to(matrix.dtype).flatten(1)).view(-1, *samples.shape[1:])


def _working_dtype(samples: Tensor) -> torch.dtype:
    return torch.promote_types(samples.dtype, torch.float32)


def encode(samples: Tensor, coded_size: int) -> Tensor:
    """E · x over dimension 0.

    Args:
        samples: x, shape (K, ...), floating.
        coded_size: N.

    Returns:
        Coded samples, shape (N, ...), in the samples' dtype (computed in fp32 or wider).
    """
    encoder, _ = coding_matrices(samples.shape[0], coded_size, _working_dtype(samples), samples.device)
    return _mix(encoder, samples).to(samples.dtype)


def decode(coded: Tensor, group_size: int) -> Tensor:
    """D · y over dimension 0.

    Args:
        coded: y = f(coded samples), shape (N, ...), floating.
        group_size: K.

    Returns:
        f̂, shape (K, ...), fp32 or wider.
    """
    _, decoder = coding_matrices(group_size, coded.shape[0], _working_dtype(coded), coded.device)
    return _mix(decoder, coded)


def _squared_norm(vectors: Tensor) -> Tensor:
    """‖v‖² over the last dimension: the norm's square, which goes over a large tensor fewer times than a sum does."""
    return torch.linalg.vector_norm(vectors, dim=-1).square()


def reconstruction_error(
    outputs: Tensor, reconstruction: Tensor, mask: Tensor | None = None, detach_variance: bool = False
) -> Tensor:
    """Mean over places of (1/K) Σ_k ‖f(x_k) - f̂(x_k)‖² / s², s² the variance of f(x_k) over the group.

    s² is the unbiased sample variance, summed over dimensions. With it the error of an affine f, averaged over the
    permutations of a group, is ‖I - DE‖²_F/K exactly (see `affine_error`), whatever the samples.
    Each place has an s² of its own, so that the few tokens of a real model with huge activations do not outweigh the
    rest; s² is at least `VARIANCE_FLOOR` times the mean square, so that a place where all samples agree (a common
    prompt prefix) counts as nothing rather than as rounding noise. All of this is this project's choice.

    Args:
        outputs: f(x_k), shape (K, ..., d); detach them for a fixed target.
        reconstruction: f̂(x_k), shape (K, ..., d).
        mask: which places count, shape (...), bool; None for all.
        detach_variance: whether s² is a constant of the gradient. If so, the gradient in the scale of f is twice the
            error: the loss can be made smaller by shrinking f. If not, it is 0.

    Returns:
        A scalar in fp32 or wider, 0 where no place counts.
    """
    outputs = outputs.to(_working_dtype(outputs))
    target = outputs.detach() if detach_variance else outputs
    spread = _squared_norm(target - target.mean(0)).sum(0) / (len(target) - 1)  # on the CPU `var` is ten times slower
    variance = spread.maximum(VARIANCE_FLOOR * _squared_norm(target).mean(0))
    tiny = torch.finfo(variance.dtype).tiny
    errors = _squared_norm(outputs - reconstruction).mean(0) / variance.clamp(min=tiny)
    if mask is None:
        return errors.mean()
    return errors.where(mask, 0).sum() / mask.sum().clamp(min=1)


def group_permutation(key: Tensor, count: int) -> Tensor:
    """A permutation of `count` samples, a function of the key alone: the same on every kind of device.

    Args:
        key: `NoiseKey.tensor()`, shape (4,).
        count: number of samples.

    Returns:
        Shape (count,), int64, on the CPU. The first K·G entries, reshaped to (K, G), are G groups of K, in random
        order: the first of them are a random sample of the groups.
    """
    generator = torch.Generator().manual_seed(derive_seed(key, -1, _STREAM))
    return torch.randperm(count, generator=generator, device="cpu")
