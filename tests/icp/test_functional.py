"""ICP's pure functions."""

from __future__ import annotations

import math

import pytest
import torch

from dip_hf.icp.functional import (
    UPDATES,
    compared_tokens,
    feature_loss,
    first_tokens,
    layer_weights,
    perturbation_step,
    perturbed_tokens,
    random_shift,
    schedule,
    term_weights,
)
from dip_hf.icp.options import ICPOptions
from dip_hf.noise import NoiseKey
from tests.icp.support import padded_batch, padding_free_batch


def rms(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.square().mean(-1)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("scale", [1.0, 1e-25])
def test_first_step_has_length_epsilon_and_descends_whatever_the_scale(update: str, scale: float) -> None:
    torch.manual_seed(0)
    g, e = torch.randn(2, 5, 16) * scale, torch.randn(2, 5, 16)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3] = False
    step, _ = perturbation_step(g, e, mask, 0.1, update)
    assert torch.allclose(rms(step)[mask], 0.01 * rms(e)[mask], rtol=1e-4)
    assert not step[0, 3].any()
    assert ((step * (g / scale)).sum(-1)[mask] < 0).all()


@pytest.mark.parametrize("update", UPDATES)
def test_a_token_without_gradient_stays(update: str) -> None:
    step, _ = perturbation_step(
        torch.zeros(1, 2, 4), torch.ones(1, 2, 4), torch.ones(1, 2, dtype=torch.bool), 0.1, update
    )
    assert not step.any()


def test_adam_is_sign_at_first_and_torchs_adam_later() -> None:
    torch.manual_seed(0)
    e = torch.randn(1, 3, 8)
    e = e / rms(e).sqrt()[..., None]  # unit RMS: then the step is Adam's own with lr = ε
    mask = torch.ones(1, 3, dtype=torch.bool)
    x = e.clone().requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.03, eps=1e-30)
    state, moved = None, e
    for step_index in range(4):
        g = torch.randn(1, 3, 8)
        step, state = perturbation_step(g, e, mask, 0.03, "adam", state)
        moved = moved + step
        x.grad = g
        optimiser.step()
        if step_index == 0:
            sign, _ = perturbation_step(g, e, mask, 0.03, "sign")
            assert torch.allclose(step, sign, atol=1e-7)
    assert torch.allclose(moved, x.detach(), atol=1e-6)


def test_unknown_update() -> None:
    with pytest.raises(ValueError, match="update='sgd' must be one of"):
        perturbation_step(torch.ones(1, 1, 2), torch.ones(1, 1, 2), torch.ones(1, 1, dtype=torch.bool), 0.1, "sgd")


def test_a_random_shift_is_as_long_and_points_anywhere() -> None:
    torch.manual_seed(0)
    shift = torch.randn(2, 500, 16)
    shift[0, 3] = 0
    key = NoiseKey(4).tensor()
    random = random_shift(shift, key)
    assert torch.allclose(random.norm(dim=-1), shift.norm(dim=-1), rtol=1e-5) and not random[0, 3].any()
    assert random.equal(random_shift(shift, key)) and not random.equal(random_shift(shift, NoiseKey(5).tensor()))
    unit = torch.nn.functional.normalize(random, dim=-1)
    assert unit.mean((0, 1)).abs().max() < 0.04  # 5 standard deviations of a mean over 1,000 directions
    cosine = torch.nn.functional.cosine_similarity(random, shift, dim=-1)
    assert cosine.square().mean().item() == pytest.approx(1 / 16, rel=0.25)  # uniform on the sphere
    assert random_shift(shift.double(), key).dtype == torch.float64


def test_layer_weights() -> None:
    assert layer_weights(1) == [1.0]
    assert layer_weights(3) == pytest.approx([1.0, math.cos(math.pi / 8), math.sqrt(0.5)])


def test_feature_loss_by_hand_and_folded() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    expected = sum(
        w * (student - teacher)[b, t].norm() ** 2 / teacher[b, t].norm() ** 2
        for w in (1.0, math.sqrt(0.5))
        for b, t in mask.nonzero().tolist()
    )
    total, tokens = feature_loss([student, student], [teacher, teacher], layer_weights(2), mask)
    assert total.item() == pytest.approx(float(expected), rel=1e-5) and tokens.item() == 4
    folded, tokens = feature_loss(
        [student, student.repeat(3, 1, 1)], [teacher, teacher.repeat(3, 1, 1)], layer_weights(2), mask
    )
    assert folded.item() == pytest.approx(float(expected), rel=1e-5) and tokens.item() == 4


