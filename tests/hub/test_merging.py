"""The base with the adapter merged in, as a push carries it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dip_hf import DIPNetConfig
from tests.hub.conftest import BASE, save_adapter, staged
from tests.hub_cache import cache_model


def test_the_merged_model_computes_what_the_adapter_does(base_folder: Path, tmp_path: Path) -> None:
    config = DIPNetConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = save_adapter(base_folder, tmp_path / "run", config).eval()
    staging = staged(tmp_path / "run", tmp_path / "work", base_model=BASE, merged=True)
    assert {"merged/config.json", "merged/model.safetensors"} <= set(staging.files)
    merged = AutoModelForCausalLM.from_pretrained(staging.files["merged/config.json"].parent).eval()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert (merged(ids).logits - model(ids).logits).abs().max() <= 1e-5
    assert 'subfolder="merged"' in staging.files["README.md"].read_text()


def test_the_merged_model_has_the_tokens_that_training_added(base_folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.add_tokens(["<one>", "<two>"])
    base.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(base, config).save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    staging = staged(tmp_path / "run", tmp_path / "work", base_model=BASE, merged=True)
    merged = AutoModelForCausalLM.from_pretrained(staging.files["merged/config.json"].parent)
    assert torch.equal(merged.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert merged.config.vocab_size == len(tokenizer)


def test_merging_loads_no_pickled_base(base_folder: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(base_folder, tmp_path / "base")
    (pickled / "model.safetensors").unlink()
    torch.save(AutoModelForCausalLM.from_pretrained(base_folder).state_dict(), pickled / "pytorch_model.bin")
    save_adapter(base_folder, tmp_path / "run", LoraConfig(r=2, target_modules=["q_proj"]))
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(pickled)
    (tmp_path / "run" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"base_model=.* cannot be loaded \(.*model.safetensors"):
        staged(tmp_path / "run", tmp_path / "work", base_model=BASE, merged=True)


def test_merging_into_embeddings_that_are_the_head_too_is_refused(base_folder: Path, tmp_path: Path) -> None:
    """The sum would go into both."""
    tied = AutoModelForCausalLM.from_pretrained(base_folder)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    shutil.copytree(base_folder, tmp_path / "base")
    tied.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        save_adapter(tmp_path / "base", tmp_path / "run", config)
        message = r"merged=True: the adapter changes the embeddings, which .* shares with its head.* without merged"
        with pytest.raises(ValueError, match=message):
            staged(tmp_path / "run", tmp_path / "work", base_model=BASE, merged=True)


def test_merging_takes_no_local_path_for_a_name_on_the_hub(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter's base is a relative path that is not here; as a name on the Hub it would be a stranger's."""
    project = tmp_path / "project"
    shutil.copytree(base_folder, project / "models" / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with monkeypatch.context() as within:
        within.chdir(project)
        save_adapter(Path("models/base"), Path("runs/lora"), lora)
    changes = {"base_model": BASE, "merged": True}
    assert "merged/model.safetensors" in staged(project / "runs" / "lora", tmp_path / "one", **changes).files
    moved = shutil.move(project / "runs", tmp_path / "runs")
    with pytest.raises(ValueError, match=rf"^base_model='{BASE}', .* cannot be loaded \([^\n]*\)"):
        staged(Path(moved) / "lora", tmp_path / "two", **changes)


def test_a_base_is_merged_and_named_at_its_revision(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_model(BASE, "v2", base_folder, tmp_path / "cache", monkeypatch)
    config = DIPNetConfig(r=2, target_modules=["q_proj"], revision="v2", task_type="CAUSAL_LM")
    save_adapter(base_folder, tmp_path / "run", config)
    staging = staged(tmp_path / "run", tmp_path / "work", base_model=BASE)
    for name in ("adapter_config.json", "lora/adapter_config.json"):
        assert json.loads(staging.files[name].read_text())["revision"] == "v2"
    card = staging.files["README.md"].read_text()
    assert f'from_pretrained("{BASE}", revision="v2")' in card and f"vllm serve {BASE} --revision v2 --enable" in card
    local = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    (tmp_path / "run" / "adapter_config.json").write_text(json.dumps({**local, "base_model_name_or_path": BASE}))
    assert "merged/model.safetensors" in staged(tmp_path / "run", tmp_path / "two", merged=True).files
