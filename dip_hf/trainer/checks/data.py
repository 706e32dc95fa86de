"""Checks of the data before training starts: rows that TRL would drop, or that would train nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, LargeList, Value
from datasets.features import List
from pyarrow.compute import list_value_length
from pyarrow.types import is_large_list, is_list
from trl import SFTConfig, is_conversational, is_conversational_from_value


_CONVERSATIONS = ("prompt", "completion", "messages", "conversations")
"""Columns that may hold messages."""
_MESSAGES = "messages (with 'from' and 'value' in 'conversations', with 'role' and 'content' elsewhere)"
_COLUMNS = (*_CONVERSATIONS, "input_ids", "labels", "completion_mask", "assistant_masks")
"""Columns that TRL reads, but for that of plain texts, whose name is an option."""


def by_name(eval_dataset: object) -> dict[str, object]:
    """The evaluation datasets, each by what an error is to call it; empty where there is none."""
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset {name}": dataset for name, dataset in eval_dataset.items()}
    return {} if eval_dataset is None else {"eval_dataset": eval_dataset}


def check_dataset(name: str, dataset: object, args: SFTConfig) -> None:
    """
    Args:
        name: the trainer's argument that holds it.
        dataset: map-style datasets are checked; of an iterable one only that it has a row, since it cannot be read
            without being consumed.
        args: what is trained of a row: `assistant_only_loss`, `completion_only_loss`, and the column of texts.

    Raises:
        ValueError: the dataset is empty, a row lacks a value, or a pre-tokenised row or a conversation trains no
            token.
    """
    if isinstance(dataset, IterableDataset) and next(iter(dataset), None) is None:
        raise ValueError(f"{name} is empty; give at least one example.")
    if not isinstance(dataset, Dataset):
        return
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty; give at least one example.")
    _check_values(name, dataset, _COLUMNS)  # first, for an empty conversation is none to ask
    _check_values(name, dataset, _texts(dataset, args))
    completion_only = args.completion_only_loss
    if completion_only is None:
        completion_only = {"prompt", "completion"} <= set(dataset.column_names)
    ignored = {"labels": -100}
    if "labels" not in dataset.column_names:  # which TRL then makes of the masks
        ignored |= {"assistant_masks": 0, **({"completion_mask": 0} if completion_only else {})}
    ignored = {column: value for column, value in ignored.items() if column in dataset.column_names}
    for column in ignored:
        if not _holds_numbers(dataset.features[column]):
            raise ValueError(
                f"{name}: the column {column!r} must hold a list with an entry for each token, got "
                f"{dataset.with_format(None)[0][column]!r} in row 0; rename or remove it."
            )
    row = _untrained_row(name, dataset, ignored) if ignored else None
    if row is not None:  # TRL labels a token where all masks do
        labelled = " and ".join(f"{column!r} other than {value}" for column, value in ignored.items())
        raise ValueError(
            f"{name} row {row}: no token has {labelled} (the first does not count, for nothing predicts it), so the "
            "row trains nothing; drop it or label at least one token."
        )
    if args.assistant_only_loss and "messages" in dataset.column_names:
        for index, messages in enumerate(dataset.with_format(None)["messages"]):
            if all(message.get("role", "assistant") != "assistant" for message in messages):
                raise ValueError(
                    f"{name} row {index}: assistant_only_loss=True trains the assistant's messages, of which this "
                    "conversation has none; drop it, or set assistant_only_loss to False."
                )


def check_columns(name: str, dataset: object, args: SFTConfig) -> None:
    """
    Args:
        name: the trainer's argument that holds it.
        dataset: map-style datasets are checked.
        args: the column of texts.

    Raises:
        ValueError: the dataset has no column that TRL reads, one of two, or something else there than text or
            messages.
    """
    options: Any = args.dataset_kwargs or {}
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom" or options.get("skip_prepare_dataset"):
        return
    row, text, pair = dataset.with_format(None)[0], args.dataset_text_field, ("prompt", "completion")
    if "input_ids" in row:
        return
    choices: list[tuple[str, ...]] = [(column,) for column in ("conversations", "messages") if _is_chat(row, column)]
    choices += [(text,), ("messages",), ("conversations",), pair]
    is_pair = "prompt" in row and not {"image", "images"} & row.keys()  # of images TRL reads prompts last
    read = pair if is_pair else next((columns for columns in choices if {*columns} & row.keys()), ())
    if not read:
        raise ValueError(
            f"{name} has the columns {', '.join(row)}, of which none is read: rename them to prompt and completion, "
            f"messages or {text!r} (dataset_text_field), or give formatting_func."
        )
    for column in (*read, *(plain for plain in _texts(dataset, args) if plain in row)):
        if column not in row:
            other = pair[column == "prompt"]
            raise ValueError(
                f"{name} has the columns {', '.join(row)}, but no {column!r}, which is read together with {other!r}; "
                f"give both, or remove or rename {other!r} (whole texts go into {text!r}, dataset_text_field)."
            )
        is_text = isinstance(row[column], str)
        if column == text:
            kind, fits = "text", is_text
        elif column == "prompt":
            kind, fits = f"text or {_MESSAGES}", is_text or _is_chat(row, column)
        elif column == "completion" and isinstance(row["prompt"], str):
            kind, fits = "text, as 'prompt' does", is_text
        else:
            kind, fits = _MESSAGES, _is_chat(row, column)
        if not fits:
            raise ValueError(f"{name}: the column {column!r} must hold {kind}, got {row[column]!r} in row 0.")


def _is_chat(row: Mapping[str, Any], column: str) -> bool:
    """Whether TRL takes what a column holds for messages."""
    own = {column: row.get(column) or None}  # TRL asks for the first of an empty list
    return is_conversational(own) or is_conversational_from_value(own)


def _texts(dataset: Dataset, args: SFTConfig) -> list[str]:
    """The column of plain texts, which TRL does not read where there are conversations."""
    row = dataset.with_format(None)[0]
    return [] if any(_is_chat(row, column) for column in _CONVERSATIONS) else [args.dataset_text_field]


def _check_values(name: str, dataset: Dataset, columns: Sequence[str]) -> None:
    """
    Raises:
        ValueError: a row has no value in a column that TRL reads, or a conversation no message.
    """
    for column in [column for column in columns if column in dataset.column_names]:
        first = 0
        for values in _arrays(dataset, column):
            missing = np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))
            if len(missing):
                raise ValueError(f"{name} row {first + missing[0]}: {column!r} is null; drop the row or fill it in.")
            if column in _CONVERSATIONS and (is_list(values.type) or is_large_list(values.type)):
                empty = np.flatnonzero(_lengths(values) == 0)
                if len(empty):
                    raise ValueError(f"{name} row {first + empty[0]}: {column!r} has no message; drop the row.")
            first += len(values)


def _untrained_row(name: str, dataset: Dataset, ignored: Mapping[str, int]) -> int | None:
    """The first row without a token, behind its first one, that all columns have another value for than `ignored`'s.

    Raises:
        ValueError: a row has entries for another number of tokens in one column than in another.
    """
    first = 0
    for arrays in zip(*(_arrays(dataset, column) for column in ignored), strict=True):
        lengths = [_lengths(values) for values in arrays]
        for column, own in zip(ignored, lengths, strict=True):
            differing = np.flatnonzero(own != lengths[0])
            if len(differing):
                raise ValueError(
                    f"{name} row {first + differing[0]}: {column!r} has {own[differing[0]]} entries, "
                    f"{next(iter(ignored))!r} {lengths[0][differing[0]]}; give one for each token."
                )
        trained = [_flat(values) != value for values, value in zip(arrays, ignored.values(), strict=True)]
        rows = _untrained(lengths[0], np.logical_and.reduce(trained))
        if len(rows):
            return first + int(rows[0])
        first += len(lengths[0])
    return None


def _untrained(lengths: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Indices of the rows without a trained token behind their first, which nothing predicts.

    Args:
        lengths: of the rows, in tokens.
        trained: of all rows, one after the other, whether a token is; bool.
    """
    ends = np.cumsum(lengths)
    behind = trained.copy()
    behind[(ends - lengths)[lengths > 0]] = False
    sums = np.concatenate([[0], np.cumsum(behind)])
    return np.flatnonzero(sums[ends] == sums[ends - lengths])


