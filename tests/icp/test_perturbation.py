"""ICP's perturbation against slow, plain second implementations."""

from __future__ import annotations

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from dip_hf.icp import ICPBranch, ICPOptions
from dip_hf.icp.functional import UPDATES, compared_tokens, perturbation_step, perturbed_tokens
from dip_hf.noise import NoiseKey
from tests.dipnet.models import deepstack
from tests.icp.support import (
    VOCABULARY,
    block_outputs,
    icp,
    padded_batch,
    padding_free_batch,
    replaced,
    task_loss,
    tiny_llama,
    with_lora,
)


@pytest.mark.parametrize("start_block", [0, 2])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize(("direction", "sign"), [("descent", 1), ("ascent", -1)])
def test_steps_against_a_plain_loop(direction: str, sign: int, start_block: int, update: str, adapter: bool) -> None:
    model = with_lora(tiny_llama()) if adapter else tiny_llama()
    inputs = padded_batch()
    branch = ICPBranch(model, ICPOptions(steps=3, update=update, start_block=start_block, direction=direction))
    with branch.clean() as record:
        task = task_loss(model, inputs)
    perturbed = branch.perturb(record, inputs, task, lambda: task_loss(model, inputs))

    sites: list[Tensor] = []
    with replaced(model, start_block, lambda states: sites.append(states.detach()) or states):
        task_loss(model, inputs)
    clean = sites[0]
    mask = perturbed_tokens(inputs, "all")
    if start_block > 0:
        mask = mask & compared_tokens(inputs)
    x, state = clean, None
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        with replaced(model, start_block, lambda states, leaf=leaf: leaf):
            (g,) = torch.autograd.grad(task_loss(model, inputs), leaf)
        step, state = perturbation_step(g, clean, mask, 0.03, update, state)
        x = x + sign * step
    assert not x.equal(clean)
    assert torch.allclose(perturbed, x, atol=1e-6)
    with replaced(model, start_block, lambda states: x):
        expected = block_outputs(model, lambda: task_loss(model, inputs))
        assert (task - task_loss(model, inputs)) * sign > 0
    for index, states in branch.teacher(record, perturbed).items():
        assert torch.allclose(states, expected[index], atol=1e-5)


@pytest.mark.parametrize("start_block", [0, 2])
def test_further_steps_see_the_dropout_of_the_clean_pass(start_block: int) -> None:
    model, inputs = tiny_llama(attention_dropout=0.5), padded_batch()
    losses: list[Tensor] = []

    def clean_loss() -> Tensor:
        losses.append(task_loss(model, inputs))
        return losses[-1]

    tiny = ICPOptions(steps=2, epsilon=1e-6, start_block=start_block)  # a step that changes no loss by itself
    branch = ICPBranch(model, tiny)
    for _ in range(2):  # another dropout in each
        with branch.clean() as record:
            clean = task_loss(model, inputs)
        branch.loss(record, inputs, clean, clean_loss)
        losses.append(clean)
    assert torch.allclose(losses[0], losses[1], atol=1e-5) and torch.allclose(losses[2], losses[3], atol=1e-5)
    assert abs(losses[1] - losses[3]) > 1e-3


def test_descent_lowers_the_loss_on_a_trained_model() -> None:
    """At the default ε, one step, on batches that training has not seen."""
    model = tiny_llama(num_hidden_layers=2)
    generator = torch.Generator().manual_seed(0)

    def batch() -> dict[str, Tensor]:  # counting upwards from anywhere, in steps of 1 to 4
        start, stride = (torch.randint(*bounds, (8, 1), generator=generator) for bounds in ((0, 24), (1, 5)))
        ids = (start + stride * torch.arange(10)) % VOCABULARY
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = task_loss(model, batch())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert loss < 1.5  # of ln 24 = 3.2
    for update in UPDATES:
        lower = 0
        branch = ICPBranch(model, ICPOptions(update=update))
        for _ in range(20):
            inputs = batch()
            with branch.clean() as record:
                task = task_loss(model, inputs)
            perturbed = branch.perturb(record, inputs, task)
            with torch.no_grad(), replaced(model, 0, lambda states, perturbed=perturbed: perturbed):
                lower += bool(task_loss(model, inputs) < task)
        assert lower >= 19


