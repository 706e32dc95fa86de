"""Eq. 4 of arXiv 2506.04690 in the trainer, against a plain loop over trajectories."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dip_hf import DIPNetConfig
from dip_hf.noise import NoiseKey, derive_seed, gaussian
from tests.trainer.methods import EVERY_MEAN
from tests.trainer.tiny import (
    ADAPTER,
    Uncounted,
    assert_close,
    base_model,
    gradients,
    losses,
    make_trainer,
    mean_of_two_rows,
    tokenised,
    two_rows,
)


M, ALPHA, BETA, STABILITY = 3, 0.3, 0.4, 0.05
NOISED = {1: 0.5, 2: 0.8}
"""Index of each noised block, and the RMS that its noise is relative to."""


def log_variance(model: nn.Module, layer: int) -> nn.Module:
    return model.get_submodule(f"base_model.model.model.layers.{layer}.dip_noise.lora_dip_log_variance.default")


def trajectory(model: Any, batch: dict[str, Tensor], key: NoiseKey, j: int) -> Tensor:
    """Logits of trajectory j alone, u = v + √λ ⊙ ε at the input of every noised block."""
    handles = []
    for layer, rms in NOISED.items():
        std = rms * (log_variance(model, layer).weight / 2).exp()

        def project(block: nn.Module, args: tuple, kwargs: dict, layer: int = layer, std: Tensor = std) -> Any:
            noise = gaussian(args[0].shape, derive_seed(key.tensor(), layer, j), torch.device("cpu"))
            return (args[0] + std * noise, *args[1:]), kwargs

        block = model.get_submodule(f"base_model.model.model.layers.{layer}")
        handles.append(block.register_forward_pre_hook(project, with_kwargs=True))
    # The original forward, without TRL's fused head: the base model was copied before the trainer changed it.
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for handle in handles:
        handle.remove()
    return logits[:, :-1]


def equation_4(model: Any, batches: list[dict[str, Tensor]], seed: int, reduction: str, unit: str) -> Tensor:
    """The loss of one optimiser step over `batches`, term by term as printed."""
    num_tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    loss = torch.zeros((), dtype=torch.float64)
    for micro_step, batch in enumerate(batches):
        labels = batch["labels"][:, 1:]
        outputs = [trajectory(model, batch, NoiseKey(seed, 0, micro_step, 0), j) for j in range(M)]
        for logits in outputs:
            log_p = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            loss = loss - log_p[labels != -100].sum() / (M * num_tokens)
        for j2 in range(M):
            for j1 in range(j2):
                distance = (outputs[j1] - outputs[j2])[labels != -100].square().sum()
                loss = loss + STABILITY / (M * (M - 1)) * distance / num_tokens
    rho = torch.cat(
        [
            log_variance(model, layer).weight + (2 * math.log(rms) if unit == "absolute" else 0)
            for layer, rms in NOISED.items()
        ]
    )
    reduce = torch.sum if reduction == "sum" else torch.mean
    return loss + ALPHA * reduce(rho.exp()) - BETA * reduce(rho)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("reduction", "unit"), [("mean", "relative"), ("sum", "absolute")])
def test_folded_pass_is_equation_4(reduction: str, unit: str, accumulation: int, tmp_path: Path) -> None:
    """m = 3 trajectories folded in one batch: the loss and every gradient are those of trajectories run one by one."""
    options = {
        "num_trajectories": M,
        "variance_weight": ALPHA,
        "log_variance_weight": BETA,
        "stability_weight": STABILITY,
        "penalty_reduction": reduction,
        "penalty_unit": unit,
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    trainer = make_trainer(
        tmp_path, DIPNetConfig(**ADAPTER, noise_blocks=[*NOISED], noise_scale=0.3), options, base_model().double()
    )
    for layer, rms in NOISED.items():
        leaf = log_variance(trainer.model, layer)
        leaf.rms.fill_(rms)
        leaf.weight.data += torch.linspace(-1, 1, 16)  # a dimension mixed up with another must show
    oracle = copy.deepcopy(trainer.model).eval()  # noise-free by itself
    oracle.base_model.model.__dict__.pop("forward", None)  # TRL's fused head, bound to the trainer's model
    batches: list[dict[str, Tensor]] = []
    compute_loss = trainer.compute_loss

    def record(model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        batches.append({key: value.clone() for key, value in inputs.items() if isinstance(value, Tensor)})
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = record
    trainer.train()
    assert len(batches) == accumulation

    loss = equation_4(oracle, batches, trainer.args.seed, reduction, unit)
    loss.backward()
    expected = {name: p.grad for name, p in oracle.named_parameters() if p.grad is not None}
    assert sum("lora_dip" in name for name in expected) == len(NOISED)
    assert_close(trainer.kept.steps[0], expected)
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_heads_gram_matrix_is_computed_once_where_it_is_frozen(frozen: bool, tmp_path: Path) -> None:
    objective = make_trainer(tmp_path, DIPNetConfig(**ADAPTER)).dipnet
    head = objective.tuner.model.get_output_embeddings().weight.requires_grad_(not frozen)
    first = objective.gram(head)
    assert torch.allclose(first, head.T @ head)
    with torch.no_grad():
        head.mul_(2)
    assert torch.allclose(objective.gram(head), first if frozen else 4 * first)


def test_without_a_count_of_tokens_every_micro_batch_has_a_mean_of_its_own(tmp_path: Path) -> None:
    """The step's is that of its micro-batches, here of a row each, with unequal numbers of labels."""
    adapter, options = DIPNetConfig(**ADAPTER), {**EVERY_MEAN, "gradient_accumulation_steps": 2}
    found = gradients(tmp_path, adapter, options, data=two_rows(), cls=Uncounted)
    assert_close(found, mean_of_two_rows(tmp_path, adapter, EVERY_MEAN))


