"""Runs of the trainer: labels, a loss that is not finite, checkpoints and their card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig

from dip_hf import DIPNetConfig, DIPSFTConfig, DIPSFTTrainer
from dip_hf.trainer.config import own_config
from tests.trainer.methods import DRES, ICP
from tests.trainer.tiny import ADAPTER, assert_close, base_model, gradients, losses, make_trainer, tokenised, tokenizer


def labelled(*turns: list[tuple[str, bool]]) -> Dataset:
    """Rows from pieces of text, each labelled or not, tokenised one character at a time."""
    rows = []
    for pieces in turns:
        row: dict[str, list[int]] = {"input_ids": [], "labels": []}
        for text, is_label in pieces:
            ids = tokenizer()(text)["input_ids"]
            row["input_ids"] += ids
            row["labels"] += ids if is_label else [-100] * len(ids)
        rows.append(row)
    return Dataset.from_list(rows)


def test_completion_only(tmp_path: Path) -> None:
    """Two trajectories over prompts and completions train the completions' tokens and no others."""
    pairs = [("1+1=", "2"), ("12+3=", "15"), ("99+1=", "100")]
    text = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])
    by_hand = labelled(*([(prompt, False), (completion + "<eos>", True)] for prompt, completion in pairs))
    options = {"num_trajectories": 2, "per_device_train_batch_size": 3, "stability_weight": 0.01}
    adapter = DIPNetConfig(**ADAPTER)
    found = gradients(tmp_path, adapter, {**options, "completion_only_loss": True}, data=text)
    assert_close(found, gradients(tmp_path, adapter, options, data=by_hand))


def test_assistant_only(tmp_path: Path) -> None:
    """Two trajectories over conversations train the assistant's tokens, of every turn, and no others."""
    chats = [[("user", "1+1"), ("assistant", "2"), ("user", "and 3+3"), ("assistant", "6")]]
    chats += [[("user", "hello"), ("assistant", "what")]]
    text = Dataset.from_list(
        [{"messages": [{"role": role, "content": content} for role, content in chat]} for chat in chats]
    )
    by_hand = labelled(
        *(
            [
                piece
                for role, content in chat
                for piece in (
                    [("a?", False), (content + "<eos>", True)] if role == "assistant" else [("u?" + content, False)]
                )
            ]
            for chat in chats
        )
    )
    options = {"num_trajectories": 2, "per_device_train_batch_size": 2}
    adapter = DIPNetConfig(**ADAPTER)
    found = gradients(tmp_path, adapter, {**options, "assistant_only_loss": True}, data=text)
    assert_close(found, gradients(tmp_path, adapter, options, data=by_hand))


class Damage(TrainerCallback):
    """Sets one kind of parameter to a value at the start of the third step, as a diverging run would."""

    def __init__(self, parameter: str, value: float) -> None:
        self.parameter, self.value = parameter, value

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            for name, parameter in model.named_parameters():
                if self.parameter in name:
                    parameter.data.fill_(self.value)


