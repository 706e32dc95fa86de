"""The study's own baselines against their formulas."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from torch.nn import functional as F

from dip_hf import DIPNetConfig, DIPSFTTrainer
from studies.trainers import RDropTrainer, SAMTrainer, StudyConfig, rdrop_loss, trainer_class
from tests.trainer import tiny


def _trainer(folder: Path, adapter: Any, **options: Any) -> Any:
    config = StudyConfig(output_dir=str(folder), **{**tiny.DEFAULTS, **options})
    trainer = trainer_class(config)(
        tiny.base_model().double(),
        args=config,
        train_dataset=tiny.tokenised(),
        processing_class=tiny.tokenizer(),
        peft_config=adapter,
    )
    trainer.kept = tiny.KeepGradients()
    trainer.add_callback(trainer.kept)
    return trainer


def _lora(dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(**tiny.ADAPTER, lora_dropout=dropout)


def _loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), batch["labels"][:, 1:].flatten())


def test_sam_steps_with_the_gradient_at_the_perturbed_weights(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, _lora(), sam_rho=0.1, learning_rate=0.0)
    assert isinstance(trainer, SAMTrainer)
    (batch,) = trainer.get_train_dataloader()
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    trainer.train()
    # The step of length 0 moved nothing, and the perturbation was taken back to the last bit
    assert all(torch.equal(p, before[name]) for name, p in trained.items())
    loss = _loss(trainer.model, batch)
    assert tiny.losses(trainer) == [pytest.approx(loss.item(), rel=1e-4)]  # before the perturbation
    first = torch.autograd.grad(loss, list(trained.values()))
    norm = sum(g.square().sum() for g in first).sqrt()
    with torch.no_grad():
        for p, g in zip(trained.values(), first, strict=True):
            p.add_(0.1 * g / norm)
    second = torch.autograd.grad(_loss(trainer.model, batch), list(trained.values()))
    kept = trainer.kept.steps[0]
    assert set(kept) == set(trained)
    for name, ours, plain in zip(trained, second, first, strict=True):
        # TRL's head works in fp32; what the perturbation changes is far more than that
        assert (kept[name] - ours).abs().max() < 1e-3 * (ours - plain).abs().max()


def test_rdrops_loss_by_hand() -> None:
    logits = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([[-100, 1, 2, -100, 3], [-100, -100, 4, 5, 6]])
    nll = divergence = 0.0
    for row in range(2):
        for place in range(1, 5):
            if (target := int(labels[row, place])) == -100:
                continue
            p, q = (logits[row + 2 * k, place - 1].softmax(-1) for k in (0, 1))
            nll += -(p[target].log() + q[target].log()) / 2
            divergence += ((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2
    ours = rdrop_loss(logits, labels)
    torch.testing.assert_close(torch.stack(ours).double(), torch.stack([nll, divergence]), rtol=1e-5, atol=1e-6)
    assert rdrop_loss(torch.cat([logits[:2], logits[:2]]), labels)[1] == 0


def test_rdrop_without_effective_dropout_is_plain_training(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    trainers = [_trainer(tmp_path / str(w), _lora(1e-12), rdrop_weight=w, **options) for w in (0.0, 1.0)]
    assert [type(trainer) for trainer in trainers] == [DIPSFTTrainer, RDropTrainer]
    for trainer in trainers:
        trainer.train()
    plain, ours = (trainer.kept.steps[0] for trainer in trainers)
    for name, gradient in plain.items():
        assert (ours[name] - gradient).abs().max() < 1e-5 * gradient.abs().max()
    tasks = [entry["rdrop/task"] for entry in trainers[1].state.log_history if "rdrop/task" in entry]
    assert tasks == pytest.approx(tiny.losses(trainers[0]), rel=1e-3)


def test_rdrop_draws_another_mask_for_each_pass_and_halves_the_papers_loss(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, _lora(0.5), rdrop_weight=3.0)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["rdrop/divergence"] > 1e-3
    assert entry["loss"] == pytest.approx(entry["rdrop/task"] + 1.5 * entry["rdrop/divergence"], rel=1e-5)


def test_rdrops_mean_is_over_the_tokens_that_are_counted(tmp_path: Path) -> None:
    """Of all micro-batches, and of all ranks where they are counted together; else of the micro-batch alone."""
    trainer = _trainer(tmp_path, _lora(0.5), rdrop_weight=1.0)
    (batch,) = trainer.get_train_dataloader()
    trainer.current_gradient_accumulation_steps = 4
    trainer.model.train()

    def loss_and_log(count: torch.Tensor | None) -> list[float]:
        torch.manual_seed(0)
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
        return [loss.item(), trainer._metrics["train"]["rdrop/task"][-1]]

    tokens = (batch["labels"][:, 1:] != -100).sum()
    mean, task = loss_and_log(None)
    assert loss_and_log(8 * tokens) == pytest.approx([mean / 8, task / 2])
    with mock.patch.object(Accelerator, "num_processes", 2):
        assert loss_and_log(None) == [mean, task]
        assert loss_and_log(8 * tokens) == pytest.approx([mean / 4, task])
        trainer.args.average_tokens_across_devices = False
        assert loss_and_log(8 * tokens) == pytest.approx([mean / 8, task / 2])


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model has no dropout: set lora_dropout"):
        _trainer(tmp_path, _lora(), rdrop_weight=1.0)
    with pytest.raises(ValueError, match="set adapter to 'lora' or 'none'"):
        _trainer(tmp_path, DIPNetConfig(**tiny.ADAPTER, lora_dropout=0.1), rdrop_weight=1.0)
    for options, message in (
        ({"sam_rho": 0.1, "gradient_accumulation_steps": 2}, "gradient_accumulation_steps to 1"),
        ({"rdrop_weight": 1.0, "icp_weight": 0.5}, "set dres_weight and icp_weight to 0"),
        ({"rdrop_weight": 1.0, "padding_free": True}, "set padding_free and packing to false"),
        ({"rdrop_weight": 1.0, "packing": True}, "set padding_free and packing to false"),
        ({"rdrop_weight": float("nan")}, "rdrop_weight=nan must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            StudyConfig(output_dir=str(tmp_path), **{**tiny.DEFAULTS, **options})
