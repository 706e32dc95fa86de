"""Noise is a pure function of its key, and add_noise is the projection with the right gradient and no memory."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dip_hf.noise import (
    _PIECE,
    _TABLE,
    NoiseKey,
    _draw,
    _noise_table,
    _normal_quantiles,
    _starts,
    add_noise,
    derive_seed,
    few_gaussians,
    gaussian,
    noise_gradient,
    noised,
)
from tests.test_second_pass import DEVICES


CPU = torch.device("cpu")
KEY = NoiseKey(7, 3, 1, 2)
integers = st.integers(-(2**63), 2**63 - 1)
places = st.tuples(integers, integers, integers, integers, st.integers(0, 1000), st.integers(0, 100))


def sample(place: tuple[int, ...], shape: tuple[int, ...] = (2, 3, 16)) -> torch.Tensor:
    """The noise of (seed, step, micro-step, rank, layer, trajectory)."""
    return gaussian(shape, derive_seed(NoiseKey(*place[:4]).tensor(), place[4], place[5]), CPU)


def test_the_same_place_gives_the_same_noise() -> None:
    assert torch.equal(sample((1, 2, 3, 4, 5, 6)), sample((1, 2, 3, 4, 5, 6)))


@pytest.mark.parametrize("part", range(6), ids=["seed", "step", "micro-step", "rank", "layer", "trajectory"])
def test_every_part_of_the_place_changes_the_noise(part: int) -> None:
    place = [1, 1, 1, 1, 1, 1]
    before = sample(tuple(place))
    place[part] += 1
    after = sample(tuple(place))
    assert torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1].abs() < 0.4
    assert (before == after).float().mean() < 0.05


def test_places_that_share_a_sum_or_a_permutation_do_not_collide() -> None:
    seeds = {derive_seed(NoiseKey(*place[:4]).tensor(), *place[4:]) for place in product(range(3), repeat=6)}
    assert len(seeds) == 3**6


@given(places, places)
@settings(deadline=None)
def test_distinct_places_have_distinct_seeds(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    first, second = (derive_seed(NoiseKey(*place[:4]).tensor(), *place[4:]) for place in (one, other))
    assert (first == second) == (one == other)
    assert -(2**63) <= first < 2**63


def test_global_generators_are_untouched() -> None:
    def states() -> tuple[bytes, bytes, str]:
        # numpy's state is a tuple with an array in it: compare its text
        numpy_state = repr([np.asarray(part).tolist() for part in np.random.get_state()])
        return torch.get_rng_state().numpy().tobytes(), repr(random.getstate()).encode(), numpy_state

    before = states()
    v = torch.zeros(4, 3, 8, requires_grad=True)
    std = torch.ones(8, requires_grad=True)
    add_noise(v, std, KEY.tensor(), 0, 2).sum().backward()
    assert states() == before


def test_noise_is_standard_normal() -> None:
    x = gaussian((400_000,), 11, CPU).double().numpy()
    assert abs(x.mean()) < 5 / len(x) ** 0.5
    assert abs(x.var() - 1) < 5 * (2 / len(x)) ** 0.5
    assert abs(stats.skew(x)) < 5 * (6 / len(x)) ** 0.5
    assert abs(stats.kurtosis(x)) < 5 * (24 / len(x)) ** 0.5
    assert stats.kstest(x, "norm").pvalue > 1e-3


def test_noise_is_independent_over_positions_and_dimensions() -> None:
    x = gaussian((20_000, 6), 5, CPU)
    assert (torch.corrcoef(x.T) - torch.eye(6)).abs().max() < 5 / 20_000**0.5
    lagged = torch.corrcoef(torch.stack([x[:-1, 0], x[1:, 0]]))[0, 1]
    assert lagged.abs() < 5 / 20_000**0.5


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), integers)
@settings(deadline=None)
def test_any_shape_any_seed(shape: list[int], seed: int) -> None:
    x = gaussian(tuple(shape), seed, CPU)
    assert x.shape == tuple(shape) and x.dtype == torch.float32
    assert x.isfinite().all() and (x.abs() < 7).all()


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_add_noise_is_v_plus_std_times_noise(dtype: torch.dtype, device: torch.device) -> None:
    v, std = torch.randn(6, 5, 8).to(device, dtype), torch.rand(8).to(device) + 0.1
    noisy = add_noise(v, std, KEY.tensor(), 4, 3)
    noise = torch.cat([gaussian((2, 5, 8), derive_seed(KEY.tensor(), 4, j), device, dtype) for j in range(3)])
    assert noisy.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps  # of the summands, not of a sum that may be near 0
    torch.testing.assert_close(noisy, v + noise * std.to(dtype), rtol=tolerance, atol=tolerance)


def test_gradient_in_both_inputs() -> None:
    v = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    std = torch.rand(5, dtype=torch.float64).add(0.5).requires_grad_()
    # Linear in both, so a coarse step is exact; the noise is fp32.
    assert torch.autograd.gradcheck(
        lambda v, std: add_noise(v, std, KEY.tensor(), 1, 2), (v, std), eps=1e-2, atol=1e-4
    )


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_std_is_the_sum_of_gradient_times_noise(dtype: torch.dtype, device: torch.device) -> None:
    grad = torch.randn(6, 4, 5).to(device, dtype)
    noise = torch.cat([gaussian((3, 4, 5), derive_seed(KEY.tensor(), 2, j), device, dtype) for j in range(2)])
    expected = (grad.float() * noise).sum((0, 1))
    tolerance = 24 * torch.finfo(dtype).eps  # a product of a gradient and noise, both of that dtype, 24 times
    torch.testing.assert_close(noise_gradient(grad, KEY.tensor(), 2, 2), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("starts", [(0, 0), (5, _TABLE - 3), (_TABLE - 1, _TABLE - 2), (_TABLE - 20, 7)])
@pytest.mark.parametrize("first", [0, 3, 2 * _TABLE - 5])
def test_noise_is_the_sum_of_two_windows_that_go_round(
    starts: tuple[int, int], first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read from the two tables entry by entry; after every 2^20 from other starts."""
    monkeypatch.setattr("dip_hf.noise._starts", lambda seed, turn: (starts[0] + 9 * turn, starts[1] + 5 * turn))
    one, other = _noise_table(_TABLE, 0), _noise_table(_TABLE - 1, 1)
    expected = []
    for turn, place in (divmod(i, _TABLE) for i in range(first, first + 40)):
        a, b = starts[0] + 9 * turn, starts[1] + 5 * turn
        expected.append(one[(a + place) % _TABLE] + other[(b + place) % (_TABLE - 1)])
    assert _draw(0, first, 40).tolist() == [float(value) for value in expected]


