"""Data that would train nothing: an error that names the row, its value and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st

from dip_hf import DIPNetConfig, DIPSFTTrainer
from dip_hf.trainer.checks.data import _untrained
from tests.trainer.tiny import ADAPTER, base_model, losses, make_trainer, tokenised, tokenizer


GOOD = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "train_dataset is empty; give at least one example"),
        (
            [GOOD, {"input_ids": [3, 4], "labels": [-100, -100]}],
            "row 1: no token has 'labels' other than -100 .*drop it",
        ),
        ([{"input_ids": [3, 4], "labels": [3, -100]}], "train_dataset row 0: .*'labels'.*drop it"),  # no prediction
        (
            [{"input_ids": [3, 4], "assistant_masks": [0, 0]}],
            "row 0: no token has 'assistant_masks' other than 0 ",
        ),
    ],
)
def test_pretokenised_data(rows: list[dict[str, list[int]]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, None, data=Dataset.from_list(rows))


def test_empty_text_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_dataset is empty; give at least one example"):
        make_trainer(tmp_path, None, data=Dataset.from_dict({"prompt": [], "completion": []}))


def test_empty_stream(tmp_path: Path) -> None:
    def nothing() -> Iterator[dict[str, list[int]]]:
        yield from ()

    with pytest.raises(ValueError, match="train_dataset is empty; give at least one example"):
        make_trainer(tmp_path, None, data=IterableDataset.from_generator(nothing))


def test_a_column_that_is_taken_for_labels(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["abc", "def"], "labels": [0, 1]})
    with pytest.raises(ValueError, match=r"train_dataset: the column 'labels' must hold a list .* got 0 in row 0"):
        make_trainer(tmp_path, None, data=rows)


@pytest.mark.parametrize("completion_only", [None, False, True])
def test_a_mask_of_completions(completion_only: bool | None, tmp_path: Path) -> None:
    """TRL uses it where it is told to, and of itself only beside the text of prompts and completions."""
    row = {"input_ids": [3, 4, 5], "completion_mask": [0, 0, 0]}
    text = {"prompt": "a", "completion": "bc"}
    for rows, used in ((row, completion_only is True), ({**row, **text}, completion_only is not False)):
        options, data = {"completion_only_loss": completion_only}, Dataset.from_list([rows])
        if used:
            with pytest.raises(ValueError, match=r"train_dataset row 0: .*'completion_mask' other than 0 .*drop it"):
                make_trainer(tmp_path, None, options, data=data)
        else:
            trainer = make_trainer(tmp_path, None, options, data=data)
            assert trainer.train_dataset[0]["labels"] == row["input_ids"]


def test_masks_without_a_token_in_common(tmp_path: Path) -> None:
    row = {"input_ids": [3, 4, 5, 6], "completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 0, 0]}
    good, options = {**row, "assistant_masks": [0, 1, 0, 1]}, {"completion_only_loss": True}
    message = r"row 1: no token has 'assistant_masks' other than 0 and 'completion_mask' other than 0 .*drop it"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, None, options, data=Dataset.from_list([good, row]))
    trainer = make_trainer(tmp_path, None, options, data=Dataset.from_list([good]))
    assert trainer.train_dataset[0]["labels"] == [-100, -100, -100, 6]
    make_trainer(tmp_path, None, {"completion_only_loss": False}, data=Dataset.from_list([row]))


def test_masks_beside_labels(tmp_path: Path) -> None:
    """TRL takes the labels as they are."""
    rows = Dataset.from_list([{**GOOD, "completion_mask": [0, 0, 0], "assistant_masks": [0, 0, 0]}])
    trainer = make_trainer(tmp_path, None, {"completion_only_loss": True}, data=rows)
    assert trainer.train_dataset[0]["labels"] == GOOD["labels"]


def test_conversation_without_the_assistant(tmp_path: Path) -> None:
    """TRL's own error names no row and blames the chat template."""
    chats = [[("user", "1+1"), ("assistant", "2")], [("user", "hello")]]
    rows = [{"messages": [{"role": role, "content": content} for role, content in chat]} for chat in chats]
    message = "train_dataset row 1: assistant_only_loss=True .* has none; drop it, or set assistant_only_loss to False"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, None, {"assistant_only_loss": True}, data=Dataset.from_list(rows))


def test_nothing_to_predict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_dataset: no row has two tokens"):
        make_trainer(tmp_path, DIPNetConfig(**ADAPTER), data=Dataset.from_dict({"text": ["", ""]}))


