"""Bad input to DReS and ICP: an error at construction, which names the field, its value and the remedy."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import ParallelismConfig
from peft import LoraConfig

from dip_hf import DIPSFTConfig
from dip_hf.trainer.checks.second_pass import check_second_pass
from dip_hf.trainer.checks.setup import check_parallelism
from tests.trainer.methods import DRES, ICP, SEQUENCE
from tests.trainer.tiny import ADAPTER, base_model, make_trainer


def checkpoints(**options: Any) -> dict[str, Any]:
    return {"activation_checkpointing": True, "activation_checkpointing_kwargs": options}


REENTRANT = checkpoints(use_reentrant=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dres_weight": -0.1}, "dres_weight=-0.1 must not be negative; 0 turns DReS off"),
        ({"dres_weight": float("nan")}, "dres_weight=nan must not be negative"),
        ({"dres_placement": "row"}, "dres_placement='row' must be one of token, sequence"),
        ({"dres_group_size": 1}, "dres_group_size=1 must be at least 2"),
        ({"dres_oversampling": 0.75}, "dres_oversampling=0.75 must be at least 1"),
        ({"dres_group_size": 2, "dres_oversampling": 2.5}, "dres_oversampling=2.5: .*always 0; change the over"),
        ({"dres_share": 0.0}, "dres_share=0.0 must be above 0 and at most 1.*1 codes all"),
        ({"dres_blocks": 0.25}, "dres_blocks=0.25 must be 'all', a number, '25%', a list of indices or a pattern"),
        ({"dres_blocks": None}, "dres_blocks=None must be 'all'"),
        ({"dres_blocks": "200%"}, "dres_blocks='200%' must be from '1%' to '100%'"),
        ({"dres_share": 1.5}, "dres_share=1.5 must be above 0 and at most 1"),
        ({"dres_gradient": "none"}, "dres_gradient='none' must be one of scale_free, all, coded"),
        ({"icp_weight": -1.0}, "icp_weight=-1.0 must not be negative; 0 turns ICP off"),
        ({"icp_steps": 0}, "icp_steps=0 must be .*at least 1; to turn ICP off set icp_weight to 0"),
        ({"icp_epsilon": 0.0}, "icp_epsilon=0.0 must be positive, for instance 0.03; to turn ICP off"),
        ({"icp_epsilon": -0.1}, "icp_epsilon=-0.1 must be positive"),
        ({"icp_update": "sgd"}, "icp_update='sgd' must be one of normalised, sign, adam"),
        ({"icp_direction": "up"}, "icp_direction='up' must be one of descent, ascent, random"),
        ({"icp_positions": "answer"}, "icp_positions='answer' must be one of all, prompt"),
        ({"icp_layers": 0}, "icp_layers=0 must be .*at least 1"),
        ({"icp_start_block": -1}, "icp_start_block=-1 must be .*not negative; 0 is the input embeddings"),
        ({"icp_start_block": 1.5}, "icp_start_block=1.5 must be a whole number"),
        ({"icp_interval": 0}, "icp_interval=0 must be .*at least 1"),
        ({"icp_weighting": "mean"}, "icp_weighting='mean' must be one of additive, paper"),
        ({"icp_warmup": 1.5}, r"icp_warmup=1.5 must lie in \[0, 1\]: it is a share of the run"),
        ({"icp_warmup": -0.1}, r"icp_warmup=-0.1 must lie in \[0, 1\]"),
        ({**DRES, **REENTRANT}, "use_reentrant': True} makes checkpoints reentrant.*dres_weight or.*to False"),
        ({**ICP, **REENTRANT}, "use_reentrant': True} makes checkpoints reentrant.*dres_weight or.*to False"),
        ({**ICP, **checkpoints(preserve_rng_state=True)}, "preserve_rng_state': True} makes checkpoints reentrant"),
        ({**ICP, **checkpoints(selective=True)}, "{'selective': True} does not work with icp_weight.*; remove"),
        ({**ICP, "activation_offloading": True}, "activation_offloading=True does not work with icp_weight"),
        ({**ICP, "use_liger_kernel": True}, "use_liger_kernel=True does not work with icp_weight.*; set it to False"),
        ({**DRES, "torch_compile": True}, "torch_compile=True does not work with dres_weight or icp_weight.*; set"),
        ({**ICP, "torch_compile": True}, "torch_compile=True does not work with dres_weight or icp_weight.*; set"),
        ({**ICP, "icp_steps": 2, "loss_type": "dft"}, "icp_steps=2 descends on loss_type='nll', but .*'dft'; set"),
    ],
    ids=lambda x: "-".join(f"{name}={value}" for name, value in x.items()) if isinstance(x, dict) else "",
)
def test_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        DIPSFTConfig(output_dir=str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize("options", [DRES, SEQUENCE, ICP])
def test_checkpoints_that_the_model_came_with(options: dict[str, Any], tmp_path: Path) -> None:
    """Trainer leaves them as they are where the arguments ask for none, and sets its own where they do."""
    model = base_model()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match=r"gradient_checkpointing_enable made reentrant checkpoints.*': False"):
        make_trainer(tmp_path, None, options, model)
    make_trainer(tmp_path, None, {**options, "activation_checkpointing": True}, model).train()
    model.gradient_checkpointing_disable()
    make_trainer(tmp_path, None, options, model)


@pytest.mark.parametrize("given", [{"every_n_layers": 2}, {"use_reentrant": False, "preserve_rng_state": True}])
def test_checkpoints_that_are_not_reentrant(given: dict[str, Any], tmp_path: Path) -> None:
    DIPSFTConfig(output_dir=str(tmp_path), use_cpu=True, **DRES, **ICP, **checkpoints(**given))


@pytest.mark.parametrize(("options", "name"), [(DRES, "dres"), (ICP, "icp")])
def test_blocks_that_are_not_found(options: dict[str, Any], name: str, tmp_path: Path) -> None:
    """The remedy is that of the method that asks, not DIPNet's."""
    model = base_model()
    model.config.num_hidden_layers = 5  # a list of as many blocks is not there
    with pytest.raises(ValueError, match=rf"block_names=None: found 0 lists of 5 .*\]\)`, or set {name}_weight to 0"):
        make_trainer(tmp_path, LoraConfig(**ADAPTER), options, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**SEQUENCE, "dres_group_size": 9}, "dres_group_size=9 is more than the 8 rows.* lower it to at most 8, or"),
        (
            {**SEQUENCE, "packing": True, "max_length": 32},
            "dres_placement='sequence' .*packing=True.*use dres_",
        ),
        (
            {**SEQUENCE, "padding_free": True},
            "dres_placement='sequence' .*padding_free=True.*use dres_",
        ),
        (
            {**DRES, "padding_free": True, "pad_to_multiple_of": 64},
            "pad_to_multiple_of=64 .*without a mask.*unset, or set dres",
        ),
        ({**SEQUENCE, "dres_blocks": "0,2"}, "dres_blocks=.*without gaps; choose neighbours"),
        ({**DRES, "dres_blocks": "4"}, "dres_blocks=4: the model has 3 blocks; give a number from 1 to 3"),
        ({**DRES, "dres_blocks": "1,3"}, r"dres_blocks=\[1, 3\]: the model has 3 blocks"),
        ({**DRES, "dres_blocks": "decoder.*"}, "dres_blocks='decoder.*' matches no block"),
        ({**ICP, "icp_start_block": 3}, "icp_start_block=3: the model has 3 blocks; give a number from 0 to 2"),
    ],
)
def test_set_up(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    """What only shows with the model, the batch or the data layout."""
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, LoraConfig(**ADAPTER), options)


