"""m folded trajectories are m single ones, in every family and with every kind of batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from dip_hf import NoiseKey
from dip_hf.dipnet.trajectories import fold_trajectories, repeat_rows
from dip_hf.noise import derive_seed, gaussian
from dip_hf.noise_state import NoiseState
from tests.dipnet.models import FAMILIES, adapt, batch, build


KEY = NoiseKey(5, step=2)


@contextmanager
def single_trajectory(model: PeftModel, key: NoiseKey, trajectory: int) -> Iterator[None]:
    """The oracle: a plain hook on each noised block that adds std · ε to its input, for one trajectory alone."""
    handles = []
    for layer, name in enumerate(model.peft_config["default"].all_block_names):
        block = model.base_model.model.get_submodule(name)
        if not hasattr(block, "dip_noise"):
            continue
        leaf = block.dip_noise.lora_dip_log_variance["default"]
        std = leaf.rms * torch.exp(leaf.weight / 2)
        seed = derive_seed(key.tensor(), layer, trajectory)

        def add(module: nn.Module, args: tuple, kwargs: dict[str, Any], std: Tensor = std, seed: int = seed) -> tuple:
            v = args[0] if args else kwargs.pop("hidden_states")
            u = v + std * gaussian(v.shape, seed, v.device)
            return (u, *args[1:]), kwargs

        handles.append(block.register_forward_pre_hook(add, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def assert_folds(model: PeftModel, inputs: dict[str, Any], trajectories: int = 2, rtol: float = 1e-4) -> None:
    """Logits and gradients of the folded pass are those of the plain loop over trajectories."""
    model.eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = len(inputs["input_ids"])
    with model.base_model.sampling(KEY, trajectories):
        folded = model(**inputs).logits
    weight = torch.randn(folded.shape, generator=torch.Generator().manual_seed(0))
    visible = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    weight = weight * repeat_rows(visible, trajectories)[..., None]  # what a padded position holds is nobody's
    gradients = torch.autograd.grad((folded * weight).sum(), parameters, allow_unused=True)
    assert len(folded) == trajectories * rows

    expected = [torch.zeros_like(parameter) for parameter in parameters]
    for j in range(trajectories):
        with single_trajectory(model, KEY, j):
            logits = model(**inputs).logits
        own = slice(j * rows, (j + 1) * rows)
        torch.testing.assert_close(folded[own][visible], logits[visible], rtol=rtol, atol=rtol)
        for total, gradient in zip(
            expected, torch.autograd.grad((logits * weight[own]).sum(), parameters, allow_unused=True), strict=True
        ):
            total += 0 if gradient is None else gradient
    scale = max(total.abs().max().item() for total in expected)
    for gradient, total in zip(gradients, expected, strict=True):
        gradient = torch.zeros_like(total) if gradient is None else gradient
        torch.testing.assert_close(gradient, total, rtol=1e-3, atol=1e-4 * scale)
    assert not torch.allclose(folded[:rows][visible], folded[rows : 2 * rows][visible], atol=1e-3)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, padded: bool) -> None:
    assert_folds(adapt(build(family), noise_blocks=[1, 3]), batch(padded=padded), 3)


@pytest.mark.parametrize("noise_blocks", ["all", 1, [0], [1, 2]], ids=str)
def test_any_choice_of_blocks(noise_blocks: Any) -> None:
    assert_folds(adapt(build(), noise_blocks=noise_blocks), batch())


@pytest.mark.parametrize(("family", "attention"), [("llama", "sdpa"), ("gemma3", "eager"), ("gpt2", "sdpa")])
def test_one_row(family: str, attention: str) -> None:
    assert_folds(adapt(build(family, _attn_implementation=attention), noise_blocks=2), batch(rows=1))


def test_a_padded_row() -> None:
    """Flash attention takes a mask of two dimensions, one row of it for each row of the batch."""
    seen: list[Tensor] = []

    class Block(nn.Module):
        def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
            seen.append(attention_mask)
            return hidden_states

    block, mask = Block(), torch.tensor([[1, 1, 0]])
    with fold_trajectories([block], 2, NoiseState()):
        block(torch.zeros(1, 3, 4), attention_mask=mask)
        block(torch.zeros(1, 3, 4), mask)  # XGLM's blocks are called so
    assert all(torch.equal(each, mask.repeat(2, 1)) for each in seen) and len(seen) == 2


@pytest.mark.parametrize("rows", [1, 3])
def test_a_second_input_of_a_block_is_repeated_with_its_first(rows: int) -> None:
    """As Zamba's blocks take the embeddings beside the hidden states, and any block what it broadcasts."""

    class Block(nn.Module):
        def forward(self, hidden_states: Tensor, embeddings: Tensor, scale: Tensor) -> Tensor:
            assert scale.shape == (1, 1, 4)
            return torch.cat([hidden_states * scale, embeddings], -1)

    block, states, embeddings = Block(), torch.randn(rows, 3, 4), torch.randn(rows, 3, 2)
    with fold_trajectories([block], 2, NoiseState()):
        folded = block(states, embeddings, scale=torch.ones(1, 1, 4))
    assert torch.equal(folded, torch.cat([states, embeddings], -1).repeat(2, 1, 1))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_as_long_as_the_batch(family: str, rows: int) -> None:
    # Tensors whose first dimension is the length could be taken for batch-shaped ones.
    assert_folds(adapt(build(family), noise_blocks=2), batch(rows, length=rows), rtol=1e-3)


