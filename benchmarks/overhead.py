"""What the regularisers cost in training: step time and peak memory, as ratios to TRL's `SFTTrainer` with LoRA.

    python benchmarks/overhead.py --preset cpu --json benchmarks/results/cpu.json
    python benchmarks/overhead.py --preset gpu --json benchmarks/results/gpu.json

All arms of a shape live in one process and take turns, step by step, so that whatever else the machine does meets all of
them alike; a time ratio is the median over rounds of an arm's step time over that of LoRA in the same round. Peak memory is
counted by the allocator (CUDA) or from the profiler's allocation events (CPU), with parameters, gradients and optimiser
state. The floor is the analytic cost without any overhead, (s + m(L - s))/L for m trajectories from block s of L on, as a
multiple of the cost of LoRA; it counts blocks only.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
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
    """One way to train. `start` is the first block, as a fraction of the depth, that runs `trajectories` times."""

    name: str
    trajectories: int = 1
    start: float = 0.0
    noise: bool = False
    plain: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def floor(self, depth: int) -> float:
        """(s + m(L - s))/L."""
        below = round(self.start * depth)
        return (below + self.trajectories * (depth - below)) / depth


ARMS = (
    Arm("lora", plain=True),
    Arm("off"),
    Arm("dipnet m=1", noise=True),
    Arm("dipnet m=2 from half depth", 2, 0.5, noise=True, options={"num_trajectories": 2}),
    Arm("dipnet m=4 from half depth", 4, 0.5, noise=True, options={"num_trajectories": 4}),
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
    blocks = shape.depth - round(arm.start * shape.depth)
    peft_config = DIPNetConfig(**lora, noise_blocks=blocks) if arm.noise else LoraConfig(**lora)
    trainer_class, config_class = (SFTTrainer, SFTConfig) if arm.plain else (DIPSFTTrainer, DIPSFTConfig)
    args = config_class(
        output_dir=folder,
        per_device_train_batch_size=shape.batch,
        max_length=shape.length,
        use_cpu=device.type == "cpu",
        bf16=shape.dtype is torch.bfloat16,
        activation_checkpointing=False,
        report_to="none",
        **arm.options,
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
    trainer.current_gradient_accumulation_steps = 1  # what Trainer's loop sets before each step
    return trainer


def step(trainer: SFTTrainer, batch: dict[str, Tensor]) -> None:
    """One optimiser step on one batch, through the trainer's own `training_step`."""
    samples, num_items = trainer.get_batch_samples(iter([dict(batch)]), 1, trainer.args.device)
    trainer.training_step(trainer.model, samples[0], num_items)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def _timed(trainer: SFTTrainer, batch: dict[str, Tensor]) -> float:
    cuda = trainer.args.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(trainer, batch)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


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
            for _ in range(2):
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
            "floor": arm.floor(shape.depth),
            "step_seconds": statistics.median(times[arm.name]),
        }
        for arm in arms
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--rounds", type=int, default=21, help="timed steps per arm")
    parser.add_argument("--shape", help="only shapes whose name contains this")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    device = torch.device("cuda" if options.preset == "gpu" else "cpu")
    shapes = [shape for shape in PRESETS[options.preset] if not options.shape or options.shape in shape.name]
    rows = [row for shape in shapes for row in measure(shape, ARMS, options.rounds, device)]
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"\n{name}, {platform.machine()}, torch {torch.__version__}, median of {options.rounds} interleaved steps\n")
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
