"""Shared by this folder's tests: the repository's files, recipes/sft.py as a module, and a model to fine-tune."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


ROOT = Path(__file__).parents[2]
ARCHITECTURES = ROOT / "recipes" / "architectures"
# Those of recipes/sft.py; the other recipes' own are tested with them
CONFIGS = [
    path
    for path in sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
    if path.name.startswith("gsm8k") or path.name == "quickstart.yaml"
]


def load_sft() -> ModuleType:
    """Import recipes/sft.py, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("recipes_sft", ROOT / "recipes" / "sft.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_small_model(folder: Path) -> Path:
    """Write a random two-block Llama that reads bytes, with its tokenizer."""
    symbols = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder
