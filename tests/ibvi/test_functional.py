"""The formulas against plain loops, and their random numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dip_hf import NoiseKey
from dip_hf.ibvi.functional import (
    deviation,
    initial_covariance,
    posterior_coefficients,
    posterior_number,
    project,
)
from dip_hf.noise import derive_seed, few_gaussians


sizes = st.integers(1, 4)


@given(sizes, sizes, sizes, sizes, sizes, st.integers(0, 2**32))
def test_a_sampled_projection_is_the_plain_loop(m: int, rank: int, r: int, n: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    covariance = torch.randn(rank, r, n, generator=generator, dtype=torch.float64)
    mean = torch.randn(r, n, generator=generator, dtype=torch.float64)
    z = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    x = torch.randn(m * rows, 2, n, generator=generator, dtype=torch.float64)
    found = project(x, mean + deviation(covariance, z))
    for j in range(m):
        weight = mean + sum(z[j, k] * covariance[k] for k in range(rank))
        for row in range(j * rows, (j + 1) * rows):
            torch.testing.assert_close(found[row], x[row] @ weight.T)


def test_the_initial_covariance_has_the_stated_variance_and_touches_no_generator() -> None:
    before = torch.get_rng_state()
    covariance = initial_covariance(4, (32, 500), 0.5, seed=1, number=posterior_number("a"))
    assert torch.equal(torch.get_rng_state(), before)
    assert covariance.shape == (4, 32, 500) and covariance.dtype == torch.float32
    expected = 0.5 / math.sqrt(4 * 500)
    assert covariance.std().item() == pytest.approx(expected, rel=0.02)
    assert abs(covariance.mean().item()) < 0.02 * expected
    # so that a weight has standard deviation c/√n, whatever R
    assert covariance.square().sum(0).mean().sqrt().item() == pytest.approx(0.5 / math.sqrt(500), rel=0.02)


def test_the_initial_covariance_depends_on_seed_and_place_alone() -> None:
    def initial(seed: int, name: str) -> torch.Tensor:
        return initial_covariance(2, (3, 5), 1.0, seed, posterior_number(name))

    assert torch.equal(initial(1, "a"), initial(1, "a"))
    assert not torch.equal(initial(1, "a"), initial(2, "a")) and not torch.equal(initial(1, "a"), initial(1, "b"))
    with torch.device("meta"):  # under which transformers builds models
        assert torch.equal(initial(1, "a"), initial_covariance(2, (3, 5), 1.0, 1, posterior_number("a")))
        assert not initial(1, "a").is_meta
    # Its values, since a seed is to go on meaning what it means
    assert initial(0, "model.layers.0")[0, 0, :3].tolist() == pytest.approx([-0.004017, 0.083292, -0.010313], abs=1e-5)


@given(st.text(), st.text())
def test_numbers_of_modules_are_no_block_indices_and_differ(one: str, other: str) -> None:
    numbers = posterior_number(one), posterior_number(other)
    assert all(2**62 <= number < 2**63 for number in numbers)
    assert (numbers[0] == numbers[1]) == (one == other)


@given(st.tuples(*[st.integers(0, 2**40)] * 4), st.integers(1, 5), st.integers(1, 8))
def test_coefficients_are_a_function_of_key_place_and_trajectory(
    key: tuple[int, int, int, int], trajectories: int, rank: int
) -> None:
    number = posterior_number("a")
    z = posterior_coefficients(NoiseKey(*key).tensor(), number, trajectories, rank)
    assert z.shape == (trajectories, rank)
    for j in range(trajectories):
        seed = derive_seed(NoiseKey(*key).tensor(), number, j)
        assert torch.equal(z[j], few_gaussians(rank, seed))


def test_coefficients_are_standard_normal_and_uncorrelated_between_passes_places_and_trajectories() -> None:
    keys = [NoiseKey(0, step).tensor() for step in range(2000)]
    places = [posterior_number(name) for name in ("model.layers.0.q_proj", "model.layers.0.k_proj")]
    z = torch.stack([torch.cat([posterior_coefficients(key, p, 2, 3) for p in places]).flatten() for key in keys])
    torch.testing.assert_close(z.T.cov(), torch.eye(12), atol=0.15, rtol=0)
    torch.testing.assert_close(z.mean(0), torch.zeros(12), atol=0.1, rtol=0)
    assert torch.corrcoef(torch.stack([z[1:, 0], z[:-1, 0]]))[0, 1].abs() < 0.1
