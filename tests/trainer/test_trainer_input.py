"""Bad input: an error before training starts, which names the field, its value and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from trl import TrlParser

from dip_hf import DIPNetConfig, DIPSFTConfig
from tests.trainer.tiny import ADAPTER, base_model, make_trainer, tokenised


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_trajectories": 0}, "num_trajectories=0 must be a whole number, at least 1"),
        ({"num_trajectories": -2}, "num_trajectories=-2 must be a whole number, at least 1"),
        ({"stability_weight": 0.1}, "stability_weight=0.1 .* num_trajectories=1; set num_trajectories to 2"),
        ({"stability_weight": -0.1, "num_trajectories": 2}, "stability_weight=-0.1 must not be negative; 0 turns"),
        ({"variance_weight": 0.0}, "variance_weight=0.0 must be positive.*learn_noise=False"),
        ({"variance_weight": float("nan")}, "variance_weight=nan must be positive.*learn_noise=False"),
        ({"log_variance_weight": -1.0}, "log_variance_weight=-1.0 must be positive.*learn_noise=False"),
        ({"penalty_reduction": "max"}, "penalty_reduction='max' must be one of mean, sum"),
        ({"penalty_unit": "metre"}, "penalty_unit='metre' must be one of relative, absolute"),
        ({"noise_learning_rate": 0.0}, "noise_learning_rate=0.0 must be positive.*learn_noise=False"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        DIPSFTConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_unknown_argument(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="num_trajectory"):
        DIPSFTConfig(output_dir=str(tmp_path), num_trajectory=2)


def test_nothing_to_train(tmp_path: Path) -> None:
    adapter = DIPNetConfig(**{**ADAPTER, "target_modules": []}, learn_noise=False)
    with pytest.raises(ValueError, match=r"nothing to train \(learn_noise=False without target_modules.*learn"):
        make_trainer(tmp_path, adapter)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_trajectories": True}, "num_trajectories=True must be a whole number"),
        ({"num_trajectories": 2.0}, "num_trajectories=2.0 must be a whole number"),
        ({"variance_weight": "0.1"}, "variance_weight='0.1' must be a number"),
        ({"stability_weight": None}, "stability_weight=None must be a number"),
        ({"icp_epsilon": None}, "icp_epsilon=None must be a number"),
        ({"variational_learning_rate": "x"}, "variational_learning_rate='x' must be a number"),
    ],
)
def test_what_is_no_number(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        DIPSFTConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_numbers_that_a_parser_has_read(tmp_path: Path) -> None:
    (args,) = TrlParser((DIPSFTConfig,)).parse_args_and_config(
        ["--output_dir", str(tmp_path), "--use_cpu", "true", "--dres_weight", "1", "--num_trajectories", "2"]
    )
    assert (args.dres_weight, args.num_trajectories, args.variational_learning_rate) == (1.0, 2, None)


def test_an_adapter_that_the_trainer_cannot_see(tmp_path: Path) -> None:
    model = base_model()
    model.add_adapter(DIPNetConfig(**ADAPTER))
    with pytest.raises(ValueError, match=r"model=LlamaForCausalLM holds a DIPNet adapter outside.*pass peft_config"):
        make_trainer(tmp_path, None, model=model)


def test_dipnets_objective_without_its_adapter(tmp_path: Path) -> None:
    options = {"num_trajectories": 2, "stability_weight": 0.1}
    with pytest.warns(
        UserWarning, match=r"num_trajectories=2 and stability_weight=0.1 without effect: .*DIPNetConfig"
    ):
        make_trainer(tmp_path, LoraConfig(**ADAPTER), options)


@pytest.mark.parametrize(
    ("adapter", "options", "message"),
    [
        ({}, {"variational_learning_rate": 0.5}, "variational_learning_rate=0.5 without effect: .* no posterior; set"),
        ({"learn_noise": False}, {"penalty_unit": "absolute"}, "penalty_unit=absolute without effect: .* that learns"),
        ({"variational_scale": 1.0}, {}, "variational_scale=1.0 without effect: variational_rank=0 is off"),
        ({}, {"dres_share": 1.0, "dres_group_size": 4}, "dres_group_size=4 and dres_share=1.0 .* dres_weight=0.0 is"),
        ({}, {"icp_steps": 3}, "icp_steps=3 without effect: icp_weight=0.0 is off"),
    ],
)
def test_fields_of_what_the_adapter_lacks(
    adapter: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=message):
        make_trainer(tmp_path, DIPNetConfig(**ADAPTER, **adapter), options)


def test_padding_without_a_mask_in_the_noises_scale(tmp_path: Path) -> None:
    options = {"padding_free": True, "pad_to_multiple_of": 8}
    with pytest.raises(
        ValueError, match=r"pad_to_multiple_of=8 with packing=True or padding_free=True .*leave it unset"
    ):
        make_trainer(tmp_path, DIPNetConfig(**ADAPTER), options)


def test_adapter_on_head(tmp_path: Path) -> None:
    """TRL's own error: its fused head would never train the adapter."""
    with pytest.raises(ValueError, match=r"`lm_head` is not supported.*Remove `'lm_head'` from your `target_modules`"):
        make_trainer(tmp_path, DIPNetConfig(**{**ADAPTER, "target_modules": ["q_proj", "lm_head"]}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_blocks": 4}, "noise_blocks=4: the model has 3 blocks; give a number from 1 to 3"),
        ({"noise_blocks": [3]}, r"noise_blocks=\[3\]: the model has 3 blocks"),
        ({"noise_blocks": "decoder.*"}, "noise_blocks='decoder.*' matches no block; the blocks are"),
        (
            {"block_names": ["model.layers.0", "model.layers.0"]},
            "block_names has 'model.layers.0' twice; name every",
        ),
        ({"block_names": ["model.blocks.0"]}, r"block_names: \['model.blocks.0'\] are no modules.*correct the names"),
    ],
)
def test_blocks(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, DIPNetConfig(**ADAPTER, **options))


def test_nothing_wrong(tmp_path: Path) -> None:
    """The same set-up without any of the faults."""
    make_trainer(tmp_path, DIPNetConfig(**ADAPTER), {"num_trajectories": 2, "stability_weight": 0.1}, data=tokenised())
