"""Every method through the same list of checks. A new method is a new row of `METHODS` in methods.py."""

from __future__ import annotations

import os
import signal
import time
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from trl import SFTTrainer

from dip_hf import DIPNetConfig, export_lora
from dip_hf.dipnet.layer import LOG_VARIANCE, own_parameters
from dip_hf.ibvi.layer import COVARIANCE
from dip_hf.peft_compat import is_own
from tests.trainer.methods import METHODS, Method
from tests.trainer.tiny import ADAPTER, assert_close, base_model, gradients, losses, make_trainer, tokenised


every_method = pytest.mark.parametrize("name", METHODS)


def applicable(name: str, check: str) -> Method:
    """The row, where the check applies to it."""
    method = METHODS[name]
    if check in method.inapplicable:
        pytest.skip(method.inapplicable[check])
    return method


@cache
def whole_batch(name: str) -> dict[str, torch.Tensor]:
    """The gradient of all rows in one padded micro-batch, which several checks compare with."""
    with TemporaryDirectory() as folder:
        return gradients(Path(folder), METHODS[name].config(), METHODS[name].options)


@pytest.mark.parametrize("variant", ["plain", "accumulated", "packed"])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.off])
def test_off_is_off(name: str, variant: str, tmp_path: Path) -> None:
    """With every regulariser off, 20 steps give SFTTrainer's losses and weights to the last bit, dropout included."""
    variants: dict[str, dict[str, Any]] = {
        "plain": {"bf16": True, "max_grad_norm": 1.0},
        "accumulated": {"gradient_accumulation_steps": 2},
        "packed": {"packing": True, "max_length": 32},
    }
    options = {"max_steps": 20, "per_device_train_batch_size": 2, **variants[variant]}
    runs = []
    for cls in (SFTTrainer, type(make_trainer(tmp_path, None))):
        trainer = make_trainer(
            tmp_path, METHODS[name].config(lora_dropout=0.1), options, base_model(attention_dropout=0.1), cls=cls
        )
        trainer.train()
        runs.append((losses(trainer), dict(trainer.model.named_parameters())))
    (expected, weights), (found, found_weights) = runs
    assert len(expected) == 20 and found == expected
    assert found_weights.keys() == weights.keys()
    assert all(torch.equal(found_weights[key], weights[key]) for key in weights)


@every_method
def test_accumulation(name: str, tmp_path: Path) -> None:
    """1, 2, 4 and 8 accumulated micro-batches of unequal token counts give one gradient and one logged loss."""
    method = applicable(name, "accumulation")
    for steps in (2, 4, 8):
        options = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
        assert_close(gradients(tmp_path, method.config(), {**method.options, **options}), whole_batch(name))


def test_frozen_noise_has_no_penalty_in_the_loss() -> None:
    step = whole_batch("frozen noise, m=2")
    assert step["loss"].item() == pytest.approx(step["task"].item(), rel=1e-6)


@every_method
@pytest.mark.parametrize("layout", ["packed", "padding_free"])
def test_layout(name: str, layout: str, tmp_path: Path) -> None:
    """Packed and padding-free batches give the gradient and the loss of padded ones."""
    method = applicable(name, layout)
    options = {"packing": True, "max_length": 64} if layout == "packed" else {"padding_free": True}
    assert_close(gradients(tmp_path, method.config(), {**method.options, **options}), whole_batch(name))


@every_method
def test_activation_checkpointing(name: str, tmp_path: Path) -> None:
    """Recomputed activations give the same gradient, with dropout on, for two steps of the real noise."""
    method = applicable(name, "activation_checkpointing")
    runs = []
    for on in (False, True):
        options = {**method.options, "activation_checkpointing": on, "max_steps": 2}
        trainer = make_trainer(tmp_path, method.config(lora_dropout=0.2), options, base_model(attention_dropout=0.2))
        trainer.train()
        runs.append(trainer.kept.steps)
    for plain, recomputed in zip(*runs, strict=True):
        assert_close(recomputed, plain)


def trained_noise(trainer: Any) -> dict[str, torch.nn.Parameter]:
    return {key: p for key, p in trainer.model.named_parameters() if is_own(key) and p.requires_grad}


