"""The formulas of arXiv 2506.04690 against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from dip_hf.dipnet.functional import head_gram, output_variance, token_rms, variance_penalty


def test_the_penalty_is_eq_4() -> None:
    rho = torch.randn(3, 5)
    alpha, beta = 0.1, 0.2
    total = variance = logarithm = 0.0
    for block in rho.tolist():
        for value in block:
            variance += math.exp(value)
            logarithm += value
            total += alpha * math.exp(value) - beta * value
    summed = variance_penalty(rho, alpha, beta, "sum")
    assert [part.item() for part in summed] == pytest.approx([total, variance, logarithm], rel=1e-5)
    mean = variance_penalty(rho, alpha, beta)
    assert [part.item() for part in mean] == pytest.approx([total / 15, variance / 15, logarithm / 15], rel=1e-5)


def plain_output_variance(hidden: torch.Tensor, head: torch.Tensor, mask: torch.Tensor, m: int) -> float:
    """Eq. 4's last term by its own letters: logits, pairs of trajectories, 1 / (m (m - 1))."""
    batch, length = mask.shape
    total = 0.0
    for b in range(batch):
        for t in range(length):
            if mask[b, t]:
                logits = [head @ hidden[j * batch + b, t] + 0.7 for j in range(m)]
                pairs = [(logits[i] - logits[j]).square().sum().item() for i in range(m) for j in range(i + 1, m)]
                total += sum(pairs) / (m * (m - 1))
    return total


@pytest.mark.parametrize("m", [2, 3, 5])
def test_output_variance_is_eq_4s_last_term(m: int) -> None:
    hidden, head = torch.randn(m * 2, 3, 4), torch.randn(9, 4)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    expected = plain_output_variance(hidden, head, mask, m)
    assert output_variance(hidden, head_gram(head), mask, m).item() == pytest.approx(expected, rel=1e-4)
    # half the mean squared distance of pairs is the unbiased covariance's trace
    states = (hidden @ head.T).unflatten(0, (m, 2))[:, mask]
    assert expected == pytest.approx(states.var(0, unbiased=True).sum().item(), rel=1e-4)


def test_output_variance_has_the_loops_gradient() -> None:
    hidden = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    head = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 2, dtype=torch.bool)
    ours = torch.autograd.grad(output_variance(hidden, head_gram(head), mask, 2), (hidden, head))
    theirs = torch.autograd.grad((hidden @ head.T).unflatten(0, (2, 2)).var(0).sum(), (hidden, head))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_equal_trajectories_and_an_empty_mask_have_no_variance() -> None:
    hidden, head = torch.randn(1, 3, 4).repeat(2, 1, 1), torch.randn(9, 4)
    assert output_variance(hidden, head_gram(head), torch.ones(1, 3, dtype=torch.bool), 2) < 1e-8
    assert output_variance(torch.randn(2, 3, 4), head_gram(head), torch.zeros(1, 3, dtype=torch.bool), 2) == 0


def test_the_rms_is_a_median_over_tokens() -> None:
    states = torch.ones(1, 5, 4)
    states[0, 0] = 1e4  # a token with massive activations
    assert token_rms(states) == 1
    assert token_rms(torch.tensor([[3.0, 4.0]])).item() == pytest.approx(math.sqrt(12.5))
    assert token_rms(torch.full((1, 3, 4), 300.0, dtype=torch.float16)) == 300  # whose square fp16 does not hold
    assert not token_rms(states.requires_grad_()).requires_grad
