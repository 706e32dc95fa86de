"""What is evaluated: the base itself, adapters on it, or whole models; checked before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dip_hf.adapter_files import CONFIG_NAME, check_adapter_folder


@dataclass(frozen=True)
class Checkpoint:
    """One column of the comparison.

    Args:
        name: what the table calls it.
        path: folder of an adapter or of a whole model; None is the base itself.
    """

    name: str
    path: str | None = None

    @classmethod
    def parse(cls, text: str) -> Checkpoint:
        """Read "name" (the base itself) or "name=folder".

        Raises:
            ValueError: an empty name or folder.
        """
        name, equals, path = text.partition("=")
        if not name or (equals and not path):
            raise ValueError(f"checkpoints: {text!r} must be a name alone (the base itself) or name=folder")
        return cls(name, path or None)

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter rather than a whole model."""
        return self.path is not None and (Path(self.path) / CONFIG_NAME).is_file()

    @property
    def kind(self) -> str:
        """ "base", "model", or the adapter's PEFT type, such as "LORA" or "DIPNET"."""
        if self.path is None:
            return "base"
        if not self.is_adapter:
            return "model"
        return str(json.loads((Path(self.path) / CONFIG_NAME).read_text(encoding="utf-8")).get("peft_type"))


def check_checkpoints(checkpoints: Sequence[Checkpoint], model: str) -> None:
    """Refuse checkpoints that cannot be loaded safely and whole.

    Args:
        checkpoints: at least one, with distinct names.
        model: the base: a folder, or a name on the Hub (which is not looked up here).

    Raises:
        ValueError: none, two of one name, a missing folder, or missing, pickled or truncated weights. Names the field,
            the value and the remedy.
    """
    if not checkpoints:
        raise ValueError("checkpoints is empty: name at least one, as `base` (the model itself) or `name=folder`")
    names = [checkpoint.name for checkpoint in checkpoints]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"checkpoints: the name {repeated[0]!r} is given twice; give every checkpoint its own")
    if Path(model).is_dir():
        _check_model_folder("model", model)
    elif Path(model).exists() or model.startswith((".", "/", "~")):
        raise ValueError(f"model={model!r} is no folder: give a model's folder, or its name on the Hub")
    for checkpoint in checkpoints:
        if checkpoint.path is None:
            continue
        field = f"checkpoints: {checkpoint.name}"
        if not Path(checkpoint.path).is_dir():
            raise ValueError(f"{field}={checkpoint.path!r} does not exist: give the folder that training wrote")
        if checkpoint.is_adapter:
            try:
                check_adapter_folder(checkpoint.path)
            except ValueError as error:
                raise ValueError(f"{field}={checkpoint.path!r}: {error}") from error
        else:
            _check_model_folder(field, checkpoint.path)


def _check_model_folder(field: str, folder: str) -> None:
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"{field}={folder!r} holds neither an adapter ({CONFIG_NAME}) nor a model (config.json): give the folder "
            "that `save_pretrained` wrote"
        )
    weights = sorted(Path(folder).glob("*.safetensors"))
    if not weights:
        pickled = sorted(path.name for path in Path(folder).glob("*.bin"))
        raise ValueError(
            f"{field}={folder!r} has no *.safetensors file"
            + (f", only {', '.join(pickled)}, and pickled weights can execute code when loaded" if pickled else "")
            + ": save the model again with safetensors"
        )
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{field}: {path} is truncated or damaged ({error}); save or download it again"
            ) from error
