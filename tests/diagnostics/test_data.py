from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dip_hf.diagnostics import file_rows, make_batches, suite_rows


ROWS = [{"prompt": "ab:", "completion": " c"}, {"prompt": "a:", "completion": " defg<|end|>"}]


def test_labels_are_the_completion_and_one_end(base_folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    (batch,) = make_batches(ROWS, tokenizer, 2)
    texts = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        scored = labels != -100
        assert (ids[scored] == labels[scored]).all() and (mask[scored] == 1).all()
        texts.append((tokenizer.decode(ids[mask.bool() & ~scored]), tokenizer.decode(labels[scored])))
    assert texts == [("ab:", " c<|end|>"), ("a:", " defg<|end|>")]
    assert mask[0] == 1  # padded on the right


def test_batches_hold_all_rows(base_folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    batches = make_batches(ROWS * 3, tokenizer, 4)
    assert [batch["labels"].shape for batch in batches] == [(4, 8), (2, 8)]
    with pytest.raises(ValueError, match="batch_size=0"):
        make_batches(ROWS, tokenizer, 0)


def test_a_row_with_more_tokens_than_the_model_has_positions(base_folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    assert len(make_batches(ROWS, tokenizer, 2, positions=8)) == 1
    with pytest.raises(ValueError, match=r"row 2, 'a:'\.\.\., has 8 tokens, and the model 7 positions: shorten it"):
        make_batches(ROWS, tokenizer, 2, positions=7)


class Merging:
    """Splits at spaces but joins a space to what follows it, so that "a" + " b" is tokenized otherwise than "a"."""

    eos_token = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": {"a ": [1, 2], "a b": [1, 3]}[text]}


def test_labels_start_where_prompt_and_completion_part() -> None:
    (batch,) = make_batches([{"prompt": "a ", "completion": "b"}], Merging(), 1)
    assert batch["labels"].tolist() == [[-100, 3]]


def test_file_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "completion": "c", "id": 1}\n\n{"prompt": "q", "completion": "d"}\n')
    assert file_rows(path) == [{"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": "d"}]
    assert len(file_rows(path, limit=1)) == 1
    for text, message in [
        ("", "has no rows"),
        ('{"prompt": "p", "completion": "c"}\n{', "line 2: no valid JSON"),
        ('["prompt"]', "line 1: must be an object"),
        ('{"prompt": "p"}', "line 1: must be an object"),
        ('{"prompt": "p", "completion": 3}', "line 1: must be an object"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            file_rows(path)
    path.write_bytes('{"prompt": "p", "completion": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"line 1: no valid JSON .*utf-8"):
        file_rows(path)
    with pytest.raises(ValueError, match="is no file"):
        file_rows(tmp_path)


def test_lines_of_a_file_end_at_newlines_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    odd = "a\u2028b\u2029c\x85d"  # within strings of JSON, as json.dumps(..., ensure_ascii=False) leaves them
    text = f'{{"prompt": "{odd}",\r "completion": "c"}}\r\n\r\n{{"prompt": "q", "completion": "{odd}"}}\n'
    path.write_bytes(text.encode())
    assert file_rows(path) == [{"prompt": odd, "completion": "c"}, {"prompt": "q", "completion": odd}]
    path.write_bytes(text.encode() + b"{")
    with pytest.raises(ValueError, match="line 4: no valid JSON"):
        file_rows(path)


def test_suite_rows() -> None:
    rows = suite_rows(["number_sorting", "gcd"], "validation", 3)
    assert len(rows) == 6 and all(row["prompt"].endswith("\nAnswer:") for row in rows)
    assert rows != suite_rows(["number_sorting", "gcd"], "test", 3)
    with pytest.raises(ValueError, match="unknown reasoning family 'nosuch'"):
        suite_rows(["gcd", "nosuch"], "test", 3)
    with pytest.raises(ValueError, match="families is empty"):
        suite_rows([], "test", 3)
