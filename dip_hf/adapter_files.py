"""Checks on an adapter folder before anything in it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open


CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"


def check_adapter_folder(folder: str | Path, require_weights: bool = True) -> None:
    """Refuse an adapter folder that cannot be loaded safely and whole.

    Args:
        folder: local folder of a PEFT adapter.
        require_weights: refuse a folder without a weight file too (a saved config alone has none).

    Raises:
        ValueError: the folder or one of its files is missing, the weights are pickled, truncated or otherwise no
            safetensors file, or the config is no JSON object. Names the file and the remedy.
    """
    folder = Path(folder)
    config, weights, pickled = folder / CONFIG_NAME, folder / WEIGHTS_NAME, folder / PICKLED_NAME
    if not config.is_file():
        raise ValueError(f"No {CONFIG_NAME} in {folder}: give the folder that `save_pretrained` wrote.")
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config} is no valid JSON ({error}); save or download the adapter again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{config} holds no JSON object; save or download the adapter again.")
    if weights.is_file():
        try:
            with safe_open(weights, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{weights} is truncated or damaged ({error}); save or download the adapter again."
            ) from error
    elif pickled.exists():
        raise ValueError(
            f"{pickled} is a pickled weight file, which can execute code when loaded; dip_hf reads only safetensors. "
            "Convert it with PEFT where you trust its origin, and save again."
        )
    elif require_weights:
        raise ValueError(f"No {WEIGHTS_NAME} in {folder}: the adapter's weights are missing.")