def assert_moved(trainer: Any, before: dict[str, torch.Tensor]) -> None:
    """All are in fp32 and were trained: a covariance's element may get a gradient below its resolution, few do."""
    for key, parameter in trained_noise(trainer).items():
        assert parameter.dtype == torch.float32
        assert (parameter != before[key]).double().mean() >= (0.99 if COVARIANCE in key else 1)


@every_method
def test_bfloat16(name: str, tmp_path: Path) -> None:
    """A bfloat16 base trains; the log-variances stay in fp32 and move."""
    method = applicable(name, "bfloat16")
    trainer = make_trainer(
        tmp_path, method.config(), {**method.options, "max_steps": 3, "bf16": True}, base_model().to(torch.bfloat16)
    )
    before = {key: p.detach().clone() for key, p in trained_noise(trainer).items()}
    trainer.train()
    assert torch.isfinite(torch.tensor(losses(trainer))).all()
    assert_moved(trainer, before)


@pytest.fixture(scope="session")
def saved_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    base_model().save_pretrained(folder)
    return folder


def quantised(folder: Path) -> PreTrainedModel:
    """The base in 4 bits."""
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantisation, device_map="cpu")


@every_method
def test_quantised(name: str, saved_base: Path, tmp_path: Path) -> None:
    """A 4-bit base trains; SFTTrainer casts the adapter to bfloat16, but what is not LoRA's begins in fp32, unrounded,
    and moves."""
    method = applicable(name, "quantised")
    trainer = make_trainer(tmp_path, method.config(), {**method.options, "max_steps": 3}, quantised(saved_base))
    before = {key: p.detach().clone() for key, p in trained_noise(trainer).items()}
    for key, value in before.items():
        assert torch.equal(value, trainer.model.get_submodule(key.rpartition(".")[0]).initial())
    trainer.train()
    assert torch.isfinite(torch.tensor(losses(trainer))).all()
    assert_moved(trainer, before)


def test_quantised_with_an_adapter_that_it_has(saved_base: Path, tmp_path: Path) -> None:
    """Its values, too, are in fp32 as they were."""
    method = METHODS["dipnet + ibvi, m=2"]
    model = get_peft_model(quantised(saved_base), method.config())
    for parameter in own_parameters(model).values():
        parameter.data += 0.1
    before = {key: parameter.detach().clone() for key, parameter in own_parameters(model).items()}
    found = own_parameters(make_trainer(tmp_path, None, method.options, model).model)
    assert len(before) == 24 and all(torch.equal(found[key], value) for key, value in before.items())


RESUMED = {"max_steps": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 2}


def resumable(name: str, folder: Path, **options: Any) -> Any:
    method = METHODS[name]
    options = {**method.options, **RESUMED, "save_strategy": "steps", **options}
    return make_trainer(folder, method.config(lora_dropout=0.1), options, data=tokenised(12))


