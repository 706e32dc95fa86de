"""What the regularisers cost in training: step time and peak memory, as ratios to TRL's `SFTTrainer` with LoRA.

    python benchmarks/overhead.py --preset cpu --json benchmarks/results/cpu.json
    python benchmarks/overhead.py --preset gpu --json benchmarks/results/gpu.json

All arms of a shape live in one process and take turns, step by step, so that whatever else the machine does meets
all of them alike; a time ratio is the median over rounds of an arm's step time over that of LoRA in the same round.
Peak memory is counted by the allocator (CUDA) or from the profiler's allocation events (CPU), with parameters,
gradients and optimiser state.

The floor is the analytic cost without any overhead, as a multiple of LoRA's, in matrix products of blocks alone (a
backward pass to the activations counts like a forward pass). m trajectories from block s of L on: (s + m(L - s))/L.
DReS on the last quarter q of the blocks at N/K = 1.25: 1 + 1.25 q, for token placement times the MLP's share. ICP
with one step: the gradient for the perturbation and the teacher add a backward and a forward pass, 2; from three
quarters of the depth, every fourth step: 1 + (1/4)/4.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen3Config
from trl import SFTConfig, SFTTrainer

from dip_hf import DIPNetConfig, DIPSFTConfig, DIPSFTTrainer


@dataclass(frozen=True)
class Shape:
    """A model and a batch: random weights, random tokens, all of them labels."""

    name: str
    config: PretrainedConfig
    batch: int
    length: int
    dtype: torch.dtype

    @property
    def depth(self) -> int:
        return self.config.num_hidden_layers


@dataclass(frozen=True)
class Arm:
    """One way to train, and the cost that it cannot fall below, as a multiple of LoRA's.

    Attributes:
        floor: from the shape, see the module's docstring.
        noise_start: first noised block as a fraction of the depth; None for plain LoRA.
        options: fields of `DIPSFTConfig`; None for TRL's own trainer.
    """

    name: str
    floor: Callable[[Shape], float]
    noise_start: float | None = None
    options: dict[str, Any] | None = field(default_factory=dict)


def _trajectories(m: int, start: float) -> Arm:
    name = f"DIPNet m={m}" + (f" from {start:g} of the depth" if start else "")
    return Arm(name, lambda shape: start + m * (1 - start), start, {"num_trajectories": m})


def _last_quarter(shape: Shape) -> float:
    return math.ceil(shape.depth / 4) / shape.depth


def _mlp_share(shape: Shape) -> float:
    """Share of a block's matrix products that are its MLP's."""
    config: Any = shape.config
    width = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    mlp, attention = 3 * config.hidden_size * config.intermediate_size, 2 * config.hidden_size * width
    return mlp / (mlp + attention)


_DRES = {"dres_weight": 0.1, "dres_group_size": 4}
_ICP = {"icp_weight": 0.1, "icp_warmup": 0.0}
ARMS = (
    Arm("LoRA, SFTTrainer", lambda shape: 1, options=None),
    Arm("all off", lambda shape: 1),
    _trajectories(1, 0),
    _trajectories(2, 0.5),
    _trajectories(4, 0.5),
    Arm(
        "DReS sequence", lambda shape: 1 + 1.25 * _last_quarter(shape), options=_DRES | {"dres_placement": "sequence"}
    ),
    Arm("DReS token", lambda shape: 1 + 1.25 * _last_quarter(shape) * _mlp_share(shape), options=_DRES),
    Arm("ICP T=1", lambda shape: 2, options=_ICP),
    Arm("ICP T=1, late, every 4th", lambda shape: 1 + 0.25 / 4, options=_ICP | {"icp_interval": 4}),
)


def _llama(hidden: int, depth: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=depth,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=512,
    )


def _qwen3(hidden: int, intermediate: int, depth: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=depth,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )


STEPS = 4
"""Steps in one timing."""

PRESETS = {
    "cpu": (
        Shape("Llama 192x4", _llama(192, 4), 16, 128, torch.float32),
        Shape("Llama 512x8", _llama(512, 8), 8, 128, torch.float32),
    ),
    "gpu": (
        Shape("Qwen3 0.6B", _qwen3(1024, 3072, 28), 8, 1024, torch.bfloat16),
        Shape("Qwen3 1.7B", _qwen3(2048, 6144, 28), 4, 1024, torch.bfloat16),
    ),
}


def _tokenizer() -> PreTrainedTokenizerFast:
    """The trainer wants one; the batches are made of token numbers and never pass through it."""
    vocabulary = {"<pad>": 0, "<eos>": 1}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )


def make_trainer(shape: Shape, arm: Arm, folder: str, device: torch.device) -> SFTTrainer:
    """A trainer of this arm over `shape`, ready to step."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape.config, dtype=shape.dtype).to(device)
    lora: dict[str, Any] = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    peft_config = LoraConfig(**lora)
    if arm.noise_start is not None:
        peft_config = DIPNetConfig(**lora, noise_blocks=shape.depth - round(arm.noise_start * shape.depth))
    trainer_class, config_class = (SFTTrainer, SFTConfig) if arm.options is None else (DIPSFTTrainer, DIPSFTConfig)
    options = dict(arm.options or {})
    if "icp_interval" in options:
        options["icp_start_block"] = round(0.75 * shape.depth)
    args = config_class(
        output_dir=folder,
        per_device_train_batch_size=shape.batch,
        max_length=shape.length,
        use_cpu=device.type == "cpu",
        bf16=shape.dtype is torch.bfloat16,
        activation_checkpointing=False,
        report_to="none",
        **options,
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 1000, (shape.batch, shape.length), generator=generator).tolist()
    trainer = trainer_class(
        model,
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": tokens, "labels": tokens}),
        processing_class=_tokenizer(),
        peft_config=peft_config,
    )
    trainer.create_optimizer()
    # What Trainer's loop would set; half way, where ICP's feature loss has its weight.
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.global_step, trainer.state.max_steps = 1_000_000, 2_000_000
    return trainer


