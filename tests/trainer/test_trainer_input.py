"""Bad input: an error before training starts, which names the field, its value and the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import MixtralConfig, MixtralForCausalLM
from trl import TrlParser

from dip_hf import DIPNetConfig, DIPSFTConfig
from dip_hf.trainer.checks import check_boundaries, check_noise_setup
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
        ([{"input_ids": [3, 4], "completion_mask": [0, 0]}], "train_dataset row 0: .*'completion_mask' is 0.*drop it"),
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


def test_a_mask_that_is_not_used(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"input_ids": [3, 4, 5], "completion_mask": [0, 0, 0]}])
    make_trainer(tmp_path, None, {"completion_only_loss": False}, data=rows)


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


def router_model() -> MixtralForCausalLM:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=48,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=2,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def test_router_loss(tmp_path: Path) -> None:
    """Folded trajectories and a router loss exclude each other; either alone trains."""
    adapter = DIPNetConfig(**{**ADAPTER, "target_modules": ["q_proj"]})
    with pytest.raises(ValueError, match=r"num_trajectories=2 does not work with a router loss.*router_aux_loss_coef"):
        make_trainer(tmp_path, adapter, {"num_trajectories": 2}, router_model())
    make_trainer(tmp_path, adapter, {"num_trajectories": 2, "router_aux_loss_coef": 0.0}, router_model()).train()
    make_trainer(tmp_path, adapter, {}, router_model()).train()


def test_fsdp_activation_checkpointing(tmp_path: Path) -> None:
    """accelerate's own activation checkpointing is refused. The plugin is a stand-in: FSDP needs an accelerator."""
    trainer = make_trainer(tmp_path, DIPNetConfig(**ADAPTER))
    plugin = SimpleNamespace(activation_checkpointing=True, fsdp_version=2, cpu_ram_efficient_loading=True)
    stand_in = SimpleNamespace(
        is_fsdp_enabled=True,
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)),
        model=trainer.model,
    )
    with pytest.raises(ValueError, match=r"fsdp_activation_checkpointing=True .*activation_checkpointing=True in the"):
        check_noise_setup(stand_in, trainer.args)
    plugin.activation_checkpointing = False
    with pytest.raises(ValueError, match=r"fsdp_cpu_ram_efficient_loading=True .*set it to False"):
        check_noise_setup(stand_in, trainer.args)
    stand_in.model = base_model()  # no noise, no buffers
    check_noise_setup(stand_in, trainer.args)


def test_blocks_that_read_one_row_s_boundaries(tmp_path: Path) -> None:
    options = {"num_trajectories": 2, "padding_free": True}
    trainer = make_trainer(tmp_path, DIPNetConfig(**ADAPTER), options)
    trainer.model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"num_trajectories=2 with packing or padding_free=True: linear_attention bl"):
        check_noise_setup(trainer, trainer.args)
    trainer.padding_free = False
    check_noise_setup(trainer, trainer.args)


def test_images_that_enter_between_blocks() -> None:
    vision = SimpleNamespace(to_dict=lambda: {"vision_config": {"deepstack_visual_indexes": [1, 2]}})
    model: Any = SimpleNamespace(config=vision)
    with pytest.raises(ValueError, match=r"num_trajectories=2: .* adds features of pixel_values .* on text alone"):
        check_boundaries(model, {"pixel_values": torch.zeros(1)}, 2)
    check_boundaries(model, {"input_ids": torch.zeros(1, 2)}, 2)


def test_flex_attention(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, DIPNetConfig(**ADAPTER), {"num_trajectories": 2})
    trainer.model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=re.escape("attn_implementation='flex_attention'")):
        check_noise_setup(trainer, trainer.args)


def positions_alone(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A padding-free batch without the boundaries that TRL's own collator gives."""
    return {
        "input_ids": torch.tensor([[token for example in examples for token in example["input_ids"]]]),
        "labels": torch.tensor([[token for example in examples for token in example["labels"]]]),
        "position_ids": torch.tensor([[i for example in examples for i in range(len(example["input_ids"]))]]),
    }


def test_flash_attention_without_boundaries(tmp_path: Path) -> None:
    """Flash attention reads them from the positions of batches of one row; folded, it would look across documents."""
    adapter, options = DIPNetConfig(**ADAPTER), {"num_trajectories": 2, "remove_unused_columns": False}
    trainer = make_trainer(tmp_path, adapter, options, data_collator=positions_alone)
    trainer.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"num_trajectories=2: .*needs cu_seq_lens_q .*set num_trajectories to 1"):
        trainer.train()
    batch = positions_alone(tokenised(2).to_list())
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2'"):
        check_boundaries(trainer.model, batch, 2)
    check_boundaries(trainer.model, {**batch, "cu_seq_lens_q": torch.tensor([0])}, 2)
    check_boundaries(trainer.model, positions_alone(tokenised(1).to_list()), 2)  # one document has no boundary inside
    trainer.model.config._attn_implementation = "sdpa"
    check_boundaries(trainer.model, batch, 2)


def test_trl_s_collator_gives_the_boundaries(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, DIPNetConfig(**ADAPTER), {"num_trajectories": 2, "padding_free": True})
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.config._attn_implementation = "flash_attention_2"
    check_boundaries(trainer.model, batch, 2)
    assert len(batch["cu_seq_lens_q"]) == 9 and batch.get("attention_mask") is None


def test_nothing_wrong(tmp_path: Path) -> None:
    """The same set-up without any of the faults."""
    make_trainer(tmp_path, DIPNetConfig(**ADAPTER), {"num_trajectories": 2, "stability_weight": 0.1}, data=tokenised())
