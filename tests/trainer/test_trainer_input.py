"""Bad input: an error before training starts, which names the field, its value and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from trl import TrlParser

from dip_hf import DIPNetConfig, DIPSFTConfig
from tests.trainer.tiny import ADAPTER, base_model, losses, make_trainer, tokenised


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_trajectories": 0}, "num_trajectories=0 must be a whole number, at least 1"),
        ({"num_trajectories": -2}, "num_trajectories=-2 must be a whole number, at least 1"),
        ({"stability_weight": 0.1}, "stability_weight=0.1 .* num_trajectories=1; set num_trajectories to 2"),
        ({"stability_weight": -0.1, "num_trajectories": 2}, "stability_weight=-0.1 must not be negative; 0 turns"),
        ({"variance_weight": 0.0}, "variance_weight=0.0 must be positive.*learn_noise=False"),
        ({"variance_weight": float("nan")}, "variance_weight=nan must be positive.*learn_noise=False"),
        ({"log_variance_weight": -1.0}, "log_variance_weight=-1.0 must be positive.*learn_noise=False"),
        ({"penalty_reduction": "max"}, "penalty_reduction='max' must be one of mean, sum"),
        ({"penalty_unit": "metre"}, "penalty_unit='metre' must be one of relative, absolute"),
        ({"noise_learning_rate": 0.0}, "noise_learning_rate=0.0 must be positive.*learn_noise=False"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        DIPSFTConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_unknown_argument(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="num_trajectory"):
        DIPSFTConfig(output_dir=str(tmp_path), num_trajectory=2)


GOOD = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "train_dataset is empty; give at least one example"),
        ([GOOD, {"input_ids": [3, 4], "labels": [-100, -100]}], "train_dataset row 1: .*'labels' is -100.*drop it"),
        ([{"input_ids": [3, 4], "labels": [3, -100]}], "train_dataset row 0: .*'labels'.*drop it"),  # no prediction
        ([{"input_ids": [3, 4], "assistant_masks": [0, 0]}], "train_dataset row 0: .*'assistant_masks' is 0.*drop it"),
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
            with pytest.raises(ValueError, match=r"train_dataset row 0: .*'completion_mask' is 0.*drop it"):
                make_trainer(tmp_path, None, options, data=data)
        else:
            trainer = make_trainer(tmp_path, None, options, data=data)
            assert trainer.train_dataset[0]["labels"] == row["input_ids"]


def test_masks_without_a_token_in_common(tmp_path: Path) -> None:
    row = {"input_ids": [3, 4, 5, 6], "completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 0, 0]}
    good, options = {**row, "assistant_masks": [0, 1, 0, 1]}, {"completion_only_loss": True}
    with pytest.raises(ValueError, match=r"row 1: assistant_masks and completion_mask have no token in common .*drop"):
        make_trainer(tmp_path, None, options, data=Dataset.from_list([good, row]))
    trainer = make_trainer(tmp_path, None, options, data=Dataset.from_list([good]))
    assert trainer.train_dataset[0]["labels"] == [-100, -100, -100, 6]
    make_trainer(tmp_path, None, {"completion_only_loss": False}, data=Dataset.from_list([row]))


def test_masks_beside_labels(tmp_path: Path) -> None:
    """TRL takes the labels as they are."""
    rows = Dataset.from_list([{**GOOD, "completion_mask": [0, 0, 0], "assistant_masks": [0, 0, 0]}])
    trainer = make_trainer(tmp_path, None, {"completion_only_loss": True}, data=rows)
    assert trainer.train_dataset[0]["labels"] == GOOD["labels"]


def test_nothing_to_train(tmp_path: Path) -> None:
    adapter = DIPNetConfig(**{**ADAPTER, "target_modules": []}, learn_noise=False)
    with pytest.raises(ValueError, match=r"nothing to train \(learn_noise=False without target_modules.*learn"):
        make_trainer(tmp_path, adapter)


def test_conversation_without_the_assistant(tmp_path: Path) -> None:
    """TRL's own error names no row and blames the chat template."""
    chats = [[("user", "1+1"), ("assistant", "2")], [("user", "hello")]]
    rows = [{"messages": [{"role": role, "content": content} for role, content in chat]} for chat in chats]
    message = "train_dataset row 1: assistant_only_loss=True .* has none; drop it, or set assistant_only_loss to False"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, None, {"assistant_only_loss": True}, data=Dataset.from_list(rows))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_trajectories": True}, "num_trajectories=True must be a whole number"),
        ({"num_trajectories": 2.0}, "num_trajectories=2.0 must be a whole number"),
        ({"variance_weight": "0.1"}, "variance_weight='0.1' must be a number"),
        ({"stability_weight": None}, "stability_weight=None must be a number"),
        ({"icp_epsilon": None}, "icp_epsilon=None must be a number"),
        ({"variational_learning_rate": "x"}, "variational_learning_rate='x' must be a number"),
    ],
)
def test_what_is_no_number(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        DIPSFTConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_numbers_that_a_parser_has_read(tmp_path: Path) -> None:
    (args,) = TrlParser((DIPSFTConfig,)).parse_args_and_config(
        ["--output_dir", str(tmp_path), "--use_cpu", "true", "--dres_weight", "1", "--num_trajectories", "2"]
    )
    assert (args.dres_weight, args.num_trajectories, args.variational_learning_rate) == (1.0, 2, None)


def test_an_adapter_that_the_trainer_cannot_see(tmp_path: Path) -> None:
    model = base_model()
    model.add_adapter(DIPNetConfig(**ADAPTER))
    with pytest.raises(ValueError, match=r"model=LlamaForCausalLM holds a DIPNet adapter outside.*pass peft_config"):
        make_trainer(tmp_path, None, model=model)


def test_nothing_to_predict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_dataset: no row has two tokens"):
        make_trainer(tmp_path, DIPNetConfig(**ADAPTER), data=Dataset.from_dict({"text": ["", ""]}))


def test_dipnets_objective_without_its_adapter(tmp_path: Path) -> None:
    options = {"num_trajectories": 2, "stability_weight": 0.1}
    with pytest.warns(
        UserWarning, match=r"num_trajectories=2 and stability_weight=0.1 without effect: .*DIPNetConfig"
    ):
        make_trainer(tmp_path, LoraConfig(**ADAPTER), options)


@pytest.mark.parametrize(
    ("adapter", "options", "message"),
    [
        ({}, {"variational_learning_rate": 0.5}, "variational_learning_rate=0.5 without effect: .* no posterior; set"),
        ({"learn_noise": False}, {"penalty_unit": "absolute"}, "penalty_unit=absolute without effect: .* that learns"),
    ],
)
def test_fields_of_what_the_adapter_lacks(
    adapter: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=message):
        make_trainer(tmp_path, DIPNetConfig(**ADAPTER, **adapter), options)


def test_padding_without_a_mask_in_the_noises_scale(tmp_path: Path) -> None:
    options = {"padding_free": True, "pad_to_multiple_of": 8}
    with pytest.raises(
        ValueError, match=r"pad_to_multiple_of=8 with packing=True or padding_free=True .*leave it unset"
    ):
        make_trainer(tmp_path, DIPNetConfig(**ADAPTER), options)


@pytest.mark.parametrize("is_text", [True, False])
def test_labels_cut_off(is_text: bool, tmp_path: Path) -> None:
    """A row whose labels all lie beyond max_length is named, not silently dropped."""
    rows = [{"prompt": "a", "completion": "bcd"}, {"prompt": "abcdefgh", "completion": "i"}]
    if not is_text:
        rows = [GOOD, {"input_ids": [3] * 9, "labels": [-100] * 8 + [3]}]
    with pytest.raises(ValueError, match=r"max_length=6 cuts every label off 1 of 2 rows of train_dataset; raise"):
        make_trainer(tmp_path, None, {"max_length": 6}, data=Dataset.from_list(rows))


def test_labels_cut_off_before_packing(tmp_path: Path) -> None:
    """TRL packs a row that it has cut all labels off, whether or not others share its pack."""
    rows = [GOOD, {"input_ids": [3] * 9, "labels": [-100] * 8 + [3]}, {"input_ids": [3, 4], "labels": [-100, 4]}]
    options = {"packing": True, "max_length": 6}
    with pytest.raises(ValueError, match=r"max_length=6 cuts every label off 1 of 3 rows of train_dataset; raise"):
        make_trainer(tmp_path, None, options, data=Dataset.from_list(rows))
    make_trainer(tmp_path, None, {**options, "max_length": 9}, data=Dataset.from_list(rows))
    make_trainer(tmp_path, None, {**options, "packing_strategy": "bfd_split"}, data=Dataset.from_list(rows))


def test_empty_texts_are_not_cut_off(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["", "abc"] * 4})
    trainer = make_trainer(tmp_path, None, {"packing": True, "max_length": 16}, data=rows)
    trainer.train()
    assert losses(trainer)[0] > 0


