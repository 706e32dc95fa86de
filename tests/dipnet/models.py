"""A tiny model of every decoder family that the adapter is tested on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from dip_hf import DIPNetConfig, NoiseKey
from dip_hf.dipnet.layer import NoiseSite


VOCABULARY = 50
KEY = NoiseKey(3)
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",  # a mask that hides a whole row gives NaN in no other family's sdpa
}
HEADS = {"num_key_value_heads": None, "head_dim": None}  # families without these two options
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def _config(config_class: type, **changes: Any) -> Any:
    arguments = {key: value for key, value in {**SMALL, **changes}.items() if value is not None}
    return config_class(**arguments)


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: _config(tf.LlamaConfig),
    "qwen3": lambda: _config(tf.Qwen3Config),
    "gemma3": lambda: _config(
        tf.Gemma3TextConfig,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    ),
    "mistral": lambda: _config(tf.MistralConfig, sliding_window=4),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=64,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    ),
    "gpt_neox": lambda: _config(tf.GPTNeoXConfig, **HEADS),
    "opt": lambda: _config(tf.OPTConfig, **HEADS, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
    "falcon": lambda: tf.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, num_attention_heads=4
    ),
    "mixtral": lambda: _config(tf.MixtralConfig, **EXPERTS),
    "qwen3_moe": lambda: _config(tf.Qwen3MoeConfig, **EXPERTS),
}


def build(family: str = "llama", **changes: Any) -> tf.PreTrainedModel:
    """A model with random weights, the same for the same arguments, in evaluation mode."""
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tf.AutoModelForCausalLM.from_config(config).eval()


def adapt(model: Any, adapter_name: str = "default", **arguments: Any) -> PeftModel:
    """A DIPNet adapter with random LoRA weights and much noise, so that either shows in the output."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(model, config(**arguments), adapter_name)


def config(**arguments: Any) -> DIPNetConfig:
    defaults = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    return DIPNetConfig(**{**defaults, "noise_scale": 0.5, **arguments})


def batch(rows: int = 3, length: int = 10, padded: bool = False) -> dict[str, torch.Tensor]:
    """Token ids and their mask; padded batches have rows of different lengths, padded on the left."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    for row in range(rows if padded else 0):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def load_base(folder: str) -> tf.PreTrainedModel:
    return tf.AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model: nn.Module, **changes: Any) -> Tensor:
    with torch.no_grad():
        return model(**{**batch(padded=True), **changes}).logits


def noisy(model: PeftModel, key: NoiseKey = KEY) -> Tensor:
    with model.base_model.sampling(key):
        return logits(model)


def sites(model: nn.Module) -> list[NoiseSite]:
    return [module for module in model.modules() if isinstance(module, NoiseSite)]


def deepstack(rows: int = 4) -> tuple[tf.PreTrainedModel, dict[str, Tensor]]:
    """A Qwen3-VL whose image features enter in front of blocks 1, 2 and 3 too, and equal rows with an image each."""
    text = {"num_hidden_layers": 4, "num_key_value_heads": 1, "head_dim": 8}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 3, "num_heads": 2, "patch_size": 4, "num_position_embeddings": 16, "initializer_range": 0.3}
    size = {"hidden_size": 16, "intermediate_size": 32}
    tokens = {"image_token_id": 60, "vision_start_token_id": 61, "vision_end_token_id": 62, "video_token_id": 63}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tf.Qwen3VLConfig(
            text_config={**text, **size, "vocab_size": 64, "num_attention_heads": 2, "rope_parameters": rope},
            vision_config={**vision, **size, "out_hidden_size": 16, "deepstack_visual_indexes": [0, 1, 2]},
            **tokens,
        )
        model = tf.Qwen3VLForConditionalGeneration(config).double().train()
        ids = torch.tensor([[3, 4, 61, 60, 60, 60, 60, 62, 5, 6, 7, 8]]).repeat(rows, 1)
        pixels = torch.randn(16, 3 * 2 * 4 * 4, dtype=torch.float64).repeat(rows, 1)
    return model, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
        "mm_token_type_ids": (ids == 60).int(),
    }
