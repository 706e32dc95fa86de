"""A checkpoint that another adapter cannot go on from, and a precision that evaluation took away."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dip_hf import DIPNetConfig
from dip_hf.dipnet.layer import own_parameters
from tests.trainer.tiny import ADAPTER, base_model, losses, make_trainer, tokenised


OPTIONS = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
ONE = {"target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ({}, {"noise_blocks": 1}, r"noise_blocks=1, but the checkpoint .*checkpoint-2 has 'all'; resume with"),
        ({"noise_blocks": 1}, {}, r"noise_blocks='all', but .* has 1;"),
        ({}, {"learn_noise": False}, r"learn_noise=False, but .* has True;"),
        ({"variational_rank": 2}, {}, r"variational_rank=0, but .* has 2;"),
        ({"noise_blocks": [4]}, {}, r"noise_blocks='all', but .* has \[4\];"),
        (
            {"variational_rank": 2},
            {"variational_rank": 2, "variational_scale": 0.0},
            r"variational_scale=0.0, but .* has 2.0;",
        ),
        (
            {"variational_rank": 2, "variational_blocks": 1},
            {"variational_rank": 2, "variational_blocks": 2},
            r"variational_blocks=2, but .* has 1;",
        ),
        ({}, {"r": 4}, r"r=4, but .* has 2;"),
        ({}, {"lora_alpha": 64}, r"lora_alpha=64, but .* has 8;"),
        ({}, {"alpha_pattern": {"q_proj": 64}}, r"alpha_pattern=\{'q_proj': 64\}, but .* has \{\};"),
        ({}, {"rank_pattern": {"q_proj": 4}}, r"rank_pattern=\{'q_proj': 4\}, but .* has \{\};"),
        ({}, {"target_modules": ["v_proj", "q_proj"]}, r"target_modules=\['q_proj', 'v_proj'\], but .* has \['down"),
        ({**ONE, "layers_to_transform": [0]}, {**ONE, "layers_to_transform": [1]}, r"layers_to_transform=\[1\], but"),
        ({}, {"exclude_modules": ["q_proj"]}, r"exclude_modules=\['q_proj'\], but .* has None;"),
        ({}, {"trainable_token_indices": [3, 4]}, r"trainable_token_indices=\[3, 4\], but .* has None;"),
        ({"trainable_token_indices": [3, 4]}, {"trainable_token_indices": [4, 3]}, r"=\[4, 3\], but .* has \[3, 4\];"),
        ({}, {"init_lora_weights": "pissa"}, r"init_lora_weights='pissa', but .* has False;"),
        ({"use_rslora": True}, {}, r"use_rslora=False, but .* has True;"),
    ],
    ids=str,
)
def test_another_adapter(first: dict[str, Any], then: dict[str, Any], message: str, tmp_path: Path) -> None:
    deeper = base_model(depth=5) if first.get("noise_blocks") == [4] else None
    make_trainer(tmp_path, DIPNetConfig(**{**ADAPTER, **first}), OPTIONS, model=deeper).train()
    trainer = make_trainer(tmp_path, DIPNetConfig(**{**ADAPTER, **then}), {**OPTIONS, "max_steps": 3})
    for checkpoint in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("kinds", [(DIPNetConfig, LoraConfig), (LoraConfig, DIPNetConfig)])
def test_an_adapter_of_another_kind(kinds: tuple[type[LoraConfig], type[LoraConfig]], tmp_path: Path) -> None:
    make_trainer(tmp_path, kinds[0](**ADAPTER), OPTIONS).train()
    trainer = make_trainer(tmp_path, kinds[1](**ADAPTER), {**OPTIONS, "max_steps": 3})
    names = {DIPNetConfig: "DIPNET", LoraConfig: "LORA"}
    message = f"peft_type='{names[kinds[1]]}', but the checkpoint .* has '{names[kinds[0]]}';"
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"noise_blocks": "all", "noise_scale": 0.2}, {"noise_blocks": [0, 1, 2], "variational_blocks": 1}),
        (
            {"noise_blocks": 0, "variational_rank": 2, "variational_blocks": "all"},
            {"noise_blocks": [], "variational_rank": 2, "variational_blocks": 3, "learn_noise": False},
        ),
    ],
    ids=str,
)
def test_the_same_in_other_words(first: dict[str, Any], then: dict[str, Any], tmp_path: Path) -> None:
    make_trainer(tmp_path, DIPNetConfig(**ADAPTER, **first), OPTIONS).train()
    trainer = make_trainer(tmp_path, DIPNetConfig(**ADAPTER, **then), {**OPTIONS, "max_steps": 3})
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
    assert all(buffer.dtype == torch.float32 for name, buffer in trainer.model.named_buffers() if "rms" in name)


def test_an_adapter_of_another_name(tmp_path: Path) -> None:
    """Trainer loads the checkpoint's only adapter into the active one."""
    make_trainer(tmp_path, DIPNetConfig(**ADAPTER), OPTIONS).train()
    model = get_peft_model(base_model(), DIPNetConfig(**ADAPTER, learn_noise=False), "mine")
    trainer = make_trainer(tmp_path, None, {**OPTIONS, "max_steps": 3}, model=model)
    with pytest.raises(ValueError, match=r"learn_noise=False, but the checkpoint .*checkpoint-2 has True"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("adapter", [None, DIPNetConfig(**ADAPTER)], ids=["none", "dipnet"])
def test_the_last_checkpoint_that_is_whole(adapter: DIPNetConfig | None, tmp_path: Path) -> None:
    """A kill within a save leaves a folder without what Trainer writes last."""
    options = {**OPTIONS, "max_steps": 3}
    whole = make_trainer(tmp_path / "whole", adapter, options)
    whole.train()
    make_trainer(tmp_path / "cut", adapter, options).train()
    shutil.rmtree(tmp_path / "cut" / "checkpoint-3")
    (tmp_path / "cut" / "checkpoint-2" / "trainer_state.json").unlink()
    resumed = make_trainer(tmp_path / "cut", adapter, options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 3
    for step in (2, 3):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{step}")
    (tmp_path / "cut" / "checkpoint-1" / "trainer_state.json").write_text("{")
    first = str(tmp_path / "cut" / "checkpoint-1")
    for given, message in ((True, "no whole checkpoint in .*cut; leave it out"), (first, "1 was not written to its")):
        trainer = make_trainer(tmp_path / "cut", adapter, {**options, "save_strategy": "no"})
        with pytest.raises(ValueError, match=rf"resume_from_checkpoint=.*{message}"):
            trainer.train(resume_from_checkpoint=given)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"noise_learning_rate": 1e3}, "lora_dip_log_variance"), ({"learning_rate": 1e38}, "lora_[AB]")],
)
def test_weights_that_a_step_has_ruined_are_not_saved(options: dict[str, Any], name: str, tmp_path: Path) -> None:
    """Their loss and gradient were finite, and the checkpoint before them would be deleted."""
    options = {**OPTIONS, "save_total_limit": 1, "max_steps": 1, **options}
    trainer = make_trainer(tmp_path, DIPNetConfig(**ADAPTER), options)
    with pytest.raises(
        FloatingPointError, match=rf"Step 1: the optimiser has made .*{name}.* infinite or NaN. Nothing"
    ):
        trainer.train()
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(FloatingPointError, match="Nothing was saved"):
        trainer.save_model(str(tmp_path / "end"))
    assert not (tmp_path / "end").exists()
