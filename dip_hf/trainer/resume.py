"""A checkpoint to go on from, against the adapter that is to go on."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from torch import nn

from dip_hf.adapter_files import CONFIG_NAME, read_config
from dip_hf.blocks import select_blocks
from dip_hf.dipnet import DIPNetConfig, DIPPeftType
from dip_hf.trainer.checkpoints import last_checkpoint


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
        checkpoint = None if output_dir is None else last_checkpoint(output_dir)
    if not checkpoint or not isinstance(model, PeftModel):
        return
    for name, own in model.peft_config.items():
        folder = Path(checkpoint, name)
        if name == "default" or (name in model.active_adapters and not (folder / CONFIG_NAME).is_file()):
            folder = Path(checkpoint)  # as Trainer finds it
        if not isinstance(own, DIPNetConfig) or not (folder / CONFIG_NAME).is_file():
            continue
        if read_config(folder).get("peft_type") != DIPPeftType.DIPNET.value:
            continue
        saved = DIPNetConfig.from_pretrained(str(folder))
        for option in _options(own, saved):
            if _meaning(own, option, own) != _meaning(saved, option, own):
                raise ValueError(
                    f"{option}={getattr(own, option)!r}, but the checkpoint {folder} has {getattr(saved, option)!r}; "
                    "resume with the adapter configuration that it was trained with, or begin a new run in another "
                    "output_dir."
                )


def _options(own: DIPNetConfig, saved: DIPNetConfig) -> list[str]:
    """Options on which the trained parameters depend, those of noise and of a posterior where both have one."""
    found = ["noise_blocks", "variational_rank"]
    if own.projected and saved.projected:
        found.append("learn_noise")
    if own.variational_rank > 0 and saved.variational_rank > 0:
        found += ["variational_blocks", "variational_scale"]
    return found


def _meaning(config: DIPNetConfig, option: str, own: DIPNetConfig) -> object:
    """An option's value, as what it does to the model."""
    value = getattr(config, option)
    if option == "variational_scale":
        return value > 0  # the initial value itself is the checkpoint's
    if not option.endswith("blocks"):
        return value
    if option == "noise_blocks" and not config.projected:
        return []
    try:
        return select_blocks(own.all_block_names or [], value, option)
    except ValueError:
        return value  # of a model of another depth