def test_log(tmp_path: Path) -> None:
    """Every term is logged raw and weighted, the terms add up to the loss, and each block has its noise level.

    That is relative whatever the penalty's unit.
    """
    options = {"num_trajectories": 2, "stability_weight": 0.05, "gradient_accumulation_steps": 2, "max_steps": 3}
    options |= {"per_device_train_batch_size": 4, "penalty_unit": "absolute"}
    trainer = make_trainer(tmp_path, DIPNetConfig(**ADAPTER, noise_blocks=2, noise_scale=0.3), options)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 3
    for entry in steps:
        assert entry["dipnet/stability_weighted"] == pytest.approx(0.05 * entry["dipnet/stability"])
        assert entry["dipnet/penalty"] == pytest.approx(
            0.1 * entry["dipnet/variance"] - 0.2 * entry["dipnet/log_variance"]
        )
        total = entry["task"] + entry["dipnet/penalty"] + entry["dipnet/stability_weighted"]
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
        assert {key for key in entry if key.startswith("dipnet/noise")} == {"dipnet/noise_1", "dipnet/noise_2"}
    assert steps[0]["dipnet/noise_1"] == pytest.approx(0.3)
    assert steps[2]["dipnet/noise_1"] != pytest.approx(0.3, rel=1e-4)


def test_noise_differs_between_steps(tmp_path: Path) -> None:
    """No two micro-batches share their noise: the same data at a learning rate of 0 never gives a loss twice."""
    options = {"max_steps": 3, "learning_rate": 0.0, "noise_learning_rate": 1e-30, "gradient_accumulation_steps": 2}
    trainer = make_trainer(tmp_path, DIPNetConfig(**ADAPTER), {**options, "per_device_train_batch_size": 4})
    keys = []
    noise_key = trainer._noise_key
    trainer._noise_key = lambda: keys.append(noise_key()) or keys[-1]
    trainer.train()
    assert [tuple(key)[1:] for key in keys] == [(step, micro, 0) for step in range(3) for micro in range(2)]
    assert len(set(losses(trainer))) == 3


def test_noise_is_numbered_anew_when_memory_has_run_out(tmp_path: Path) -> None:
    """`auto_find_batch_size` begins again with smaller batches, in the same call of `train`."""
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "auto_find_batch_size": True}
    trainer = make_trainer(tmp_path, DIPNetConfig(**ADAPTER), options)
    keys = []
    noise_key = trainer._noise_key
    trainer._noise_key = lambda: keys.append(noise_key()) or keys[-1]

    def run_out(module: Any, args: tuple) -> None:
        if len(keys) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.model.register_forward_pre_hook(run_out)
    trainer.train()
    assert [key.micro_step for key in keys] == [0, 0]


def test_trajectories_share_what_lies_below_the_first_noised_block(tmp_path: Path) -> None:
    """Two rows a batch: three times as many from the first noised block on."""
    options = {"max_steps": 1, "num_trajectories": 3, "per_device_train_batch_size": 2}
    trainer = make_trainer(tmp_path, DIPNetConfig(**ADAPTER, noise_blocks=[1]), options)
    rows: list[int] = []
    for block in trainer.model.get_submodule("base_model.model.model.layers"):
        block.self_attn.q_proj.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    trainer.train()
    assert rows == [2, 6, 6]


def test_noise_differs_where_a_stream_ends_inside_a_step(tmp_path: Path) -> None:
    """Trainer then takes up the same step anew, with the stream's beginning."""
    options = {"max_steps": 3, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}
    stream = tokenised(7).to_iterable_dataset()
    trainer = make_trainer(tmp_path, DIPNetConfig(**ADAPTER), options, data=stream)
    keys = []
    noise_key = trainer._noise_key
    trainer._noise_key = lambda: keys.append(noise_key()) or keys[-1]
    trainer.train()
    assert len(keys) > 12 and len(set(keys)) == len(keys)