def step(trainer: SFTTrainer, batch: dict[str, Tensor]) -> None:
    """One optimiser step on one batch, through the trainer's own `training_step`."""
    samples, num_items = trainer.get_batch_samples(iter([dict(batch)]), 1, trainer.args.device)
    trainer.training_step(trainer.model, samples[0], num_items)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    trainer.state.global_step += 1


def _timed(trainer: SFTTrainer, batch: dict[str, Tensor]) -> float:
    """Seconds a step, over as many steps as the longest interval between two alike."""
    cuda = trainer.args.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step(trainer, batch)
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS


def peak_memory(trainer: SFTTrainer, batch: dict[str, Tensor]) -> int:
    """Bytes at the highest point of one step: parameters, optimiser state, gradients, activations."""
    if trainer.args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(trainer, batch)
        return _resident(trainer) + torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(trainer, batch)
    current = peak = 0
    for size in _allocations(profile):
        current += size
        peak = max(peak, current)
    return _resident(trainer) + peak


def _allocations(profile: torch.profiler.profile) -> Iterator[int]:
    """Signed sizes in bytes of allocations (positive) and releases, in order of time."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))


def _resident(trainer: SFTTrainer) -> int:
    state = [value for values in trainer.optimizer.state.values() for value in values.values()]
    tensors = [*trainer.model.parameters(), *(value for value in state if isinstance(value, Tensor))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(shape: Shape, arms: tuple[Arm, ...], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows {name, time_ratio, memory_ratio, floor, step_seconds} of one shape, LoRA first."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {arm.name: make_trainer(shape, arm, folder, device) for arm in arms}
        batches = {name: next(iter(trainer.get_train_dataloader())) for name, trainer in trainers.items()}
        for name, trainer in trainers.items():
            for _ in range(STEPS):
                step(trainer, batches[name])
        memory = {name: peak_memory(trainer, batches[name]) for name, trainer in trainers.items()}
        times: dict[str, list[float]] = {name: [] for name in trainers}
        for turn in range(rounds):
            names = list(trainers)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                times[name].append(_timed(trainers[name], batches[name]))
            print(f"\r{shape.name}: round {turn + 1}/{rounds}", end="", flush=True)
    print()
    reference = times[arms[0].name]
    return [
        {
            "name": f"{shape.name}: {arm.name}",
            "time_ratio": statistics.median(t / r for t, r in zip(times[arm.name], reference, strict=True)),
            "memory_ratio": memory[arm.name] / memory[arms[0].name],
            "floor": arm.floor(shape),
            "step_seconds": statistics.median(times[arm.name]),
        }
        for arm in arms
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--rounds", type=int, default=11, help="timings per arm, of four steps each")
    parser.add_argument("--shape", help="only shapes whose name contains this")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    device = torch.device("cuda" if options.preset == "gpu" else "cpu")
    shapes = [shape for shape in PRESETS[options.preset] if not options.shape or options.shape in shape.name]
    rows = [row for shape in shapes for row in measure(shape, ARMS, options.rounds, device)]
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"\n{name}, {platform.machine()}, torch {torch.__version__}, median of {options.rounds} interleaved timings\n"
    )
    print(f"{'':44}{'time':>8}{'floor':>8}{'memory':>8}{'s/step':>9}")
    for row in rows:
        print(
            f"{row['name']:44}{row['time_ratio']:8.3f}{row['floor']:8.3f}{row['memory_ratio']:8.3f}"
            f"{row['step_seconds']:9.3f}"
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([{**row, "device": name} for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
