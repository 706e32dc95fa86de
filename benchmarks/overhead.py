"""What the regularisers cost in training: step time and peak memory, as ratios to TRL's `SFTTrainer` with LoRA.

    python benchmarks/overhead.py --preset cpu --json benchmarks/results/cpu.json
    python benchmarks/overhead.py --preset gpu --json benchmarks/results/gpu.json

All arms of a shape live in one process and take turns; see interleaved.py. Peak memory is counted by the allocator
(CUDA) or from the profiler's allocation events (CPU), with parameters, gradients and optimiser state.

The floor is the analytic cost without any overhead, as a multiple of LoRA's, in matrix products of blocks alone (a
backward pass to the activations counts like a forward pass). m trajectories from block s of L on: (s + m(L - s))/L.
DReS on the last quarter q of the blocks at N/K = 1.25 with a share p of the groups coded: 1 + 1.25 p q, for token
placement times the MLP's share. ICP with one step: the gradient for the perturbation and the teacher add a backward
and a forward pass, 2; from three quarters of the depth, every fourth step: 1 + (1/4)/4. A posterior of rank R adds no
product of its own order, nor does LoRA's dropout, which regularisation is compared with: 1.

The head is no block, and what an arm must do with it is not in the floor: m trajectories need it m times. How much of
LoRA's step it takes is measured in the same run, h, by a model without blocks, whose step is the head's forward and
backward pass as TRL makes them. With f the floor and k the times that an arm needs the head, the floor with the head
is (1 - h) f + h k.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from interleaved import PRESETS, Shape, bytes_of, peak_memory, ratios, report, seconds, take_turns
from peft import LoraConfig
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from trl.trainer import add_fused_lm_head

from dip_hf import DIPNetConfig, DIPSFTConfig, DIPSFTTrainer


@dataclass(frozen=True)
class Arm:
    """One way to train, and the cost that it cannot fall below, as a multiple of LoRA's.

    Attributes:
        floor: from the shape, see the module's docstring.
        heads: k, how many times as often as LoRA's step it needs the head.
        adapter: fields of `DIPNetConfig` for a shape; None for plain LoRA.
        options: fields of `DIPSFTConfig`; None for TRL's own trainer.
        steps: steps in one timing, as many as the longest interval between two alike.
        dropout: probability of LoRA's own.
    """

    name: str
    floor: Callable[[Shape], float]
    adapter: Callable[[Shape], dict[str, Any]] | None = None
    options: dict[str, Any] | None = field(default_factory=dict)
    steps: int = 1
    heads: float = 1
    dropout: float = 0.0


def _trajectories(m: int, start: float) -> Arm:
    name = f"DIPNet m={m}" + (f" from {start:g} of the depth" if start else "")
    return Arm(
        name,
        lambda shape: start + m * (1 - start),
        lambda shape: {"noise_blocks": shape.depth - round(start * shape.depth)},
        {"num_trajectories": m},
        heads=m,
    )


def _sequence_floor(shape: Shape) -> float:
    return 1 + 1.25 * shape.last_quarter / shape.depth


def _token_floor(share: float, shape: Shape) -> float:
    return 1 + 1.25 * share * shape.last_quarter / shape.depth * shape.mlp_share


_DRES = {"dres_weight": 0.1}
_ALL = _DRES | {"dres_share": 1.0}
_ICP = {"icp_weight": 0.1, "icp_warmup": 0.0}
ARMS = (
    Arm("LoRA, SFTTrainer", lambda shape: 1, options=None),
    Arm("LoRA with dropout, SFTTrainer", lambda shape: 1, options=None, dropout=0.1),
    Arm("all off", lambda shape: 1),
    _trajectories(1, 0),
    _trajectories(2, 0.5),
    _trajectories(4, 0.5),
    Arm(
        "DReS sequence, all groups",
        _sequence_floor,
        options=_ALL | {"dres_placement": "sequence", "dres_group_size": 4},
    ),
    Arm("DReS token, all groups", partial(_token_floor, 1.0), options=_ALL),
    Arm("DReS token, half of the groups", partial(_token_floor, 0.5), options=_DRES | {"dres_share": 0.5}),
    Arm("ICP T=1", lambda shape: 2, options=_ICP, heads=2),
    Arm(
        "ICP T=1, late, every 4th", lambda shape: 1 + 0.25 / 4, options=_ICP | {"icp_interval": 4}, steps=4, heads=1.25
    ),
    Arm(
        "IBVI R=4, all blocks",
        lambda shape: 1,
        lambda shape: {"variational_rank": 4, "variational_blocks": "all", "noise_blocks": []},
    ),
)
WARM_UP = 4
"""Steps before the first timing."""
HEAD = "the head alone"


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
    lora: dict[str, Any] = {
        "r": 16,
        "target_modules": "all-linear",
        "lora_dropout": arm.dropout,
        "task_type": "CAUSAL_LM",
    }
    peft_config = LoraConfig(**lora) if arm.adapter is None else DIPNetConfig(**lora, **arm.adapter(shape))
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
    tokens = shape.tokens().tolist()
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


def head_step(shape: Shape, device: torch.device) -> Callable[[], None]:
    """A forward and backward pass through the shape's head alone, frozen, as `SFTTrainer` makes it."""
    model = AutoModelForCausalLM.from_config(shape.of_depth(0), dtype=shape.dtype).to(device).requires_grad_(False)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    ids = shape.tokens().to(device)
    embeddings = model.get_input_embeddings()(ids).requires_grad_()

    def step() -> None:
        embeddings.grad = None
        model(inputs_embeds=embeddings, labels=ids, fused_lm_head=True).loss.backward()

    return step