def test_feature_loss_adds_up_over_micro_batches() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
    mask = torch.rand(4, 6) > 0.4
    whole, tokens = feature_loss([student], [teacher], [1.0], mask)
    parts = [feature_loss([student[i : i + 1]], [teacher[i : i + 1]], [1.0], mask[i : i + 1]) for i in range(4)]
    assert torch.allclose(whole, torch.stack([total for total, _ in parts]).sum())
    assert tokens == sum(part for _, part in parts)


def test_feature_loss_survives_empty_and_zero() -> None:
    student = torch.zeros(1, 2, 4, requires_grad=True)
    total, tokens = feature_loss([student], [torch.zeros(1, 2, 4)], [1.0], torch.zeros(1, 2, dtype=torch.bool))
    total.backward()
    assert total == 0 and tokens == 0 and student.grad is not None and not student.grad.any()


def test_schedule() -> None:
    assert schedule(0.0, 0.25) == schedule(0.25, 0.25) == 1.0
    assert schedule(0.625, 0.25) == pytest.approx(math.sqrt(0.5))
    assert schedule(1.0, 0.25) == pytest.approx(0.0, abs=1e-12)
    assert schedule(1.0, 1.0) == 1.0
    assert schedule(1.01, 0.0) == pytest.approx(0.0, abs=1e-12)  # a step past the end does not turn round


def test_term_weights() -> None:
    a = schedule(0.5, 0.25)
    assert term_weights(0.5, 2.0, 0.25, "additive") == (1.0, pytest.approx(2 * (1 - a)))
    assert term_weights(0.5, 1.0, 0.25, "paper") == (pytest.approx(a), pytest.approx(1 - a))
    assert term_weights(0.1, 2.0, 0.25, "paper") == (1.0, 0.0)


def test_tokens_of_a_padded_batch() -> None:
    batch = padded_batch()
    compared = compared_tokens(batch)
    assert not compared[:, 0].any() and compared[:, 1:7].all() and not compared[-1, -3:].any()
    assert perturbed_tokens(batch, "all").equal(batch["attention_mask"].bool())
    prompt = perturbed_tokens(batch, "prompt")
    assert prompt[:, 1:3].all() and not prompt[:, 3:].any() and not prompt[:, 0].any()


def test_first_token_behind_left_padding() -> None:
    batch = {"input_ids": torch.ones(2, 4), "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])}
    assert first_tokens(batch).nonzero().tolist() == [[0, 2], [1, 0]]


def test_first_tokens_of_a_padding_free_batch() -> None:
    batch = padding_free_batch()
    assert first_tokens(batch).nonzero().tolist() == [[0, 0], [0, 5], [0, 9]]
    assert perturbed_tokens(batch, "all").all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight", -1.0),
        ("weight", float("nan")),
        ("steps", 0),
        ("epsilon", 0.0),
        ("epsilon", -0.1),
        ("update", "sgd"),
        ("positions", "none"),
        ("layers", 0),
        ("start_block", -1),
        ("interval", 0),
        ("weighting", "mean"),
        ("warmup", 1.5),
        ("warmup", -0.1),
    ],
)
def test_options_name_field_and_value(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"icp_{field}={value!r} must"):
        ICPOptions(**{field: value})


def test_due_every_nth_step() -> None:
    assert [step for step in range(7) if ICPOptions(interval=3).due(step)] == [0, 3, 6]


@pytest.mark.parametrize("masked", [True, False])
def test_a_documents_first_token_is_not_of_the_prompt_masked_or_not(masked: bool) -> None:
    """Collators of padding-free batches mask it, those that pad do not."""
    labels = torch.tensor([[-100 if masked else 3, -100, 5], [3, 4, 5]])
    inputs = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": labels}
    assert perturbed_tokens(inputs, "prompt").tolist() == [[False, True, False], [False] * 3]
