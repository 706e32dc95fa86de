"""The scale of the loss's terms, for any values, batch sizes, accumulation and number of ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dip_hf.trainer.terms import Term, check_finite, token_mean, total_loss


values = st.floats(-1e3, 1e3)
weights = st.floats(1e-3, 1e3)
# [rank][micro-batch] -> the values of its label tokens; ranks have equally many micro-batches, of unequal sizes
steps = st.integers(1, 3).flatmap(
    lambda ranks: st.integers(1, 4).flatmap(
        lambda micro: st.lists(
            st.lists(st.lists(values, max_size=5), min_size=micro, max_size=micro), min_size=ranks, max_size=ranks
        )
    )
)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@given(steps, weights)
def test_token_mean_is_the_mean_over_all_label_tokens(step: list[list[list[float]]], weight: float) -> None:
    """Summed over micro-batches and averaged over ranks, as DDP does: the mean over the step's label tokens."""
    tokens = [value for rank in step for micro in rank for value in micro]
    ranks, accumulation = len(step), len(step[0])
    terms = [
        token_mean("t", scalar(math.fsum(micro)), weight, len(tokens), ranks, accumulation)
        for rank in step
        for micro in rank
    ]
    loss = sum(float(total_loss([term], accumulation)) for term in terms) / ranks
    raw = sum(float(term.value) for term in terms) / (ranks * accumulation)
    mean = math.fsum(tokens) / max(len(tokens), 1)
    assert loss == pytest.approx(weight * mean, rel=1e-5, abs=1e-4 * weight)  # the token count enters in fp32
    assert raw == pytest.approx(mean, rel=1e-5, abs=1e-4)


@given(st.lists(st.lists(values, min_size=3, max_size=3), min_size=1, max_size=3), weights, weights)
def test_the_loss_counts_every_micro_batch_alike(step: list[list[float]], weight: float, other: float) -> None:
    """Summed over micro-batches and averaged over ranks: the weighted means over micro-batches and ranks."""
    losses = [
        float(total_loss([Term("t", scalar(value), weight), Term("u", scalar(1.0), other)], 3))
        for rank in step
        for value in rank
    ]
    mean = math.fsum(value for rank in step for value in rank) / (3 * len(step))
    expected = weight * mean + other
    assert math.fsum(losses) / len(step) == pytest.approx(expected, rel=1e-9, abs=1e-9 * max(weight, other))


@given(st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 10**6), st.text(min_size=1, max_size=9))
def test_not_finite(value: float, step: int, name: str) -> None:
    """The error names step, term and value."""
    with pytest.raises(FloatingPointError) as error:
        check_finite(name, value, step)
    assert f"Step {step}" in str(error.value) and repr(name) in str(error.value) and str(value) in str(error.value)


@given(values)
def test_finite(value: float) -> None:
    check_finite("t", value, 0)


def test_gradient() -> None:
    """Of a micro-batch's loss: weight times the value's, as a share of the step's tokens, undone what DDP averages."""
    x = torch.tensor(2.0, requires_grad=True)
    total_loss([token_mean("t", x * 3, 0.5, torch.tensor(6), 2, 4)], 4).backward()
    assert x.grad == pytest.approx(3 * 0.5 * 2 / 6)
