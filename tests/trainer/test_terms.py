"""The scale of the loss's terms, for any values, batch sizes, accumulation and number of ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dip_hf.trainer.terms import batch_mean, check_finite, token_mean


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
        [token_mean("t", scalar(math.fsum(micro)), weight, len(tokens), ranks, accumulation) for micro in rank]
        for rank in step
    ]
    loss = sum(float(term.loss) for rank in terms for term in rank) / ranks
    raw = sum(float(term.value) for rank in terms for term in rank) / (ranks * accumulation)
    mean = math.fsum(tokens) / max(len(tokens), 1)
    assert loss == pytest.approx(weight * mean, rel=1e-5, abs=1e-4 * weight)  # the token count enters in fp32
    assert raw == pytest.approx(mean, rel=1e-5, abs=1e-4)


@given(st.lists(st.lists(values, min_size=3, max_size=3), min_size=1, max_size=3), weights)
def test_batch_mean_counts_every_micro_batch_alike(step: list[list[float]], weight: float) -> None:
    """Summed over micro-batches and averaged over ranks: the mean over micro-batches and ranks."""
    terms = [[batch_mean("t", scalar(value), weight, len(rank)) for value in rank] for rank in step]
    loss = sum(float(term.loss) for rank in terms for term in rank) / len(step)
    mean = math.fsum(value for rank in step for value in rank) / (3 * len(step))
    assert loss == pytest.approx(weight * mean, rel=1e-9, abs=1e-9 * weight)


@given(values, weights, st.integers(1, 64))
def test_what_is_logged_is_what_enters_the_loss(value: float, weight: float, accumulation: int) -> None:
    term = batch_mean("t", scalar(value), weight, accumulation)
    assert float(term.loss) * accumulation == pytest.approx(float(term.value) * term.weight, abs=1e-9)


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
    """A term's gradient is weight times share times its value's."""
    x = torch.tensor(2.0, requires_grad=True)
    token_mean("t", x * 3, 0.5, torch.tensor(6), 2, 4).loss.backward()
    assert x.grad == pytest.approx(3 * 0.5 * 2 / 6)
