"""A tiny model, tokenizer and data set, and trainers around them: what the tests of the trainer share."""

from __future__ import annotations

import copy
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from peft import PeftConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTTrainer

import dip_hf.dipnet.layer
import dip_hf.ibvi.layer
from dip_hf import DIPSFTConfig, DIPSFTTrainer
from dip_hf.dipnet.layer import LogVariance
from dip_hf.ibvi.functional import posterior_coefficients
from dip_hf.noise import NoiseKey, derive_seed, gaussian


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}?"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<eos>{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}a?{% endif %}"
)
ADAPTER = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": "all-linear", "init_lora_weights": False}
"""LoRA with random B: at the usual B = 0 most gradients vanish, and comparing them would show nothing."""
DEFAULTS: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "bf16": False,  # TRL trains in bfloat16 by default, too coarse to compare gradients
    "activation_checkpointing": False,
    "max_grad_norm": 0.0,
    "max_length": None,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    specials = ["<pad>", "<eos>", "<unk>"]
    characters = string.ascii_lowercase + string.digits + " +=?"
    vocabulary = {token: index for index, token in enumerate([*specials, *characters])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=CHAT_TEMPLATE
    )
    return fast


def base_model(depth: int = 3, **options: Any) -> LlamaForCausalLM:
    """A Llama, of three blocks unless said, with the same random weights every time."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=depth,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.3,  # at the usual 0.02 so small a model computes next to nothing
        eos_token_id=1,
        pad_token_id=0,
        **options,
    )
    return LlamaForCausalLM(config)


def tokenised(rows: int = 8) -> Dataset:
    """Rows of unequal length, of which unequal parts are labelled."""
    generator = torch.Generator().manual_seed(3)
    examples = []
    for index in range(rows):
        ids = torch.randint(3, 43, (6 + index % 8,), generator=generator).tolist()
        masked = 2 + index % 3
        examples.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return Dataset.from_list(examples)


class KeepGradients(TrainerCallback):
    """Keeps the accumulated gradient of every optimiser step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def make_trainer(
    folder: Path,
    adapter: PeftConfig | None,
    options: dict[str, Any] | None = None,
    model: Any = None,
    data: Dataset | None = None,
    cls: type[SFTTrainer] = DIPSFTTrainer,
    **kwargs: Any,
) -> Any:
    """A trainer of `cls` over the tiny model and data; `options` are fields of the training arguments."""
    config = DIPSFTConfig if issubclass(cls, DIPSFTTrainer) else cls.__init__.__globals__["SFTConfig"]
    trainer = cls(
        base_model() if model is None else model,
        args=config(output_dir=str(folder), **{**DEFAULTS, **(options or {})}),
        train_dataset=tokenised() if data is None else data,
        processing_class=tokenizer(),
        peft_config=copy.deepcopy(adapter),  # PEFT writes into it
        **kwargs,
    )
    trainer.kept = KeepGradients()
    trainer.add_callback(trainer.kept)
    return trainer


def losses(trainer: Any) -> list[float]:
    """The logged losses, step by step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


STEADY = {"max_steps": 2, "learning_rate": 0.0, "noise_learning_rate": 1e-30}
"""Two steps that move nothing: ICP's term has weight 0 in the first step of every run."""


def gradients(
    folder: Path, adapter: PeftConfig | None, options: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, Tensor]:
    """The accumulated gradient of a step on the initial weights, with steady noise, in float64, and its logged loss.

    With the task's loss beside it, where there is more to the loss.
    """
    trainer = make_trainer(folder, adapter, {**STEADY, **(options or {})}, base_model().double(), **kwargs)
    with steady_noise(trainer):
        trainer.train()
    *_, entry = (entry for entry in trainer.state.log_history if "loss" in entry)
    logged = {name: torch.tensor(entry[name]) for name in ("loss", "task") if name in entry}
    return {**trainer.kept.steps[-1], **logged}


class Uncounted(DIPSFTTrainer):
    """As around a model that takes no number of label tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


def two_rows() -> Dataset:
    """Of unequal numbers of labels, which weigh alike where each is a mean of its own."""
    return tokenised().select([0, 5])


def mean_of_two_rows(folder: Path, adapter: PeftConfig, options: dict[str, Any]) -> dict[str, Tensor]:
    """What `gradients` gives for each row alone, in the mean over both."""
    one, other = (gradients(folder, adapter, options, data=two_rows().select([row])) for row in range(2))
    return {name: (value + other[name]) / 2 for name, value in one.items()}


@contextmanager
def steady_noise(trainer: Any) -> Iterator[None]:
    """Noise and samples of weights that depend on place and trajectory alone, and RMS values known beforehand.

    Every token then gets the same, however the data is cut into micro-batches, ranks or packed rows, so that
    all terms of the loss, those of the noise too, must come out the same for the same data.
    """

    def same_for_every_token(v: Tensor, std: Tensor, key: Tensor, layer: int, trajectories: int) -> Tensor:
        seeds = [derive_seed(NoiseKey(0).tensor(), layer, j) for j in range(trajectories)]
        noise = torch.stack([gaussian(std.shape, seed, v.device) for seed in seeds])
        return v + (std * noise).repeat_interleave(v.shape[0] // trajectories, 0)[:, None]

    def same_sample(key: Tensor, number: int, trajectories: int, rank: int) -> Tensor:
        return posterior_coefficients(NoiseKey(0).tensor(), number, trajectories, rank)

    for module in trainer.model.modules():
        if isinstance(module, LogVariance):
            module.rms.fill_(0.5)
    with (
        mock.patch.object(dip_hf.dipnet.layer, "add_noise", same_for_every_token),
        mock.patch.object(dip_hf.ibvi.layer, "posterior_coefficients", same_sample),
    ):
        yield


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Every tensor equal, up to `tolerance` relative to its largest entry."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].double() - value.double()).abs().max()
        assert error <= tolerance * value.abs().max() + 1e-9, f"{name}: {error / value.abs().max():.2e}"
