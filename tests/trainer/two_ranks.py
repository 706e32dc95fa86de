"""What `test_trainer_ranks.py` launches with torchrun: every method on two ranks; results go to the folder named."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from dip_hf import DIPNetConfig, DIPSFTTrainer
from tests.trainer.by_hand import recorded_step
from tests.trainer.methods import EVERY_MEAN, METHODS, Method
from tests.trainer.tiny import ADAPTER, Uncounted, gradients, make_trainer, tokenised, two_rows


def noised_input(method: Method, folder: Path) -> torch.Tensor:
    """The input of the last block in the first step, as that block sees it, where every row is the same."""
    rows = Dataset.from_list([tokenised()[0]] * 8)
    options = {**method.options, "per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    trainer = make_trainer(folder, method.config(), options, data=rows)
    seen: list[torch.Tensor] = []

    def keep(block: Any, args: tuple) -> None:
        seen.append(args[0].detach().clone())

    block = next(m for name, m in trainer.model.named_modules() if name.endswith("layers.2"))
    block.register_forward_pre_hook(keep)
    trainer.train()
    return seen[0]


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()  # see conftest.py
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    results: dict[str, Any] = {}
    for name, method in METHODS.items():
        options = {**method.options, "ddp_backend": "gloo"}
        options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        results[name] = {"noised": noised_input(method, folder / "run")}
        if "ranks" not in method.inapplicable:
            results[name]["gradients"] = gradients(folder / "run", method.config(), options)
        elif not method.noisy:
            results[name]["step"] = recorded_step(folder / "run", method.config(), options)
    for name, cls in (("own count", DIPSFTTrainer), ("no count", Uncounted)):
        options = {**EVERY_MEAN, "average_tokens_across_devices": name == "no count", "ddp_backend": "gloo"}
        results[name] = gradients(folder / "run", DIPNetConfig(**ADAPTER), options, data=two_rows(), cls=cls)
    torch.save(results, folder / f"rank_{rank}.pt")
    gc.collect()  # a DDP wrapper must not outlive its process group, see recipes/sft.py
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