def test_adapter_on_head(tmp_path: Path) -> None:
    """TRL's own error: its fused head would never train the adapter."""
    with pytest.raises(ValueError, match=r"`lm_head` is not supported.*Remove `'lm_head'` from your `target_modules`"):
        make_trainer(tmp_path, DIPNetConfig(**{**ADAPTER, "target_modules": ["q_proj", "lm_head"]}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_blocks": 4}, "noise_blocks=4: the model has 3 blocks; give a number from 1 to 3"),
        ({"noise_blocks": [3]}, r"noise_blocks=\[3\]: the model has 3 blocks"),
        ({"noise_blocks": "decoder.*"}, "noise_blocks='decoder.*' matches no block; the blocks are"),
        (
            {"block_names": ["model.layers.0", "model.layers.0"]},
            r"block_names=.* has 'model.layers.0' twice; name every",
        ),
        ({"block_names": ["model.blocks.0"]}, r"block_names: \['model.blocks.0'\] are no modules.*correct the names"),
    ],
)
def test_blocks(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, DIPNetConfig(**ADAPTER, **options))


def test_nothing_wrong(tmp_path: Path) -> None:
    """The same set-up without any of the faults."""
    make_trainer(tmp_path, DIPNetConfig(**ADAPTER), {"num_trajectories": 2, "stability_weight": 0.1}, data=tokenised())
