"""torch.compile: samples change from pass to pass without compiling anew, and equal the eager pass's."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from peft import PeftModel

from dip_hf import NoiseKey
from tests.dipnet.models import batch, build
from tests.dipnet.test_compiled import Counter, step
from tests.ibvi.models import variational


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model() -> PeftModel:
    return variational(build(num_hidden_layers=2), target_modules=["q_proj", "up_proj"]).train()


@pytest.mark.parametrize("trajectories", [1, 2])
def test_the_whole_model(model: PeftModel, trajectories: int) -> None:
    counter = Counter()
    compiled = torch.compile(model, backend=counter)
    graphs = []
    for number in range(4):
        found, gradients = step(compiled, model, NoiseKey(1, number), trajectories)
        expected, theirs = step(model, model, NoiseKey(1, number), trajectories)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradients, theirs, rtol=1e-3, atol=1e-5)
        graphs.append(counter.graphs)
    assert graphs[-1] == graphs[2] > 0
    # by the mean outside
    model.eval()
    arguments = {**batch(), "use_cache": False}
    torch.testing.assert_close(compiled(**arguments).logits, model(**arguments).logits, rtol=1e-4, atol=1e-5)


def test_outside_a_context(model: PeftModel) -> None:
    counter = Counter()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        passes, graphs = [], []
        for _ in range(5):
            passes.append(compiled(**batch(), use_cache=False).logits)
            graphs.append(counter.graphs)
    assert not any(torch.equal(one, other) for one, other in pairwise(passes))
    assert graphs[-1] == graphs[3] > 0


def test_gradients_through_aot_autograd(model: PeftModel) -> None:
    compiled = torch.compile(model, backend="aot_eager")
    found, gradients = step(compiled, model, NoiseKey(1), 2)
    expected, theirs = step(model, model, NoiseKey(1), 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, theirs, rtol=1e-3, atol=1e-5)


def test_whole_blocks_in_checkpoints(model: PeftModel) -> None:
    """As `torch_compile` with activation checkpoints has them: a block changes nothing outside, and is one graph."""
    expected, theirs = step(model, model, NoiseKey(1), 1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    for block in model.get_base_model().model.layers:
        block.compile(backend="eager", fullgraph=True)
    found, gradients = step(model, model, NoiseKey(1), 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, theirs, rtol=1e-3, atol=1e-5)
