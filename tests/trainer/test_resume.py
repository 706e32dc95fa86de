"""A checkpoint that another adapter cannot go on from, and a precision that evaluation took away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dip_hf import DIPNetConfig
from dip_hf.trainer.objective import own_parameters
from tests.trainer.tiny import ADAPTER, make_trainer, tokenised


OPTIONS = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ({}, {"noise_blocks": 1}, r"noise_blocks=1, but the checkpoint .*checkpoint-2 has 'all'; resume with"),
        ({"noise_blocks": 1}, {}, r"noise_blocks='all', but .* has 1;"),
        ({}, {"learn_noise": False}, r"learn_noise=False, but .* has True;"),
        ({"variational_rank": 2}, {}, r"variational_rank=0, but .* has 2;"),
        (
            {"variational_rank": 2, "variational_blocks": 1},
            {"variational_rank": 2, "variational_blocks": 2},
            r"variational_blocks=2, but .* has 1;",
        ),
    ],
    ids=str,
)
def test_another_adapter(first: dict[str, Any], then: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_trainer(tmp_path, DIPNetConfig(**ADAPTER, **first), OPTIONS).train()
    trainer = make_trainer(tmp_path, DIPNetConfig(**ADAPTER, **then), {**OPTIONS, "max_steps": 3})
    for checkpoint in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=checkpoint)


def test_the_same_blocks_in_other_words(tmp_path: Path) -> None:
    make_trainer(tmp_path, DIPNetConfig(**ADAPTER, noise_blocks="all", noise_scale=0.2), OPTIONS).train()
    other = DIPNetConfig(**ADAPTER, noise_blocks=[0, 1, 2], variational_blocks=1)
    trainer = make_trainer(tmp_path, other, {**OPTIONS, "max_steps": 3})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


def test_evaluation_in_bfloat16_first(tmp_path: Path) -> None:
    """It casts the model for good, and steps of 1e-3 are below bfloat16's spacing at a log-variance."""
    options = {**OPTIONS, "save_strategy": "no", "bf16_full_eval": True}
    trainer = make_trainer(tmp_path, DIPNetConfig(**ADAPTER), options, eval_dataset=tokenised(4))
    trainer.evaluate()
    assert {parameter.dtype for parameter in own_parameters(trainer.model).values()} == {torch.bfloat16}
    before = {name: parameter.detach().clone() for name, parameter in own_parameters(trainer.model).items()}
    trainer.train()
    for name, parameter in own_parameters(trainer.model).items():
        assert parameter.dtype == torch.float32 and not torch.equal(parameter, before[name].float())