def _arrays(dataset: Dataset, column: str) -> Iterator[Any]:
    """The values of a column as Arrow arrays, piece by piece."""
    for batch in dataset.select_columns(column).with_format("arrow").iter(10_000):
        yield batch[column].combine_chunks()


def _holds_numbers(feature: object) -> bool:
    """Whether a column holds a list of numbers or booleans in each row."""
    kind = feature.feature if isinstance(feature, List | LargeList) else None
    return isinstance(kind, Value) and not kind.dtype.endswith(("string", "binary"))


def _lengths(lists: Any) -> np.ndarray:
    return list_value_length(lists).to_numpy(zero_copy_only=False)


def _flat(lists: Any) -> np.ndarray:
    return lists.flatten().to_numpy(zero_copy_only=False)


def check_prepared(name: str, given: object, prepared: object, args: SFTConfig, packing: bool) -> None:
    """
    Args:
        name: the trainer's argument that held it.
        given: what it was.
        prepared: what TRL has made of it.
        args: for `max_length` and the strategy of packing.
        packing: whether rows are packed.

    Raises:
        ValueError: TRL cut every label off a row: it drops such rows, but for those that it has packed. (Packing
            that splits rows loses nothing.) Or a row that it keeps trains nothing; or no row has a token to predict.
    """
    if not isinstance(given, Dataset) or not isinstance(prepared, Dataset):
        return
    rows = prepared.with_format(None)
    dropped = 0
    if not packing:
        dropped = len(given) - len(prepared)
    elif args.packing_strategy == "bfd" and {"labels", "seq_lengths"} <= set(prepared.column_names):
        for labels, lengths in zip(_arrays(prepared, "labels"), _arrays(prepared, "seq_lengths"), strict=True):
            sizes = _flat(lengths)
            # A lone token, such as an empty text's, has nothing to predict; it is not cut
            dropped += int((sizes[_untrained(sizes, _flat(labels) != -100)] > 1).sum())
    if dropped > 0:
        raise ValueError(
            f"max_length={args.max_length} cuts every label off {dropped} of {len(given)} rows of {name}, or they "
            "have none; raise max_length or drop those rows."
        )
    if "input_ids" in rows.column_names and not any(len(ids) > 1 for ids in rows["input_ids"]):
        raise ValueError(f"{name}: no row has two tokens, so there is none to predict; give longer rows.")
    if not packing and "labels" in rows.column_names:
        first = 0
        for labels in _arrays(prepared, "labels"):
            lengths = _lengths(labels)
            idle = _untrained(lengths, _flat(labels) != -100)
            idle = idle[lengths[idle] > 1]
            if len(idle):
                row = first + int(idle[0])
                if args.shuffle_dataset:  # as TRL has, so that this finds the row that was given
                    row = Dataset.from_dict({"row": np.arange(len(given))}).shuffle(seed=args.seed)[row]["row"]
                raise ValueError(
                    f"{name} row {row}, as prepared with max_length={args.max_length}: no token but "
                    "perhaps the first has a label, and nothing predicts that one, so the row trains nothing; drop "
                    "it, or give it a completion."
                )
            first += len(labels)


def check_rows_left(dataloader: Any) -> None:
    """
    Args:
        dataloader: of an evaluation.

    Raises:
        ValueError: it has no row.
    """
    if isinstance(dataloader.dataset, Dataset) and len(dataloader.dataset) == 0:
        raise ValueError(
            "eval_dataset has no row with a label within max_length; raise max_length, or give other rows."
        )
