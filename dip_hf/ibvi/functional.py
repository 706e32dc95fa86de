"""IBVI's formulas as pure functions (arXiv 2505.20235), and the posterior's random numbers."""

from __future__ import annotations

import hashlib
import math
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from dip_hf.noise import NoiseKey, derive_seed, few_gaussians, gaussian


_ABOVE_ANY_BLOCK = 1 << 62


def posterior_number(name: str) -> int:
    """A whole number from 2^62 to 2^63 - 1 for a module's name, in the place of a block's index in a seed.

    BLAKE2b of the name: the same in every process, and no block's index.
    """
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return _ABOVE_ANY_BLOCK + int.from_bytes(digest, "little") % _ABOVE_ANY_BLOCK


def initial_covariance(rank: int, shape: tuple[int, int], scale: float, seed: int, number: int) -> Tensor:
    """S ~ N(0, c²/(nR)), so that a weight's prior standard deviation is c/√n, √3 · c times that of a new LoRA's A.

    The paper's family (its authors' code): entries of standard deviation prior scale / √R. A function of its
    arguments alone: no global generator is touched, so that LoRA's own weights come out as without it.

    Args:
        rank: R.
        shape: (r, n) of LoRA's A.
        scale: c.
        seed: the adapter's `noise_seed`.
        number: the module's `posterior_number`.

    Returns:
        S, shape (R, r, n), fp32, on the CPU.
    """
    place = derive_seed(NoiseKey(seed).tensor(), number, -1)  # no pass has a trajectory -1
    return gaussian((rank, *shape), place, torch.device("cpu")) * (scale / (shape[1] * rank) ** 0.5)


def posterior_coefficients(key: Tensor, number: int, trajectories: int, rank: int) -> Tensor:
    """z ~ N(0, I_R), one per trajectory: shape (m, R), fp32, on the CPU.

    A function of its arguments alone, on every kind of device the same.

    Args:
        key: `NoiseKey.tensor()`, shape (4,), int64, on the CPU.
        number: the module's `posterior_number`.
        trajectories: m.
        rank: R.
    """
    return torch.stack([few_gaussians(rank, derive_seed(key, number, j)) for j in range(trajectories)])


# Opaque to `torch.compile`; called outside of it, an operator's own cost would be many times the function's.
compiled_coefficients = torch.library.custom_op("dip_hf::posterior_coefficients", mutates_args=())(
    posterior_coefficients
)


@compiled_coefficients.register_fake
def _(key: Tensor, number: int, trajectories: int, rank: int) -> Tensor:
    return torch.empty(trajectories, rank, dtype=torch.float32)


def deviation(covariance: Tensor, coefficients: Tensor) -> Tensor:
    """Σ_k z_k S_k, a sample of N(0, S Sᵀ) (arXiv 2505.20235's low-rank Gaussian family), in fp32 or wider.

    Args:
        covariance: S, shape (R, r, n).
        coefficients: z, shape (m, R).

    Returns:
        Shape (m, r, n).
    """
    kind = covariance.device.type
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        return (coefficients @ covariance.flatten(1)).unflatten(1, covariance.shape[1:])


def project(x: Tensor, weights: Tensor) -> Tensor:
    """x Aᵀ, with trajectory j's own A_j for its rows.

    Args:
        x: shape (m · rows, ..., n), trajectory-major.
        weights: A_j, shape (m, r, n), dtype of `x`.

    Returns:
        Shape (m · rows, ..., r).
    """
    if len(weights) == 1:
        return F.linear(x, weights[0])
    return torch.bmm(x.reshape(len(weights), -1, x.shape[-1]), weights.mT).view(*x.shape[:-1], weights.shape[1])


def average_log_probabilities(logits: Tensor, num_samples: int) -> Tensor:
    """Log of the mean over samples of the next-token probabilities: logsumexp_j log_softmax(logits_j) - ln k.

    Args:
        logits: shape (k · batch, ..., vocabulary), sample-major: row j · batch + b is sample j of row b.
        num_samples: k ≥ 1.

    Returns:
        Normalised log-probabilities in fp32, shape (batch, ..., vocabulary).
    """
    # One sample at a time: a large vocabulary's log-probabilities in fp32 are not to exist k times at once
    first, *others = logits.chunk(num_samples)
    total = first.log_softmax(dim=-1, dtype=torch.float32)
    for sample in others:
        total = torch.logaddexp(total, sample.log_softmax(dim=-1, dtype=torch.float32))
    return total - math.log(num_samples)
