"""Running something a second time: the same random numbers and precision, and no trace afterwards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import dropout

from dip_hf.second_pass import Surroundings, block_output, fit_mask


CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_dropout_repeats_and_the_generators_go_on(device: torch.device) -> None:
    ones = torch.ones(64, device=device)
    surroundings = Surroundings.now({device})
    first, second = dropout(ones), dropout(ones)
    with surroundings.restored_generators():
        again = dropout(ones)
        dropout(torch.ones(7, device=device))  # more than the first pass drew
    third = dropout(ones)
    assert again.equal(first) and not second.equal(first)
    with surroundings.restored_generators():
        [dropout(ones) for _ in range(2)]
        assert dropout(ones).equal(third)  # as if the pass above had not been


def test_the_generators_go_on_after_an_error() -> None:
    surroundings = Surroundings.now([CPU])
    torch.rand(3)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), surroundings.restored():
        torch.rand(5)
        raise RuntimeError
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_is_that_of_the_first_pass(enabled: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled):
        surroundings = Surroundings.now([CPU, torch.device("meta")])
    for outside in (False, True):
        with torch.autocast("cpu", torch.float16, outside):
            with surroundings.restored():
                product = torch.ones(2, 2) @ torch.ones(2, 2)
                assert product.dtype == (torch.bfloat16 if enabled else torch.float32)
            assert torch.is_autocast_enabled("cpu") == outside
            if outside:
                assert torch.get_autocast_dtype("cpu") == torch.float16


def test_a_weight_cast_without_gradient_serves_no_later_pass() -> None:
    weight = torch.ones(2, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad(), Surroundings.now([CPU]).restored():
            torch.ones(2, 2) @ weight
        (torch.ones(2, 2) @ weight).sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_block_output() -> None:
    states = torch.zeros(1)
    assert block_output(states) is states and block_output((states, None)) is states


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 4),
    front=st.integers(0, 3),
    folds=st.integers(1, 3),
    fill=st.booleans(),
)
def test_a_mask_fits_folded_rows_and_tokens_in_front(
    batch: int, length: int, front: int, folds: int, fill: bool
) -> None:
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(batch * 8 + length)) < 0.5
    fitted = fit_mask(mask, torch.zeros(folds * batch, front + length, 2), fill)
    for row in range(folds * batch):
        assert fitted[row].tolist() == [fill] * front + mask[row % batch].tolist()
