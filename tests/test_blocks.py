"""Decoder blocks are found in every family, and chosen as the option says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PretrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from dip_hf.blocks import find_decoder_blocks, input_size, select_blocks
from tests.dipnet.models import FAMILIES, build


NAMES = [f"model.layers.{index}" for index in range(12)]
PREFIXES = {
    "falcon": "transformer.h",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_every_family(family: str) -> None:
    prefix = PREFIXES.get(family, "model.layers")
    assert find_decoder_blocks(build(family)) == [f"{prefix}.{index}" for index in range(4)]


def test_a_model_of_ones_own_needs_names() -> None:
    with pytest.raises(
        ValueError, match=r"block_names=None: Linear has no config with a number of layers; .*block_names=\["
    ):
        find_decoder_blocks(nn.Linear(2, 2))


def test_a_model_whose_blocks_are_not_as_many_as_its_config_says() -> None:
    model = build()
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match=r"block_names=None: found 0 lists of 5 decoder blocks .*block_names=\["):
        find_decoder_blocks(model)


def test_a_decoder_that_is_shallower_than_its_encoder() -> None:
    """T5's config calls the encoder's depth `num_hidden_layers`."""
    sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(num_layers=3, num_decoder_layers=1, **sizes))
    assert find_decoder_blocks(model) == ["decoder.block.0"]


def test_a_vision_tower_of_the_same_depth() -> None:
    """The decoder's blocks, whichever of the two lists comes first."""
    sizes = {"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    vision = {**sizes, "image_size": [28, 28], "patch_size": [14, 14]}
    text = {**sizes, "model_type": "qwen2", "num_key_value_heads": 1, "vocab_size": 64}
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(InternVLConfig(vision_config=vision, text_config=text))
    assert [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == 3] == [
        "model.vision_tower.encoder.layer",
        "model.language_model.layers",
    ]
    assert find_decoder_blocks(model) == [f"model.language_model.layers.{index}" for index in range(3)]


def test_an_encoder_of_the_same_depth() -> None:
    """An encoder-decoder is not what the methods here are for: its blocks need names."""
    sizes = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 64}
    with torch.device("meta"):
        model = BartForConditionalGeneration(BartConfig(**sizes, encoder_layers=2, decoder_layers=2))
    with pytest.raises(ValueError, match=r"block_names=None: found 2 lists of 2 decoder blocks .*encoder.*decoder"):
        find_decoder_blocks(model)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("all", list(range(12))),
        (1, [11]),
        (12, list(range(12))),
        ("25%", [9, 10, 11]),
        ("100%", list(range(12))),
        ("1%", [11]),
        ("8%", [11]),
        ("9%", [10, 11]),
        ([0, 5], [0, 5]),
        ([5, 0, 5], [0, 5]),
        ([-1, 11, -12], [0, 11]),
        (r".*\.1", [1]),
        (r".*\.1\d?", [1, 10, 11]),
        (r"model\.layers\.[02]", [0, 2]),
    ],
)
def test_choices(choice: Any, expected: list[int]) -> None:
    assert select_blocks(NAMES, choice, "noise_blocks") == expected


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (0, r"noise_blocks=0: the model has 12 blocks; give a number from 1 to 12"),
        (-1, r"noise_blocks=-1: .*from 1 to 12"),
        (13, r"noise_blocks=13: .*from 1 to 12"),
        ([], r"noise_blocks=\[\]: .*at least one index, each from -12 to 11"),
        ([3, 12], r"noise_blocks=\[3, 12\]: .*each from -12 to 11"),
        ([-13], r"noise_blocks=\[-13\]: .*each from -12 to 11"),
        ("layers", r"noise_blocks='layers' matches no block; the blocks are 'model.layers.0' to 'model.layers.11'"),
        ("", r"noise_blocks='' matches no block"),
        ("0%", r"noise_blocks='0%' must be from '1%' to '100%'"),
        ("101%", r"noise_blocks='101%' must be from '1%' to '100%'"),
        ("(", r"noise_blocks='\(' is no regular expression"),
    ],
    ids=str,
)
def test_choices_that_make_no_sense(choice: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_blocks(NAMES, choice, "noise_blocks")


@given(st.integers(1, 40), st.data())
def test_a_list_gives_its_indices_ascending_and_once(depth: int, data: st.DataObject) -> None:
    names = [str(index) for index in range(depth)]
    choice = data.draw(st.lists(st.integers(-depth, depth - 1), min_size=1))
    chosen = select_blocks(names, choice, "noise_blocks")
    assert chosen == sorted(set(chosen)) and {names[index] for index in choice} == {names[index] for index in chosen}


@given(st.integers(1, 40), st.data())
def test_a_number_gives_that_many_blocks_from_the_end(depth: int, data: st.DataObject) -> None:
    number = data.draw(st.integers(1, depth))
    chosen = select_blocks([str(index) for index in range(depth)], number, "noise_blocks")
    assert len(chosen) == number and chosen[-1] == depth - 1 and chosen == list(range(chosen[0], depth))


def test_a_config_without_sizes() -> None:
    """Of a model with several depths and widths, as vision models have them."""
    model = build()
    model.config = PretrainedConfig()
    with pytest.raises(ValueError, match="LlamaForCausalLM has no config with a number of layers; pass the blocks"):
        find_decoder_blocks(model)
    with pytest.raises(ValueError, match=r"cannot tell the input size of 'model.layers.0' .*name `nn.Linear` modules"):
        input_size(model, model.model.layers[0], "model.layers.0")
