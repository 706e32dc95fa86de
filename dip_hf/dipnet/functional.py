"""DIPNet's formulas as pure functions (arXiv 2506.04690)."""

from __future__ import annotations

import torch
from torch import Tensor


def token_rms(hidden_states: Tensor) -> Tensor:
    """Median over tokens of each token's root mean square, a scalar in fp32.

    The unit of a block's noise. The median, not the mean, because a few tokens of a real model carry activations a
    thousand times larger than the rest (this project's choice).

    Args:
        hidden_states: shape (..., d).
    """
    return hidden_states.detach().float().square().mean(-1).sqrt().median()


def variance_penalty(
    log_variances: Tensor, alpha: float, beta: float, reduction: str = "mean"
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 4's second and third term: α Σ λ - β Σ ln λ, stationary at λ = β/α.

    Args:
        log_variances: ρ = ln λ of every noised block, shape (blocks, d).
        alpha: α > 0, weight of the variances.
        beta: β > 0, weight of the log-variances.
        reduction: "sum" over blocks and dimensions (the paper's), or "mean" (this project's choice: a sum over a
            large model swamps a loss that is a mean over tokens).

    Returns:
        The penalty, and its raw parts Σ λ and Σ ln λ, all scalars.
    """
    reduce = torch.sum if reduction == "sum" else torch.mean
    variance, log_variance = reduce(log_variances.exp()), reduce(log_variances)
    return alpha * variance - beta * log_variance, variance, log_variance


def head_gram(head: Tensor) -> Tensor:
    """WᵀW of the LM head W, shape (vocabulary, d): shape (d, d), fp32. It costs what d tokens cost in the head."""
    wide = head.float()
    return wide.T @ wide


def output_variance(hidden_states: Tensor, gram: Tensor, mask: Tensor, trajectories: int) -> Tensor:
    """Eq. 4's last term without its weight: the trace of the unbiased covariance of the outputs, summed over tokens.

    1/(m(m-1)) Σ_{j1<j2} ‖f_j1 - f_j2‖² = 1/(m-1) Σ_j ‖f_j - f̄‖², and the outputs are the logits f = W h + b, so with
    d = h - h̄ the squared norm is d·(WᵀW)d: exact, without building logits of vocabulary size.

    Args:
        hidden_states: final hidden states, shape (m · batch, length, d), trajectory-major.
        gram: WᵀW, as `head_gram` gives it.
        mask: which positions count, shape (batch, length), bool.
        trajectories: m ≥ 2.

    Returns:
        A scalar in fp32.
    """
    states = hidden_states.float().unflatten(0, (trajectories, -1))[:, mask]
    deviations = states - states.mean(0)
    return ((deviations @ gram) * deviations).sum() / (trajectories - 1)
