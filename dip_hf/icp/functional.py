"""ICP's formulas as pure functions (arXiv 2505.14751 and its authors' code; what is this project's choice says so)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dip_hf.noise import derive_seed, gaussian


UPDATES = ("normalised", "sign", "adam")
DIRECTIONS = ("descent", "ascent", "random")
POSITIONS = ("all", "prompt")
WEIGHTINGS = ("additive", "paper")
ADAM_BETAS = (0.9, 0.999)
_STREAM = int.from_bytes(b"icp", "little")  # keeps the random direction apart from every other method's draws


class AdamState(NamedTuple):
    """Moments of the "adam" update, fresh for every batch (authors' code).

    Attributes:
        first: running mean of the gradient, shape of the embeddings, fp32.
        second: running mean of its square.
        step: number of steps taken.
        scale: unit of both, the first gradient's largest entry: without it the squares would underflow.
    """

    first: Tensor
    second: Tensor
    step: int
    scale: Tensor


def _wide(tensor: Tensor) -> Tensor:
    """fp32, or float64 where it already is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _unit_scale(gradient: Tensor) -> Tensor:
    """The gradient with each token's largest entry at ±1: its square would underflow, for it scales as 1/tokens."""
    return gradient / gradient.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)


def perturbation_step(
    gradient: Tensor,
    embeddings: Tensor,
    mask: Tensor,
    epsilon: float,
    update: str = "normalised",
    state: AdamState | None = None,
) -> tuple[Tensor, AdamState | None]:
    """One step of gradient *descent* on the input, x_{t+1} = x_t + step (authors' code: constant step, no projection).

    The length is relative to each token's own RMS(e), the mean taken over the last dimension, and does not change
    from step to step (this project's choice; a raw step of 1e-3 moves nothing). The directions:

    - "normalised": -ε · RMS(e) · g / RMS(g) (this project's choice).
    - "sign": -ε · RMS(e) · sign(g), which is one step of Adam.
    - "adam": -ε · RMS(e) · m̂ / √v̂ with β = .9, .999 (authors' code). Adam's own 1e-8 in the denominator is
      replaced by 1e-12 of the largest gradient, because the gradient of a mean over tokens is of that order.

    A token whose gradient is zero stays where it is.

    Args:
        gradient: g, the task loss's gradient at x_t, shape (batch, length, d); its scale does not matter.
        embeddings: e, the clean input, of the same shape.
        mask: which tokens move, shape (batch, length), bool.
        epsilon: ε > 0, relative to RMS(e).
        update: one of `UPDATES`.
        state: what the previous step of "adam" returned; None at the first.

    Returns:
        The step, shape of `gradient`, fp32 (float64 for such input), and the next state, None but for "adam".

    Raises:
        ValueError: unknown `update`.
    """
    g = _wide(gradient)
    length = epsilon * _wide(embeddings).square().mean(-1, keepdim=True).sqrt() * mask.unsqueeze(-1)
    if update == "normalised":
        g = _unit_scale(g)
        return -length * g / g.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12), None
    if update == "sign":
        return -length * g.sign(), None
    if update != "adam":
        raise ValueError(f"update={update!r} must be one of {', '.join(UPDATES)}.")
    beta1, beta2 = ADAM_BETAS
    if state is None:
        largest = g.abs().amax()
        state = AdamState(torch.zeros_like(g), torch.zeros_like(g), 0, torch.where(largest > 0, largest, 1.0))
    g = g / state.scale
    first, second = state.first.lerp(g, 1 - beta1), state.second.lerp(g.square(), 1 - beta2)
    state = AdamState(first, second, state.step + 1, state.scale)
    mean = state.first / (1 - beta1**state.step)
    deviation = (state.second / (1 - beta2**state.step)).sqrt()
    return -length * mean / deviation.clamp_min(1e-12), state


def random_shift(shift: Tensor, key: Tensor) -> Tensor:
    """A shift of the same length per token in a random direction: the control of "does the direction matter?".

    The direction is uniform on the sphere and a function of the key alone (this project's choice).

    Args:
        shift: x_T - e, shape (rows, length, d).
        key: `NoiseKey.tensor()`, shape (4,).

    Returns:
        Shape and dtype of `shift`.
    """
    noise = gaussian(shift.shape, derive_seed(key, -1, _STREAM), shift.device).to(shift.dtype)
    return noise * (shift.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))


