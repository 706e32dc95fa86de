"""The README's example runs, with the bundled base and a few rows in place of downloads."""

import re
from pathlib import Path

import pytest
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

import dip_hf  # noqa: F401  (the README's "once")


ROOT = Path(__file__).parents[1]
BASE = ROOT / "recipes" / "base_model"


def test_the_example_trains_and_its_adapter_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for there, here in (
        ('"Qwen/Qwen2.5-0.5B"', repr(str(BASE))),
        ('load_dataset("trl-lib/Capybara", split="train")', "rows"),
        ("learning_rate=2e-4)  # no GPU: use_cpu=True, bf16=False", "learning_rate=2e-4, use_cpu=True, bf16=False)"),
    ):
        assert there in example
        example = example.replace(there, here)
    monkeypatch.chdir(tmp_path)
    exec(example, {"rows": Dataset.from_dict({"text": ["Reverse the words: one two three"] * 16})})
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), tmp_path / "out")