@pytest.mark.parametrize("steps", [1, 3])
def test_a_random_direction_moves_every_token_as_far_as_descent(steps: int) -> None:
    model, inputs = tiny_llama(), padded_batch()

    def shift(direction: str, key: NoiseKey | None = None) -> Tensor:
        branch = ICPBranch(model, ICPOptions(steps=steps, direction=direction))
        with branch.clean() as record:
            task = task_loss(model, inputs)
        before = torch.get_rng_state()
        perturbed = branch.perturb(record, inputs, task, lambda: task_loss(model, inputs), key)
        assert torch.get_rng_state().equal(before)
        return perturbed - record.site.detach()

    descent, random = shift("descent"), shift("random", NoiseKey(1, 2, 3))
    assert torch.allclose(random.norm(dim=-1), descent.norm(dim=-1), rtol=1e-3)
    moved = inputs["attention_mask"].bool()
    moved &= moved.cumsum(-1) < moved.sum(-1, keepdim=True)  # nothing comes after a row's last token, so it stays
    assert (random.norm(dim=-1) > 0).equal(moved)
    assert nn.functional.cosine_similarity(random, descent, -1)[moved].abs().max() < 0.8
    assert random.equal(shift("random", NoiseKey(1, 2, 3)))
    for other in (NoiseKey(0, 2, 3), NoiseKey(1, 3, 3), NoiseKey(1, 2, 4), NoiseKey(1, 2, 3, 1)):
        assert not torch.allclose(random, shift("random", other), atol=1e-3)
    with pytest.raises(ValueError, match="icp_direction='random' needs `key`"):
        shift("random")


@pytest.mark.parametrize("start_block", [0, 2])
def test_prompt_only(start_block: int) -> None:
    model, inputs = tiny_llama(), padded_batch()
    branch = ICPBranch(model, ICPOptions(positions="prompt", start_block=start_block))
    with branch.clean() as record:
        task = task_loss(model, inputs)
    moved = (branch.perturb(record, inputs, task) - record.site).abs().sum(-1) > 0
    assert moved[:, 1:3].all() and not moved[:, 3:].any()
    assert not moved[:, 0].any()


@pytest.mark.parametrize("start_block", [0, 2])
def test_the_callers_mask_stays_as_it_is(start_block: int) -> None:
    """A boolean one too, which needs no conversion and would be written to."""
    inputs = padded_batch()
    inputs["attention_mask"] = inputs["attention_mask"].bool()
    before = inputs["attention_mask"].clone()
    icp(tiny_llama(), inputs, start_block=start_block)
    assert torch.equal(inputs["attention_mask"], before)


@pytest.mark.parametrize("start_block", [0, 2])
def test_padding_free(start_block: int) -> None:
    """One row of documents gives what the documents give by themselves."""
    whole = padding_free_batch()
    model = tiny_llama()
    _, term, _ = icp(model, whole, start_block=start_block)
    parts = []
    for begin, end in ((0, 5), (5, 9), (9, 12)):
        document = {name: value[:, begin:end] for name, value in whole.items()}
        parts.append(icp(model, document, start_block=start_block)[1])
    assert term.tokens == sum(part.tokens for part in parts) == 9
    assert term.total.item() == pytest.approx(sum(part.total.item() for part in parts), rel=1e-3)


def test_padding_changes_nothing() -> None:
    model, inputs = tiny_llama(), padded_batch()
    _, term, _ = icp(model, inputs)
    rows = []
    for row in range(3):
        length = int(inputs["attention_mask"][row].sum())
        rows.append(icp(model, {name: value[row : row + 1, :length] for name, value in inputs.items()})[1])
    assert term.tokens == sum(part.tokens for part in rows)
    assert term.total.item() == pytest.approx(sum(part.total.item() for part in rows), rel=1e-3)


def test_prompt_tuning_from_block_one() -> None:
    """Virtual tokens are neither perturbed nor compared."""
    inputs = padded_batch()
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(tiny_llama(), config)
    labels = nn.functional.pad(inputs["labels"], (2, 0), value=-100)
    branch = ICPBranch(model, ICPOptions(start_block=1))
    with branch.clean() as record:
        task = task_loss(model, inputs, labels)
    perturbed = branch.perturb(record, inputs, task)
    assert perturbed[:, :3].equal(record.site[:, :3].detach()) and not perturbed[:, 3:].equal(record.site[:, 3:])
    term = branch.loss(record, inputs, task)
    assert term.total > 0 and term.tokens == compared_tokens(inputs).sum()
    branch = ICPBranch(model, ICPOptions())
    with pytest.raises(ValueError, match=r"icp_start_block=0 .* set icp_start_block to 1"), branch.clean():
        task_loss(model, inputs, labels)


@pytest.mark.parametrize("start_block", [0, 1, 2, 3])
def test_features_of_images_that_enter_between_blocks(start_block: int) -> None:
    """A teacher that ran the blocks one after the other would not see the images."""
    model, inputs = deepstack()
    branch = ICPBranch(model, ICPOptions(start_block=start_block, epsilon=1e-9))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 60, -100)

    def loss(**more: Tensor) -> float:
        with branch.clean() as record:
            task = model(**more, labels=labels, use_cache=False).loss
        found = branch.loss(record, {**more, "labels": labels}, task)
        return (found.total / found.tokens).item()

    assert loss(input_ids=inputs["input_ids"].clamp(max=59), attention_mask=inputs["attention_mask"]) < 1e-12
    if start_block in (0, 3):
        assert loss(**inputs) < 1e-12
        return
    with pytest.raises(ValueError, match=rf"icp_start_block={start_block}: .* of block {start_block + 1} .* to 0"):
        loss(**inputs)