def layer_weights(n: int) -> list[float]:
    """w_i = cos(i/(n-1) · π/4) for i = 0..n-1, from 1 at the lowest layer to .71 at the highest (authors' code).

    A single layer weighs 1.
    """
    return [math.cos(i / max(n - 1, 1) * math.pi / 4) for i in range(n)]


def feature_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Sequence[float], mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ_i w_i Σ_t ‖h_it - h'_it‖² / ‖h'_it‖², as a sum over tokens and their number.

    The authors' code has a plain MSE per layer. Dividing by the teacher's ‖h'‖², without gradient, makes layers
    comparable; dividing token by token, not by a mean over the batch, makes the sum over micro-batches exactly the sum
    over the whole batch (both this project's choice).

    Args:
        student: per layer h, shape (m · batch, length, d), with gradient. m may differ from layer to layer: 1 below
            the first block whose batch is folded into m trajectories. A layer's sum is divided by its m.
        teacher: per layer h', of the same shapes; taken as constants.
        weights: w, one for each layer.
        mask: which tokens count, shape (batch, length), bool.

    Returns:
        The sum over tokens and the number of tokens (of the unfolded batch); scalars. Their quotient is the mean.
    """
    total = torch.zeros((), device=mask.device)
    for h, h_teacher, weight in zip(student, teacher, weights, strict=True):
        target = _wide(h_teacher.detach())
        folds = h.shape[0] // mask.shape[0]
        error = (_wide(h) - target).square().sum(-1)
        relative = error / target.square().sum(-1).clamp_min(torch.finfo(error.dtype).tiny)
        counted = relative.masked_fill(~mask.repeat(folds, 1).to(h.device), 0).sum()
        total = total + (counted * (weight / folds)).to(total.device)
    return total, mask.sum()


def schedule(progress: float, warmup: float) -> float:
    """a(t) = 1 until the end of the warm-up k, then cos(π (t-k) / (2 (1-k))), from 1 down to 0 (authors' code).

    Theirs counts epochs; here t is the share of the run that is done, so that it changes at every step (this
    project's choice).

    Args:
        progress: t, from 0 to 1.
        warmup: k, from 0 to 1; at 1, a stays 1.
    """
    if progress <= warmup:
        return 1.0
    return max(math.cos(math.pi * (min(progress, 1.0) - warmup) / (2 * (1 - warmup))), 0.0)


def term_weights(
    progress: float, weight: float = 1.0, warmup: float = 0.25, weighting: str = "additive"
) -> tuple[float, float]:
    """Weights of the task loss and of the feature loss.

    "paper" is (a, w · (1-a)), the printed formula at w = 1; "additive" is (1, w · (1-a)) (this project's choice).

    Args:
        progress: share of the run that is done, from 0 to 1.
        weight: w.
        warmup: as for `schedule`.
        weighting: one of `WEIGHTINGS`.
    """
    a = schedule(progress, warmup)
    return (a if weighting == "paper" else 1.0), weight * (1 - a)


def valid_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """Tokens that are no padding, shape (batch, length), bool: all of them where there is no attention mask."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def first_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """The first token of every document, shape (batch, length), bool.

    From the position indices where there are any (packed and padding-free batches), else from the attention mask.
    """
    if inputs.get("position_ids") is not None:
        return (inputs["position_ids"] == 0).expand_as(inputs["input_ids"])
    valid = valid_tokens(inputs)
    return valid & (valid.cumsum(-1) == 1)


def compared_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """Tokens whose features are compared: valid ones, but for the first of every document, shape (batch, length).

    That one carries activations a thousand times larger than the rest, whatever it reads (this project's choice).
    """
    return valid_tokens(inputs) & ~first_tokens(inputs)


def perturbed_tokens(inputs: Mapping[str, Any], positions: str) -> Tensor:
    """Tokens whose embedding is perturbed, shape (batch, length), bool.

    Args:
        inputs: a batch, with `labels` for "prompt".
        positions: "all" valid tokens, or the valid ones without label, the "prompt" (this project's choice: the
            perturbation of a labelled token tells of the labels behind it), but for a document's first one, whose
            label trains nothing, and which collators mask or not.
    """
    valid = valid_tokens(inputs)
    return valid if positions == "all" else valid & (inputs["labels"] == -100) & ~first_tokens(inputs)
