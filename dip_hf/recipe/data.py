"""Datasets for recipes/sft.py: reasoning families, GSM8K, or anything TRL reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError

from dip_hf.recipe.arguments import AdapterArguments, DataArguments
from dip_hf.recipe.gsm8k import to_prompt_completion
from dip_hf.trainer import DIPSFTConfig


# Column sets that TRL's SFTTrainer prepares or takes as they are
_TRL_COLUMNS = ({"prompt", "completion"}, {"messages"}, {"conversations"}, {"input_ids"})
_FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def check_run(data: DataArguments, training: DIPSFTConfig, adapter: AdapterArguments) -> None:
    """Refuse, before anything loads, what the trainer would stop at once the weights are there.

    Args:
        data: where the examples come from.
        training: the trainer's config.
        adapter: the adapter.

    Raises:
        ValueError: a step or a batch without rows, a stream (of unknown length) without a number of steps, or
            MonteCLoRA where its samples or its loss would go wrong.
    """
    for name, value in (
        ("per_device_train_batch_size", training.per_device_train_batch_size),
        ("per_device_eval_batch_size", training.per_device_eval_batch_size),
        ("gradient_accumulation_steps", training.gradient_accumulation_steps),
    ):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if data.families is None and data.dataset_streaming and training.max_steps < 1:
        raise ValueError(
            f"max_steps={training.max_steps} with dataset_streaming=True: a stream's length is not known; set "
            "max_steps, or dataset_streaming to False"
        )
    if adapter.adapter == "monteclora":
        if training.activation_checkpointing:
            raise ValueError(
                "activation_checkpointing=True with adapter='monteclora': a layer that is recomputed draws another "
                "sample, which gives a wrong gradient; set activation_checkpointing (or its old name, "
                "gradient_checkpointing) to False"
            )
        if training.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_accumulation_steps={training.gradient_accumulation_steps} with adapter='monteclora': PEFT "
                "adds its loss whole to every micro-batch, so that it would count as many times; set it to 1, and "
                "per_device_train_batch_size higher"
            )


def load_datasets(
    data: DataArguments, training: DIPSFTConfig
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """Load the training and the validation examples; None for the latter where `eval_strategy` is "no".

    Raises:
        ValueError: as `load_train_dataset`, or the dataset has no such split.
    """
    train = load_train_dataset(data, training.dataset_text_field)
    evaluates = training.eval_strategy != "no"
    return train, load_eval_dataset(data, training.dataset_text_field) if evaluates else None


def load_train_dataset(arguments: DataArguments, text_field: str = "text") -> Dataset | IterableDataset:
    """Load the training examples that `arguments` name.

    Args:
        arguments: the recipe's data fields.
        text_field: the column of a language-modelling dataset (`SFTConfig.dataset_text_field`).

    Returns:
        A dataset in one of TRL's formats.

    Raises:
        ValueError: the dataset cannot be read, is empty, or has none of the columns that training needs.
    """
    if arguments.families is not None:
        return _families(arguments, "train", arguments.train_size)
    return _named(arguments, "dataset_train_split", text_field)


def load_eval_dataset(arguments: DataArguments, text_field: str = "text") -> Dataset | IterableDataset:
    """Load the validation examples: the families' validation split, or `dataset_test_split`."""
    if arguments.families is not None:
        return _families(arguments, "validation", arguments.eval_size)
    return _named(arguments, "dataset_test_split", text_field)


def describe_data(arguments: DataArguments) -> dict[str, Any]:
    """What a run is trained on, for its record; of a file or folder of this machine the name alone."""
    if arguments.families is not None:
        fields: tuple[str, ...] = ("families", "families_seed", "train_size")
    else:
        fields = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_format")
    found = {name: getattr(arguments, name) for name in fields}
    if arguments.dataset_name is not None and is_local(arguments.dataset_name):
        found["dataset_name"] = Path(arguments.dataset_name).resolve().name
    return found


def is_local(dataset_name: str) -> bool:
    """Tell whether `dataset_name` is a file or folder of this machine, rather than a name on the Hub.

    Raises:
        ValueError: it is spelled like a file or folder, and there is none.
    """
    if Path(dataset_name).exists():
        return True
    if _builder(dataset_name) is not None or dataset_name.startswith((".", "/", "~")):
        raise ValueError(f"dataset_name={dataset_name!r} does not exist: give a file or folder, or a name on the Hub")
    return False


def _builder(file_name: str) -> str | None:
    """What `datasets` reads such a file with, compressed or not; None for what is no data file by its name."""
    suffixes = [suffix for suffix in Path(file_name).suffixes if suffix not in _COMPRESSED]
    return _FILE_BUILDERS.get(suffixes[-1]) if suffixes else None


def _families(arguments: DataArguments, split: Literal["train", "validation"], size: int) -> Dataset:
    # reasoning-gym is an optional dependency
    from dip_hf.reasoning import make_split

    parts = [make_split(family, split, size, seed=arguments.families_seed) for family in arguments.families or []]
    return concatenate_datasets(parts).select_columns(["prompt", "completion"])


def _named(arguments: DataArguments, split_field: str, text_field: str) -> Dataset | IterableDataset:
    name, split = arguments.dataset_name, getattr(arguments, split_field)
    assert name is not None  # DataArguments requires it where there are no families
    builder = _builder(name) if is_local(name) and Path(name).is_file() else None
    where: dict[str, Any] = {"path": name, "name": arguments.dataset_config}
    if builder is not None:
        where = {"path": builder, "data_files": name}
    try:
        splits = load_dataset(**where, streaming=arguments.dataset_streaming)
    except (ValueError, StopIteration, DatasetsError) as error:  # not all of which say which dataset it was
        if isinstance(error, StopIteration) or "corresponds to no data" in str(error):  # of JSON, and of Parquet
            raise ValueError(f"dataset_name={name!r} gives no rows; give a dataset with rows") from error
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise ValueError(
            f"dataset_name={name!r} with dataset_config={arguments.dataset_config!r} cannot be read ({reason}); give "
            "others, or mend the data"
        ) from error
    if split not in splits:
        known = ", ".join(map(repr, splits))
        raise ValueError(f"{split_field}={split!r}: dataset_name={name!r} has only the splits {known}")
    dataset = splits[split]
    # TRL takes a first row before any check of its own and would stop with a bare StopIteration
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"dataset_name={name!r} gives no rows in {split_field}={split!r}; give a dataset with rows")
    columns = set(first)
    if arguments.dataset_format == "gsm8k":
        if not {"question", "answer"} <= columns:
            raise ValueError(
                f"dataset_format='gsm8k' needs the columns question and answer, {name!r} has {sorted(columns)}"
            )
        return dataset.map(
            lambda row: to_prompt_completion(row["question"], row["answer"]), remove_columns=sorted(columns)
        )
    if text_field not in columns and not any(needed <= columns for needed in _TRL_COLUMNS):
        raise ValueError(
            f"dataset_name={name!r} has the columns {sorted(columns)}, but training needs prompt and completion, "
            f"messages, or {text_field!r}: rename its columns, set dataset_text_field, or see dataset_format"
        )
    return dataset
