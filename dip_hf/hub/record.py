"""What a run was, written beside its weights: training_config.yaml, training_data.yaml and environment.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from enum import Enum
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from transformers import TrainingArguments

from dip_hf.environment import describe_environment
from dip_hf.model_files import weight_digests


TRAINING_NAME = "training_config.yaml"
DATA_NAME = "training_data.yaml"
ENVIRONMENT_NAME = "environment.json"

# Written even where they have their defaults, which differ between releases of TRL and transformers
_ALWAYS = {
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "optim", "weight_decay"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "seed", "bf16", "fp16"),
    *("max_length", "packing"),
}
# Of one machine or one account, and nothing that another run would repeat
_PLACES = {
    *("output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "local_rank", "report_to", "disable_tqdm"),
    "project",
}
_PLACES_PREFIXES = ("hub_", "push_to_hub", "trackio", "logging_", "save_")
_SECRET = re.compile(r"(?:^|_)(?:token|secret|password|api_key)$|^trust_remote_code$", re.IGNORECASE)
_TEXT_TOKENS = frozenset({"bos_token", "eos_token", "pad_token", "unk_token"})
"""Called tokens, but those of a tokenizer."""
_URL = re.compile(r"(?!file:)[a-z][a-z\d.-]+://", re.IGNORECASE)
_PARENT = re.compile(r"(?:^|/)\.\.(?:[/\\]|$)")
_JOINT = re.compile(r"\+(?=[/~]|\.\.|file:|\\\\|[a-z]:[/\\])", re.IGNORECASE)
"""Where another path of an ensemble begins that may be private; any other + may belong to a folder's name."""


def scrub(value: Any) -> Any:
    """Make a setting fit to be published, and plain enough for YAML and JSON.

    Access tokens and `trust_remote_code` are dropped from mappings, at any depth. Of a path that is absolute, in
    someone's home folder, or leads out of a folder by `..`, the last part is kept; paths that `+` joins count apart.
    Enumerations become their values, what is no plain value its text.
    """
    if isinstance(value, Enum):
        return scrub(value.value)
    if isinstance(value, Mapping):
        return {str(key): scrub(entry) for key, entry in value.items() if not _is_secret(str(key))}
    if isinstance(value, list | tuple):
        return [scrub(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted(scrub(entry) for entry in value)
    if value is None or isinstance(value, bool | int | float):
        return value
    return "+".join(_public_path(path) for path in _JOINT.split(str(value)))


def _public_path(text: str) -> str:
    if _URL.match(text):
        return text
    windows = PureWindowsPath(text)
    absolute = PurePosixPath(text).is_absolute() or windows.is_absolute() or text.startswith(("~", "file:", "\\\\"))
    return windows.name if absolute or _PARENT.search(text) else text  # which splits at both kinds of slash


def _is_secret(key: str) -> bool:
    return bool(_SECRET.search(key)) and key not in _TEXT_TOKENS


def training_config(args: TrainingArguments, always: Iterable[str] = ()) -> dict[str, Any]:
    """The settings of a run that another run would repeat.

    Args:
        args: the trainer's.
        always: fields to write besides those that differ from their defaults and the main ones.

    Returns:
        Field names to plain values, scrubbed (see `scrub`); `type(args)` takes them, with an `output_dir`.
    """
    wanted = _ALWAYS | set(always)
    found = {}
    for field in fields(args):
        name, value = field.name, getattr(args, field.name)
        if name in _PLACES or name.startswith(_PLACES_PREFIXES) or _is_secret(name) or not field.init:
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        plain = scrub(asdict(value) if is_dataclass(value) and not isinstance(value, type) else value)
        if name in wanted or plain != scrub(default):
            found[name] = plain
    return found


def write_record(
    folder: str | Path, args: TrainingArguments, always: Iterable[str] = (), base_is_local: bool = False
) -> None:
    """Write training_config.yaml and environment.json into `folder`, which exists; see `training_config`.

    Args:
        folder: of the run.
        args: the trainer's.
        always: as for `training_config`.
        base_is_local: whether an adapter's base is a folder here, whose path says nothing elsewhere.
    """
    text = yaml.safe_dump(training_config(args, always), sort_keys=True, allow_unicode=True)
    (Path(folder) / TRAINING_NAME).write_text(text, encoding="utf-8")
    environment = {**describe_environment(str(args.device)), "base_is_local": base_is_local}
    (Path(folder) / ENVIRONMENT_NAME).write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")


def write_data(folder: str | Path, data: Mapping[str, Any]) -> None:
    """Write training_data.yaml, what the weights in `folder` were trained on.

    Args:
        folder: of the run, with its weights, whose SHA-256 are written too: a later training may leave the file there.
        data: with "families" or "dataset_name"; it is scrubbed (see `scrub`).
    """
    text = yaml.safe_dump(scrub({**data, "weights": weight_digests(folder)}), sort_keys=True, allow_unicode=True)
    (Path(folder) / DATA_NAME).write_text(text, encoding="utf-8")
