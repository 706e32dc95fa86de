"""`--adapter monteclora`: PEFT's peer of the posterior trains with its own loss, and loads again."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dip_hf.recipe.arguments import make_parser
from tests.recipes.support import load_sft, save_small_model


def test_it_trains_with_pefts_loss_and_loads_again(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"prompt": "How many?", "completion": " One."}) + "\n") * 4)
    base = str(save_small_model(tmp_path / "model"))
    arguments = make_parser().parse_recipe(
        [
            *("--model_name_or_path", base, "--dataset_name", str(rows), "--output_dir", str(tmp_path / "out")),
            *("--adapter", "monteclora", "--use_cpu", "--bf16", "false", "--max_steps", "2", "--report_to", "none"),
            *("--lora_target_modules", "all-linear", "--learning_rate", "0.01"),
        ]
    )
    trainer = load_sft().make_trainer(*arguments)
    priors = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "std_prior" in name}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert priors and all(not torch.equal(after[name], value) for name, value in priors.items())
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "saved"))
    assert loaded.peft_config["default"].monteclora_config.buffer_size == 4
    tokens = torch.arange(6).view(1, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, trainer.model.eval()(tokens).logits)