@pytest.mark.parametrize(
    ("adapter", "parameter", "value", "term"),
    [
        (LoraConfig(**ADAPTER), "lora_A", float("nan"), "task"),
        (DIPNetConfig(**ADAPTER), "lora_A", float("nan"), "task"),
        (DIPNetConfig(**ADAPTER), "lora_dip", float("-inf"), "dipnet/penalty"),  # λ = 0: the task loss is fine
    ],
    ids=["lora", "task", "penalty"],
)
def test_not_finite(adapter: PeftConfig, parameter: str, value: float, term: str, tmp_path: Path) -> None:
    """The run stops with step and term named, before the optimiser step, and goes on from the last checkpoint."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, adapter, options, callbacks=[Damage(parameter, value)])
    with pytest.raises(FloatingPointError, match=f"Step 2: the term '{term}' is") as caught:
        trainer.train()
    assert ("Lower the term's weight" in str(caught.value)) == (term != "task")
    assert len(trainer.kept.steps) == 2
    assert PeftModel.from_pretrained(base_model(), str(tmp_path / "checkpoint-2"))
    if term == "task":  # the other remedy: a new run from its weights
        model = PeftModel.from_pretrained(base_model(), str(tmp_path / "checkpoint-2"), is_trainable=True)
        make_trainer(tmp_path / "anew", None, {"max_steps": 1}, model).train()
    resumed = make_trainer(tmp_path, adapter, options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and torch.isfinite(torch.tensor(losses(resumed))).all()


@pytest.mark.parametrize("kind", [LoraConfig, DIPNetConfig])
def test_an_adapter_without_a_task_type_loads_by_itself(kind: type[PeftConfig], tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    given = kind(r=2, target_modules=["q_proj"])
    trainer = make_trainer(tmp_path / "run", given, {"max_steps": 1}, model)
    trainer.train()
    trainer.save_model()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    tokens = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(tokens).logits, trainer.model.eval()(tokens).logits)
    assert given.task_type is None


def test_a_step_cut_off_is_taken_up_anew(tmp_path: Path) -> None:
    """An exception within a step, and training resumed on the same trainer: a whole run's noise, losses and log."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    options |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    whole = make_trainer(tmp_path / "whole", DIPNetConfig(**ADAPTER), options)
    whole.train()
    trainer = make_trainer(tmp_path / "cut", DIPNetConfig(**ADAPTER), options)
    calls: list[int] = []

    def cut(module: torch.nn.Module, args: tuple) -> None:
        calls.append(1)
        if len(calls) == 4:  # the second micro-batch of the second step
            raise InterruptedError

    trainer.model.get_submodule("base_model.model.lm_head").register_forward_pre_hook(cut)
    trainer.model.get_submodule("base_model.model.model.norm").register_forward_pre_hook(cut)
    with pytest.raises(InterruptedError):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert losses(trainer) == losses(whole)
    tasks = [[entry["task"] for entry in run.state.log_history if "task" in entry] for run in (trainer, whole)]
    assert tasks[0] == tasks[1] and len(tasks[0]) == 3


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_a_gradient_whose_norm_is_not_finite(value: float, max_grad_norm: float, tmp_path: Path) -> None:
    """The run stops before the step that would spoil the parameters; the only checkpoint kept is a good one."""
    options = {"max_steps": 4, "save_steps": 1, "save_strategy": "steps", "save_total_limit": 1}
    options["max_grad_norm"] = max_grad_norm
    trainer = make_trainer(tmp_path, DIPNetConfig(**ADAPTER), options)
    parameter = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    parameter.register_hook(lambda grad: torch.full_like(grad, value) if trainer.state.global_step == 2 else grad)
    with pytest.raises(FloatingPointError, match=r"Step 2: the norm of the gradient is (nan|inf).*intact"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert PeftModel.from_pretrained(base_model(), str(tmp_path / "checkpoint-2"))


def test_norms_that_are_not_the_trainers_to_judge(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, None)
    infinite = torch.tensor(float("inf"))
    with pytest.raises(FloatingPointError, match="Step 0: the norm of the gradient is inf"):
        trainer._get_grad_norm(trainer.model, infinite)
    trainer.is_deepspeed_enabled = True
    assert trainer._get_grad_norm(trainer.model, infinite) is infinite
    trainer.is_deepspeed_enabled = False
    trainer.args.mixed_precision = "fp16"  # whose scaler leaves such steps out, and which a launcher may ask for
    assert trainer._get_grad_norm(trainer.model, infinite) is infinite


def test_directions_of_icp(tmp_path: Path) -> None:
    """On the same data and weights, only the random direction differs from step to step; it is the run's own."""
    logged: dict[str, list[float]] = {}
    for direction in ("descent", "ascent", "random", "random"):
        options = {**ICP, "icp_direction": direction, "max_steps": 4, "learning_rate": 0.0}
        trainer = make_trainer(tmp_path, LoraConfig(**ADAPTER), options)
        trainer.train()
        values = [entry["icp/features"] for entry in trainer.state.log_history if "icp/features" in entry]
        assert logged.setdefault(direction, values) == values
    assert logged["descent"] == pytest.approx(logged["descent"][:1] * 3, rel=1e-3)
    assert logged["ascent"] == pytest.approx(logged["ascent"][:1] * 3, rel=1e-3)
    assert len(set(logged["random"])) == 3
    assert len({values[0] for values in logged.values()}) == 3


def test_short_last_batch(tmp_path: Path) -> None:
    """A last batch with fewer rows than the loss has terms is an ordinary batch."""
    options = {"num_trajectories": 2, "stability_weight": 0.1, "max_steps": 3, "per_device_train_batch_size": 4}
    trainer = make_trainer(tmp_path, DIPNetConfig(**ADAPTER), options, data=tokenised(9))
    trainer.train()
    assert len(losses(trainer)) == 3


def test_card(tmp_path: Path) -> None:
    """The card that goes with a checkpoint names the method, and nothing of the machine that trained it."""
    folder = tmp_path / "tiny-dip"
    trainer = make_trainer(folder, DIPNetConfig(**ADAPTER), {"save_strategy": "steps", "save_steps": 1})
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "# tiny\\-dip\n" in card and "**DIPNet**" in card and "| `num_trajectories` | `1` |" in card
    assert all(f"- {tag}\n" in card for tag in ("trl", "sft", "dip_hf"))
    assert str(tmp_path) not in card and "/home" not in card
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
    assert (folder / "checkpoint-1" / "adapter_model.safetensors").is_file()
    for saved in (tmp_path / "saved", folder / "checkpoint-1"):
        assert {"training_config.yaml", "environment.json"} <= {path.name for path in saved.iterdir()}
        assert str(tmp_path) not in (saved / "training_config.yaml").read_text(encoding="utf-8")


def test_arguments_of_other_classes(tmp_path: Path) -> None:
    """TRL's own SFTConfig is accepted, and so is none."""
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", learning_rate=3e-3)
    trainer = DIPSFTTrainer(base_model(), args=args, train_dataset=tokenised(), processing_class=tokenizer())
    assert isinstance(trainer.args, DIPSFTConfig) and trainer.args.learning_rate == 3e-3
    assert trainer.args.num_trajectories == 1


def test_what_has_no_json_is_kept(tmp_path: Path) -> None:
    parallelism = ParallelismConfig(dp_replicate_size=1)
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, parallelism_config=parallelism, hub_token="hf_x")
    own = own_config(args)
    assert own.parallelism_config is parallelism and own.hub_token == "hf_x"


