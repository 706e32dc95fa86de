"""The trainer with a posterior: LoRA at c = 0 to the last bit, groups, resumption, and export."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from trl import SFTTrainer

from dip_hf import DIPNetConfig, export_lora
from dip_hf.trainer import DIPSFTTrainer, optimizer_groups
from dip_hf.trainer.hybrid import HybridOptimizer
from tests.dipnet.models import batch
from tests.dipnet.test_export import STOCK
from tests.ibvi.models import EVERYWHERE, POSTERIOR
from tests.trainer.tiny import ADAPTER, base_model, losses, make_trainer


LORA = {**ADAPTER, "init_lora_weights": True}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Sums in one order, so that runs compare bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "options",
    [{"bf16": True, "max_grad_norm": 1.0}, {"gradient_accumulation_steps": 2}, {"packing": True, "max_length": 32}],
    ids=["plain", "accumulated", "packed"],
)
def test_scale_0_is_lora_to_the_last_bit(options: dict[str, Any], tmp_path: Path) -> None:
    """20 steps give SFTTrainer's losses and weights with plain LoRA, dropout included, under its own AdamW."""
    options = {"max_steps": 20, "per_device_train_batch_size": 2, **options}
    runs = []
    for cls, adapter in (
        (SFTTrainer, LoraConfig(**LORA, lora_dropout=0.1)),
        (DIPSFTTrainer, DIPNetConfig(**{**LORA, **POSTERIOR, "variational_scale": 0.0}, lora_dropout=0.1)),
    ):
        trainer = make_trainer(tmp_path, adapter, options, base_model(attention_dropout=0.1), cls=cls)
        trainer.train()
        runs.append((losses(trainer), dict(trainer.model.named_parameters())))
    (expected, weights), (found, found_weights) = runs
    assert len(expected) == 20 and found == expected
    assert all(torch.equal(found_weights[name], weight) for name, weight in weights.items())
    more = [name for name in found_weights if name not in weights]
    assert len(more) == 21 and not any(found_weights[name].any() for name in more)