@pytest.mark.parametrize(
    "by", ["is_fsdp_enabled", "is_deepspeed_enabled", "is_distributed_loading_by_transformers"], ids=lambda by: by[3:]
)
def test_sharded_parameters(by: str, tmp_path: Path) -> None:
    """FSDP, ZeRO-3 and transformers' own sharding are refused. The trainer is only told that they are on."""
    trainer = make_trainer(tmp_path, LoraConfig(**ADAPTER), DRES)
    check_second_pass(trainer)
    setattr(trainer, by, True)
    trainer.args.deepspeed_plugin = SimpleNamespace(zero_stage=3)  # DeepSpeed's own needs DeepSpeed
    with pytest.raises(ValueError, match=r"dres_weight and icp_weight do not work with FSDP or ZeRO-3.*or set both"):
        check_second_pass(trainer)


def test_kernels_that_write_over_what_they_saved(tmp_path: Path) -> None:
    model = base_model()
    model._use_kernels = True  # as loading with use_kernels=True leaves it, which needs a GPU
    with pytest.raises(ValueError, match=r"use_kernels=True does not work with icp_weight.*or set icp_weight to 0"):
        make_trainer(tmp_path, LoraConfig(**ADAPTER), ICP, model)
    model = base_model()
    model._use_kernels = True
    make_trainer(tmp_path, LoraConfig(**ADAPTER), DRES, model)