@pytest.mark.parametrize(("family", "attention"), [("llama", "eager"), ("gemma3", "sdpa"), ("mistral", "sdpa")])
def test_padding_free(family: str, attention: str) -> None:
    """Documents end to end in one row, told apart by their positions, as TRL's collator gives them."""
    model = adapt(build(family, _attn_implementation=attention), noise_blocks=2)
    lengths = [4, 3, 5]
    ids = batch(1, sum(lengths))["input_ids"]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    boundaries = torch.tensor([0, 4, 7, 12], dtype=torch.int32)
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    assert_folds(model, inputs)
    assert_folds(
        model,
        inputs | {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 5, "max_length_k": 5},
    )
    # and documents do not see one another: the last one alone gives the same
    with model.disable_adapter():
        alone = model(input_ids=ids[:, 7:]).logits
        torch.testing.assert_close(model(**inputs).logits[:, 7:], alone, rtol=1e-4, atol=1e-4)


def test_boundaries_of_a_padding_free_batch_are_laid_end_to_end() -> None:
    seen: dict[str, Tensor] = {}
    model = adapt(build(), noise_blocks=2)

    def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.update({name: value for name, value in kwargs.items() if name.startswith("cu_seq_lens")})

    model.base_model.model.model.layers[3].self_attn.register_forward_pre_hook(look, with_kwargs=True)
    boundaries = torch.tensor([0, 4, 10], dtype=torch.int32)
    positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
    with model.base_model.sampling(KEY, 3):
        model(
            **{"input_ids": batch(1)["input_ids"], "position_ids": positions},
            **{"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 6, "max_length_k": 6},
        )
    for folded in seen.values():
        assert folded.tolist() == [0, 4, 10, 14, 20, 24, 30] and folded.dtype == torch.int32
    assert len(seen) == 2


def test_position_ids_per_row() -> None:
    inputs = batch(padded=True)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert_folds(adapt(build("qwen3"), noise_blocks=2), inputs)


def test_one_trajectory_is_the_first_of_several() -> None:
    model, inputs = adapt(build()), batch()
    with model.base_model.sampling(KEY):
        one = model(**inputs).logits
    with model.base_model.sampling(KEY, 2):
        two = model(**inputs).logits
    torch.testing.assert_close(two[:3], one, rtol=1e-5, atol=1e-5)


def test_the_context_yields_log_variances_with_gradient_and_leaves_nothing_behind() -> None:
    model, inputs = adapt(build(), noise_blocks=2, noise_scale=0.1), batch()
    clean = model(**inputs).logits
    with pytest.raises(RuntimeError, match="inside"), model.base_model.sampling(KEY, 2) as log_variances:
        model(**inputs)
        assert sorted(log_variances) == [2, 3]
        for value, rms in log_variances.values():
            torch.testing.assert_close(value, torch.full((32,), 2 * torch.log(torch.tensor(0.1)).item()))
            assert value.requires_grad and rms.shape == (1,) and rms > 0
        raise RuntimeError("inside")
    assert torch.equal(model(**inputs).logits, clean)


def test_contexts_nest() -> None:
    model, inputs = adapt(build()), batch()
    with model.base_model.sampling(KEY):
        before = model(**inputs).logits
        with model.base_model.sampling(NoiseKey(99)):
            assert not torch.equal(model(**inputs).logits, before)
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("trajectories", [0, -1, 2.0, True])
def test_a_number_of_trajectories_that_is_none(trajectories: Any) -> None:
    with (
        pytest.raises(ValueError, match=rf"trajectories={trajectories} must be a whole number, at least 1"),
        adapt(build()).base_model.sampling(KEY, trajectories),
    ):
        pass


def test_a_key_that_is_none() -> None:
    model = adapt(build())
    with (
        pytest.raises(TypeError, match=r"key=3 must be a NoiseKey, such as NoiseKey\(0\)"),
        model.base_model.sampling(3),
    ):
        pass
