"""A block's arguments, however they are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from dip_hf.block_call import BlockCall, uncached


class Block(nn.Module):
    def forward(self, hidden_states: Any, layer_past: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        return hidden_states, layer_past, attention_mask, kwargs


class AnyBlock(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


CALLS = [
    BlockCall(("states", "past", "mask"), {"use_cache": True}),
    BlockCall(("states", "past"), {"attention_mask": "mask", "use_cache": True}),
    BlockCall((), {"hidden_states": "states", "layer_past": "past", "attention_mask": "mask", "use_cache": True}),
]


@pytest.mark.parametrize("call", CALLS, ids=["positions", "mixed", "names"])
def test_arguments_by_position_and_by_name_are_the_same(call: BlockCall) -> None:
    block, seen = Block(), []
    assert call.hidden_states == "states"
    assert call.others(block) == {"layer_past": "past", "attention_mask": "mask", "use_cache": True}
    args, kwargs = call.with_hidden_states("other").changed(block, lambda name, value: seen.append(name) or name)
    assert block(*args, **kwargs) == ("other", "layer_past", "attention_mask", {"use_cache": "use_cache"})
    assert sorted(seen) == ["attention_mask", "layer_past", "use_cache"] and len(args) == len(call.args)


def test_arguments_without_names_stay_in_their_places() -> None:
    call = BlockCall((1, 2, 3, 4), {})
    assert call.changed(AnyBlock(), lambda name, value: 10 * value) == ((1, 20, 30, 40), {})


@pytest.mark.parametrize("name", ["past_key_values", "layer_past", ""])
def test_a_second_pass_has_no_cache(name: str) -> None:
    mask = torch.ones(1)
    assert uncached(name, DynamicCache()) is None
    assert uncached("use_cache", True) is False
    assert uncached("attention_mask", mask) is mask
