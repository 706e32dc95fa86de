"""A base from a GGUF file: the model that transformers reads from it, which can then be trained and saved."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from dip_hf.loading import load_base
from studies.from_gguf import main


PACKED = {"blk.0.ffn_down.weight": GGMLQuantizationType.Q4_1}
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
        values = draw.normal(size=shape).astype(np.float32)
        kind = PACKED.get(name, GGMLQuantizationType.F32)
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def test_the_base_is_the_model_of_the_file(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "base"
    main([str(file), str(out)])
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    base = load_base(out, dtype=torch.float32)
    tokens = torch.tensor([[3, 5, 7, 4]])
    for parameter in packed.parameters():
        parameter.data = parameter.data.bfloat16().float()
    expected = packed(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(base(tokens).logits, expected)
    assert AutoTokenizer.from_pretrained(out)("dab").input_ids[-2:] == [6, 11]


def test_packed_weights_are_unpacked(file: Path, tmp_path: Path) -> None:
    main([str(file), str(tmp_path / "base")])
    (tensor,) = (tensor for tensor in GGUFReader(file).tensors if tensor.name in PACKED)
    expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).bfloat16()
    found = load_base(tmp_path / "base").model.layers[0].mlp.down_proj.weight
    assert torch.equal(found, expected) and len(found.unique()) > 100


def test_it_can_be_trained_and_saved(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "base"
    main([str(file), str(out)])
    base = load_base(out)
    base(torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]])).loss.backward()
    base.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as weights:
        assert weights.get_tensor("model.norm.weight").dtype is torch.bfloat16
    assert "quantization_config" not in (tmp_path / "again" / "config.json").read_text()


def test_nothing_is_written_over_nor_by_halves(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "base"
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", Mock(side_effect=OSError("disk full")))
        with pytest.raises(SystemExit, match=r"studies\.from_gguf: disk full"):
            main([str(file), str(out)])
    assert not out.exists()
    main([str(file), str(out)])
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", "base"}
    with pytest.raises(SystemExit, match=r"out='.*base' exists, and a study may read it: name another folder, or"):
        main([str(file), str(out)])


def test_what_is_no_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"studies\.from_gguf: file='.*none\.gguf' does not exist: give a GGUF file"):
        main([str(tmp_path / "none.gguf"), str(tmp_path / "base")])
    (tmp_path / "bad.gguf").write_text("no weights")
    with pytest.raises(SystemExit, match=r"studies\.from_gguf: "):
        main([str(tmp_path / "bad.gguf"), str(tmp_path / "base")])
    assert not (tmp_path / "base").exists()
