"""A tiny base, a small adapter on it, a pickle that would leave a trace, and a watch over what loading touches."""

from __future__ import annotations

import copy
import io
import os
import pickle
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import PeftModel, get_peft_model

from dip_hf import DIPNetConfig, NoiseKey


INPUTS = torch.tensor([[3, 5, 7, 9, 11]])
_CODE = tuple(str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "platstdlib", "purelib"))


def base() -> Any:
    """A causal LM of two blocks; the same weights at every call."""
    config = tf.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tf.AutoModelForCausalLM.from_config(config).eval()


_BASE = base()


def fresh_base() -> Any:
    """A copy of `base()`, to be changed."""
    return copy.deepcopy(_BASE)


def save_adapter(folder: Path, **arguments: Any) -> PeftModel:
    """Write a DIPNet adapter whose tensors are all set: random LoRA weights, measured noise scales."""
    defaults = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "down_proj"]}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(fresh_base(), DIPNetConfig(**{**defaults, "init_lora_weights": False, **arguments}))
    with torch.no_grad(), model.base_model.sampling(NoiseKey(0)):
        model(INPUTS)
    model.save_pretrained(folder)
    return model


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def pickles(marker: Path) -> list[bytes]:
    """The payload as a plain pickle, and as torch saves it."""
    buffer = io.BytesIO()
    torch.save({"weight": Payload(marker)}, buffer)
    return [pickle.dumps(Payload(marker)), buffer.getvalue()]


_seen: list[str] | None = None
_inside = ""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event == "open" and isinstance(arguments[0], str | bytes):
        path, mode, flags = os.path.realpath(os.fsdecode(arguments[0])), arguments[1], arguments[2]
        writes = any(letter in str(mode or "") for letter in "wax+") or flags & (os.O_WRONLY | os.O_RDWR)
        if writes or not path.startswith((*_CODE, _inside, "/proc/", "/sys/")):
            _seen.append(f"{event} {path} {mode}")
    elif event in ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.fork", "socket.connect"):
        _seen.append(f"{event} {arguments}")


sys.addaudithook(_audit)  # stays for the process, and does nothing outside `watched`


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """Yields a list that fills with what Python code does inside: writing, reading outside `folder`, unpickling."""
    global _seen, _inside
    _seen, _inside = [], str(folder.resolve()) + os.sep
    try:
        yield _seen
    finally:
        _seen = None
