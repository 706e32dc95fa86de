"""What is evaluated, and how it predicts: the base, adapters on it, or whole models; checked before anything loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dip_hf.adapter_files import CONFIG_NAME, base_revision, check_adapter_folder, read_config
from dip_hf.model_files import check_base, check_model_folder


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


def check_checkpoints(checkpoints: Sequence[Checkpoint], model: str, num_samples: int = 0) -> None:
    """Refuse checkpoints that cannot be loaded safely and whole, or cannot predict as they are asked to.

    Args:
        checkpoints: at least one, with distinct names.
        model: the base: a folder, or a name on the Hub (which is not looked up here).
        num_samples: the evaluation's own number, for checkpoints that name none.

    Raises:
        ValueError: none, two of one name, a missing folder, or missing, pickled or truncated weights; samples of what
            has none; an ensemble of anything but LoRA adapters; adapters of several revisions of a base on the Hub.
            Names the field, the value and the remedy.
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
    common_revision(checkpoints, model)
    if num_samples > 0 and not any(one.samples is None and one.num_samples(num_samples) for one in checkpoints):
        kinds = ", ".join(checkpoint.kind for checkpoint in checkpoints)
        raise ValueError(
            f"num_samples={num_samples} needs a checkpoint with a DIPNet adapter or `,dropout`, got {kinds}: add one, "
            "or set num_samples=0"
        )


def common_revision(checkpoints: Sequence[Checkpoint], model: str) -> str | None:
    """The revision of the base that its adapters were trained on; None for main, and for a folder, which has none.

    Raises:
        ValueError: a base on the Hub whose adapters were trained on several.
    """
    if Path(model).is_dir():
        return None
    folders = [Path(folder) for checkpoint in checkpoints for folder in checkpoint.folders]
    found = {base_revision(read_config(folder)): folder for folder in folders if (folder / CONFIG_NAME).is_file()}
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise ValueError(
            f"checkpoints: {first} was trained on revision {one or 'main'} of its base, and {second} on "
            f"{other or 'main'}: evaluate them apart, or correct `revision` in {CONFIG_NAME}"
        )
    return next(iter(found), None)


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
