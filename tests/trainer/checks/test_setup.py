"""Models, batches and launchers that noise or several trajectories cannot go with: each refused by name."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from dip_hf import DIPNetConfig
from dip_hf.trainer.checks.setup import check_batch, check_fsdp, check_noise_setup, warn_of_rounding
from tests.trainer.tiny import ADAPTER, base_model, make_trainer, tokenised


def router_model() -> MixtralForCausalLM:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=48,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=2,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def test_router_loss(tmp_path: Path) -> None:
    """Folded trajectories and a router loss exclude each other; either alone trains."""
    adapter = DIPNetConfig(**{**ADAPTER, "target_modules": ["q_proj"]})
    with pytest.raises(ValueError, match=r"num_trajectories=2 does not work with a router loss.*router_aux_loss_coef"):
        make_trainer(tmp_path, adapter, {"num_trajectories": 2}, router_model())
    make_trainer(tmp_path, adapter, {"num_trajectories": 2, "router_aux_loss_coef": 0.0}, router_model()).train()
    make_trainer(tmp_path, adapter, {}, router_model()).train()


def test_router_loss_in_the_steps_of_icp(tmp_path: Path) -> None:
    adapter, steps = LoraConfig(r=2, target_modules=["q_proj"]), {"icp_weight": 0.5, "icp_steps": 2}
    with pytest.raises(ValueError, match=r"icp_steps=2 does not work with a router loss.*router_aux_loss_coef=0.0"):
        make_trainer(tmp_path, adapter, steps, router_model())
    make_trainer(tmp_path, adapter, {**steps, "router_aux_loss_coef": 0.0}, router_model())
    make_trainer(tmp_path, adapter, {**steps, "icp_steps": 1}, router_model())


@pytest.mark.parametrize("by", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharding_in_half_precision_is_warned_of(by: str) -> None:
    """A stand-in, since either needs a launcher."""
    trainer: Any = SimpleNamespace(
        accelerator=SimpleNamespace(mixed_precision="bf16"),
        is_fsdp_enabled=False,
        is_deepspeed_enabled=False,
        model=get_peft_model(base_model(), DIPNetConfig(r=2, target_modules=["q_proj"])),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_rounding(trainer)
    setattr(trainer, by, True)
    with pytest.warns(UserWarning, match=r"mixed_precision='bf16' with FSDP or DeepSpeed .*; use DDP"):
        warn_of_rounding(trainer)
    learning = trainer.model
    frozen = get_peft_model(base_model(), DIPNetConfig(r=2, target_modules=["q_proj"], learn_noise=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.model = frozen
        warn_of_rounding(trainer)
        trainer.model = learning
        trainer.accelerator.mixed_precision = "no"
        warn_of_rounding(trainer)


def test_fsdp_activation_checkpointing(tmp_path: Path) -> None:
    """accelerate's own activation checkpointing is refused."""
    model = make_trainer(tmp_path, DIPNetConfig(**ADAPTER)).model
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, activation_checkpointing=True)
    plugin.cpu_ram_efficient_loading = True
    with pytest.raises(ValueError, match=r"fsdp_activation_checkpointing=True .*activation_checkpointing=True in the"):
        check_fsdp(model, plugin)
    plugin.activation_checkpointing = False
    with pytest.raises(ValueError, match=r"fsdp_cpu_ram_efficient_loading=True .*set it to False"):
        check_fsdp(model, plugin)
    check_fsdp(base_model(), plugin)  # no noise, no buffers
    plugin.fsdp_version = 1
    with pytest.raises(ValueError, match=r"fsdp_version=1 flattens .*set fsdp_version to 2"):
        check_fsdp(model, plugin)


