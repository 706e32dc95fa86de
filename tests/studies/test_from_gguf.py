"""A base from a GGUF file: the model that transformers reads from it, which can then be trained and saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from dip_hf.loading import load_base
from studies.from_gguf import main


WIDTH, HEADS, MLP, WORDS = 16, 2, 32, ["<unk>", "<s>", "</s>", *"abcdefgh", "ab"]


def write_gguf(path: Path) -> None:
    """A Llama of one block with a tokenizer of single letters."""
    draw = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3] + [1] * 9)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {
        **{f"blk.0.attn_{name}.weight": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{name}.weight": (MLP, WIDTH) for name in ("gate", "up")},
        "blk.0.ffn_down.weight": (WIDTH, MLP),
        **{f"{name}.weight": (WIDTH,) for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")},
        "token_embd.weight": (len(WORDS), WIDTH),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, draw.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_base_is_the_model_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = tmp_path / "tiny.gguf", tmp_path / "base"
    write_gguf(file)
    monkeypatch.setattr("sys.argv", ["from_gguf", str(file), str(out)])
    main()

    packed = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    base = load_base(out, dtype=torch.float32)
    tokens = torch.tensor([[3, 5, 7, 4]])
    for parameter in packed.parameters():
        parameter.data = parameter.data.bfloat16().float()
    expected = packed(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(base(tokens).logits, expected)
    assert AutoTokenizer.from_pretrained(out)("dab").input_ids[-2:] == [6, 11]


def test_it_can_be_trained_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = tmp_path / "tiny.gguf", tmp_path / "base"
    write_gguf(file)
    monkeypatch.setattr("sys.argv", ["from_gguf", str(file), str(out)])
    main()

    base = load_base(out)
    base(torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]])).loss.backward()
    base.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as weights:
        assert weights.get_tensor("model.norm.weight").dtype is torch.bfloat16
    assert "quantization_config" not in (tmp_path / "again" / "config.json").read_text()
