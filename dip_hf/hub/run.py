"""A finished run on disk, read and checked before any of it is pushed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from huggingface_hub import ModelCard

from dip_hf.adapter_files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    base_revision,
    check_adapter_folder,
    check_inside,
    declared_shapes,
    read_config,
)
from dip_hf.hub.record import DATA_NAME, ENVIRONMENT_NAME, TRAINING_NAME
from dip_hf.hub.settings import check_repo_id, is_repo_id
from dip_hf.model_files import check_model_folder, weight_digests
from dip_hf.peft_compat import DUMMY_TARGET_MODULES, EMBEDDING_LAYER_NAMES, is_own


MODEL = "model"
"""The kind of a run that trained the whole model; an adapter's is its PEFT type."""


@dataclass(frozen=True)
class FinishedRun:
    """What the folder of a run holds.

    Attributes:
        folder: where it lies.
        kind: the adapter's PEFT type, such as "DIPNET" or "LORA", or `MODEL`.
        adapter: content of its adapter_config.json; empty for a whole model.
        training: content of training_config.yaml; None where the run wrote none.
        environment: content of environment.json; None where the run wrote none.
        base_model: the base's name on the Hub; None for a whole model of unknown origin.
        datasets: what it was trained on, as far as known.
        has_data: whether training_data.yaml is there, and of these weights.
    """

    folder: Path
    kind: str
    adapter: dict[str, Any]
    training: dict[str, Any] | None
    environment: dict[str, Any] | None
    base_model: str | None
    datasets: tuple[str, ...]
    has_data: bool = False

    @property
    def base_revision(self) -> str | None:
        """The base's branch, tag or commit; None for main, and for a whole model."""
        return base_revision(self.adapter)

    @property
    def noise_only(self) -> bool:
        """Whether it is a DIPNet adapter of noise alone, by its configuration."""
        return self.kind == "DIPNET" and self.adapter.get("target_modules") == DUMMY_TARGET_MODULES

    @property
    def has_plain_weights(self) -> bool:
        """Whether an adapter has weights besides a DIPNet adapter's own, so that a plain LoRA copy makes sense."""
        return any(not is_own(name) for name in declared_shapes(self.folder))

    @property
    def embedding_rows(self) -> int | None:
        """Rows of the embeddings or the head that an adapter brings, as many as its base must have; None without."""
        if not (self.folder / WEIGHTS_NAME).is_file():
            return None
        shapes = declared_shapes(self.folder)
        owners = {name.removesuffix(".weight").removesuffix(".base_layer"): shape for name, shape in shapes.items()}
        return next((shape[0] for name, shape in owners.items() if name.split(".")[-1] in EMBEDDING_LAYER_NAMES), None)


def read_run(folder: str | Path, base_model: str | None = None, datasets: list[str] | None = None) -> FinishedRun:
    """Read a finished run.

    Args:
        folder: what training wrote.
        base_model: the base's name on the Hub; default: what the run itself says.
        datasets: what it was trained on; default: what the run's record of it says, or else the folder's card.

    Raises:
        ValueError: weights or config are missing, pickled, truncated or damaged, or the base is known as a local
            folder only. Names the field, the value and the remedy.
    """
    folder = Path(folder)
    card = _card_metadata(folder)
    environment = read_mapping(folder / ENVIRONMENT_NAME)
    base = base_model or _only(card.get("base_model"), folder)
    if (folder / CONFIG_NAME).is_file():
        check_adapter_folder(folder)
        adapter = dict(read_config(folder))
        base = base_model or adapter.get("base_model_name_or_path")
        kind = str(adapter["peft_type"])
        if not base:
            raise ValueError(f"base_model is missing: {folder / CONFIG_NAME} names none; give its name on the Hub")
        if base_model is None:
            _check_public(str(base), folder, (environment or {}).get("base_is_local") is True)
    else:
        if others := other_adapters(folder):
            raise ValueError(
                f"{folder} holds adapters in folders of their own ({', '.join(others)}), as PEFT saves those that are "
                f"not called 'default'; give one of these folders, such as {folder / others[0]}"
            )
        check_model_folder("folder", folder)
        if "model_type" not in (read_mapping(folder / "config.json") or {}):
            raise ValueError(f"{folder / 'config.json'} names no model_type; save or download the model again")
        kind, adapter = MODEL, {}
        if base_model is None and base and not _is_on_hub(str(base), folder):
            base = None  # a card may name a folder
    data = _read_data(folder)
    known = data.get("families") or data.get("dataset_name") or card.get("datasets") or []
    names = datasets if datasets is not None else [known] if isinstance(known, str) else known
    return FinishedRun(
        folder=folder,
        kind=kind,
        adapter=adapter,
        training=read_mapping(folder / TRAINING_NAME),
        environment=environment,
        base_model=None if base is None else str(base),
        datasets=tuple(str(name) for name in names),
        has_data=bool(data),
    )


