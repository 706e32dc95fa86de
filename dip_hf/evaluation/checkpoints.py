"""What is evaluated, and how it predicts: the base, adapters on it, or whole models; checked before anything loads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from dip_hf.adapter_files import CONFIG_NAME, WEIGHTS_NAME, check_adapter_folder, read_config


SPELLING = (
    "`name` (the base itself) or `name=folder`, `name=folder+folder` (an ensemble), and behind it `,samples=10`, "
    "`,dropout` or `,temperature`"
)


@dataclass(frozen=True)
class Checkpoint:
    """One column of the comparison: weights, and how predictions are made with them.

    Args:
        name: what the table calls it.
        path: folder of an adapter or of a whole model, or several LoRA adapters' joined by "+"; None is the base.
        samples: number of samples to average over; None: the evaluation's own number, where there is something to
            sample.
        dropout: sample a LoRA adapter's dropout.
        temperature: divide the logits by a temperature fitted on the validation split.
    """

    name: str
    path: str | None = None
    samples: int | None = None
    dropout: bool = False
    temperature: bool = False

    @classmethod
    def parse(cls, text: str) -> Checkpoint:
        """Read "name" (the base itself), "name=folder" or "name=folder+folder", each with options behind commas.

        Raises:
            ValueError: an empty name or folder, a folder without a name, or an option that is none.
        """
        head, *options = text.split(",")
        name, equals, path = head.partition("=")
        if not name or (equals and not all(path.split("+"))):
            raise ValueError(f"checkpoints: {text!r} must be {SPELLING}")
        if not equals and ("/" in name or any((Path(name) / file).is_file() for file in (CONFIG_NAME, "config.json"))):
            raise ValueError(
                f"checkpoints: {text!r} is spelled like a folder, but a name alone stands for the base; write "
                f"NAME={name} for a folder, and call the base by another name"
            )
        fields: dict[str, Any] = {}
        for option in options:
            key, _, value = option.partition("=")
            if key in fields:
                raise ValueError(f"checkpoints: {text!r} gives {key!r} twice; remove one")
            if option in ("dropout", "temperature"):
                fields[key] = True
            elif key == "samples" and value.isdecimal():
                fields[key] = int(value)
            else:
                raise ValueError(f"checkpoints: {text!r}: {option!r} is no option; spell a checkpoint {SPELLING}")
        return cls(name, path or None, **fields)

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders to load; none for the base, several for an ensemble."""
        return () if self.path is None else tuple(self.path.split("+"))

    @property
    def is_adapter(self) -> bool:
        """Whether the (first) folder holds an adapter rather than a whole model."""
        return self.path is not None and (Path(self.folders[0]) / CONFIG_NAME).is_file()

    @property
    def kind(self) -> str:
        """ "base", "model", or the (first) adapter's PEFT type, such as "LORA" or "DIPNET"."""
        if self.path is None:
            return "base"
        return str(read_config(Path(self.folders[0])).get("peft_type")) if self.is_adapter else "model"

    def num_samples(self, default: int) -> int:
        """k, the number of samples to average over; 0 for a plain pass. Members of an ensemble are no samples.

        Args:
            default: of the evaluation.
        """
        if self.samples is not None:
            return self.samples
        return default if self.dropout or self.kind == "DIPNET" else 0


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


def check_checkpoints(checkpoints: Sequence[Checkpoint], model: str, num_samples: int = 0) -> None:
    """Refuse checkpoints that cannot be loaded safely and whole, or cannot predict as they are asked to.

    Args:
        checkpoints: at least one, with distinct names.
        model: the base: a folder, or a name on the Hub (which is not looked up here).
        num_samples: the evaluation's own number, for checkpoints that name none.

    Raises:
        ValueError: none, two of one name, a missing folder, or missing, pickled or truncated weights; samples of what
            has none; an ensemble of anything but LoRA adapters. Names the field, the value and the remedy.
    """
    if not checkpoints:
        raise ValueError("checkpoints is empty: name at least one, as `base` (the model itself) or `name=folder`")
    names = [checkpoint.name for checkpoint in checkpoints]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"checkpoints: the name {repeated[0]!r} is given twice; give every checkpoint its own")
    check_base("model", model)
    for checkpoint in checkpoints:
        field = f"checkpoints: {checkpoint.name}"
        for folder in checkpoint.folders:
            _check_folder(field, folder)
        _check_prediction(field, checkpoint, num_samples)
    if num_samples > 0 and not any(one.samples is None and one.num_samples(num_samples) for one in checkpoints):
        kinds = ", ".join(checkpoint.kind for checkpoint in checkpoints)
        raise ValueError(
            f"num_samples={num_samples} needs a checkpoint with a DIPNet adapter or `,dropout`, got {kinds}: add one, "
            "or set num_samples=0"
        )


def _check_folder(field: str, folder: str) -> None:
    if not Path(folder).is_dir():
        raise ValueError(f"{field}={folder!r} does not exist: give the folder that training wrote")
    if (Path(folder) / CONFIG_NAME).is_file():
        try:
            check_adapter_folder(folder)
        except ValueError as error:
            raise ValueError(f"{field}={folder!r}: {error}") from error
    else:
        check_model_folder(field, folder)


def _check_prediction(field: str, checkpoint: Checkpoint, default: int) -> None:
    """Refuse what `DIPLM` would refuse after the model is loaded."""
    folders, samples = checkpoint.folders, checkpoint.num_samples(default)
    configs = [
        read_config(Path(folder)) if (Path(folder) / CONFIG_NAME).is_file() else {"peft_type": "whole model"}
        for folder in folders
    ]
    if sum([len(folders) > 1, samples > 0 or checkpoint.dropout, checkpoint.temperature]) > 1:
        raise ValueError(f"{field}: an ensemble, samples and a temperature cannot be combined; choose one of them")
    if len(folders) > 1:
        for folder, config in zip(folders, configs, strict=True):
            if config["peft_type"] != "LORA" or config.get("use_dora"):
                raise ValueError(
                    f"{field}: an ensemble is made of LoRA adapters (without DoRA), and {folder!r} is "
                    f"{config['peft_type']}; give other folders"
                )
    if checkpoint.dropout:
        if samples < 1:
            raise ValueError(f"{field}: dropout needs a number of samples; write `,dropout,samples=10`")
        if checkpoint.kind != "LORA" or not configs[0].get("lora_dropout") or configs[0].get("use_dora"):
            given = configs[0].get("lora_dropout", "none") if configs else "none"
            raise ValueError(
                f"{field}: dropout needs a LoRA adapter (without DoRA) trained with lora_dropout > 0, got "
                f"{checkpoint.kind} with lora_dropout={given}; train one, or remove `dropout`"
            )
    elif samples > 0 and checkpoint.kind != "DIPNET":
        raise ValueError(
            f"{field}: samples={samples} needs a DIPNet adapter, got {checkpoint.kind}, which has neither noise nor a "
            "posterior; remove it, or write `,dropout` for a LoRA adapter's dropout"
        )


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
