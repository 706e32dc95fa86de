"""The files of whole models and bases: which there are, and whether they can be loaded safely and whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from dip_hf.adapter_files import CONFIG_NAME, WEIGHTS_NAME


def weight_digests(folder: str | Path) -> dict[str, str]:
    """SHA-256 of each weight file of an adapter or a whole model, by file name; tells whether it was trained since."""
    is_adapter = (Path(folder) / CONFIG_NAME).is_file()
    files = [Path(folder) / WEIGHTS_NAME] if is_adapter else model_weights(folder)
    digests = {}
    for path in files:
        if not path.is_file():
            continue
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def check_base(field: str, base: str) -> None:
    """Refuse a base model that is no folder and cannot be a name on the Hub, or a folder that holds no model.

    Args:
        field: which names it, for the error message.
        base: a folder, or a name on the Hub (which is not looked up here).

    Raises:
        ValueError: see `check_model_folder`; names the field, the value and the remedy.
    """
    if (Path(base) / CONFIG_NAME).is_file() and not (Path(base) / "config.json").is_file():
        raise ValueError(f"{field}={base!r} is an adapter: give the model that it was trained on")
    if Path(base).is_dir():
        check_model_folder(field, base)
    elif Path(base).exists() or base.startswith((".", "/", "~")):
        raise ValueError(f"{field}={base!r} is no folder: give a model's folder, or its name on the Hub")


def model_weights(folder: str | Path) -> list[Path]:
    """Weight files of a whole model, those that transformers loads from a folder; empty where it would unpickle.

    Raises:
        ValueError: the index of its parts is damaged, or leads out of the folder.
    """
    whole, index = Path(folder) / SAFE_WEIGHTS_NAME, Path(folder) / SAFE_WEIGHTS_INDEX_NAME
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return []
    try:
        parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({error!r}); save or download the model again") from error
    if not all(isinstance(part, str) and Path(part).name == part for part in parts):
        raise ValueError(f"{index} names files outside its folder ({parts}); save or download the model again")
    return [Path(folder) / part for part in parts]


def check_model_folder(field: str, folder: str | Path) -> None:
    """Refuse a whole model's folder that cannot be loaded safely and whole.

    Args:
        field: which names it, for the error message.
        folder: what `save_pretrained` wrote.

    Raises:
        ValueError: no model, or its weights are missing, pickled or truncated; names the field, the value and the
            remedy.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"{field}={str(folder)!r} holds neither an adapter ({CONFIG_NAME}) nor a model (config.json): give the "
            "folder that `save_pretrained` wrote"
        )
    weights = model_weights(folder)
    if not weights:
        pickled = sorted(path.name for path in Path(folder).glob("*.bin"))
        raise ValueError(
            f"{field}={str(folder)!r} has no {SAFE_WEIGHTS_NAME}, nor the index of its parts"
            + (f", only {', '.join(pickled)}, and pickled weights can execute code when loaded" if pickled else "")
            + ": save the model again with safetensors"
        )
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(
                f"{field}: {path} is missing, truncated or damaged ({error}); save or download it again"
            ) from error