@dataclass
class Extended(SFTConfig):
    """With a field of a user's own."""

    curriculum: str = "none"


def test_arguments_with_fields_of_their_own(tmp_path: Path) -> None:
    args = Extended(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=r"args=Extended has the fields curriculum, which DIPSFTConfig lacks; give a"):
        DIPSFTTrainer(base_model(), args=args, train_dataset=tokenised(), processing_class=tokenizer())


def test_model_that_already_has_the_adapter(tmp_path: Path) -> None:
    """A PEFT model that holds a DIPNet adapter trains Eq. 4 without `peft_config`."""
    torch.manual_seed(0)
    model = PeftModel(base_model(), DIPNetConfig(**ADAPTER))
    trainer = make_trainer(tmp_path, None, model=model)
    trainer.train()
    assert "dipnet/penalty" in trainer.state.log_history[0]


def test_terms_of_a_second_run_add_up_to_its_loss(tmp_path: Path) -> None:
    """The first leaves behind what it noted after its last log line of training."""
    options = {**DRES, "max_steps": 3, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3}
    trainer = make_trainer(tmp_path, LoraConfig(**ADAPTER), options, eval_dataset=tokenised(4))
    for _ in range(2):
        trainer.train()
        entry = next(entry for entry in trainer.state.log_history if "task" in entry)
        assert entry["task_weighted"] + entry["dres/error_weighted"] == pytest.approx(entry["loss"], rel=1e-4)
