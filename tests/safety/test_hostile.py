"""What a hostile adapter tries, one by one: a ValueError that names it, nothing run, nothing allocated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, MontecloraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dip_hf import DIPNetConfig, export_lora
from dip_hf.adapter_files import CONFIG_NAME, LARGEST_CONFIG, PICKLED_NAME, WEIGHTS_NAME, check_adapter_folder
from tests.safety.support import fresh_base, pickles, save_adapter, watched


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder: Path, **values: Any) -> None:
    file = folder / CONFIG_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_weights(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Set the tensors whose name ends in `name`, or remove them."""
    weights = load_file(folder / WEIGHTS_NAME)
    for key in [key for key in weights if key.endswith(name)]:
        del weights[key]
        if tensor is not None:
            weights[key] = tensor.clone()
    save_file(weights, folder / WEIGHTS_NAME)


def refused(folder: Path, message: str, **arguments: Any) -> None:
    with watched(folder) as seen, pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(fresh_base(), folder, **arguments)
    assert not seen


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": "8"}, "r='8' is not of the type int; correct or remove it"),
        ({"r": 10**30}, "r=1000.* is not of the type int"),
        ({"r": 0}, "r=0 must be a whole number of at least 1"),
        ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern={'q_proj': '2'} must be a dictionary of numbers"),
        ({"noise_scale": [0.1]}, r"noise_scale=\[0.1\] is not of the type float"),
        ({"noise_scale": float("nan")}, "noise_scale=nan must be positive and finite"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf must be finite"),
        ({"learn_noise": 1}, "learn_noise=1 is not of the type bool"),
        ({"target_modules": [["q_proj"]]}, "target_modules=.* is not of the type"),
        ({"block_names": ["../../etc"]}, r"block_names: \['../../etc'\] are no modules of Llama"),
        ({"an_option": 1}, r"unknown keys \['an_option'\]; upgrade dip_hf and peft"),
        ({"megatron_config": {}, "megatron_core": "megatron.evil"}, "would import the module of that name"),
        ({"megatron_core": "os"}, "would import the module of that name"),
        ({"target_modules": "(a+)+$"}, r"A repeated group can take for ever to match, in target_modules="),
        ({"noise_blocks": ".*" * 6 + "x"}, "6 repeats and 1 alternatives can take for ever to match, in noise_blocks"),
        ({"target_modules": "(.|.)" * 30}, "alternatives can take for ever"),
        ({"rank_pattern": {r"(a)\1": 2}}, r"A back-reference in rank_pattern="),
        ({"target_modules": "("}, "No regular expression .* in target_modules='\\('; list the modules' names instead"),
        ({"r": 3}, "is declared with shape .2, 8., but the module's rank is 3"),
        ({"r": 10**12}, "is declared with shape .2, 8., but the module's rank is 1000000000000"),
        ({"rank_pattern": {"q_proj": 10**9}}, "q_proj.lora_A.weight is declared .* rank is 1000000000"),
        ({"target_modules": ["v_proj"]}, "no LoRA weights for the module 'model.layers.0.self_attn.v_proj'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: the weight file holds nothing of 'lm_head'"),
        ({"arrow_config": {}}, "adapter_config.json cannot be applied to LlamaForCausalLM"),
        ({"monteclora_config": {"unknown": 1}}, "unexpected keyword argument 'unknown'; correct the field"),
        (
            {"monteclora_config": {"num_samples": 10**9}},
            r"num_samples=1000000000: the weight file has \[\]; correct it",
        ),
        (
            {"trainable_token_indices": [1] * 9},
            "trainable_token_indices names 9 tokens, of which the weight file has no",
        ),
        ({"variational_rank": 10**9}, "lora_dip_covariance.weight is declared with shape None"),
    ],
    ids=str,
)
def test_configurations(folder: Path, values: dict[str, Any], message: str) -> None:
    change(folder, **values)
    refused(folder, message)