@pytest.mark.parametrize("kind", ["Params4bit", "Int8Params"])
def test_fsdp_over_a_quantised_base(kind: str, tmp_path: Path) -> None:
    """TRL trains LoRA in bf16 there. The class stands for bitsandbytes' of its name."""
    model: Any = make_trainer(tmp_path, DIPNetConfig(**ADAPTER)).model
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    check_fsdp(model, plugin)
    quantised = type(kind, (nn.Parameter,), {})
    model.base_model.model.lm_head.weight = quantised(torch.zeros(48, 16), requires_grad=False)
    message = r"FSDP with a quantised base: .*lora_dip_.* is trained in fp32 .*; use DDP, or leave load_in_4bit"
    with pytest.raises(ValueError, match=message):
        check_fsdp(model, plugin)
    for name, parameter in model.named_parameters():  # frozen noise is not reduced
        parameter.requires_grad_("lora_A" in name)
    check_fsdp(model, plugin)


def test_blocks_that_read_one_row_s_boundaries(tmp_path: Path) -> None:
    options = {"num_trajectories": 2, "padding_free": True}
    trainer = make_trainer(tmp_path, DIPNetConfig(**ADAPTER), options)
    trainer.model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"num_trajectories=2 with packing or padding_free=True: linear_attention bl"):
        check_noise_setup(trainer, trainer.args)
    trainer.padding_free = False
    check_noise_setup(trainer, trainer.args)


def test_images_that_enter_between_blocks() -> None:
    vision = SimpleNamespace(to_dict=lambda: {"vision_config": {"deepstack_visual_indexes": [1, 2]}})
    model: Any = SimpleNamespace(config=vision)
    with pytest.raises(ValueError, match=r"num_trajectories=2: .* adds features of pixel_values .* on text alone"):
        check_batch(model, {"pixel_values": torch.zeros(1)}, 2)
    check_batch(SimpleNamespace(config=None), {"input_ids": torch.zeros(1, 2)}, 2)  # which nothing is asked of


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("_attn_implementation", "flex_attention", "trajectories=2 with attn_implementation='flex_attention'"),
        ("model_type", "gpt_bigcode", "trajectories=2: GPT-BigCode .*set num_trajectories"),
    ],
)
def test_models_whose_rows_cannot_be_repeated(field: str, value: str, message: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, DIPNetConfig(**ADAPTER), {"num_trajectories": 2})
    setattr(trainer.model.config, field, value)
    with pytest.raises(ValueError, match=message):
        check_noise_setup(trainer, trainer.args)


def positions_alone(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A padding-free batch without the boundaries that TRL's own collator gives."""
    return {
        "input_ids": torch.tensor([[token for example in examples for token in example["input_ids"]]]),
        "labels": torch.tensor([[token for example in examples for token in example["labels"]]]),
        "position_ids": torch.tensor([[i for example in examples for i in range(len(example["input_ids"]))]]),
    }


def test_flash_attention_without_boundaries(tmp_path: Path) -> None:
    """Flash attention reads them from the positions of batches of one row; folded, it would look across documents."""
    adapter, options = DIPNetConfig(**ADAPTER), {"num_trajectories": 2, "remove_unused_columns": False}
    trainer = make_trainer(tmp_path, adapter, options, data_collator=positions_alone)
    trainer.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"num_trajectories=2: .*needs cu_seq_lens_q .*set num_trajectories to 1"):
        trainer.train()
    batch = positions_alone(tokenised(2).to_list())
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2'"):
        check_batch(trainer.model, batch, 2)
    check_batch(trainer.model, {**batch, "cu_seq_lens_q": torch.tensor([0])}, 2)
    check_batch(trainer.model, positions_alone(tokenised(1).to_list()), 2)  # one document has no boundary inside
    trainer.model.config._attn_implementation = "sdpa"
    check_batch(trainer.model, batch, 2)


def test_trl_s_collator_gives_the_boundaries(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, DIPNetConfig(**ADAPTER), {"num_trajectories": 2, "padding_free": True})
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.config._attn_implementation = "flash_attention_2"
    check_batch(trainer.model, batch, 2)
    assert len(batch["cu_seq_lens_q"]) == 9 and batch.get("attention_mask") is None
