"""Finding the decoder blocks of a model, and choosing some of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dip_hf.peft_compat import BaseTunerLayer


def _text_config(model: nn.Module) -> Any:
    """The decoder's config; None where it is no transformers model, compiled or not."""
    config = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if isinstance(config, PretrainedConfig) else None


def _depth(model: nn.Module) -> int | None:
    """How many decoder blocks the model has by its config; None where it has none."""
    config = _text_config(model)
    if config is None:
        return None
    # T5 and its kin call the encoder's depth `num_hidden_layers`
    return getattr(config, "num_decoder_layers", None) or getattr(config, "num_hidden_layers", None)


def find_decoder_blocks(
    model: nn.Module, remedy: str = "pass the blocks' module names as `DIPNetConfig(block_names=[...])`"
) -> list[str]:
    """Names of the model's decoder blocks, in order of depth.

    They are the entries of the one `nn.ModuleList` all of whose entries are `GradientCheckpointingLayer`s and whose
    length is the config's number of decoder layers (this project's choice: it finds the blocks of 159 of the 168
    causal-LM classes of transformers 5.23). Of several, as where a vision tower is as deep, the one under
    `get_decoder()` counts.

    Args:
        model: a transformers model.
        remedy: what to do where they are not found, for the error message.

    Raises:
        ValueError: none or several such lists; or an encoder-decoder, whose encoder is as deep.
    """
    depth = _depth(model)
    if depth is None:
        raise ValueError(f"block_names=None: {type(model).__name__} has no config with a number of layers; {remedy}.")
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and all(isinstance(block, GradientCheckpointingLayer) for block in module)
    ]
    if len(found) > 1 and isinstance(model, PreTrainedModel) and not model.config.is_encoder_decoder:
        decoder = set(model.get_decoder().modules())
        inside = [name for name in found if model.get_submodule(name) in decoder]
        found = inside if len(inside) == 1 else found
    if len(found) != 1:
        raise ValueError(
            f"block_names=None: found {len(found)} lists of {depth} decoder blocks in {type(model).__name__} "
            f"({', '.join(found) or 'none'}); {remedy}."
        )
    return [f"{found[0]}.{index}" for index in range(depth)]


def find_visible_blocks(model: nn.Module, known: Iterable[list[str] | None]) -> list[str]:
    """`find_decoder_blocks`, and where wrappers hide them, such as those of blocks compiled one by one, what is known.

    Args:
        model: a transformers model.
        known: names that were found before, in this model or another one.

    Raises:
        ValueError: no blocks are found, and none of `known` are all of the model's.
    """
    try:
        return find_decoder_blocks(model)
    except ValueError:
        depth = _depth(model)
        modules = {name for name, _ in model.named_modules()}
        for names in known:
            if names and len(names) == depth and modules.issuperset(names):
                return names
        raise


def input_size(model: nn.Module, block: nn.Module, name: str) -> int:
    """d, the last dimension of a block's input.

    Args:
        model: which the block belongs to.
        block: a decoder block, or another module that `block_names` names.
        name: of the block, for the error message.

    Raises:
        ValueError: neither the block nor the model's config says it.
    """
    if isinstance(block, BaseTunerLayer):  # a block that is itself a LoRA target
        block = block.get_base_layer()
    size = getattr(block, "in_features", None)
    if isinstance(size, int):
        return size
    size = getattr(_text_config(model), "hidden_size", None)
    if isinstance(size, int):
        return size
    raise ValueError(
        f"block_names: cannot tell the input size of {name!r} ({type(block).__name__}) in a model whose config has no "
        "hidden_size; name `nn.Linear` modules instead."
    )


def last_share(choice: str | int | Sequence[int], field: str) -> int | None:
    """The percentage in a choice such as "25%"; None for any other.

    Args:
        choice: as for `select_blocks`.
        field: the option's name, for the error message.

    Raises:
        ValueError: a percentage below 1 or above 100.
    """
    if not isinstance(choice, str) or not re.fullmatch(r"\d+%", choice):
        return None
    share = int(choice[:-1])
    if not 1 <= share <= 100:
        raise ValueError(f"{field}={choice!r} must be from '1%' to '100%' of the blocks.")
    return share


def check_choice(choice: Any, field: str) -> None:
    """
    Args:
        choice: as for `select_blocks`, not yet compared with a model.
        field: the option's name, for the error message.

    Raises:
        ValueError: it chooses no blocks of any model.
    """
    several = isinstance(choice, list | tuple | range)
    kinds, indices = (int, choice) if several else (str | int, [choice])
    if any(isinstance(index, bool) or not isinstance(index, kinds) for index in indices):
        raise ValueError(f"{field}={choice!r} must be 'all', a number, '25%', a list of indices or a pattern.")
    last_share(choice, field)


def select_blocks(names: Sequence[str], choice: str | int | Sequence[int], field: str) -> list[int]:
    """Indices of the chosen blocks, ascending.

    Args:
        names: all blocks' names, in order of depth.
        choice: "all"; an integer n for the last n; "25%" for the last quarter, rounded up; a list of
            indices (negative ones count from the end); any other string is a regular expression that a block's whole
            name must match.
        field: the option's name, for the error message.

    Raises:
        ValueError: the choice is empty, or reaches outside the model.
    """
    depth = len(names)
    chosen: list[int]
    if choice == "all":
        chosen = list(range(depth))
    elif (share := last_share(choice, field)) is not None:
        chosen = list(range(depth - -(-depth * share // 100), depth))
    elif isinstance(choice, str):
        try:
            chosen = [index for index, name in enumerate(names) if re.fullmatch(choice, name)]
        except re.error as error:
            raise ValueError(f"{field}={choice!r} is no regular expression: {error}.") from error
        if not chosen:
            raise ValueError(f"{field}={choice!r} matches no block; the blocks are {names[0]!r} to {names[-1]!r}.")
    elif isinstance(choice, int):
        if not 1 <= choice <= depth:
            raise ValueError(f"{field}={choice}: the model has {depth} blocks; give a number from 1 to {depth}.")
        chosen = list(range(depth - choice, depth))
    else:
        outside = [index for index in choice if not -depth <= index < depth]
        if outside or not choice:
            raise ValueError(
                f"{field}={list(choice)}: the model has {depth} blocks; give at least one index, each from "
                f"{-depth} to {depth - 1}."
            )
        chosen = sorted({index % depth for index in choice})
    return chosen


def parse_blocks(value: str | int | list[int]) -> str | int | list[int]:
    """A choice of blocks written as text, as `select_blocks` takes it.

    Args:
        value: "all", "4" (the last four), "25%", "0,5,9" (indices), or a regular expression. An integer or a list of
            integers is returned as it is.
    """
    if not isinstance(value, str):
        return value
    parts = value.split(",")
    if all(part.strip().isdecimal() for part in parts):
        numbers = [int(part) for part in parts]
        return numbers if len(numbers) > 1 else numbers[0]
    return value