def train_forever(name: str, folder: Path) -> None:
    """Train until the first checkpoint is whole, then wait in the middle of the fourth step to be killed."""
    torch.set_num_threads(1)
    trainer = resumable(name, folder)
    compute_loss = trainer.compute_loss

    def stall(*args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(*args, **kwargs)
        if trainer.state.global_step == 3:
            (folder / "stalled").touch()
            time.sleep(600)
        return loss

    trainer.compute_loss = stall
    trainer.train()


@every_method
def test_resume(name: str, tmp_path: Path) -> None:
    """A run that is killed outright and resumed gives the uninterrupted run's losses and weights bit for bit."""
    applicable(name, "resume")
    whole = resumable(name, tmp_path / "whole", save_strategy="no")
    whole.train()

    context = get_context("forkserver")  # a clean process, without the seconds of importing everything again
    context.set_forkserver_preload(["dip_hf.trainer", "bitsandbytes"])
    folder = tmp_path / "killed"
    process = context.Process(target=train_forever, args=(name, folder))
    process.start()
    while process.is_alive() and not (folder / "stalled").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    process.join()
    assert process.exitcode == -signal.SIGKILL and (folder / "checkpoint-2").is_dir()

    resumed = resumable(name, folder)
    resumed.train(resume_from_checkpoint=True)
    assert len(losses(whole)) == 8 and losses(resumed) == losses(whole)
    found, expected = dict(resumed.model.named_parameters()), dict(whole.model.named_parameters())
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@every_method
def test_optimiser_groups(name: str, tmp_path: Path) -> None:
    """Every trained parameter is in one group; what is not LoRA's has its own rate, scheduled, and no decay."""
    method = applicable(name, "optimiser_groups")
    decay = 0.0 if method.variational else 0.1
    options = {**method.options, "weight_decay": decay, "noise_learning_rate": 0.03, "max_steps": 4}
    trainer = make_trainer(tmp_path, method.config(), {**options, "lr_scheduler_type": "linear"})
    trainer.create_optimizer_and_scheduler(4)
    groups = trainer.optimizer.param_groups
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in trainer.model.parameters() if p.requires_grad)
    own = trained_noise(trainer)
    rates = {id(p): 0.03 if LOG_VARIANCE in key else 1e-2 / len(p) for key, p in own.items()}
    for step in range(4):
        for group in groups:
            (rate,) = {rates.get(id(p), 1e-2) for p in group["params"]} or {1e-2}
            assert group["lr"] == pytest.approx(rate * (1 - step / 4))
            assert group["weight_decay"] == 0 or not any(id(p) in rates for p in group["params"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()


@every_method
def test_evaluation(name: str, tmp_path: Path) -> None:
    """Evaluation is noise-free and repeatable, and training goes on as if it had not been."""
    method = applicable(name, "evaluation")
    options = {**method.options, "max_steps": 3, "per_device_train_batch_size": 2}
    plain = make_trainer(tmp_path, method.config(), options)
    plain.train()
    evaluated = make_trainer(
        tmp_path, method.config(), {**options, "eval_strategy": "steps", "eval_steps": 1}, eval_dataset=tokenised(4)
    )
    evaluated.train()
    assert losses(evaluated) == losses(plain)
    loss = evaluated.evaluate()["eval_loss"]
    assert evaluated.evaluate()["eval_loss"] == loss == evaluated.state.log_history[-1]["eval_loss"]
    terms = ("eval_dipnet", "eval_dres", "eval_icp")
    assert not any(key.startswith(terms) for entry in evaluated.state.log_history for key in entry)


@pytest.mark.parametrize("options", [{}, {"noise_blocks": [], "variational_rank": 2, "variational_blocks": "all"}])
def test_noise_in_evaluation(options: dict[str, Any], tmp_path: Path) -> None:
    """Where an adapter keeps it: the same in every evaluation of a step, and in a run that was resumed."""
    adapter = DIPNetConfig(**ADAPTER, noise_in_eval=True, **options)
    steps = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}

    def run(folder: str, **more: Any) -> Any:
        trainer = make_trainer(tmp_path / folder, adapter, {**steps, **more}, eval_dataset=tokenised(4))
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2") if folder == "rest" else None)
        return trainer

    def evaluations(trainer: Any) -> list[float]:
        return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]

    whole = run("whole")
    assert evaluations(run("rest")) == evaluations(whole)
    assert losses(run("alone", eval_strategy="no")) == losses(whole)
    assert whole.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"] == evaluations(whole)[2]
    whole.state.global_step += 1
    assert whole.evaluate()["eval_loss"] != evaluations(whole)[2]


@every_method
def test_saved_and_exported(name: str, tmp_path: Path) -> None:
    """The saved adapter loads in PEFT, and its export in stock PEFT, both with the trainer's evaluation loss."""
    method = applicable(name, "exported")
    trainer = make_trainer(
        tmp_path / "run", method.config(), {**method.options, "max_steps": 3}, eval_dataset=tokenised(4)
    )
    trainer.train()
    expected = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "adapter"))
    folders = [tmp_path / "adapter"]
    if isinstance(method.config(), DIPNetConfig):
        folders.append(export_lora(tmp_path / "adapter", tmp_path / "lora"))
    for folder in folders:
        model = PeftModel.from_pretrained(base_model(), str(folder))
        loaded = make_trainer(tmp_path / "eval", None, model=model, cls=SFTTrainer, eval_dataset=tokenised(4))
        assert loaded.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
