"""recipes/sft.py from its arguments to an adapter on disk."""

import json
import weakref
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import Accelerator
from peft import AutoPeftModelForCausalLM
from transformers import TrainingArguments

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


def test_nothing_holds_the_ddp_wrapper_when_the_processes_part() -> None:
    """Stands for `DistributedDataParallel`, whose reducer must not be the last to hold the process group."""
    wrapper = torch.nn.Sequential(torch.nn.Linear(1, 1))
    wrapper.itself = [wrapper]  # a cycle, which the reference count alone does not free
    alive = weakref.ref(wrapper)

    class Trainer:
        args = TrainingArguments(output_dir="out", use_cpu=True)
        accelerator = Accelerator(cpu=True)
        model, model_wrapped = wrapper[0], wrapper
        ended = False

        def train(self, resume_from_checkpoint: str | None) -> None:
            self.accelerator._models.append(self.model_wrapped)

        def save_model(self, folder: str) -> None:
            assert alive() is not None

        def end(self) -> None:
            assert alive() is None
            self.ended = True

    trainer = Trainer()
    trainer.model_wrapped = wrapper
    del wrapper, Trainer.model_wrapped
    load_sft().train(trainer, None, None)
    assert trainer.ended
