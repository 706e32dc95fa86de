"""Checks of the data before training starts: rows that TRL would drop, or that would train nothing."""

from __future__ import annotations

from itertools import accumulate

from datasets import Dataset, IterableDataset
from trl import SFTTrainer


def check_dataset(name: str, dataset: object, assistant_only: bool, completion_only: bool | None) -> None:
    """
    Args:
        name: the trainer's argument that holds it.
        dataset: map-style datasets are checked; of an iterable one only that it has a row, since it cannot be read
            without being consumed.
        assistant_only: whether the assistant's messages alone are trained.
        completion_only: whether completions alone are trained; None: where the rows have a prompt and a completion.

    Raises:
        ValueError: the dataset is empty, or a pre-tokenised row or a conversation trains no token.
    """
    if isinstance(dataset, IterableDataset) and next(iter(dataset), None) is None:
        raise ValueError(f"{name} is empty; give at least one example.")
    if not isinstance(dataset, Dataset):
        return
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty; give at least one example.")
    if completion_only is None:
        completion_only = {"prompt", "completion"} <= set(dataset.column_names)
    columns = {"labels": -100}
    if "labels" not in dataset.column_names:  # which TRL then makes of the masks
        columns |= {"assistant_masks": 0, **({"completion_mask": 0} if completion_only else {})}
    for column, ignored in columns.items():
        if column in dataset.column_names:
            if not isinstance(dataset.with_format(None)[0][column], list):
                raise ValueError(
                    f"{name}: the column {column!r} must hold a list with an entry for each token, got "
                    f"{dataset.with_format(None)[0][column]!r} in row 0; rename or remove it."
                )
            for index, row in enumerate(dataset.with_format(None)[column]):
                if all(value == ignored for value in row[1:]):  # nothing predicts the first token
                    raise ValueError(
                        f"{name} row {index}: every entry of {column!r} is {ignored} (the first does not count, for "
                        "nothing predicts it), so the row trains nothing; drop it or label at least one token."
                    )
    masks = [column for column in columns if column in dataset.column_names and column != "labels"]
    if len(masks) > 1:  # TRL labels a token where all of them do
        rows = zip(*(dataset.with_format(None)[column] for column in masks), strict=True)
        for index, row in enumerate(rows):
            if not any(all(bits) for bits in list(zip(*row, strict=False))[1:]):
                raise ValueError(
                    f"{name} row {index}: {' and '.join(masks)} have no token in common (the first does not count, "
                    "for nothing predicts it), so the row trains nothing; drop it, or remove one of the columns."
                )
    if assistant_only and "messages" in dataset.column_names:
        for index, messages in enumerate(dataset.with_format(None)["messages"]):
            if all(message["role"] != "assistant" for message in messages):
                raise ValueError(
                    f"{name} row {index}: assistant_only_loss=True trains the assistant's messages, of which this "
                    "conversation has none; drop it, or set assistant_only_loss to False."
                )


def check_nothing_dropped(trainer: SFTTrainer, train_dataset: object) -> None:
    """
    Raises:
        ValueError: TRL cut every label off a row: it drops such rows, but for those that it has packed. (Packing
            that splits rows loses nothing.) Or no row has a token to predict.
    """
    prepared = trainer.train_dataset
    if not isinstance(train_dataset, Dataset) or not isinstance(prepared, Dataset):
        return
    rows = prepared.with_format(None)
    if "input_ids" in rows.column_names and not any(len(ids) > 1 for ids in rows["input_ids"]):
        raise ValueError("train_dataset: no row has two tokens, so there is none to predict; give longer rows.")
    if not trainer.args.packing:
        dropped = len(train_dataset) - len(prepared)
    elif trainer.args.packing_strategy == "bfd" and {"labels", "seq_lengths"} <= set(prepared.column_names):
        dropped = sum(
            all(label == -100 for label in labels[end - length + 1 : end])
            for labels, lengths in zip(rows["labels"], rows["seq_lengths"], strict=True)
            for length, end in zip(lengths, accumulate(lengths), strict=True)
            if length > 1  # a lone token, such as an empty text's, has nothing to predict; it is not cut
        )
    else:
        return
    if dropped > 0:
        raise ValueError(
            f"max_length={trainer.args.max_length} cuts every label off {dropped} of {len(train_dataset)} rows of "
            "train_dataset; raise max_length or drop those rows."
        )