@pytest.mark.parametrize("is_text", [True, False])
def test_labels_cut_off(is_text: bool, tmp_path: Path) -> None:
    """A row whose labels all lie beyond max_length is named, not silently dropped."""
    rows = [{"prompt": "a", "completion": "bcd"}, {"prompt": "abcdefgh", "completion": "i"}]
    if not is_text:
        rows = [GOOD, {"input_ids": [3] * 9, "labels": [-100] * 8 + [3]}]
    with pytest.raises(ValueError, match=r"max_length=6 cuts every label off 1 of 2 rows of train_dataset, or they"):
        make_trainer(tmp_path, None, {"max_length": 6}, data=Dataset.from_list(rows))


def test_labels_cut_off_before_packing(tmp_path: Path) -> None:
    """TRL packs a row that it has cut all labels off, whether or not others share its pack."""
    rows = [GOOD, {"input_ids": [3] * 9, "labels": [-100] * 8 + [3]}, {"input_ids": [3, 4], "labels": [-100, 4]}]
    options = {"packing": True, "max_length": 6}
    with pytest.raises(ValueError, match=r"max_length=6 cuts every label off 1 of 3 rows of train_dataset, or they"):
        make_trainer(tmp_path, None, options, data=Dataset.from_list(rows))
    make_trainer(tmp_path, None, {**options, "max_length": 9}, data=Dataset.from_list(rows))
    make_trainer(tmp_path, None, {**options, "packing_strategy": "bfd_split"}, data=Dataset.from_list(rows))


def test_empty_texts_are_not_cut_off(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["", "abc"] * 4})
    trainer = make_trainer(tmp_path, None, {"packing": True, "max_length": 16}, data=rows)
    trainer.train()
    assert losses(trainer)[0] > 0


@given(st.lists(st.lists(st.sampled_from([-100, 3, 4]), max_size=4), min_size=1, max_size=6))
def test_untrained_rows_are_those_of_a_plain_loop(rows: list[list[int]]) -> None:
    expected = [i for i, row in enumerate(rows) if all(label == -100 for label in row[1:])]
    labels = np.array([label for row in rows for label in row], dtype=np.int64)
    assert _untrained(np.array([len(row) for row in rows]), labels != -100).tolist() == expected


@pytest.mark.parametrize("labels", [0, [[3], [4]], ["a", "b"]])
def test_labels_that_are_no_list_of_numbers(labels: object, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"input_ids": [3, 4], "labels": labels}])
    message = r"train_dataset: the column 'labels' must hold a list .* got .* in row 0; rename or remove it"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, None, data=rows)


def test_masks_of_another_length(tmp_path: Path) -> None:
    row = {"input_ids": [3, 4, 5], "assistant_masks": [0, 1, 1], "completion_mask": [0, 1, 1]}
    rows = Dataset.from_list([row, {**row, "completion_mask": [0, 1]}])
    message = r"train_dataset row 1: 'completion_mask' has 2 entries, 'assistant_masks' 3; give one for each token"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, None, {"completion_only_loss": True}, data=rows)


def test_rows_that_train_nothing_as_prepared(tmp_path: Path) -> None:
    """TRL's filter counts a label on the first token."""
    idle = {"input_ids": [3, 4, 5, 6], "labels": [-100, 4, -100, -100]}
    options = {"max_length": 3, "truncation_mode": "keep_end"}
    rows, fine = Dataset.from_list([GOOD, idle]), Dataset.from_list([GOOD])
    message = r"row 1, as prepared with max_length=3: .*the row trains nothing; drop it, or give"
    with pytest.raises(ValueError, match=f"train_dataset {message}"):
        make_trainer(tmp_path, None, options, data=rows)
    with pytest.raises(ValueError, match=f"eval_dataset {message}"):
        make_trainer(tmp_path, None, options, data=fine, eval_dataset=rows)
    make_trainer(tmp_path, None, options, data=fine, eval_dataset=fine)
    shuffled = Dataset.from_list([GOOD] * 7 + [idle] + [GOOD] * 12)
    with pytest.raises(ValueError, match="train_dataset row 7, as prepared"):
        make_trainer(tmp_path, None, {**options, "shuffle_dataset": True}, data=shuffled)


@pytest.mark.parametrize("column", ["prompt", "completion", "messages", "conversations"])
def test_conversations_without_a_message(column: str, tmp_path: Path) -> None:
    """TRL may take such a row for one of texts, or fall over it."""
    row: dict[str, Any] = {"prompt": CHAT[:1], "completion": CHAT[1:]}
    if column not in row:
        row = {column: CHAT if column == "messages" else SHARED}
    make_trainer(tmp_path, None, data=Dataset.from_list([row]))
    with pytest.raises(ValueError, match=rf"train_dataset row 1: '{column}' has no message; drop the row"):
        make_trainer(tmp_path, None, data=Dataset.from_list([row, {**row, column: []}]))
    with pytest.raises(ValueError, match=rf"train_dataset row 0: '{column}' has no message; drop the row"):
        make_trainer(tmp_path, None, data=Dataset.from_list([{**row, column: []}, row]))


