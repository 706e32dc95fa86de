"""What evaluation does to training (nothing), and which noise it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

from dip_hf import DIPNetConfig
from dip_hf.dipnet.layer import LogVariance
from tests.trainer.tiny import ADAPTER, base_model, losses, make_trainer, tokenised


def scales(trainer: Any) -> list[float]:
    return [module.rms.item() for module in trainer.model.modules() if isinstance(module, LogVariance)]


@pytest.mark.parametrize("how", ["eval_on_start", "evaluate"])
def test_an_evaluation_before_training_does_not_set_the_noises_scale(how: str, tmp_path: Path) -> None:
    adapter = DIPNetConfig(**ADAPTER, noise_in_eval=True)
    other = Dataset.from_list([{"input_ids": [41] * 12, "labels": [41] * 12}] * 4)
    plain = make_trainer(tmp_path, adapter, {"max_steps": 3})
    plain.train()
    options = {"eval_on_start": True, "eval_strategy": "epoch"} if how == "eval_on_start" else {}
    evaluated = make_trainer(tmp_path, adapter, {"max_steps": 3, **options}, eval_dataset=other)
    if how == "evaluate":
        noisy = evaluated.evaluate()["eval_loss"]
        assert scales(evaluated) == [0.0] * 3
        assert evaluated.evaluate()["eval_loss"] == noisy
    evaluated.train()
    assert losses(evaluated) == losses(plain)
    assert scales(evaluated) == scales(plain)
    assert all(scale > 0 for scale in scales(plain))


def test_noise_in_evaluation_has_keys_that_training_never_has(tmp_path: Path) -> None:
    adapter, options = DIPNetConfig(**ADAPTER, noise_in_eval=True), {"per_device_eval_batch_size": 2}
    trainer = make_trainer(tmp_path, adapter, options, eval_dataset=tokenised(4))
    keys = []
    noise_key = trainer._noise_key
    trainer._noise_key = lambda: keys.append(noise_key()) or keys[-1]
    trainer.evaluate()
    assert [key.micro_step for key in keys] == [-1, -2]


def test_of_two_active_adapters_one_keeps_its_noise_in_evaluation(tmp_path: Path) -> None:
    def evaluation_loss(scale_of_the_other: float, kept: bool = True) -> float:
        torch.manual_seed(0)
        model = get_peft_model(
            base_model(), DIPNetConfig(**ADAPTER, noise_blocks=[0], noise_scale=scale_of_the_other), "a"
        )
        model.add_adapter("b", DIPNetConfig(**ADAPTER, noise_blocks=[1, 2], noise_in_eval=kept))
        model.base_model.set_adapter(["a", "b"])
        return make_trainer(tmp_path, None, {}, model, eval_dataset=tokenised(4)).evaluate()["eval_loss"]

    assert evaluation_loss(0.01) == evaluation_loss(3.0) != evaluation_loss(3.0, kept=False)
