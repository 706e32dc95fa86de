"""What averaging M posterior samples costs in prediction, as a ratio to a reference of PEFT's plain LoRA alone.

    python benchmarks/prediction.py --preset cpu --json benchmarks/results/prediction_cpu.json

The reference, `floor` in the results, is measured in the same run: one pass through the blocks below the first
variational one, one of M times as many rows through the rest and the head, and the mean of the softmaxes. Beside it
stands what a loop over M whole passes costs. All three have a model of the same size, and take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from interleaved import PRESETS, Shape, peak_memory, ratios, report, seconds, take_turns
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from dip_hf import DIPNetConfig
from dip_hf.ibvi import posterior_predictive


LORA: dict[str, Any] = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def _adapted(shape: Shape, depth: int, adapter: LoraConfig, device: torch.device) -> Any:
    """The shape's model with `depth` blocks, and an adapter on it."""
    model = AutoModelForCausalLM.from_config(shape.of_depth(depth), dtype=shape.dtype).to(device)
    return get_peft_model(model, adapter).eval()


def _mean_probabilities(logits: Tensor, samples: int) -> Tensor:
    total = torch.zeros_like(logits[: len(logits) // samples], dtype=torch.float32)
    for sample in logits.unflatten(0, (samples, -1)):
        total += sample.float().softmax(-1)
    return total / samples


def arms(shape: Shape, rank: int, samples: int, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """The floor, the samples folded into one batch, and a loop of passes; the last quarter is variational."""
    last = shape.last_quarter
    below = _adapted(shape, shape.depth - last, LoraConfig(**LORA), device).get_base_model().model
    above = _adapted(shape, last, LoraConfig(**LORA), device)
    lora = _adapted(shape, shape.depth, LoraConfig(**LORA), device)
    posterior = DIPNetConfig(**LORA, noise_blocks=[], variational_rank=rank, variational_blocks=last)
    model = _adapted(shape, shape.depth, posterior, device)
    ids = shape.tokens().to(device)

    def floor() -> Tensor:
        hidden = below(input_ids=ids, use_cache=False).last_hidden_state
        logits = above(inputs_embeds=hidden.repeat(samples, 1, 1), use_cache=False).logits
        return _mean_probabilities(logits, samples)

    def folded() -> Tensor:
        return posterior_predictive(model, {"input_ids": ids, "use_cache": False}, samples)

    def loop() -> Tensor:
        total = torch.zeros((), device=device)
        for _ in range(samples):
            total = total + lora(input_ids=ids, use_cache=False).logits.float().softmax(-1)
        return total / samples

    return {"floor": floor, "samples in one batch": folded, "loop of passes": loop}


@torch.no_grad()
def measure(shape: Shape, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Rows of one shape, as `report` prints them, the floor first."""
    builds = []
    for _ in range(options.builds):
        runs = arms(shape, options.rank, options.samples, device)
        memory = {name: peak_memory(run, device) for name, run in runs.items()}  # and warms up
        timed = {name: partial(seconds, run, device) for name, run in runs.items()}
        builds.append(take_turns(timed, options.rounds, shape.name))
    return [
        {
            "name": f"{shape.name}: {name}",
            **ratios(builds, name, "floor"),
            "floor": 1.0,
            "memory_ratio": memory[name] / memory["floor"],
        }
        for name in runs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--rank", type=int, default=4, help="R")
    parser.add_argument("--samples", type=int, default=10, help="M")
    parser.add_argument("--rounds", type=int, default=11, help="timings per arm and build")
    parser.add_argument("--builds", type=int, default=2, help="how often everything is built anew")
    parser.add_argument("--shape", help="only shapes whose name contains this")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    device = torch.device("cuda" if options.preset == "gpu" else "cpu")
    shapes = [shape for shape in PRESETS[options.preset] if not options.shape or options.shape in shape.name]
    if options.rounds < 2 or min(options.builds, options.samples, options.rank) < 1 or not shapes:
        parser.error("there must be 2 rounds, 1 build, 1 sample, rank 1 and a shape of that name.")
    rows = [row for shape in shapes for row in measure(shape, options, device)]
    note = f"M={options.samples}, R={options.rank}, {options.builds} builds of {options.rounds} rounds"
    report(rows, device, note, options.json)


if __name__ == "__main__":
    main()