def test_labels_cut_off_rows_of_evaluation(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": "abcdefgh", "completion": "i"}] * 4)
    train = Dataset.from_list([{"prompt": "a", "completion": "b"}])  # which sets that completions alone are trained
    for evaluation, name in ((rows, "eval_dataset"), ({"a": train, "b": rows}, "eval_dataset b")):
        with pytest.raises(
            ValueError, match=rf"max_length=4 cuts every label off 4 of 4 rows of {name}, or they have"
        ):
            make_trainer(tmp_path, None, {"max_length": 4}, data=train, eval_dataset=evaluation)


def test_no_row_left_for_an_evaluation(tmp_path: Path) -> None:
    """Data that come with the call are prepared inside it."""
    train = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    trainer = make_trainer(tmp_path, None, {"max_length": 14}, data=train)
    with pytest.raises(ValueError, match=r"eval_dataset has no row with a label within max_length; raise max_length"):
        trainer.evaluate(Dataset.from_list([{"prompt": "abcdefghijklmnop", "completion": "i"}]))
    assert trainer.evaluate(tokenised())["eval_loss"] > 0


def test_every_row_cut_off_names_the_length(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": "abcdefgh", "completion": "i"}] * 4)
    with pytest.raises(ValueError, match=r"max_length=4 cuts every label off 4 of 4 rows of train_dataset"):
        make_trainer(tmp_path, None, {"max_length": 4}, data=rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "ab"}, {"text": None}], "train_dataset row 1: 'text' is null; drop the row or fill it in"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}], "row 1: 'completion' is null"),
        ([GOOD, {"input_ids": [3, 4], "labels": None}], "row 1: 'labels' is null"),
        ([{"conversations": SHARED}, {"conversations": None}], "row 1: 'conversations' is null"),
    ],
)
def test_values_that_are_missing(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, None, data=Dataset.from_list(rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"question": "a", "answer": "b"}],
            r"has the columns question, answer, of which none is read: .*'text'",
        ),
        ([{"text": ["a", "b"]}], r"the column 'text' must hold text, got \['a', 'b'\] in row 0"),
        ([{"prompt": 1, "completion": "2"}], r"the column 'prompt' must hold text or messages \(.*, got 1 in row 0"),
        (
            [{"prompt": "a", "answer": "b"}],
            "but no 'completion', .*with 'prompt'; give both, or remove or rename 'prompt'",
        ),
        (
            [{"completion": "b"}],
            r"but no 'prompt', .* with 'completion'; give .* \(whole texts go into 'text'",
        ),
        ([{"prompt": "a", "completion": CHAT}], r"'completion' must hold text, as 'prompt' does, got \[\{.* in row 0"),
        ([{"prompt": CHAT, "completion": "b"}], r"'completion' must hold messages \(.*'role' .*\), got 'b' in row 0"),
        (
            [{"messages": "ab"}],
            r"'messages' must hold messages \(.*'role' and 'content' elsewhere\), got 'ab' in row 0",
        ),
        ([{"messages": SHARED}], r"'messages' must hold messages \(with 'from' .* in 'conversations', .*got \[\{"),
        ([{"conversations": CHAT}], r"'conversations' must hold messages \(with 'from' and 'value' in .*got \[\{"),
    ],
)
def test_columns_that_are_no_text(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"train_dataset.*{message}"):
        make_trainer(tmp_path, None, data=Dataset.from_list(rows))


def test_a_column_of_texts_beside_conversations_is_not_read(tmp_path: Path) -> None:
    turns = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    for text in (None, ["c"]):
        make_trainer(tmp_path, None, {"max_steps": 1}, data=Dataset.from_list([{**turns, "text": text}] * 4)).train()
    for row in ({"conversations": SHARED, "text": None}, {"conversations": CHAT, "text": "a"}):
        make_trainer(tmp_path, None, data=Dataset.from_list([row] * 4))
    with pytest.raises(ValueError, match="train_dataset row 0: 'text' is null"):
        make_trainer(tmp_path, None, data=Dataset.from_list([{"prompt": "a", "completion": "b", "text": None}]))


def test_arguments_by_position(tmp_path: Path) -> None:
    """In `SFTTrainer`'s order."""
    args = make_trainer(tmp_path, None).args
    trainer = DIPSFTTrainer(base_model(), args, None, tokenised(), tokenised(4), tokenizer())
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (8, 4)
