"""One optimiser of two: torch's own updates, one state, and a state dict that goes on bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW
from transformers import get_scheduler

from dip_hf.trainer.hybrid import HybridOptimizer


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(3, 2, generator=generator)) for _ in range(4)]


def parts(found: list[nn.Parameter]) -> tuple[AdamW, SGD]:
    adamw = AdamW([{"params": found[:1]}, {"params": found[1:2], "lr": 0.5}], lr=0.1, weight_decay=0.0, fused=True)
    return adamw, SGD([{"params": found[2:3]}, {"params": found[3:], "lr": 0.2}], lr=0.1, momentum=0.9)


def gradients(found: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in found:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def train(found: list[nn.Parameter], steppers: list[Any], steps: range) -> None:
    for step in steps:
        gradients(found, step)
        for stepper in steppers:
            stepper.step()


def test_it_is_both_side_by_side_under_one_schedule() -> None:
    apart, together = parameters(), parameters()
    two = parts(apart)
    one = HybridOptimizer(parts(together))
    schedules = [torch.optim.lr_scheduler.LinearLR(each, 1.0, 0.1, 10) for each in (*two, one)]
    train(apart, [*two, *schedules[:2]], range(10))
    train(together, [one, schedules[2]], range(10))
    assert all(map(torch.equal, apart, together))
    assert [group["lr"] for group in one.param_groups] == [group["lr"] for each in two for group in each.param_groups]


def test_schedules_that_end_at_a_rate_of_their_own() -> None:
    for name, options in (("polynomial", {}), ("cosine_with_min_lr", {"min_lr": 1e-3})):
        one = HybridOptimizer(parts(parameters()))
        schedule = get_scheduler(
            name, one, num_warmup_steps=0, num_training_steps=2, scheduler_specific_kwargs=options
        )
        one.step()
        schedule.step()
        assert 0 < one.param_groups[0]["lr"] < 0.1


def test_a_state_dict_goes_on_bit_for_bit() -> None:
    whole, cut = parameters(), parameters()
    train(whole, [HybridOptimizer(parts(whole))], range(8))
    first = HybridOptimizer(parts(cut))
    train(cut, [first], range(4))
    saved = copy.deepcopy(first.state_dict())
    resumed = HybridOptimizer(parts(cut))
    resumed.load_state_dict(saved)
    train(cut, [resumed], range(4, 8))
    assert all(map(torch.equal, whole, cut))
    assert len(resumed.state) == 4


def test_a_closure_is_evaluated_once_with_gradient() -> None:
    found = parameters()
    optimizer, calls = HybridOptimizer(parts(found)), []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        gradients(found, 0)
        return 1.5

    assert optimizer.step(closure) == 1.5 and calls == [True]


def test_parameters_without_a_gradient_stay() -> None:
    found = parameters()
    before = [parameter.detach().clone() for parameter in found]
    optimizer = HybridOptimizer(parts(found))
    gradients(found[:1], 0)
    optimizer.step()
    assert [torch.equal(one, other) for one, other in zip(before, found, strict=True)] == [False, True, True, True]
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in found)
