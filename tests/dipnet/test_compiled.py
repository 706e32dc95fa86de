"""torch.compile: noise changes from pass to pass without compiling anew, and equals the eager pass's."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from dip_hf import NoiseKey
from dip_hf.evaluation.sampling import make_sampler
from tests.dipnet.models import adapt, batch, build
from tests.ibvi.models import POSTERIOR


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["noise", "posterior"])
def model(request: pytest.FixtureRequest) -> PeftModel:
    options = {"noise": {}, "posterior": POSTERIOR}[request.param]
    model = adapt(build(num_hidden_layers=2), target_modules=["q_proj", "up_proj"], **options).train()
    with model.base_model.sampling(NoiseKey(0)):
        model(**batch())  # measures the scale, which is not part of what is compiled
    return model


class Counter:
    """A compiler backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs += 1
        return graph.forward


def step(model: Any, owner: PeftModel, key: NoiseKey, trajectories: int = 1) -> tuple[Tensor, list[Tensor]]:
    owner.zero_grad()
    with owner.base_model.sampling(key, trajectories):
        logits = model(**batch(), use_cache=False).logits
    logits.square().mean().backward()
    return logits.detach(), [p.grad.clone() for p in owner.parameters() if p.requires_grad]


def test_a_base_that_is_compiled_already() -> None:
    model = adapt(torch.compile(build(num_hidden_layers=2), backend=Counter()), target_modules=["q_proj"]).train()
    assert model.base_model.noised_layers() == [0, 1]


def test_samples_of_a_compiled_model(model: PeftModel) -> None:
    sampler = make_sampler(torch.compile(model, backend=Counter()), num_samples=2, dropout=False)
    assert sampler is not None and sampler.num_samples == 2


@pytest.mark.parametrize("trajectories", [1, 2])
def test_the_whole_model(model: PeftModel, trajectories: int) -> None:
    counter = Counter()
    compiled = torch.compile(model, backend=counter)
    graphs = []
    for number in range(4):
        key = NoiseKey(1, step=number)
        logits, gradients = step(compiled, model, key, trajectories)
        expected, theirs = step(model, model, key, trajectories)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradients, theirs, rtol=1e-3, atol=1e-5)
        graphs.append(counter.graphs)
    assert graphs[-1] == graphs[2] > 0
    # outside the context nothing of it is left in the compiled code
    model.eval()
    torch.testing.assert_close(
        compiled(**batch(), use_cache=False).logits, model(**batch(), use_cache=False).logits, rtol=1e-4, atol=1e-5
    )
    assert len(compiled(**batch(), use_cache=False).logits) == 3


def test_noise_outside_a_context_changes_without_compiling_anew(model: PeftModel) -> None:
    counter = Counter()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        passes, graphs = [], []
        for _ in range(5):
            passes.append(compiled(**batch(), use_cache=False).logits)
            graphs.append(counter.graphs)
    assert not any(torch.equal(one, other) for one, other in pairwise(passes))
    assert graphs[-1] == graphs[3] > 0


@pytest.mark.parametrize("trajectories", [1, 2])
def test_gradients_through_aot_autograd(model: PeftModel, trajectories: int) -> None:
    compiled = torch.compile(model, backend="aot_eager")
    logits, gradients = step(compiled, model, NoiseKey(1), trajectories)
    expected, theirs = step(model, model, NoiseKey(1), trajectories)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, theirs, rtol=1e-3, atol=1e-5)


def test_blocks_one_by_one(model: PeftModel, tmp_path: Path, trajectories: int = 2) -> None:
    key = NoiseKey(1)
    expected, theirs = step(model, model, key, trajectories)
    layers = model.base_model.model.model.layers
    for index in range(2):
        layers[index] = torch.compile(layers[index], backend="eager")
    logits, gradients = step(model, model, key, trajectories)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, theirs, rtol=1e-3, atol=1e-5)
    # names are clean on saving; the file loads into a model that is compiled, and one that is not
    model.save_pretrained(tmp_path)
    assert not any("_orig_mod" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    again, _ = step(model.train(), model, key, trajectories)
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)
    plain = PeftModel.from_pretrained(build(num_hidden_layers=2), tmp_path, is_trainable=True)
    torch.testing.assert_close(step(plain, plain, key, trajectories)[0], expected, rtol=1e-4, atol=1e-5)


def test_blocks_compiled_in_place() -> None:
    """The second block has no noise of its own, so that nothing but the number of its rows tells m to its code."""
    model = adapt(build(num_hidden_layers=2), noise_blocks=[0], target_modules=["q_proj"]).train()
    key = NoiseKey(1)
    with model.base_model.sampling(key):
        model(**batch())
    expected = {trajectories: step(model, model, key, trajectories)[0] for trajectories in (1, 2)}
    for layer in model.base_model.model.model.layers:
        layer.compile(backend="eager")
    for trajectories in (1, 2, 1):
        logits, _ = step(model, model, key, trajectories)
        torch.testing.assert_close(logits, expected[trajectories], rtol=1e-4, atol=1e-5)


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