@pytest.mark.parametrize(
    ("option", "good", "bad", "message"),
    [
        ("trainable_token_indices", [1, 2], [1] * 9, "names 9 tokens, of which"),
        ("trainable_token_indices", {"embed_tokens": [1, 2]}, {"embed_tokens": [1] * 9}, "names 9 tokens, of which"),
        (
            "monteclora_config",
            {"num_samples": 3},
            {"num_samples": 10**9},
            r"num_samples=1000000000: .* has \[\(3,\)\]",
        ),
    ],
)
def test_more_than_the_weights(tmp_path: Path, option: str, good: Any, bad: Any, message: str) -> None:
    given = MontecloraConfig(**good) if option == "monteclora_config" else good
    config = DIPNetConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **{option: given})
    get_peft_model(fresh_base(), config).save_pretrained(tmp_path)
    PeftModel.from_pretrained(fresh_base(), tmp_path)
    change(tmp_path, **{option: bad})
    refused(tmp_path, message)


def test_a_buffer_that_the_weights_do_not_bound(tmp_path: Path) -> None:
    """MonteCLoRA draws that many samples at once, in memory of its own."""
    samples = MontecloraConfig(num_samples=3)
    config = DIPNetConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", monteclora_config=samples)
    get_peft_model(fresh_base(), config).save_pretrained(tmp_path)
    change(tmp_path, monteclora_config={"num_samples": 3, "buffer_size": 10**9})
    model = PeftModel.from_pretrained(fresh_base(), tmp_path)
    assert model.peft_config["default"].monteclora_config.buffer_size == 150


def test_patterns_in_use_pass() -> None:
    vision = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj|"
        r"out_proj|o_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:k_proj|v_proj)))"
    )
    for pattern in (
        vision,
        r".*\.layers\.[0-9]+\.self_attn\.(q|v)_proj",
        r"^(?!.*visual).*(?:q|k)_proj$",
        "all-linear",
    ):
        assert DIPNetConfig(target_modules=pattern).target_modules == pattern


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("lora_B.weight", torch.full((8, 2), torch.nan), r"adapter_model.safetensors: .*lora_B.weight holds NaN"),
        ("dip_log_variance.weight", torch.full((8,), torch.nan), "lora_dip_log_variance.weight holds NaN"),
        ("dip_log_variance.weight", torch.full((8,), 1e4), "not finite, or too large for a log-variance"),
        ("rms", torch.full((1,), torch.inf), "rms holds NaN or infinity"),
        ("rms", torch.full((1,), -1.0), "rms' is negative, which no RMS is"),
        ("rms", torch.ones(1, dtype=torch.int64), "is of the type torch.int64, no floating-point one"),
        ("rms", torch.ones(3), r"has shape \(3,\), the model's has \(1,\); load the adapter on the base model"),
        ("rms", None, r"The adapter's weights lack '.*rms' \(2 are missing\)"),
        ("q_proj.lora_A.weight", torch.zeros(2, 9), r"declared with shape \(2, 9\), but the module's input has 8"),
        ("q_proj.lora_B.weight", torch.zeros(9, 2), r"lora_B.default.weight' has shape \(9, 2\), the model's has"),
    ],
    ids=str,
)
def test_weights(folder: Path, name: str, tensor: torch.Tensor | None, message: str) -> None:
    change_weights(folder, name, tensor)
    refused(folder, message)


def test_a_shape_that_the_caller_will_not_have_compared(folder: Path) -> None:
    change_weights(folder, "q_proj.lora_A.weight", torch.zeros(2, 9))
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes=True"):
        PeftModel.from_pretrained(fresh_base(), folder, ignore_mismatched_sizes=True)


def test_a_weight_of_a_module_that_the_model_has_not(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS_NAME)
    save_file({**weights, "base_model.model.other.lora_A.weight": torch.zeros(2, 8)}, folder / WEIGHTS_NAME)
    refused(folder, "other.lora_A.weight' is a weight of no module of the model")