def test_over_seeds_the_noise_of_a_place_is_standard_normal_and_independent() -> None:
    x = torch.stack([sample((seed, 0, 0, 0, 0, 0), (32,)) for seed in range(6_000)])
    assert (torch.corrcoef(x.T) - torch.eye(32)).abs().max() < 5 / len(x) ** 0.5
    assert stats.kstest(x.flatten().double().numpy(), "norm").pvalue > 1e-3
    products = (x[:, :-1] * x[:, 1:]).square().mean()  # of pairs that are independent, not merely uncorrelated
    assert products.item() == pytest.approx(1, abs=0.05)


def test_a_draw_longer_than_the_tables_does_not_repeat() -> None:
    """Nor do its parts go together, where a row is a power of two and parts begin at the same place of the tables."""
    x = gaussian((4, _TABLE // 2), 3, CPU)
    assert (torch.corrcoef(x) - torch.eye(4)).abs().max() < 5 / (_TABLE // 2) ** 0.5


def test_windows_start_anew_for_each_seed_and_turn() -> None:
    starts = [_starts(seed, turn) for seed in (-1, 0, 1) for turn in (0, 1, 2)]
    assert len({a for a, _ in starts}) == len({b for _, b in starts}) == 9


def test_a_default_device_does_not_move_the_key() -> None:
    with torch.device("meta"):
        assert KEY.tensor().device == CPU


@pytest.mark.parametrize("number", [0, 1])
def test_a_table_holds_every_quantile_once_in_no_order(number: int) -> None:
    length = _TABLE - number
    table = _noise_table(length, number).astype(np.float64)
    assert np.array_equal(table[length:], table[:_PIECE])
    table = table[:length]
    exact = stats.norm.cdf(np.sort(table) * 2**0.5)
    levels = np.arange(length + 1) / length
    assert max(np.abs(levels[1:] - exact).max(), np.abs(exact - levels[:-1]).max()) < 1e-6
    assert (table**2).mean() == pytest.approx(0.5, abs=1e-6)
    for lag in (1, 2, 192, 4096):
        assert abs(np.corrcoef(table[:-lag], table[lag:])[0, 1]) < 5 / length**0.5


def test_pieces_join_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    v, std = torch.randn(4, 7, 5, requires_grad=True), torch.ones(5, requires_grad=True)
    results = []
    for piece in (5, 20, 10**6):
        monkeypatch.setattr("dip_hf.noise._PIECE", min(piece, _PIECE))
        noisy = add_noise(v, std, KEY.tensor(), 0, 2)
        results.append((noisy, *torch.autograd.grad(noisy.square().sum(), (v, std)), gaussian((57,), 4, CPU)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)
    noise = torch.cat([gaussian((2, 7, 5), derive_seed(KEY.tensor(), 0, j), CPU) for j in range(2)])
    torch.testing.assert_close(results[0][0], v + noise)


def test_the_number_of_threads_changes_nothing() -> None:
    before, results = torch.get_num_threads(), []
    v, std = torch.randn(4, 8_000, 8), torch.ones(8)  # enough for torch to share it out
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            noise = gaussian((100_000,), 3, CPU)
            results.append(
                (noise, add_noise(v, std, KEY.tensor(), 0, 2), noise_gradient(v[:, :50], KEY.tensor(), 0, 2))
            )
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0]) and torch.equal(result[1], results[0][1])
        torch.testing.assert_close(result[2], results[0][2])  # a sum, whose order is torch's


def test_distance_and_support_are_the_documented_ones() -> None:
    """Of `few_gaussians`: half a step of 2^-16 between the steps, and the rescaling to unit variance."""
    quantiles = _normal_quantiles(2**16).astype(np.float64)
    levels = np.arange(2**16 + 1) / 2**16
    exact = stats.norm.cdf(quantiles)
    assert max(np.abs(levels[1:] - exact).max(), np.abs(exact - levels[:-1]).max()) < 1.05e-5
    assert 4.3 < quantiles.max() < 4.4 and quantiles.min() == pytest.approx(-quantiles.max())
    assert (quantiles**2).mean() == pytest.approx(1, abs=1e-6)
    assert sum(_noise_table(_TABLE - number, number).max() for number in (0, 1)) == pytest.approx(6.9, abs=0.05)


@given(st.integers(0, 100), st.integers(0, 100), st.integers(-(2**63), 2**63 - 1))
def test_few_numbers_are_the_first_of_many(one: int, other: int, seed: int) -> None:
    few, many = sorted((few_gaussians(one, seed), few_gaussians(other, seed)), key=len)
    assert torch.equal(few, many[: len(few)])


def test_few_numbers_are_standard_normal_over_seeds() -> None:
    numbers = torch.stack([few_gaussians(40, seed) for seed in range(500)]).double()
    assert stats.kstest(numbers.flatten().numpy(), "norm").pvalue > 1e-3
    torch.testing.assert_close(numbers.T.cov(), torch.eye(40).double(), atol=0.25, rtol=0)


def test_backward_keeps_nothing_as_large_as_the_input() -> None:
    saved: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    v, std = torch.randn(2, 64, 16, requires_grad=True), torch.rand(16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        noisy = add_noise(v, std, KEY.tensor(), 0, 1)
    assert saved == [torch.Size([4])]  # the key
    noisy.sum().backward()
    assert std.grad is not None


def test_a_frozen_std_draws_no_noise_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    v, std = torch.randn(2, 3, 4, requires_grad=True), torch.rand(4)
    noisy = add_noise(v, std, KEY.tensor(), 0, 1)
    monkeypatch.setattr("dip_hf.noise._draw", None)
    noisy.sum().backward()
    assert v.grad is not None and torch.equal(v.grad, torch.ones_like(v))


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 5), (4, 0, 5)])
def test_operators_are_well_formed(shape: tuple[int, ...]) -> None:
    v, std = torch.randn(shape, requires_grad=True), torch.rand(5, requires_grad=True)
    torch.library.opcheck(noised, (v.detach(), std.detach(), KEY.tensor(), 0, 2))
    torch.library.opcheck(noise_gradient, (torch.randn(shape), KEY.tensor(), 0, 2))
    assert torch.equal(noised(v.detach(), std.detach(), KEY.tensor(), 0, 2), add_noise(v, std, KEY.tensor(), 0, 2))


def test_no_cuda_graph_replays_a_sample() -> None:
    """Inductor takes no operator into a graph that has this tag."""
    for operator in (torch.ops.dip_hf.noised, torch.ops.dip_hf.noise_gradient):
        assert torch.Tag.cudagraph_unsafe in operator.default.tags


def test_a_compiled_pass_equals_an_eager_one() -> None:
    results = []
    for function in (add_noise, torch.compile(add_noise, backend="aot_eager", fullgraph=True)):
        v, std = torch.linspace(-1, 1, 40).view(4, 2, 5).requires_grad_(), torch.rand(5).fill_(0.5).requires_grad_()
        u = function(v, std, KEY.tensor(), 3, 2)
        results.append((u.detach(), *torch.autograd.grad(u.square().sum(), (v, std))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_an_input_that_is_not_contiguous() -> None:
    v, std = torch.randn(3, 8, 5).transpose(0, 2), torch.rand(3)
    torch.testing.assert_close(
        add_noise(v[..., :3], std, KEY.tensor(), 0, 1), add_noise(v[..., :3].contiguous(), std, KEY.tensor(), 0, 1)
    )
