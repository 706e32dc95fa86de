"""`--adapter monteclora`: PEFT's peer of the posterior trains with its own loss, and loads again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dip_hf.recipe.arguments import SFTParser
from dip_hf.recipe.dry_run import describe_run
from tests.recipes.support import ARCHITECTURES, load_sft, save_small_model


def test_it_trains_with_pefts_loss_and_loads_again(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"prompt": "How many?", "completion": " One."}) + "\n") * 4)
    base = str(save_small_model(tmp_path / "model"))
    arguments = SFTParser().parse_recipe(
        [
            *("--model_name_or_path", base, "--dataset_name", str(rows), "--output_dir", str(tmp_path / "out")),
            *("--adapter", "monteclora", "--use_cpu", "--bf16", "false", "--max_steps", "2", "--report_to", "none"),
            *("--lora_target_modules", "all-linear", "--learning_rate", "0.01"),
            *("--activation_checkpointing", "false"),
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "activation_checkpointing=True with adapter='monteclora': .*another sample.*to False"),  # TRL's default
        (["--gradient_checkpointing", "true"], "activation_checkpointing=True with adapter='monteclora'"),
        (
            ["--activation_checkpointing", "false", "--gradient_accumulation_steps", "4"],
            "gradient_accumulation_steps=4 with adapter='monteclora': .*every micro-batch.*set it to 1",
        ),
    ],
)
def test_set_ups_in_which_it_would_go_wrong(options: list[str], message: str, tmp_path: Path) -> None:
    """A dry run refuses them too. Other adapters train with them."""
    base = str(save_small_model(tmp_path / "model"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "How many?", "completion": " One."}) + "\n")
    argv = ["--model_name_or_path", base, "--dataset_name", str(rows), "--use_cpu", "--bf16", "false", *options]
    argv += ["--lora_target_modules", "all-linear", "--output_dir", str(tmp_path / "out")]
    arguments = SFTParser().parse_recipe([*argv, "--adapter", "monteclora"])
    with pytest.raises(ValueError, match=message):
        load_sft().make_trainer(*arguments)
    with pytest.raises(ValueError, match=message):
        next(describe_run(*arguments, architectures=ARCHITECTURES))
    assert next(describe_run(*SFTParser().parse_recipe([*argv, "--adapter", "lora"]), architectures=ARCHITECTURES))
