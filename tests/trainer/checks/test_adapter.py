"""Variants of LoRA that draw or are told something in a model's own pass alone, with what runs blocks again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig, MontecloraConfig, get_peft_model

from dip_hf import DIPNetConfig
from dip_hf.trainer.checks.setup import check_monteclora
from tests.trainer.methods import DRES, ICP
from tests.trainer.tiny import base_model, make_trainer


LORA = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
MONTECLORA = {**LORA, "monteclora_config": MontecloraConfig(buffer_size=2)}
ALORA = {**LORA, "alora_invocation_tokens": [5, 6]}


@pytest.mark.parametrize("kind", [LoraConfig, DIPNetConfig])
def test_samples_and_recomputation(kind: type[LoraConfig], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"activation_checkpointing=True with monteclora_config: .*gradient_chec.*False"
    ):
        make_trainer(tmp_path, kind(**MONTECLORA), {"activation_checkpointing": True})
    make_trainer(tmp_path, kind(**LORA), {"activation_checkpointing": True})
    make_trainer(tmp_path, kind(**MONTECLORA)).train()


def test_recomputation_that_is_not_the_arguments_own(tmp_path: Path) -> None:
    """Turned on in the model, or by FSDP (a stand-in, which needs an accelerator)."""
    model = base_model()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="with monteclora_config"):
        make_trainer(tmp_path, LoraConfig(**MONTECLORA), model=model)
    plugin = SimpleNamespace(activation_checkpointing=True)
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(activation_checkpointing=False),
        is_fsdp_enabled=True,
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)),
        model=get_peft_model(base_model(), LoraConfig(**MONTECLORA)),
    )
    with pytest.raises(ValueError, match="with monteclora_config"):
        check_monteclora(trainer)
    plugin.activation_checkpointing = False
    check_monteclora(trainer)


def test_samples_of_an_adapter_that_is_off(tmp_path: Path) -> None:
    model = get_peft_model(base_model(), LoraConfig(**LORA))
    model.add_adapter("other", LoraConfig(**MONTECLORA))
    make_trainer(tmp_path, None, ICP, model)


def test_noise_that_no_pass_draws(tmp_path: Path) -> None:
    """A new adapter is trained on top of an old one, which stays active: the first one's noise would be drawn."""

    def stacked(order: list[str], blocks: list[int]) -> Any:
        model = get_peft_model(base_model(), DIPNetConfig(**LORA, noise_blocks=[0]))
        model.add_adapter("second", DIPNetConfig(**LORA, noise_blocks=blocks))
        model.base_model.set_adapter(order)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".second" in name)
        return model

    message = r"block 0 draws the noise of 'default', .* noise of 'second' would be trained"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, None, model=stacked(["default", "second"], [0, 1]))
    make_trainer(tmp_path, None, model=stacked(["second", "default"], [0, 1]))
    make_trainer(tmp_path, None, model=stacked(["default", "second"], [1, 2]))
    trainer = make_trainer(tmp_path, None, model=stacked(["second", "default"], [0, 1]))
    trainer.model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_modules_to_save_that_the_model_has_not(tmp_path: Path) -> None:
    """They would be found missing when the trained adapter is exported or pushed."""
    adapter = {**LORA, "modules_to_save": ["lm_haed"]}
    with pytest.raises(
        ValueError, match=r"modules_to_save=\['lm_haed'\]: the model has no module of the name 'lm_haed'"
    ):
        make_trainer(tmp_path, DIPNetConfig(**adapter))
    make_trainer(tmp_path, DIPNetConfig(**{**adapter, "modules_to_save": ["lm_head"]}))


@pytest.mark.parametrize("options", [DRES, ICP], ids=["dres", "icp"])
@pytest.mark.parametrize("lora", [MONTECLORA, ALORA], ids=["monteclora_config", "alora_invocation_tokens"])
def test_second_passes(lora: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    name = next(name for name in lora if name not in LORA)
    message = f"dres_weight and icp_weight do not work with {name}: .*or set both weights to 0"
    for kind in (LoraConfig, DIPNetConfig):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, kind(**lora), options)


def test_copies_of_rows_whose_invocation_is_known(tmp_path: Path) -> None:
    message = r"trajectories=2 with alora_invocation_tokens: .*or set num_trajectories \(or num_samples\) to 1"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, DIPNetConfig(**ALORA), {"num_trajectories": 2})
    make_trainer(tmp_path, DIPNetConfig(**ALORA)).train()
