"""Arms that take turns: models and batches to measure them on, ratios with standard errors, tables, JSON.

A ratio is the 20 % trimmed mean over many short rounds of an arm's time over the reference arm's in the same round, so
that a machine's slow and fast minutes meet all arms alike; the order changes from round to round. Where tensors happen
to lie in memory makes one copy of a model a little faster than another, which no number of rounds shows, so everything
is built anew a few times, and the standard error is the larger one of that over rounds and that over builds.
"""

from __future__ import annotations

import copy
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, PretrainedConfig, Qwen3Config


BASE = Path(__file__).parents[1] / "recipes" / "base_model"
"""What the quickstart trains: Llama 192x4 with a vocabulary of 307."""

TRIM = 0.2
"""Share of the ratios left out at each end."""


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

    @property
    def last_quarter(self) -> int:
        """Number of blocks in it, rounded up."""
        return -(-self.depth // 4)

    @property
    def mlp_share(self) -> float:
        """The MLP's share of a block's matrix products, attention's own left out."""
        config: Any = self.config
        attention = (
            2 * config.hidden_size * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
        )
        mlp = 3 * config.hidden_size * config.intermediate_size
        return mlp / (mlp + attention)

    def of_depth(self, depth: int) -> PretrainedConfig:
        """The same model with so many blocks."""
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = depth
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:depth]
        return config

    def tokens(self) -> Tensor:
        """The batch: random, shape (batch, length)."""
        high = min(1000, self.config.vocab_size)
        return torch.randint(2, high, (self.batch, self.length), generator=torch.Generator().manual_seed(0))


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
        Shape("embedded base", AutoConfig.from_pretrained(BASE), 16, 128, torch.float32),
        Shape("Llama 192x4", _llama(192, 4), 16, 128, torch.float32),
        Shape("Llama 512x8", _llama(512, 8), 8, 128, torch.float32),
    ),
    "gpu": (
        Shape("Qwen3 0.6B", _qwen3(1024, 3072, 28), 8, 1024, torch.bfloat16),
        Shape("Qwen3 1.7B", _qwen3(2048, 6144, 28), 4, 1024, torch.bfloat16),
    ),
}


def peak_memory(function: Callable[[], Any], device: torch.device) -> int:
    """Bytes at the highest point of a call, above what was there before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Wall time of a call, and of what it started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def trimmed_mean(values: Sequence[float]) -> tuple[float, float]:
    """The trimmed mean, and its standard error from the winsorised variance (Yuen 1974); two values at least."""
    ordered = sorted(values)
    cut = int(TRIM * len(ordered))
    kept = ordered[cut : len(ordered) - cut]
    winsorised = [kept[0]] * cut + kept + [kept[-1]] * cut
    return statistics.fmean(kept), statistics.stdev(winsorised) / ((1 - 2 * TRIM) * len(ordered) ** 0.5)


def take_turns(arms: Mapping[str, Callable[[], float]], rounds: int, title: str) -> dict[str, list[float]]:
    """Seconds of each arm in each round; an arm returns the seconds of one timing. No garbage collection within."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for turn in range(rounds):
        gc.collect()
        gc.disable()
        try:
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                times[name].append(arms[name]())
        finally:
            gc.enable()
        print(f"\r{title}: round {turn + 1}/{rounds}", end="", flush=True)
    print()
    return times


def ratios(builds: Sequence[dict[str, list[float]]], name: str, reference: str) -> dict[str, float]:
    """{time_ratio, time_ratio_se, step_seconds} of one arm, from the times of each build."""
    by_build = [[own / other for own, other in zip(build[name], build[reference], strict=True)] for build in builds]
    mean, error = trimmed_mean([ratio for ratios in by_build for ratio in ratios])
    if len(by_build) > 1:
        means = [trimmed_mean(ratios)[0] for ratios in by_build]
        error = max(error, statistics.stdev(means) / len(means) ** 0.5)
    median = statistics.median(taken for build in builds for taken in build[name])
    return {"time_ratio": mean, "time_ratio_se": error, "step_seconds": median}


def report(rows: list[dict[str, Any]], device: torch.device, note: str, path: Path | None) -> None:
    """Print rows as a table, and write them to `path` as a JSON list."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"\n{name}, {platform.machine()}, torch {torch.__version__}, {note}\n")
    print(f"{'':46}{'time':>8}{'±':>8}{'floor':>8}{'memory':>8}{'seconds':>9}{'floor and head':>16}")
    for row in rows:
        head = f"{row['floor_with_head']:16.3f}" if "floor_with_head" in row else ""
        print(
            f"{row['name']:46}{row['time_ratio']:8.3f}{row['time_ratio_se']:8.3f}{row['floor']:8.3f}"
            f"{row['memory_ratio']:8.3f}{row['step_seconds']:9.3f}{head}"
        )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([{**row, "device": name} for row in rows], indent=1) + "\n")
