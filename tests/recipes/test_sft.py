"""recipes/sft.py from its arguments to an adapter on disk."""

import json
import weakref
from contextlib import nullcontext
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from accelerate import Accelerator
from peft import AutoPeftModelForCausalLM
from transformers import TrainingArguments

from dip_hf.hub import HubError
from dip_hf.recipe.arguments import DataArguments
from tests.recipes.support import load_sft, save_small_model


@pytest.mark.parametrize("adapter", ["dipnet", "lora"])
def test_a_run_leaves_an_adapter_that_loads(tmp_path: Path, adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = tmp_path / "rows.jsonl"
    row = {"question": "How many?", "answer": "One.\n#### 1"}
    rows.write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
model_name_or_path: {save_small_model(tmp_path / "model")}
lora_target_modules: all-linear
lora_r: 2
dataset_name: {rows}
dataset_format: gsm8k
output_dir: {tmp_path / "out"}
per_device_train_batch_size: 2
max_steps: 2
learning_rate: 1.0e-2
logging_steps: 1
use_cpu: true
bf16: false
activation_checkpointing: false
save_steps: 1
report_to: none
"""
    )
    run = ["--config", str(config), "--adapter", adapter]
    load_sft().main(run)
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["peft_type"] == {"dipnet": "DIPNET", "lora": "LORA"}[adapter]
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["adapter_model.safetensors"]
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    record = yaml.safe_load((tmp_path / "out" / "training_data.yaml").read_text())
    assert record["dataset_name"] == "rows.jsonl" and record["dataset_format"] == "gsm8k"
    changed = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert changed and all(torch.any(p != 0) for p in changed)

    for missing, named in (("True", tmp_path / "none"), (str(tmp_path / "gone"), tmp_path / "gone")):
        asked = ["--output_dir", str(tmp_path / "none"), "--resume_from_checkpoint", missing]
        with pytest.raises(
            SystemExit, match=rf"resume_from_checkpoint={missing}: no whole checkpoint in {named}; leave"
        ):
            load_sft().main([*run, *asked])
    load_sft().main([*run, "--max_steps", "3", "--resume_from_checkpoint", "true"])
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3]


@pytest.mark.parametrize("push", [False, True])
def test_nothing_holds_the_ddp_wrapper_when_the_processes_part(push: bool, tmp_path: Path) -> None:
    """Stands for `DistributedDataParallel`, whose reducer must not be the last to hold the process group."""
    wrapper = torch.nn.Sequential(torch.nn.Linear(1, 1))
    wrapper.itself = [wrapper]  # a cycle, which the reference count alone does not free
    alive = weakref.ref(wrapper)

    class Trainer:
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, push_to_hub=push, hub_model_id="you/run")
        accelerator = Accelerator(cpu=True)
        model, model_wrapped = wrapper[0], wrapper
        ended = False

        def train(self, resume_from_checkpoint: str | None) -> None:
            self.accelerator._models.append(self.model_wrapped)

        def save_model(self, folder: str) -> None:
            assert alive() is not None

        def push_to_hub(self, dataset_name: list[str]) -> None:
            raise HubError("nobody\nthere")

        def end(self) -> None:
            assert alive() is None
            self.ended = True

    trainer = Trainer()
    trainer.model_wrapped = wrapper
    del wrapper, Trainer.model_wrapped
    with pytest.raises(SystemExit) if push else nullcontext() as stop:
        load_sft().train(trainer, DataArguments(families=["gcd"]), None)
    if push:
        remedy = f"run `dip-hf push {tmp_path} you/run`"
        assert str(stop.value) == f"recipes/sft.py: saved to {tmp_path}; the push failed (nobody there); {remedy}"
    assert trainer.ended