def other_adapters(folder: Path) -> list[str]:
    """Folders inside a run's that hold an adapter, but for its checkpoints'; PEFT saves one there by its name."""
    names = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
    return [name for name in names if not name.startswith("checkpoint-")]


def local_base(base: str, folder: Path) -> Path | None:
    """A base's absolute path, seen from here or from any folder above the run, where training may have begun.

    Args:
        base: its name, as the run knows it.
        folder: of the run; need not exist.

    Returns:
        None where there is none, or no name. A folder that happens to be called so and holds no model is none.
    """
    places = (Path.cwd(), *folder.resolve().parents) if base else ()
    return next((place / base for place in places if (place / base / "config.json").is_file()), None)


def _is_on_hub(base: str, folder: Path) -> bool:
    """Whether a base is a name on the Hub, and no folder that is seen from here or from above the run."""
    return is_repo_id(base) and not Path(base).exists() and local_base(base, folder) is None


def _check_public(base: str, folder: Path, was_local: bool) -> None:
    """Refuse a base that is a local folder, or was one where the run began, or that is no name on the Hub.

    A relative path of two parts may look like a name on the Hub, and be a stranger's there.
    """
    remedy = "give base_model, its name on the Hub, so that others can load the adapter"
    if was_local or local_base(base, folder) is not None:
        raise ValueError(f"base_model={base!r}, which the adapter was trained on, is a local folder: {remedy}")
    try:
        check_repo_id("base_model", base)
    except ValueError as error:
        raise ValueError(
            f"base_model={base!r}, which the adapter was trained on, is no name on the Hub: {remedy}"
        ) from error


def _card_metadata(folder: Path) -> dict[str, Any]:
    """The YAML head of the folder's README.md; empty where there is none."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    check_inside(folder, path)
    try:
        head = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the head of {path} is no YAML mapping ({error}); mend it, or remove the file") from error
    for name in ("datasets", "base_model"):
        _check_names(head, name, path)
    return head


def _read_data(folder: Path) -> dict[str, Any]:
    """The record of what the folder's weights were trained on; empty where there is none of these weights."""
    data = read_mapping(folder / DATA_NAME) or {}
    for name in ("families", "dataset_name"):
        _check_names(data, name, folder / DATA_NAME)
    return data if data and data.get("weights") == weight_digests(folder) else {}


def _check_names(content: dict[str, Any], name: str, path: Path) -> None:
    value = content.get(name)
    if not isinstance(value, (str, list, NoneType)):
        raise ValueError(f"{name}={value!r} in {path} must be a name or a list of names; mend it")


def _only(bases: Any, folder: Path) -> Any:
    """The base that a card names, as a text or as a list of one."""
    if not isinstance(bases, list):
        return bases
    if len(bases) > 1:
        raise ValueError(f"base_model={bases} in {folder / 'README.md'} are several; give base_model, the one it is")
    return bases[0] if bases else None


def read_mapping(path: Path) -> dict[str, Any] | None:
    """A YAML (or JSON) file's mapping; None where there is no file."""
    if not path.is_file():
        return None
    check_inside(path.parent, path)
    load = json.loads if path.suffix == ".json" else yaml.safe_load  # a tokenizer's file would take YAML minutes
    try:
        content = load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, or save the run again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no mapping; remove it, or save the run again")
    return content
