"""A checkpoint to go on from, against the adapter that is to go on."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from dip_hf.adapter_files import CONFIG_NAME, read_config
from dip_hf.blocks import select_blocks
from dip_hf.dipnet import DIPNetConfig, DIPPeftType


def check_resumed(model: nn.Module, checkpoint: str | bool | None, output_dir: str | None) -> None:
    """Say which option has changed, where torch and PEFT would only miss weights, or parameters of the optimiser.

    Args:
        model: with the adapters that are trained.
        checkpoint: as Trainer's `resume_from_checkpoint`: a folder, or True for the last one in `output_dir`.
        output_dir: of the training arguments.

    Raises:
        ValueError: the checkpoint's DIPNet adapter noises or samples other blocks than the model's, with another
            rank, or learns what the model's does not.
    """
    if checkpoint is True:
        checkpoint = get_last_checkpoint(output_dir) if output_dir is not None and Path(output_dir).is_dir() else None
    if not checkpoint or not isinstance(model, PeftModel):
        return
    for name, own in model.peft_config.items():
        folder = Path(checkpoint) if name == "default" else Path(checkpoint, name)
        if not isinstance(own, DIPNetConfig) or not (folder / CONFIG_NAME).is_file():
            continue
        if read_config(folder).get("peft_type") != DIPPeftType.DIPNET.value:
            continue
        saved = DIPNetConfig.from_pretrained(str(folder))
        names = own.all_block_names or []
        for option in ("noise_blocks", "learn_noise", "variational_rank", "variational_blocks"):
            if option == "variational_blocks" and own.variational_rank == 0:
                continue
            mine, theirs = getattr(own, option), getattr(saved, option)
            if option.endswith("blocks") and mine not in (0, []) and theirs not in (0, []):
                changed = select_blocks(names, mine, option) != select_blocks(names, theirs, option)
            else:
                changed = mine != theirs
            if changed:
                raise ValueError(
                    f"{option}={mine!r}, but the checkpoint {folder} has {theirs!r}; resume with the adapter "
                    "configuration that it was trained with, or begin a new run in another output_dir."
                )
