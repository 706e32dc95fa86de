"""What the diagnostics measure, as pure functions on tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


IGNORED = -100
"""The label of a token that is not scored."""


class Answers(NamedTuple):
    """Teacher-forced scores of a batch of examples.

    Attributes:
        nll: -ln probability of each example's scored tokens together, nats, shape (batch,), fp32 or wider.
        tokens: their number, shape (batch,), int64.
        match: whether the argmax of the logits is right at every one of them, shape (batch,), bool.
    """

    nll: Tensor
    tokens: Tensor
    match: Tensor


def teacher_forced(logits: Tensor, labels: Tensor) -> Answers:
    """Score the labelled tokens of each example, every token predicted from the true ones before it.

    `match` is what greedy generation gives under a scorer that compares strings: the first wrong argmax is where the
    generated answer leaves the reference. Text that several token sequences spell is the exception.

    Args:
        logits: shape (batch, length, vocabulary); position t predicts token t + 1.
        labels: shape (batch, length), `IGNORED` where a token is not scored.
    """
    logits, targets = logits[:, :-1], labels[:, 1:]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scored = targets != IGNORED
    nll = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none").sum(1)
    wrong = (logits.argmax(-1) != targets) & scored
    return Answers(nll, scored.sum(1), ~wrong.any(1))


PLATEAU = 10
"""Iterations in which a value rises no more before it counts as found: it rests at lesser eigenvalues on its way."""


class SpectralNorms(NamedTuple):
    """Result of a power iteration.

    Attributes:
        values: shape (batch,); lower bounds on the norms, each of which rises from iteration to iteration.
        iterations: products with the matrices that were taken.
        converged: whether a value rose by no more than the tolerance in `PLATEAU` iterations; shape (batch,), bool.
    """

    values: Tensor
    iterations: int
    converged: Tensor


def spectral_norms(
    product: Callable[[Tensor], Tensor], start: Tensor, max_iterations: int = 100, tolerance: float = 1e-3
) -> SpectralNorms:
    """Largest absolute eigenvalue of each of a batch of symmetric matrices, by power iteration.

    v ← Hv / ‖Hv‖, and ‖Hv‖ is the estimate. It needs no sign, so that eigenvalues λ and -λ of one size do no harm.
    A value that is found stays, whatever the others still need, so that it does not depend on them.

    Args:
        product: from v, shape (batch, ...), to the products H_b v_b, of the same shape.
        start: first v, nonzero in every row; of any length.
        max_iterations: at least 1; none is found before `PLATEAU` + 1.
        tolerance: relative rise of a value in `PLATEAU` iterations at which it counts as found; stops when all are.

    Raises:
        ValueError: a value out of range.
    """
    if max_iterations < 1:
        raise ValueError(f"max_iterations={max_iterations} must be at least 1; 100 is usual.")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance={tolerance} must lie between 0 and 1; 1e-3 is usual.")

    def norms(vector: Tensor) -> Tensor:
        return vector.flatten(1).norm(dim=1)

    def scaled(vector: Tensor, length: Tensor) -> Tensor:
        # A product of zero, as where the matrix is zero, stays zero
        length = torch.where(length > 0, length, 1.0)
        return vector / length.view(-1, *[1] * (vector.dim() - 1))

    vector, values = scaled(start, norms(start)), start.new_zeros(start.shape[0])
    converged = torch.zeros_like(values, dtype=torch.bool)
    history: list[Tensor] = []
    while len(history) < max_iterations and not converged.all():
        vector = product(vector)
        length = norms(vector)
        vector = scaled(vector, length)
        values = torch.where(converged, values, length)
        history.append(values)
        if len(history) > PLATEAU:
            converged |= values - history[-1 - PLATEAU] <= tolerance * values
    return SpectralNorms(values, len(history), converged)


def token_scale(embeddings: Tensor) -> Tensor:
    """Root mean square of each token's embedding, shape (..., d) to (..., 1): the unit of every perturbation here."""
    return embeddings.square().mean(-1, keepdim=True).sqrt()


def fgsm(embeddings: Tensor, gradient: Tensor, mask: Tensor, epsilon: float) -> Tensor:
    """e + ε · RMS(e) · sign(g): the fast gradient sign method (arXiv 1412.6572), on embeddings.

    The length is relative to each token's own RMS (this project's choice).

    Args:
        embeddings: e, shape (batch, length, d).
        gradient: g, the loss's gradient at e; its scale does not matter.
        mask: which tokens move, shape (batch, length), bool.
        epsilon: ε ≥ 0.
    """
    return embeddings + epsilon * token_scale(embeddings) * mask.unsqueeze(-1) * gradient.sign()


def add_relative_noise(embeddings: Tensor, noise: Tensor, mask: Tensor, scale: float) -> Tensor:
    """e + scale · RMS(e) · noise, at the tokens of `mask`; shapes as for `fgsm`, `noise` of the embeddings'."""
    return embeddings + scale * token_scale(embeddings) * mask.unsqueeze(-1) * noise


def gaussian_w2(mean: Tensor, factor: Tensor, other_mean: Tensor, other_factor: Tensor) -> Tensor:
    """2-Wasserstein distance of N(μ, SSᵀ) and N(μ', S'S'ᵀ); degenerate covariances are fine.

    W2² = ‖μ - μ'‖² + tr SSᵀ + tr S'S'ᵀ - 2‖SᵀS'‖_nuclear, and what follows the means is min over orthogonal Q of
    ‖S - S'Q‖², which is what is computed: it has no cancellation where the two are close. The cost is a singular value
    decomposition of R×R.

    Args:
        mean: μ, shape (P,).
        factor: S, shape (P, R).
        other_mean: μ', shape (P,).
        other_factor: S', shape (P, R').

    Returns:
        A scalar in float64.
    """
    s, t = factor.double(), other_factor.double()
    rank = max(s.shape[1], t.shape[1])
    s, t = F.pad(s, (0, rank - s.shape[1])), F.pad(t, (0, rank - t.shape[1]))
    left, _, right = torch.linalg.svd(t.T @ s)
    covariance = (s - t @ (left @ right)).square().sum()
    return ((mean.double() - other_mean.double()).square().sum() + covariance).sqrt()