@pytest.mark.parametrize(
    ("part", "name"), [("attention", "attn_implementation=.*'"), ("block", "model.layers.1"), ("mlp", "layers.1.mlp")]
)
def test_compiled_parts(part: str, name: str, tmp_path: Path) -> None:
    """They would fall over the second backward pass, when the warm-up ends."""
    model = base_model(attn_implementation="flex_attention" if part == "attention" else "sdpa")
    block = model.model.layers[1]
    if part == "block":
        block.compile()  # in place
    elif part == "mlp":
        block.mlp = torch.compile(block.mlp)
    make_trainer(tmp_path, None, {}, model)
    with pytest.raises(
        ValueError, match=f"{name} is compiled code, .* with icp_weight.*; leave it uncompiled .*'sdpa'"
    ):
        make_trainer(tmp_path, None, ICP, model)


def test_smoothed_labels(tmp_path: Path) -> None:
    """TRL smooths those of one loss, and ignores the option with the other."""
    options = {**DRES, "label_smoothing_factor": 0.1}
    with pytest.raises(ValueError, match="label_smoothing_factor makes TRL run a second forward pass"):
        make_trainer(tmp_path, LoraConfig(**ADAPTER), options)
    make_trainer(tmp_path, LoraConfig(**ADAPTER), {**options, "loss_type": "dft"})


@pytest.mark.parametrize("size", ["tp_size", "cp_size", "sp_size"])
def test_ranks_of_one_batch(size: str) -> None:
    check_parallelism(None)
    check_parallelism(ParallelismConfig())
    with pytest.raises(
        ValueError, match=rf"parallelism_config has .*{size}=2.*ranks of one batch would draw .*use data"
    ):
        check_parallelism(ParallelismConfig(**{size: 2}))


@pytest.mark.parametrize("options", [DRES, ICP], ids=["dres", "icp"])
def test_parallelism_is_asked_for_with_any_regulariser(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("dip_hf.trainer.trainer.check_parallelism", asked.append)
    make_trainer(tmp_path, LoraConfig(**ADAPTER), {})
    assert asked == []
    trainer = make_trainer(tmp_path, LoraConfig(**ADAPTER), options)
    assert asked == [trainer.accelerator.parallelism_config]


@pytest.mark.parametrize(("dead", "gradient"), [(False, "scale_free"), (True, "scale_free"), (True, "all")])
def test_a_part_that_has_become_constant_is_said_to_be(dead: bool, gradient: str, tmp_path: Path) -> None:
    options = {**DRES, "max_steps": 1, "dres_gradient": gradient}
    trainer = make_trainer(tmp_path, LoraConfig(**ADAPTER), options)
    if dead:
        for mlp in trainer.dres.modules.values():
            mlp.down_proj.register_forward_hook(lambda module, args, output: 1 + 1e-6 * output)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(one.message) for one in caught if "dres/error" in str(one.message)]
    assert len(said) == dead
    assert not dead or ("the error of a linear map" in said[0] and "lower dres_weight" in said[0])
    assert not dead or ("dres_gradient='scale_free'" in said[0]) == (gradient == "all")
