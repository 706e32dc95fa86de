"""A random two-block Llama with a byte tokenizer, and adapters on it, saved once per session."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dip_hf import DIPNetConfig, NoiseKey


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", padding_side="left"
    )


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the base: random weights large enough that its answers depend on its prompts."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = _byte_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.4,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def _save_adapter(base_folder: str, config: peft.LoraConfig, folder: Path, seed: int = 1) -> str:
    torch.manual_seed(seed)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config)
    if isinstance(config, DIPNetConfig) and config.projected:
        with torch.no_grad(), model.base_model.sampling(NoiseKey(0)):  # measures the scale of the blocks' inputs
            model(torch.arange(20).view(2, 10))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def lora_folder(base_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a LoRA adapter with random weights in both factors."""
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return _save_adapter(base_folder, config, tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="session")
def dipnet_folder(base_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a DIPNet adapter with random weights, and noise at the last block only."""
    config = DIPNetConfig(r=2, target_modules="all-linear", init_lora_weights=False, noise_blocks=1, noise_scale=0.5)
    return _save_adapter(base_folder, config, tmp_path_factory.mktemp("dipnet"))


@pytest.fixture(scope="session")
def other_lora_folder(base_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of another LoRA adapter, of another rank."""
    config = peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    return _save_adapter(base_folder, config, tmp_path_factory.mktemp("other_lora"), seed=2)


@pytest.fixture(scope="session")
def dropout_folder(base_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a LoRA adapter trained with dropout."""
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.3)
    return _save_adapter(base_folder, config, tmp_path_factory.mktemp("dropout"))


@pytest.fixture(scope="session")
def posterior_folder(base_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an adapter with a posterior in the last block, and no noise."""
    config = DIPNetConfig(
        r=2,
        target_modules="all-linear",
        init_lora_weights=False,
        noise_blocks=[],
        variational_rank=2,
        variational_scale=3.0,
        variational_blocks=1,
    )
    return _save_adapter(base_folder, config, tmp_path_factory.mktemp("posterior"))


@pytest.fixture(scope="session")
def monteclora_folder(base_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of PEFT's MonteCLoRA."""
    config = peft.LoraConfig(
        r=2,
        target_modules="all-linear",
        init_lora_weights=False,
        monteclora_config=peft.MontecloraConfig(buffer_size=2),
    )
    return _save_adapter(base_folder, config, tmp_path_factory.mktemp("monteclora"))
