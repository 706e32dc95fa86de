"""The posterior's flags of recipes/sft.py, and what a dry run says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dip_hf.dipnet import DIPNetConfig
from dip_hf.recipe.arguments import SFTParser
from dip_hf.recipe.dry_run import describe_run
from recipes.sft import make_trainer
from tests.ibvi.models import posteriors
from tests.recipes.support import ARCHITECTURES, ROOT


QUICKSTART = ROOT / "recipes" / "configs" / "quickstart.yaml"
CONFIG = ["--config", str(ROOT / "recipes" / "configs" / "gsm8k_qwen2.5_3b.yaml"), "--dry_run"]


def parse(*argv: str) -> tuple[Any, ...]:
    return SFTParser().parse_recipe([*CONFIG, *argv])


def test_flags_become_fields() -> None:
    *_, adapter = parse(
        *("--variational_rank", "4", "--variational_scale", "0.5", "--variational_blocks", "9", "--noise_blocks", "0")
    )
    config = adapter.peft_config()
    assert isinstance(config, DIPNetConfig) and not config.projected
    assert (config.variational_rank, config.variational_scale, config.variational_blocks) == (4, 0.5, 9)
    *_, adapter = parse("--variational_rank", "2", "--variational_blocks", "0,3")
    assert adapter.peft_config().variational_blocks == [0, 3] and adapter.peft_config().projected


def test_each_training_seed_has_a_posterior_of_its_own(tmp_path: Path) -> None:
    def start(seed: int) -> list[Tensor]:
        options = ("--seed", str(seed), "--variational_rank", "2", "--output_dir", str(tmp_path), "--train_size", "2")
        data, training, adapter = SFTParser().parse_recipe(["--config", str(QUICKSTART), *options])
        trainer = make_trainer(data, training, adapter)
        assert trainer.model.peft_config["default"].noise_seed == seed
        return [leaf.weight for _, leaf in posteriors(trainer.model).values()]

    first, again, other = start(1), start(1), start(2)
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_only_our_adapter_has_one(adapter: str) -> None:
    with pytest.raises(ValueError, match=rf"variational_rank=4 contradicts adapter='{adapter}'.*noise_blocks '0'"):
        parse("--adapter", adapter, "--variational_rank", "4")


def test_a_dry_run_describes_it() -> None:
    arguments = parse("--variational_rank", "4", "--noise_blocks", "0")
    text = "\n".join(describe_run(*arguments, architectures=ARCHITECTURES))
    assert "posterior   of rank 4 in 9 of 36 blocks, model.layers.27 to model.layers.35; initially 2 x" in text
    assert "hybrid optimiser" in text and "noise " not in text
    assert "sharing the 27 blocks below" in text
    assert "63 tensors, learning rate 0.000125, weight decay 0" in text  # seven layers in nine blocks, 5e-4 / 4
