"""Bad input is refused with the field, its value and a remedy, before anything is changed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dip_hf import DIPNetConfig, DIPSFTConfig
from dip_hf.ibvi.layer import Covariance
from tests.dipnet.models import KEY, batch, build
from tests.ibvi.models import POSTERIOR, posteriors, variational
from tests.trainer.tiny import ADAPTER, make_trainer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variational_rank": -1}, "variational_rank=-1 must be a whole number, 0"),
        ({"variational_scale": -0.1}, "variational_scale=-0.1 must not be negative; 0 keeps"),
        ({"variational_scale": math.nan}, "variational_scale=nan must not be negative"),
        ({"variational_scale": math.inf}, "variational_scale=inf must not"),
        ({"variational_blocks": True}, "variational_blocks=True must be 'all', a number"),
        ({"variational_blocks": ["a"]}, r"variational_blocks=\['a'\] must be 'all'"),
        ({"variational_rank": 0}, r"noise_blocks=\[\] and variational_rank=0 leave nothing but LoRA; use peft.Lora"),
        ({"variational_rank": 0, "noise_blocks": 0}, "noise_blocks=0 and variational_rank=0 leave"),
        ({"use_dora": True}, "variational_rank=3 with use_dora: a LoRA layer cannot be both; leave use_dora unset"),
        ({"init_lora_weights": "mica"}, "variational_rank=3 with init_lora_weights: "),
        ({"alora_invocation_tokens": [1, 2]}, "variational_rank=3 with alora_invocation_tokens: "),
        ({"target_parameters": ["w"]}, r"target_parameters=\['w'\] with variational_rank=3: only linear layers"),
        ({"target_modules": []}, r"target_modules=\[\] with variational_rank=3: without LoRA"),
    ],
    ids=str,
)
def test_values(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DIPNetConfig(**{"target_modules": ["q_proj"], **POSTERIOR, **arguments})


@pytest.mark.parametrize("rank", [1.5, True, "2"])
def test_a_rank_that_is_no_whole_number(rank: Any) -> None:
    with pytest.raises(ValueError, match=r"variational_rank="):
        DIPNetConfig(target_modules=["q_proj"], variational_rank=rank)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variational_blocks": 9}, "variational_blocks=9: the model has 4 blocks"),
        ({"variational_blocks": []}, r"variational_blocks=\[\]: .*at least one index"),
        ({"variational_blocks": "none"}, "variational_blocks='none' matches no block"),
        ({"target_modules": ["lm_head"]}, r"variational_blocks='all' holds no module of target_modules=\{'lm_head'\}"),
        (
            {"target_modules": r".*layers\.0\..*q_proj", "variational_blocks": [1]},
            r"variational_blocks=\[1\] holds no module of target_modules='.*layers",
        ),
        ({"target_modules": ["embed_tokens", "lm_head"]}, "variational_blocks='all' holds no module"),
        (
            {"target_modules": "all-linear", "exclude_modules": r".*layers\.3\..*", "variational_blocks": 1},
            "variational_blocks=1 holds no module of target_modules='all-linear'",
        ),
        (
            {"target_modules": None, "layers_to_transform": [0], "variational_blocks": 1},
            "variational_blocks=1 holds no module of target_modules=None",
        ),
    ],
    ids=str,
)
def test_targets_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    model = build()
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        variational(model, **arguments)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "w1", "w2", "w3"]], ids=str)
def test_experts_that_are_parameters(targets: Any) -> None:
    model = build("mixtral")
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=r"target_modules: in MixtralForCausalLM it names experts, .*'gate_up_proj'"):
        variational(model, target_modules=targets)
    assert set(model.state_dict()) == names


def test_weights_that_are_offloaded() -> None:
    model = variational(build())
    for module, _ in posteriors(model).values():
        module.lora_A.to("meta")
    with pytest.raises(ValueError, match=r"device_map: .*block 0 are offloaded"), model.base_model.sampling(KEY):
        model(**batch())


def test_layers_that_are_not_linear() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Embedding(5, 4), nn.Conv1d(4, 4, 1))
            self.second = nn.Linear(4, 4)

    options = {"task_type": None, "block_names": ["first", "second"]}
    for target, kind in (("first.0", "Embedding"), ("first.1", "Conv1d")):
        model = Own()
        names = set(model.state_dict())
        with pytest.raises(ValueError, match=rf"target_modules: {target} \({kind}\) cannot have a posterior"):
            variational(model, **options, target_modules=[target, "second"])
        assert set(model.state_dict()) == names
        adapted = variational(model, **options, target_modules=[target, "second"], variational_blocks=[1])
        assert sum(isinstance(module, Covariance) for module in adapted.modules()) == 1


def test_experts_cannot_be_told_apart_by_trajectory() -> None:
    """A linear layer that sees some of its block's tokens, as one expert of a list does."""
    model = variational(build())
    mlp = model.base_model.model.model.layers[2].mlp
    mlp.register_forward_pre_hook(lambda module, args: (args[0].flatten(0, 1)[::2],))
    mlp.register_forward_hook(lambda module, args, output: output.new_zeros(6, 10, 32))
    with (
        pytest.raises(ValueError, match=r"trajectories=2: .*block 2 sees 30 tokens of 60"),
        model.base_model.sampling(KEY, 2),
    ):
        model(**batch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": 0.1}, "weight_decay=0.1 with variational_rank > 0: .*set weight_decay to 0"),
        ({"optim": "adafactor"}, "optim='adafactor' does not work with variational_optimizer='hybrid'"),
        ({"optim": "sgd"}, "optim='sgd' does not work with variational_optimizer='hybrid'"),
        (
            {"optim": "adafactor", "variational_optimizer": "faithful"},
            "optim='adafactor' does not work with variational_optimizer='faithful'",
        ),
        ({"adam_beta1": 0.5, "variational_optimizer": "faithful"}, "adam_beta1=0.5: AdamW's, but .*'faithful'"),
        ({"adam_epsilon": 1e-6, "variational_optimizer": "faithful"}, "adam_epsilon=1e-06: AdamW's"),
        ({"dres_weight": 0.1, "num_trajectories": 2}, "dres_weight=0.1 with num_trajectories=2 and variational_rank"),
    ],
    ids=str,
)
def test_training_settings_that_contradict_a_posterior(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, DIPNetConfig(**ADAPTER, **POSTERIOR), options)
    # none of which concerns an adapter without one
    make_trainer(tmp_path, DIPNetConfig(**ADAPTER), options)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("variational_optimizer", "adam", "variational_optimizer='adam' must be one of hybrid, faithful"),
        ("variational_learning_rate", 0.0, "variational_learning_rate=0.0 must be positive; leave it unset"),
        ("variational_learning_rate", -1.0, "variational_learning_rate=-1.0 must be positive"),
        ("variational_learning_rate", math.nan, "variational_learning_rate=nan must be positive"),
    ],
)
def test_training_values(field: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        DIPSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **{field: value})
