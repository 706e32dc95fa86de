from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dip_hf.dres.functional import (
    affine_error,
    coded_nodes,
    coding_matrices,
    decode,
    encode,
    group_permutation,
    natural_spline_matrix,
    reconstruction_error,
    sample_nodes,
    spline_codec,
)
from dip_hf.noise import NoiseKey
from tests.dres.oracle import spline


SIZES = [(2, 3), (3, 4), (4, 4), (4, 5), (4, 6), (7, 9), (8, 10), (8, 12), (16, 20), (16, 24)]


@pytest.mark.parametrize(("k", "n"), SIZES)
def test_matrices_are_scipys_splines(k: int, n: int) -> None:
    encoder, decoder = coding_matrices(k, n)
    alpha, beta = sample_nodes(k).numpy(), coded_nodes(n).numpy()
    assert np.abs(encoder.numpy() - spline(alpha, np.eye(k), beta)).max() < 1e-10
    assert np.abs(decoder.numpy() - spline(beta, np.eye(n), alpha)).max() < 1e-10
    assert encoder.shape == (n, k) and decoder.shape == (k, n)
    assert (encoder.sum(1) - 1).abs().max() < 1e-12 and (decoder.sum(1) - 1).abs().max() < 1e-12


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(-50, 50), min_size=2, max_size=9, unique=True),
    st.lists(st.floats(-8, 8), min_size=1, max_size=6),
)
def test_any_knots_in_any_order_and_points_outside_them(knots: list[int], points: list[float]) -> None:
    t, x = torch.tensor(knots, dtype=torch.float64) / 10, torch.tensor(points, dtype=torch.float64)
    matrix = natural_spline_matrix(t, x)
    expected = spline(t.numpy(), np.eye(len(knots)), x.numpy())
    assert np.abs(matrix.numpy() - expected).max() < 1e-10 * max(1, np.abs(expected).max())


def test_nodes() -> None:
    assert torch.allclose(sample_nodes(2), torch.tensor([1, -1], dtype=torch.float64) / math.sqrt(2))
    assert torch.allclose(coded_nodes(3), torch.tensor([1, 0, -1], dtype=torch.float64))


def affine(size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(size, 6, dtype=torch.float64, generator=generator),
        torch.randn(6, dtype=torch.float64, generator=generator),
    )


def test_matrices_outlast_the_mode_in_which_they_are_first_asked_for() -> None:
    coding_matrices.cache_clear()
    with torch.inference_mode():
        coding_matrices(4, 6)
    with torch.device("meta"):
        coding_matrices(4, 7)
    for size in (6, 7):
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        encode(x, size).sum().backward()
        assert x.grad is not None


@pytest.mark.parametrize(("k", "n"), SIZES)
def test_affine_f_gives_the_closed_form(k: int, n: int) -> None:
    """Exactly where the samples spread alike in all directions: here the corners of a simplex."""
    samples = torch.eye(k, dtype=torch.float64)
    rotation = torch.linalg.qr(affine(k)[0] @ affine(k)[0].T)[0]

    def f(x: torch.Tensor) -> torch.Tensor:
        return 3 * x @ rotation + affine(k)[0][:, 0]

    error = reconstruction_error(f(samples), decode(f(encode(samples, n)), k))
    encoder, decoder = coding_matrices(k, n)
    closed_form = (torch.eye(k, dtype=torch.float64) - decoder @ encoder).square().sum() / k
    assert error.item() == pytest.approx(closed_form.item(), rel=1e-9, abs=1e-20)
    assert affine_error(k, n) == closed_form.item()


