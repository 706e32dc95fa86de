"""A stranger without dip_hf: loads base and plain LoRA adapter by their names, and lets lm-eval score them."""

from __future__ import annotations

import json
import sys

import torch
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, PeftModel
from scoring import score  # beside this file; the repository is not on the path
from transformers import AutoModelForCausalLM, AutoTokenizer


base, repo, task_folder, task = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), repo, subfolder="lora").eval()
assert type(model.peft_config["default"]) is LoraConfig
assert model.peft_config["default"].base_model_name_or_path == base
with torch.no_grad():
    logits = model(torch.arange(1, 11)[None]).logits
lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(repo), device="cpu")
scores = score(lm, None, task_folder, task)
assert "dip_hf" not in sys.modules
print("\n" + json.dumps({"logits": logits.flatten().tolist(), **scores}))