def step(trainer: SFTTrainer, batch: dict[str, Tensor]) -> None:
    """One optimiser step on one batch, through the trainer's own `training_step`."""
    samples, num_items = trainer.get_batch_samples(iter([dict(batch)]), 1, trainer.args.device)
    trainer.training_step(trainer.model, samples[0], num_items)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    trainer.state.global_step += 1


def _steps(trainer: SFTTrainer, batch: dict[str, Tensor], count: int) -> None:
    for _ in range(count):
        step(trainer, batch)


def _timed(trainer: SFTTrainer, batch: dict[str, Tensor], count: int) -> float:
    """Seconds a step."""
    return seconds(partial(_steps, trainer, batch, count), trainer.args.device) / count


def _resident(trainer: SFTTrainer) -> int:
    """Bytes of parameters and optimiser state."""
    state = [value for values in trainer.optimizer.state.values() for value in values.values()]
    return bytes_of([*trainer.model.parameters(), *(value for value in state if isinstance(value, Tensor))])


def measure(
    shape: Shape, arms: tuple[Arm, ...], rounds: int, builds: int, device: torch.device
) -> list[dict[str, Any]]:
    """Rows {name, time_ratio, time_ratio_se, memory_ratio, floor, step_seconds} of one shape, LoRA first."""
    times: list[dict[str, list[float]]] = []
    memory: dict[str, int] = {}
    for build in range(builds):
        with tempfile.TemporaryDirectory() as folder:
            order = arms[build % len(arms) :] + arms[: build % len(arms)]
            trainers = {arm.name: make_trainer(shape, arm, folder, device) for arm in order}
            batches = {name: next(iter(trainer.get_train_dataloader())) for name, trainer in trainers.items()}
            for name, trainer in trainers.items():
                _steps(trainer, batches[name], WARM_UP)
                if build == 0:
                    peak = peak_memory(partial(step, trainer, batches[name]), device)
                    memory[name] = _resident(trainer) + peak
            turns = {arm.name: partial(_timed, trainers[arm.name], batches[arm.name], arm.steps) for arm in order}
            head = head_step(shape, device)
            for _ in range(WARM_UP):
                head()
            turns[HEAD] = partial(seconds, head, device)
            times.append(take_turns(turns, rounds, f"{shape.name}, build {build + 1}/{builds}"))
            del trainers, turns
    share = ratios(times, HEAD, arms[0].name)["time_ratio"]
    print(f"{shape.name}: the head takes {share:.0%} of LoRA's step")
    return [
        {
            "name": f"{shape.name}: {arm.name}",
            **ratios(times, arm.name, arms[0].name),
            "memory_ratio": memory[arm.name] / memory[arms[0].name],
            "floor": arm.floor(shape),
            "floor_with_head": (1 - share) * arm.floor(shape) + share * arm.heads,
        }
        for arm in arms
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--rounds", type=int, default=20, help="timings per arm and build, at least 2")
    parser.add_argument("--builds", type=int, default=3, help="times that everything is built anew")
    parser.add_argument("--shape", help="only shapes whose name contains this")
    parser.add_argument("--arm", action="append", help="only arms whose name contains this, and LoRA's; repeatable")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    if options.rounds < 2 or options.builds < 1:
        parser.error(f"--rounds {options.rounds} --builds {options.builds}: there must be 2 rounds and 1 build.")
    device = torch.device("cuda" if options.preset == "gpu" else "cpu")
    shapes = [shape for shape in PRESETS[options.preset] if not options.shape or options.shape in shape.name]
    arms = ARMS[:1] + tuple(
        arm for arm in ARMS[1:] if not options.arm or any(part in arm.name for part in options.arm)
    )
    if not shapes or (options.arm and len(arms) == 1):
        parser.error(
            f"--shape {options.shape} --arm {options.arm}: no shape, or no arm besides LoRA, has such a name."
        )
    rows = [row for shape in shapes for row in measure(shape, arms, options.rounds, options.builds, device)]
    note = f"20 % trimmed means of {options.rounds} interleaved timings in each of {options.builds} builds"
    report(rows, device, note, options.json)


if __name__ == "__main__":
    main()
