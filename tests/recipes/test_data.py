"""Loading of local datasets, and what is refused before anything trains."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError

from dip_hf.recipe.arguments import DataArguments
from dip_hf.recipe.data import describe_data, is_local, load_eval_dataset, load_train_dataset


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows_file(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_gsm8k_rows_are_rewritten(tmp_path: Path, streaming: bool) -> None:
    name = rows_file(tmp_path, {"question": "How many?", "answer": "One.\n#### 1"})
    dataset = load_train_dataset(DataArguments(dataset_name=name, dataset_format="gsm8k", dataset_streaming=streaming))
    assert list(dataset) == [
        {"prompt": "Q: How many?\nA: Let's think step by step.", "completion": " One.\nThe answer is 1"}
    ]


def test_rows_in_trl_s_formats_pass_through(tmp_path: Path) -> None:
    row = {"prompt": "1 + 1 =", "completion": " 2", "level": 3}
    assert list(load_train_dataset(DataArguments(dataset_name=rows_file(tmp_path, row)))) == [row]


def test_a_text_column_of_another_name(tmp_path: Path) -> None:
    name = rows_file(tmp_path, {"body": "words"})
    with pytest.raises(ValueError, match=r"has the columns \['body'\].*dataset_text_field"):
        load_train_dataset(DataArguments(dataset_name=name))
    assert len(list(load_train_dataset(DataArguments(dataset_name=name), text_field="body"))) == 1


def test_gsm8k_needs_its_columns(tmp_path: Path) -> None:
    name = rows_file(tmp_path, {"prompt": "?", "completion": "!"})
    with pytest.raises(ValueError, match="dataset_format='gsm8k' needs the columns question and answer"):
        load_train_dataset(DataArguments(dataset_name=name, dataset_format="gsm8k"))


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    name = rows_file(tmp_path, {"text": "words"})
    with pytest.raises(ValueError, match=r"dataset_test_split='test'.*only the splits 'train'"):
        load_eval_dataset(DataArguments(dataset_name=name))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl"])
def test_an_empty_dataset(tmp_path: Path, name: str, streaming: bool) -> None:
    path = tmp_path / name
    empty = datasets.Dataset.from_dict({"text": []})
    empty.to_parquet(path) if path.suffix == ".parquet" else path.touch()
    with pytest.raises(ValueError, match=r"dataset_name='.*' gives no rows( in .*)?; give a dataset with rows"):
        load_train_dataset(DataArguments(dataset_name=str(path), dataset_streaming=streaming))


@pytest.mark.parametrize("content", ['{"prompt": "a"', '{"text": "a"}\n["b"]\n'])
def test_a_broken_file_is_named(tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"dataset_name='.*rows\.jsonl' .* cannot be read \(.*JSON parse error.*\); "):
        load_train_dataset(DataArguments(dataset_name=str(path)))


def test_a_dataset_of_several_configs_asks_for_one(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "words"}\n')
    configs = "".join(f"- {{config_name: {name}, data_files: {name}.jsonl}}\n" for name in ("one", "two"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert len(list(load_train_dataset(DataArguments(dataset_name=str(tmp_path), dataset_config="one")))) == 1
    with pytest.raises(ValueError, match=r"with dataset_config=None cannot be read \(Config name is missing.*'two'"):
        load_train_dataset(DataArguments(dataset_name=str(tmp_path)))


def test_a_name_that_the_hub_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise DatasetNotFoundError("Dataset 'you/data' doesn't exist on the Hub or cannot be accessed.")

    monkeypatch.setattr("dip_hf.recipe.data.load_dataset", refuse)
    with pytest.raises(ValueError, match=r"cannot be read \(Dataset 'you/data' doesn't .* accessed\.\); give others"):
        load_train_dataset(DataArguments(dataset_name="you/data"))


def test_families_share_no_question_between_training_and_validation() -> None:
    pytest.importorskip("reasoning_gym")
    arguments = DataArguments(families=["palindrome_generation", "number_sorting"], train_size=20, eval_size=10)
    train, validation = load_train_dataset(arguments), load_eval_dataset(arguments)
    assert (len(train), len(validation)) == (40, 20)
    assert train.column_names == ["prompt", "completion"]
    assert not set(train["prompt"]) & set(validation["prompt"])


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(ValueError, match="unknown reasoning family 'lmc'"):
        load_train_dataset(DataArguments(families=["lmc"]))


def test_what_a_run_was_trained_on_is_told_without_a_path(tmp_path: Path) -> None:
    file, name = tmp_path / "rows.jsonl", "openai/gsm8k"
    file.touch()
    told = [describe_data(DataArguments(dataset_name=value))["dataset_name"] for value in (str(file), name)]
    assert told == ["rows.jsonl", name]
    families = describe_data(DataArguments(families=["gcd"], train_size=5))
    assert families == {"families": ["gcd"], "families_seed": 0, "train_size": 5}


def test_a_compressed_file(tmp_path: Path) -> None:
    name = tmp_path / "rows.v2.jsonl.gz"
    with gzip.open(name, "wt") as file:
        file.write(json.dumps({"prompt": "1 + 1 =", "completion": " 2"}))
    assert len(list(load_train_dataset(DataArguments(dataset_name=str(name))))) == 1


@pytest.mark.parametrize("name", ["nowhere/rows.jsonl", "rows.csv.gz", "./rows", "/nowhere/rows"])
def test_a_file_that_is_not_there_is_no_name_on_the_hub(name: str) -> None:
    with pytest.raises(ValueError, match=f"dataset_name='{name}' does not exist"):
        is_local(name)
    assert not is_local("openai/gsm8k")
