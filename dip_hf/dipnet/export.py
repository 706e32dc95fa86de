"""A DIPNet adapter as a plain LoRA adapter."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path

from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from dip_hf.adapter_files import WEIGHTS_NAME, check_adapter_folder
from dip_hf.dipnet.config import DIPNetConfig
from dip_hf.peft_compat import is_own


def export_lora(adapter: str | Path | PeftModel, output: str | Path, adapter_name: str = "default") -> Path:
    """Write a DIPNet adapter as a plain LoRA adapter that PEFT loads without dip_hf.

    Its logits are those of the DIPNet adapter's noise-free pass: the LoRA weights are copied, the noise left out.

    Args:
        adapter: an adapter's folder, or a model that holds it.
        output: the new adapter's folder; must not exist, or be empty.
        adapter_name: which adapter of a model.

    Returns:
        `output` as a path.

    Raises:
        ValueError: the adapter is damaged, lacks the modules that it is to have saved, is no DIPNet one, or has no
            LoRA weights; `output` is in use. Nothing is written then.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output={output} exists and is not empty; name a new folder.")
    if isinstance(adapter, PeftModel):
        with tempfile.TemporaryDirectory() as folder:
            adapter.save_pretrained(folder, selected_adapters=[adapter_name])
            source = Path(folder) if adapter_name == "default" else Path(folder) / adapter_name
            return _export_folder(source, output)
    return _export_folder(Path(adapter), output)


def _export_folder(source: Path, output: Path) -> Path:
    check_adapter_folder(source)
    config = DIPNetConfig.from_pretrained(str(source))
    names = [field.name for field in dataclasses.fields(LoraConfig) if field.init]
    lora = LoraConfig(**{name: getattr(config, name) for name in names})
    weights = {name: tensor for name, tensor in load_file(source / WEIGHTS_NAME).items() if not is_own(name)}
    if not weights:
        raise ValueError(f"adapter={source} has noise only: its noise-free pass is the base model, nothing to export.")
    # Which modules the names fit, only the base could tell: all of them are missing, or none is taken to be
    saved = config.modules_to_save
    if saved and not any(f"{module}." in name for module in saved for name in weights):
        raise ValueError(
            f"modules_to_save={list(saved)}: {source / WEIGHTS_NAME} holds nothing of them; save or download the "
            "adapter again, or take them out of adapter_config.json."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the target and moved there whole: a reader never sees half an adapter.
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        staging = Path(folder) / "lora"
        lora.save_pretrained(str(staging))
        save_file(weights, staging / WEIGHTS_NAME, metadata={"format": "pt"})
        if output.exists():
            output.rmdir()
        shutil.move(staging, output)
    return output
