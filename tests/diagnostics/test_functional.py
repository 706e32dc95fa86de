from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dip_hf.diagnostics.functional import add_relative_noise, fgsm, gaussian_w2, spectral_norms, teacher_forced


def matrices(seed: int, batch: int, size: int) -> torch.Tensor:
    square = torch.randn(batch, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return square + square.mT


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_spectral_norms_are_numpys(seed: int, batch: int, size: int) -> None:
    h = matrices(seed, batch, size)
    start = torch.ones(batch, size, dtype=torch.float64) + 0.1 * torch.arange(size)
    values, vectors = np.linalg.eigh(h.numpy())
    exact, largest = np.abs(values).max(1), np.abs(values).argmax(1)
    # A start without the sought eigenvector in it stands still at another one.
    along = np.einsum("bi,bi->b", vectors[np.arange(batch), :, largest], start.numpy())
    assume((np.abs(along) > 1e-3 * np.linalg.norm(start.numpy(), axis=1)).all())
    # Two eigenvalues nearly as large take as many iterations as one wishes.
    first, second = np.sort(np.abs(values), axis=1)[:, ::-1].T[:2] if size > 1 else (exact, 0 * exact)
    assume((second < 0.999 * first).all())
    found = spectral_norms(lambda v: torch.einsum("bij,bj->bi", h, v), start, 20_000, 1e-11)
    assert found.converged.all()
    np.testing.assert_allclose(found.values.numpy(), exact, rtol=1e-4)
    assert (found.values.numpy() <= exact * (1 + 1e-12)).all()


def test_spectral_norms_rise_and_say_when_they_stop_short() -> None:
    h = matrices(1, 3, 20)
    start = torch.ones(3, 20, dtype=torch.float64)
    values = []
    for steps in (2, 5, 20):
        found = spectral_norms(lambda v: torch.einsum("bij,bj->bi", h, v), start, steps, 1e-15)
        assert found.iterations == steps and not found.converged.any()
        values.append(found.values)
    assert (values[0] < values[1]).all() and (values[1] < values[2]).all()


def test_spectral_norm_of_opposite_eigenvalues_and_of_zero() -> None:
    diagonals = torch.tensor([[3.0, -3.0, 1.0], [0.0, 0.0, 0.0]])
    found = spectral_norms(lambda v: diagonals * v, torch.tensor([[1.0, 2.0, 3.0]]).repeat(2, 1), 100, 1e-6)
    assert found.converged.all() and found.values.tolist() == pytest.approx([3.0, 0.0], rel=1e-5)


def test_spectral_norms_pass_a_plateau_and_do_not_depend_on_one_another() -> None:
    """A start that lies almost along a lesser eigenvector: its value seems to stand still before it rises again."""
    diagonals = torch.tensor([[1.0, 1.5, 0.1], [2.0, 0.3, 0.1], [1.0, 0.99, 0.98]], dtype=torch.float64)
    start = torch.tensor([[1.0, 1e-2, 1e-2]], dtype=torch.float64).repeat(3, 1)
    together = spectral_norms(lambda v: diagonals * v, start, 1000, 1e-3)
    alone = [spectral_norms(lambda v, h=h: h * v, start[:1], 1000, 1e-3) for h in diagonals]
    assert together.converged.all() and torch.equal(together.values, torch.cat([found.values for found in alone]))
    assert together.values.tolist() == pytest.approx([1.5, 2.0, 1.0], rel=1e-3)
    assert together.iterations == max(found.iterations for found in alone)


@pytest.mark.parametrize(("iterations", "tolerance", "field"), [(0, 0.1, "max_iterations=0"), (9, 0.0, "tolerance=0")])
def test_spectral_norms_refuse(iterations: int, tolerance: float, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        spectral_norms(lambda v: v, torch.ones(1, 2), iterations, tolerance)


@pytest.mark.filterwarnings("ignore:Matrix is singular")  # which the factors make it
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(0, 4), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_w2_is_the_dense_formula(seed: int, size: int, rank: int, other_rank: int) -> None:
    random = np.random.default_rng(seed)
    mean, other_mean = random.normal(size=(2, size))
    s, t = random.normal(size=(size, rank)), random.normal(size=(size, other_rank))
    found = gaussian_w2(*(torch.from_numpy(part) for part in (mean, s, other_mean, t))).item()
    c, d = s @ s.T, t @ t.T
    root = scipy.linalg.sqrtm(c)
    middle = scipy.linalg.sqrtm(root @ d @ root)
    squared = np.square(mean - other_mean).sum() + np.trace(c + d - 2 * np.real(middle))
    assert found**2 == pytest.approx(squared, rel=1e-5, abs=1e-5)  # sqrtm of a singular matrix is no better
    back = gaussian_w2(*(torch.from_numpy(part) for part in (other_mean, t, mean, s))).item()
    assert back == pytest.approx(found, rel=1e-9)


def test_w2_of_equal_distributions_is_zero_and_of_close_ones_exact() -> None:
    s = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    zero = torch.zeros(50)
    assert gaussian_w2(zero, s, zero, s @ rotation).item() < 1e-12  # another factor of the same covariance
    assert gaussian_w2(zero, s, zero, s * (1 + 1e-9)).item() == pytest.approx(1e-9 * s.norm().item(), rel=1e-4)
    assert gaussian_w2(zero, s, zero, torch.zeros(50, 1)).item() == pytest.approx(s.norm().item(), rel=1e-12)


def test_answers_are_scored_as_in_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 5, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (40, 5), generator=generator)
    labels[:, 1] = -100
    found = teacher_forced(logits, labels)
    for row in range(40):
        places = [t for t in range(1, 5) if labels[row, t] >= 0]
        log_p = [logits[row, t - 1].log_softmax(-1)[labels[row, t]].item() for t in places]
        assert found.nll[row].item() == pytest.approx(-sum(log_p), rel=1e-12)
        assert found.tokens[row] == 3
        assert found.match[row] == all(logits[row, t - 1].argmax() == labels[row, t] for t in places)
    assert 0 < found.match.sum() < 40


def test_perturbations_have_the_length_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    e, g = torch.randn(2, 2, 3, 4, dtype=torch.float64, generator=generator).unbind()
    e = e * torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)[:, None]
    mask = torch.tensor([[True, True, False], [False, True, True]])
    step = fgsm(e, g, mask, 0.1) - e
    expected = 0.1 * e.square().mean(-1).sqrt() * mask
    torch.testing.assert_close(step.abs(), expected[..., None].expand_as(step))
    assert (step[mask].sign() == g[mask].sign()).all()
    noisy = add_relative_noise(e, g, mask, 0.1) - e
    torch.testing.assert_close(noisy, expected[..., None] * g)
