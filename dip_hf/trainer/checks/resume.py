"""A checkpoint to go on from, against the adapter that is to go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn

from dip_hf.adapter_files import CONFIG_NAME, read_config
from dip_hf.blocks import select_blocks
from dip_hf.dipnet import DIPNetConfig


_OF_LORA = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "init_lora_weights",
    "use_rslora",
    "use_dora",
    "bias",
    "lora_bias",
)
"""What of LoRA its weights, or what they do, depend on."""


def check_resumed(model: nn.Module, checkpoint: str) -> None:
    """Say which option has changed, where torch and PEFT would only miss weights, or parameters of the optimiser.

    Args:
        model: with the adapters that are trained.
        checkpoint: the folder to go on from.

    Raises:
        ValueError: the checkpoint's adapter is of another kind than the model's or has another LoRA; or its DIPNet
            noises or samples other blocks, with another rank, or learns what the model's does not.
    """
    if not isinstance(model, PeftModel):
        return
    for name, own in model.peft_config.items():
        folder = Path(checkpoint, name)
        if name == "default" or (name in model.active_adapters and not (folder / CONFIG_NAME).is_file()):
            folder = Path(checkpoint)  # as Trainer finds it
        if not (folder / CONFIG_NAME).is_file():
            continue
        for option, value, before in _changes(own, read_config(folder), folder):
            raise ValueError(
                f"{option}={value!r}, but the checkpoint {folder} has {before!r}; resume with the adapter "
                "configuration that it was trained with, or begin a new run in another output_dir."
            )


def _changes(own: PeftConfig, content: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, Any, Any]]:
    """Options that differ, with the value now and the one in the checkpoint; those that the others follow from first.

    Args:
        own: the model's.
        content: of the checkpoint's configuration file.
        folder: where that is.
    """
    kind, before = str(own.peft_type.value), content.get("peft_type")
    if kind != before:
        yield "peft_type", kind, before
    if isinstance(own, DIPNetConfig):
        saved = DIPNetConfig.from_pretrained(str(folder))
        for option in _options(own, saved):
            if _meaning(own, option, own) != _meaning(saved, option, own):
                yield option, getattr(own, option), getattr(saved, option)
    if isinstance(own, LoraConfig):
        for option in _OF_LORA:
            value, saved_value = (_comparable(found) for found in (getattr(own, option), content.get(option)))
            if option in content and value != saved_value:
                yield option, value, saved_value


def _comparable(value: Any) -> Any:
    """A list of names, which PEFT writes in no order, as a sorted one, of numbers as it is; an empty one as None."""
    if not isinstance(value, list | set | tuple):
        return value
    return (list(value) if all(isinstance(item, int) for item in value) else sorted(value)) or None


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
