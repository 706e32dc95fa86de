"""Load a base without running anybody's code, and an adapter onto a base that it fits, or say that it does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel


def load_base(source: str | Path, **options: Any) -> PreTrainedModel:
    """A whole model, from safetensors alone and without code of its own.

    Args:
        source: a folder, or a name on the Hub.
        **options: as for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        OSError, ValueError: transformers' own, also where there are pickled weights alone.
    """
    return AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, trust_remote_code=False, **options)


def load_adapter(base: PreTrainedModel, adapter: str | Path, tokens: int = 0) -> PeftModel:
    """`PeftModel.from_pretrained`, for any kind of adapter, which leaves out weights that fit nothing in the base.

    Args:
        base: the model; it is changed in place.
        adapter: a folder, or a name on the Hub.
        tokens: of the adapter's tokenizer. A base with fewer embeddings gets as many, as it had in training.

    Raises:
        ValueError: the adapter was trained on another base, or its weights are incomplete; names a weight.
    """
    if tokens > base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(tokens)
    try:
        model = PeftModel.from_pretrained(base, adapter)
        # Once more, for what the first call has found and not returned
        check_loaded_whole(model, model.load_adapter(adapter, model.active_adapter), adapter)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise _misfit(adapter, str(error).strip().splitlines()[-1].strip()) from error
    return model


def check_loaded_whole(model: PeftModel, result: Any, adapter: str | Path) -> None:
    """
    Args:
        model: that the adapter was loaded into.
        result: what `PeftModel.load_adapter` returned.
        adapter: whose weights it loaded.

    Raises:
        ValueError: weights were left out, or missing.
    """
    # A prompt's vectors are no weights of a module; embeddings that were resized and trained PEFT writes twice
    of_modules = [key for key in result.unexpected_keys if key.startswith("base_model.")]
    left_out = [key for key in of_modules if ".modules_to_save." not in key]
    if left_out:
        raise _misfit(adapter, f"{left_out[0]!r} is a weight of no module of the model")
    if result.missing_keys:
        weights = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        # A tensor that layers share, as VB-LoRA's bank of vectors, is saved under one name
        filled = {value.data_ptr() for name, value in weights.items() if name not in set(result.missing_keys)} - {0}
        for name in result.missing_keys:
            if name not in weights or weights[name].data_ptr() not in filled:
                raise _misfit(adapter, f"{name!r} is not among its weights")


def _misfit(adapter: str | Path, reason: str) -> ValueError:
    return ValueError(
        f"adapter={str(adapter)!r} does not fit the base model ({reason}); load it on the base that it was trained "
        "on, or save or download it again."
    )