def test_pickles(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for content in pickles(marker):
        (folder / WEIGHTS_NAME).write_bytes(content)
        refused(folder, "adapter_model.safetensors is truncated or damaged")
        (folder / WEIGHTS_NAME).unlink()
        (folder / PICKLED_NAME).write_bytes(content)
        refused(folder, "adapter_model.bin is a pickled weight file")
        with pytest.raises(ValueError, match="is a pickled weight file"):
            export_lora(folder, tmp_path / "out")
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_links_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        elsewhere = (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(elsewhere)
        with pytest.raises(ValueError, match=f"{name} is a link that leads out of its folder, to .*; copy the file"):
            check_adapter_folder(folder)
        (folder / name).unlink()
        elsewhere.rename(folder / name)
    (folder / "step").mkdir()
    (folder / WEIGHTS_NAME).rename(folder / "step" / "weights")
    (folder / WEIGHTS_NAME).symlink_to("step/weights")
    check_adapter_folder(folder)  # leads nowhere outside


@pytest.mark.parametrize("subfolder", ["../adapter", "/adapter", "a/../.."])
def test_a_subfolder_outside(folder: Path, subfolder: str) -> None:
    with pytest.raises(ValueError, match=r"subfolder=.* leads out of the adapter's folder"):
        DIPNetConfig.from_pretrained(str(folder), subfolder=subfolder)


def test_a_large_or_deep_config(folder: Path) -> None:
    (folder / CONFIG_NAME).write_text(" " * LARGEST_CONFIG + "{}")
    with pytest.raises(ValueError, match="has 1048578 bytes, more than 1048576"):
        check_adapter_folder(folder)
    (folder / CONFIG_NAME).write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is no valid JSON"):
        check_adapter_folder(folder)


def test_another_method(folder: Path) -> None:
    change(folder, peft_type="LORA")
    with pytest.raises(ValueError, match="peft_type='LORA' is no DIPNet adapter; PEFT loads it as it is"):
        DIPNetConfig.from_pretrained(str(folder))


def cached(folder: Path, files: list[str]) -> dict[str, Any]:
    """Lay the adapter out as the Hub's cache does; the arguments that load it from there without a network."""
    revision = "0" * 40
    repository = folder.parent / "cache" / "models--someone--adapter"
    snapshot, blobs = repository / "snapshots" / revision, repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in files:
        (blobs / name).write_bytes((folder / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    return {"cache_dir": str(folder.parent / "cache"), "revision": revision, "local_files_only": True}


def test_the_hubs_cache(folder: Path) -> None:
    options = cached(folder, [CONFIG_NAME, WEIGHTS_NAME])
    assert isinstance(PeftModel.from_pretrained(fresh_base(), "someone/adapter", **options), PeftModel)


def test_a_pickle_in_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    (folder / PICKLED_NAME).write_bytes(pickles(tmp_path / "marker")[1])
    options = cached(folder, [CONFIG_NAME, PICKLED_NAME])
    with pytest.raises(ValueError, match=r"No adapter_model.safetensors in someone/adapter.*pickled and not read"):
        PeftModel.from_pretrained(fresh_base(), "someone/adapter", **options)
    assert not (tmp_path / "marker").exists()


def test_a_class_to_import(folder: Path, tmp_path: Path) -> None:
    fresh_base().save_pretrained(tmp_path / "base")
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama"}
    change(folder, task_type=None, auto_mapping=mapping, base_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(ValueError, match="Cannot infer the auto class"):
        AutoPeftModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("load", [AutoPeftModelForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_fields_are_checked_on_every_way_in(folder: Path, tmp_path: Path, load: Any) -> None:
    fresh_base().save_pretrained(tmp_path / "base")
    change(folder, base_model_name_or_path=str(tmp_path / "base"))
    load(folder)
    change(folder, noise_scale=[1])
    with pytest.raises(ValueError, match=r"noise_scale=\[1\] is not of the type float"):
        load(folder)