def kinds(groups: list[dict[str, Any]], model: torch.nn.Module) -> list[tuple[str, float, float, float | None]]:
    """Each group that is not empty: what it holds, its learning rate and decay, and its momentum, None for AdamW."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = []
    for group in groups:
        held = {names[id(p)].split(".")[-3] for p in group["params"]}
        if held:
            rate = group.get("initial_lr", group["lr"])
            found.append(("+".join(sorted(held)), rate, group["weight_decay"], group.get("momentum")))
    return sorted(found)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [("lora_A+lora_B", 0.01, 0.0, None), ("lora_dip_covariance", 0.01 / 3, 0.0, 0.9)]),
        (
            {"variational_learning_rate": 0.5},
            [("lora_A+lora_B", 0.01, 0.0, None), ("lora_dip_covariance", 0.5, 0.0, 0.9)],
        ),
        (
            {"variational_optimizer": "faithful", "optim": "sgd"},
            [("lora_A+lora_B", 0.01, 0.0, 0.9), ("lora_dip_covariance", 0.01 / 3, 0.0, 0.9)],
        ),
        (
            {"variational_optimizer": "faithful"},
            [("lora_A+lora_B", 0.01, 0.0, 0.9), ("lora_dip_covariance", 0.01 / 3, 0.0, 0.9)],
        ),
    ],
    ids=["hybrid", "own rate", "faithful, sgd", "faithful"],
)
@pytest.mark.parametrize("noisy", [False, True], ids=["posterior", "with noise"])
def test_groups(options: dict[str, Any], expected: list[Any], noisy: bool, tmp_path: Path) -> None:
    blocks = "all" if noisy else []
    trainer = make_trainer(
        tmp_path,
        DIPNetConfig(**LORA, **EVERYWHERE, variational_rank=3, noise_blocks=blocks),
        {**options, "max_steps": 2},
    )
    trainer.train()
    if noisy:  # keeps Trainer's optimiser
        expected = [*expected, ("lora_dip_log_variance", 1e-3, 0.0, 0 if "optim" in options else None)]
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, HybridOptimizer)
    assert kinds(optimizer.param_groups, trainer.model) == expected
    dry = kinds(optimizer_groups(trainer.model, trainer.args), trainer.model)
    assert dry == [(*group[:3], group[3] or None) for group in expected]
    for group in optimizer.param_groups:
        for parameter in group["params"] if "momentum" not in group or group["momentum"] > 0 else ():
            keys = set(optimizer.state[parameter])
            assert keys == ({"momentum_buffer"} if "momentum" in group else {"step", "exp_avg", "exp_avg_sq"})


def test_the_noise_is_trained_by_adamw_under_faithful_too(tmp_path: Path) -> None:
    """Eq. 4's penalty has gradients of a scale of its own, for which SGD's rate would have to be found anew."""
    options = {"variational_optimizer": "faithful", "max_steps": 1, "lr_scheduler_type": "constant"}
    trainer = make_trainer(tmp_path, DIPNetConfig(**LORA, **EVERYWHERE, variational_rank=3), options)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "log_variance" in n}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if name in before:  # a first step of Adam is the learning rate
            step = (parameter - before[name]).abs()
            torch.testing.assert_close(step, torch.full_like(step, 1e-3), rtol=1e-2, atol=0)


@pytest.mark.parametrize("where", ["optimizers", "optimizer_cls_and_kwargs"])
def test_another_optimiser_is_refused(where: str, tmp_path: Path) -> None:
    model = get_peft_model(base_model(), DIPNetConfig(**LORA, **POSTERIOR))
    adamw = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    given = {"optimizers": (adamw, None), "optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 0.1})}[where]
    with pytest.raises(ValueError, match=f"^{where} with variational_rank > 0: .*='hybrid' brings .*{where} unset"):
        make_trainer(tmp_path, None, {}, model, **{where: given})


def test_another_optimiser_trains_the_noise_at_its_own_rate(tmp_path: Path) -> None:
    model = get_peft_model(base_model(), DIPNetConfig(**LORA))
    sgd = torch.optim.SGD((parameter for parameter in model.parameters() if parameter.requires_grad), lr=0.1)
    with pytest.warns(UserWarning, match=r"noise_learning_rate=0\.001 has no effect: .*`optimizers`"):
        trainer = make_trainer(tmp_path, None, {}, model, optimizers=(sgd, None))
    trainer.train()
    assert trainer.optimizer.optimizer is sgd and len(sgd.param_groups) == 1


def test_each_step_trains_on_a_sample_of_its_own(tmp_path: Path) -> None:
    """With everything else the same, another seed gives another sample, and so another loss."""
    runs = []
    for seed in (1, 1, 2):
        trainer = make_trainer(
            tmp_path, DIPNetConfig(**ADAPTER, **POSTERIOR), {"max_steps": 2, "seed": 42, "learning_rate": 1e-9}
        )
        trainer.args.seed = seed  # of the samples alone: data order and dropout are drawn by now
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1] and runs[0] != runs[2]
    assert runs[0][0] != runs[0][1]


def test_the_export_is_the_mean_and_loads_without_dip_hf(tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path / "run", DIPNetConfig(**ADAPTER, **POSTERIOR), {"max_steps": 3})
    trainer.train()
    inputs = {name: value % 40 for name, value in batch().items()}
    model = trainer.model.eval()
    model.get_base_model().__dict__.pop("forward", None)  # TRL's fused head
    with torch.no_grad():
        expected: Tensor = model(**inputs).logits
    export_lora(model, tmp_path / "lora")
    torch.save(inputs, tmp_path / "inputs.pt")
    subprocess.run(
        [sys.executable, "-c", STOCK, *(str(tmp_path / name) for name in ("base", "lora", "inputs.pt", "logits.pt"))],
        check=True,
        cwd=tmp_path,  # not the repository, from which dip_hf could be imported
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert (torch.load(tmp_path / "logits.pt") - expected).abs().max() <= 1e-5
