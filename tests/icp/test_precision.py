"""ICP in half precision, of the weights and by autocast."""

from __future__ import annotations

import pytest
import torch

from dip_hf.icp import ICPBranch, ICPOptions
from dip_hf.icp.perturbation import _input_gradient
from tests.icp.support import padded_batch, task_loss, tiny_llama


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("start_block", [0, 2])
def test_bfloat16(autocast: bool, start_block: int) -> None:
    model = tiny_llama() if autocast else tiny_llama().bfloat16()
    inputs = padded_batch()
    branch = ICPBranch(model, ICPOptions(start_block=start_block))
    with branch.clean() as record, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        task = task_loss(model, inputs)
    teacher = branch.teacher(record, record.site)  # outside of autocast, like a call outside the wrapped forward
    assert branch.compare(record, inputs, teacher).total == 0
    term = branch.loss(record, inputs, task)
    (task + term.total).backward()
    assert term.total > 0 and all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("update", ["normalised", "adam"])
@pytest.mark.parametrize(("head", "share"), [(0.6, 1.0), (0.02, 1e-5)])
def test_float16(head: float, share: float, update: str) -> None:
    """Neither the large gradient of a single label is lost, nor the small one of a label's share of a step's many."""
    inputs = padded_batch(rows=1)
    inputs["labels"][:, :-1] = -100
    inputs["labels"][:, -1] = 5
    inputs["attention_mask"][:] = 1

    def term(dtype: torch.dtype) -> float:
        model = tiny_llama()
        model.lm_head.weight.data.normal_(0, head, generator=torch.Generator().manual_seed(0))
        model.to(dtype)
        branch = ICPBranch(model, ICPOptions(steps=2, update=update))
        with branch.clean() as record:
            task = task_loss(model, inputs)
        return branch.loss(record, inputs, share * task, lambda: share * task_loss(model, inputs)).total.item()

    assert term(torch.float16) == pytest.approx(term(torch.float32), rel=0.2) and term(torch.float32) > 0


@pytest.mark.parametrize("slope", [1.0, 60.0])  # of which 4096 times the second is no number in fp16
def test_the_scale_that_a_loss_is_differentiated_at_is_taken_out_again(slope: float) -> None:
    site = torch.ones(3, dtype=torch.float16, requires_grad=True)
    assert _input_gradient((slope * site).sum(), site).tolist() == [slope] * 3
