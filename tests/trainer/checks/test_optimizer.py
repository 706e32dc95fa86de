"""Optimisers under which log-variances and posteriors have no groups of their own: refused or said to be."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from dip_hf import DIPNetConfig, DIPSFTConfig
from dip_hf.trainer.checks.optimizer import check_own_optimizer
from dip_hf.trainer.optimizer import compose_optimizer
from tests.trainer.tiny import ADAPTER, base_model, make_trainer


FROZEN = DIPNetConfig(**ADAPTER, learn_noise=False)
NOISE = DIPNetConfig(**ADAPTER)
POSTERIOR = DIPNetConfig(**ADAPTER, noise_blocks=[], variational_rank=2, variational_blocks="all")


def deepspeed(**config: Any) -> Any:
    """Training arguments with DeepSpeed; a stand-in, since it is not installed."""
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config=config))
    return SimpleNamespace(
        deepspeed_plugin=plugin,
        noise_learning_rate=1e-3,
        variational_optimizer="hybrid",
        optim=SimpleNamespace(value="adamw_torch"),
    )


def test_deepspeed_s_own_optimiser() -> None:
    own = deepspeed(optimizer={"type": "AdamW", "params": {"weight_decay": 0.01}})
    posterior, noise, frozen = (get_peft_model(base_model(), config) for config in (POSTERIOR, NOISE, FROZEN))
    message = r"^the optimizer section of DeepSpeed's configuration with variational_rank > 0: .*unset"
    with pytest.raises(ValueError, match=message):
        check_own_optimizer(posterior, own, None, None)
    with pytest.warns(UserWarning, match=r"noise_learning_rate=0\.001 has no effect: the optimizer section .*remove"):
        check_own_optimizer(noise, own, None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_own_optimizer(frozen, own, None, None)
        for model in (posterior, noise):
            check_own_optimizer(model, deepspeed(zero_optimization={"stage": 2}), None, None)


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_optimisers_that_step_each_parameter_by_itself(optim: str, tmp_path: Path) -> None:
    message = rf"optim='{optim}' steps each parameter .*noise_learning_rate=0\.001 has no effect; .*learn_noise=False"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, NOISE, {"optim": optim})
    make_trainer(tmp_path, FROZEN, {"optim": optim})


class Layerwise(torch.optim.SGD):
    """As transformers' dummy for such optimisers: it has a parameter of its own, and the model's elsewhere."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__([nn.Parameter(torch.zeros(1))], **options)


def test_an_optimiser_without_the_noise_in_its_groups(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, NOISE, optimizer_cls_and_kwargs=(Layerwise, {"lr": 0.1}))
    message = r"noise_learning_rate=0\.001 has no effect: Layerwise has .* in none of its groups; take another"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    args = DIPSFTConfig(output_dir=str(tmp_path), use_cpu=True)
    compose_optimizer(Layerwise(None, lr=0.1), get_peft_model(base_model(), FROZEN), args)