@pytest.mark.parametrize(("k", "n"), [(3, 4), (4, 5), (5, 7)])
def test_affine_f_gives_the_closed_form_on_average_over_permutations(k: int, n: int) -> None:
    """For any samples whatever: the variance of the group is the normaliser that makes it so."""
    weight, bias = affine(5)
    samples = torch.randn(k, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) ** 3
    errors = []
    for order in itertools.permutations(range(k)):
        x = samples[list(order)]
        errors.append(reconstruction_error(x @ weight + bias, decode(encode(x, n) @ weight + bias, k)).item())
    assert np.mean(errors) == pytest.approx(affine_error(k, n), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(4, 5), (4, 6), (8, 10), (16, 24)]),
    st.floats(0, 3),
    st.floats(0.05, 3),
    st.sampled_from([lambda x: x**2, lambda x: x**4, lambda x: torch.cos(4 * x)]),
)
def test_the_more_f_curves_the_larger_the_error(size: tuple[int, int], curvature: float, more: float, bend) -> None:
    """f(x) = x + c·bend(x) along a straight path, where the affine part is reconstructed exactly."""
    k, n = size
    samples = sample_nodes(k)[:, None]

    def error(c: float) -> float:
        return reconstruction_error(
            samples + c * bend(samples), decode(encode(samples, n) + c * bend(encode(samples, n)), k)
        ).item()

    assert error(0) < 1e-24
    assert error(curvature + more) > error(curvature)


def test_error_is_scale_free_and_masked_places_do_not_count() -> None:
    f_x, f_hat = torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([True, False, True])
    error = reconstruction_error(f_x, f_hat, mask)
    assert error.item() == pytest.approx(reconstruction_error(7 * f_x + 2, 7 * f_hat + 2, mask).item(), rel=1e-9)
    assert error.item() == pytest.approx(reconstruction_error(f_x[:, mask], f_hat[:, mask]).item())
    f_hat[:, 1] = math.nan
    assert error == reconstruction_error(f_x, f_hat, mask)
    assert reconstruction_error(f_x, f_hat, torch.zeros(3, dtype=torch.bool)) == 0


def test_equal_samples_count_as_nothing_and_zero_outputs_are_finite() -> None:
    same = torch.randn(1, 6).expand(4, 6)
    assert reconstruction_error(same, decode(encode(same, 5), 4)) < 1e-8
    assert reconstruction_error(torch.zeros(4, 6), torch.zeros(4, 6)) == 0
    # 6 · 0.1² over a thousandth of 6 · 1²
    assert reconstruction_error(torch.ones(4, 6), torch.full((4, 6), 1.1)).item() == pytest.approx(10, rel=1e-4)


def test_variance_is_a_constant_of_the_gradient() -> None:
    f_x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    f_hat = torch.zeros(4, 5, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(reconstruction_error(f_x, f_hat, detach_variance=True), f_x)
    assert torch.allclose(gradient, 2 * f_x / 4 / f_x.detach().var(0).sum())


@pytest.mark.parametrize("detached", [True, False])
def test_shrinking_f_pays_where_the_variance_is_held_constant(detached: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    f_x, f_hat = (torch.randn(4, 3, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    error = reconstruction_error(scale * f_x, scale * f_hat, detach_variance=detached)
    (gradient,) = torch.autograd.grad(error, scale)
    assert gradient.item() == pytest.approx(2 * error.item() if detached else 0.0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_coding_computes_in_fp32_or_wider(dtype: torch.dtype) -> None:
    samples = torch.full((8, 3), 7.0, dtype=dtype)  # rows sum to 1, so equal samples stay what they are
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coded = encode(samples, 10)
        back = decode(coded, 8)
    assert coded.dtype == dtype and back.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.allclose(back, samples.to(back.dtype), atol=1e-5)


def test_permutation_is_a_function_of_the_key() -> None:
    key = NoiseKey(3, step=5, micro_step=1, rank=0)
    state = torch.get_rng_state()
    order = group_permutation(key.tensor(), 20)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(9)
    assert torch.equal(order, group_permutation(key.tensor(), 20))
    assert sorted(order.tolist()) == list(range(20))
    for other in (key._replace(seed=4), key._replace(step=6), key._replace(micro_step=0), key._replace(rank=1)):
        assert not torch.equal(order, group_permutation(other.tensor(), 20))


@pytest.mark.parametrize(
    ("k", "n", "reason"),
    [(1, 3, "at least 2"), (4, 3, "coded_size=3 is below group_size=4"), (8, 17, "always 0"), (2, 5, "always 0")],
)
def test_choices_that_say_nothing_are_refused(k: int, n: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        coding_matrices(k, n)


def test_identical_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="exact for every f"):
        spline_codec(sample_nodes(6), sample_nodes(6))
