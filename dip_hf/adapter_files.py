"""Checks on an adapter folder before anything in it is loaded."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open


CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
CONVERSION = (
    f"convert it with safetensors.torch.save_file(torch.load({PICKLED_NAME!r}, weights_only=True), {WEIGHTS_NAME!r})"
)
"""What to do about a pickled file: `weights_only` runs no code from it."""

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor names of a weight file, and the shapes that its header declares."""
LARGEST_CONFIG = 1 << 20
"""Bytes; a config that lists every module of a large model has a few hundred thousand."""

_REVISION = re.compile(r"(?!-|.*\.\.)[\w.+@-]+(?:/[\w.+@-]+)*")
"""What Git calls branches, tags and commits, and neither an option of a command nor a path out of a folder."""


def check_adapter_folder(folder: str | Path, require_weights: bool = True) -> None:
    """Refuse an adapter folder that cannot be loaded safely and whole.

    The weights are read once, tensor by tensor, and never unpickled. A header that declares other sizes than the
    file has is refused before anything is allocated.

    Args:
        folder: local folder of a PEFT adapter.
        require_weights: refuse a folder without a weight file too (a saved config alone has none).

    Raises:
        ValueError: the folder or one of its files is missing, or a link that leads out of the folder; the weights are
            pickled, truncated, otherwise no safetensors file, or not finite; the config is no JSON object, names no
            type of adapter, or is larger than `LARGEST_CONFIG`. Names the file and the remedy.
    """
    folder = Path(folder)
    if not isinstance(read_config(folder).get("peft_type"), str):
        raise ValueError(f"{folder / CONFIG_NAME} names no peft_type; save or download the adapter again.")
    weights, pickled = folder / WEIGHTS_NAME, folder / PICKLED_NAME
    if weights.is_file():
        declared_shapes(folder)
        _check_finite(weights)
    elif pickled.exists():
        raise ValueError(
            f"{pickled} is a pickled weight file, which can execute code when loaded; dip_hf reads only safetensors. "
            f"Save it again, or {CONVERSION}."
        )
    elif require_weights:
        raise ValueError(f"No {WEIGHTS_NAME} in {folder}: the adapter's weights are missing; save or copy it again.")


def read_config(folder: Path) -> Mapping[str, Any]:
    """The JSON object in a folder's config file.

    Raises:
        ValueError: see `check_adapter_folder`.
    """
    config = folder / CONFIG_NAME
    if not config.is_file():
        raise ValueError(f"No {CONFIG_NAME} in {folder}: give the folder that `save_pretrained` wrote.")
    check_inside(folder, config)
    size = config.stat().st_size
    if size > LARGEST_CONFIG:
        raise ValueError(f"{config} has {size} bytes, more than {LARGEST_CONFIG}; save or download the adapter again.")
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config} is no valid JSON ({error}); save or download the adapter again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{config} holds no JSON object; save or download the adapter again.")
    return content


def base_revision(config: Mapping[str, Any]) -> str | None:
    """Branch, tag or commit at which an adapter's base on the Hub was trained on; None for main.

    Args:
        config: content of the adapter's config file.

    Raises:
        ValueError: it is none that Git could have.
    """
    revision = config.get("revision")
    if revision is not None and not (isinstance(revision, str) and _REVISION.fullmatch(revision)):
        raise ValueError(
            f"revision={revision!r} in {CONFIG_NAME} is no branch, tag or commit of the base; correct it, or set it "
            "to null for main."
        )
    return None if revision == "main" else revision


def declared_shapes(folder: Path) -> Shapes:
    """Names and shapes that the header of a folder's weight file declares; nothing is allocated for the tensors.

    Raises:
        ValueError: the file is a link out of the folder, or the header does not fit it.
    """
    weights = folder / WEIGHTS_NAME
    check_inside(folder, weights)
    try:
        with safe_open(weights, framework="pt") as file:  # compares shapes, types, offsets and the file's length
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{weights} is truncated or damaged ({error}); save or download the adapter again."
        ) from error


def fetch_weights(repository: str, subfolder: str | None, options: Mapping[str, Any]) -> Path:
    """Folder in the Hub's cache that holds an adapter's config and its safetensors file, fetched where missing.

    PEFT falls back on the pickled file of a repository that has no other, so having none is an error here.

    Args:
        repository: its id on the Hub.
        subfolder: of the adapter in it.
        options: of which those that `hf_hub_download` knows are passed to it.

    Raises:
        ValueError: the repository cannot be found, or lacks one of the files.
    """
    known = {name: options[name] for name in inspect.signature(hf_hub_download).parameters if name in options}
    files = []
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        try:
            files.append(Path(hf_hub_download(repository, name, subfolder=subfolder, **known)))
        except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError) as error:
            raise ValueError(
                f"No {name} in {repository}{f'/{subfolder}' if subfolder else ''}: give a folder that exists, or a "
                f"repository that has this file ({PICKLED_NAME} is pickled and not read): {error}"
            ) from error
    if files[0].parent != files[1].parent:
        raise ValueError(f"{repository} changed while it was fetched; load it again, at one revision.")
    return files[0].parent


def _check_finite(weights: Path) -> None:
    with safe_open(weights, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (no iterator of its own)
            tensor = file.get_tensor(name)
            if tensor.is_floating_point() and tensor.itemsize > 1 and not torch.isfinite(tensor).all():
                raise ValueError(f"{weights}: {name} holds NaN or infinity; the training run diverged: save another.")


def check_inside(folder: Path, file: Path) -> None:
    """Refuse a file that is a link out of its folder.

    A link may lead within the folder, or, in a snapshot of the Hub's cache, to that repository's own blobs.

    Raises:
        ValueError: names the file and where it leads.
    """
    root, target = folder.resolve(), file.resolve()
    allowed = [root]
    for parent in root.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            allowed.append(parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise ValueError(f"{file} is a link that leads out of its folder, to {target}; copy the file there instead.")
