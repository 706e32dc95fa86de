"""`--dry_run`: says what would run, and neither downloads, writes nor trains."""

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import datasets
import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig

from dip_hf.recipe.arguments import SFTParser
from dip_hf.recipe.dry_run import build_on_meta, describe_run
from dip_hf.trainer import optimizer_groups
from tests.recipes.support import ARCHITECTURES, CONFIGS, ROOT, load_sft, save_small_model


# Parameters of the published checkpoints
PUBLISHED = {
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-3B": 3_212_749_824,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "gemma-3-12b-pt": 12_187_325_040,
    "gemma-3-4b-pt": 4_300_079_472,
}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("a dry run must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def describe(*argv: str) -> str:
    arguments = SFTParser().parse_recipe([*argv, "--dry_run"])
    return "\n".join(describe_run(*arguments, architectures=ARCHITECTURES))


@pytest.mark.parametrize("name", PUBLISHED)
def test_bundled_shapes_are_those_of_the_published_models(name: str) -> None:
    model = build_on_meta(AutoConfig.from_pretrained(ARCHITECTURES / f"{name}.json"), "bfloat16")
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem != "quickstart"], ids=lambda path: path.stem)
def test_every_gsm8k_config(path: Path, no_network: None) -> None:
    text = describe("--config", str(path))
    assert "would load openai/gsm8k main" in text
    assert "468 (1 epochs)" in text
    assert "cosine schedule; groups:\n            adamw_torch_fused: " in text
    assert "learning rate 0.0005" in text and "learning rate 0.001, weight decay 0" in text
    # The vision tower of a Gemma has layers too, and gets neither noise nor LoRA
    assert "vision" not in text
    if "qlora" in path.stem:
        assert "linear layers in 4 bits (nf4)" in text
        # LoRA in bf16, and 28 blocks' variances of width 3584 in fp32
        variances = 28 * 3584
        size = 4 * (2 * (40_470_528 - variances) + 4 * variances)
        assert f"40,470,528 trainable parameters, {size / 2**20:.2f} MiB with gradients and moments" in text


def test_the_baseline_differs_by_its_noise_alone(no_network: None) -> None:
    config = str(ROOT / "recipes" / "configs" / "gsm8k_qwen2.5_3b.yaml")
    dipnet, lora = describe("--config", config), describe("--config", config, "--adapter", "lora")
    # 36 blocks of width 2048
    assert "29,933,568 parameters in 504 tensors" in lora and "29,933,568 parameters in 504 tensors" in dipnet
    assert f"{36 * 2048:,} parameters in 36 tensors" in dipnet
    assert "noise " not in lora


def test_a_posterior_is_trained_by_sgd(no_network: None) -> None:
    words = ["--config", str(ROOT / "recipes" / "configs" / "gsm8k_qwen2.5_3b.yaml"), "--variational_rank", "2"]
    hybrid = describe(*words).partition("groups:")[2].splitlines()[1:4]
    assert [line.split(":")[0].strip() for line in hybrid] == ["adamw_torch_fused"] * 2 + ["SGD with momentum 0.9"]
    faithful = describe(*words, "--noise_blocks", "0", "--variational_optimizer", "faithful").partition("groups:")[2]
    assert "SGD with momentum 0.9" in faithful and "adamw" not in faithful


def test_trajectories_share_the_blocks_below_the_noise(no_network: None) -> None:
    config = str(ROOT / "recipes" / "configs" / "gsm8k_qwen2.5_7b.yaml")
    text = describe("--config", config, "--noise_blocks", "14", "--num_trajectories", "2")
    assert "14 of 28 blocks, model.layers.14 to model.layers.27" in text
    assert "2 trajectories, sharing the 14 blocks below: 1.50 x" in text


def test_a_local_model_and_dataset(tmp_path: Path, no_network: None) -> None:
    model = save_small_model(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "How many?", "answer": "One.\n#### 1"}) + "\n")
    before = sorted(tmp_path.rglob("*"))
    text = describe(
        *("--model_name_or_path", str(model), "--dataset_name", str(rows), "--dataset_format", "gsm8k"),
        *("--output_dir", str(tmp_path / "out"), "--lora_target_modules", "all-linear"),
    )
    assert "weights in that folder" in text and "to evaluate on" not in text
    assert "1 rows from" in text and "The answer is 1" in text
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_of_unknown_shape_is_named(no_network: None) -> None:
    with pytest.raises(ValueError, match="model_name_or_path='some/model' is neither a folder nor in"):
        describe("--model_name_or_path", "some/model", "--dataset_name", "some/data")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--noise_blocks", "29"], "noise_blocks=29"),
        (["--noise_blocks", "decoder.*"], r"noise_blocks='decoder\.\*' matches no block"),
        (["--lora_target_modules", "q_proj", "lm_head"], "lora_target_modules=.* has the LM head"),
        (["--variational_rank", "4", "--weight_decay", "0.1"], "weight_decay=0.1 with variational_rank > 0"),
        (
            ["--dres_weight", "1", "--activation_checkpointing_kwargs", '{"use_reentrant": true}'],
            "use_reentrant': True} makes checkpoints reentrant",
        ),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor makes TRL run a second forward pass"),
    ],
    ids=["depth", "pattern", "head", "posterior", "reentrant", "smoothing"],
)
def test_what_a_real_run_refuses_is_refused(argv: list[str], message: str, no_network: None) -> None:
    """And by the script in one line."""
    config = ["--config", str(ROOT / "recipes" / "configs" / "gsm8k_qwen2.5_7b.yaml")]
    with pytest.raises(ValueError, match=message):
        describe(*config, *argv)
    with pytest.raises(SystemExit, match=rf"^recipes/sft\.py: .*{message}"):
        load_sft().main([*config, *argv, "--dry_run"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--eval_strategy", "steps"], r"dataset_test_split='test': .* has only the splits 'train'"),
        (["--dataset_streaming", "true"], "max_steps=-1 with dataset_streaming=True: .* set max_steps, or"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size=0 must be at least 1"),
        (["--per_device_eval_batch_size", "-1"], "per_device_eval_batch_size=-1 must be at least 1"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps=0 must be at least 1"),
    ],
    ids=["split", "stream", "batch", "evaluation", "accumulation"],
)
def test_a_dry_and_a_real_run_refuse_alike(
    tmp_path: Path, argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, the real one before its model loads."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "How many?", "completion": " One."}) + "\n")
    model = save_small_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    fields = [
        *("--model_name_or_path", str(model), "--dataset_name", str(rows), "--lora_target_modules", "all-linear"),
        *("--output_dir", str(tmp_path / "out"), "--use_cpu", "--bf16", "false", *argv),
    ]
    for run in ([], ["--dry_run"]):
        with pytest.raises(SystemExit, match=rf"^recipes/sft\.py: {message}"):
            load_sft().main([*fields, *run])


@pytest.mark.parametrize("adapter", ["dipnet", "lora", "none"])
def test_groups_are_those_of_a_real_trainer(tmp_path: Path, adapter: str) -> None:
    sft = load_sft()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "How many?", "completion": " One."}) + "\n")
    data, training, chosen = SFTParser().parse_recipe(
        [
            *("--model_name_or_path", str(save_small_model(tmp_path / "model")), "--dataset_name", str(rows)),
            *("--output_dir", str(tmp_path / "out"), "--use_cpu", "--bf16", "false", "--weight_decay", "0.1"),
            *("--adapter", adapter, "--noise_learning_rate", "0.02", "--dataset_streaming", "--max_steps", "1"),
        ]
    )
    trainer = sft.make_trainer(data, training, chosen)
    real = trainer.create_optimizer().param_groups
    model = build_on_meta(AutoConfig.from_pretrained(tmp_path / "model"), chosen.dtype)
    if (config := chosen.peft_config()) is not None:
        model = get_peft_model(model, config)
    planned = optimizer_groups(model, training)

    def facts(groups: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        return [
            ([tuple(p.shape) for p in group["params"]], group["lr"], group["weight_decay"])
            for group in groups
            if group["params"]
        ]

    assert facts(planned) == facts(real)


def test_the_script_itself_writes_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"}
    config = ROOT / "recipes" / "configs" / "gsm8k_llama3.2_3b.yaml"
    command = [sys.executable, str(ROOT / "recipes" / "sft.py"), "--config", str(config), "--dry_run"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "LlamaForCausalLM, 3,212,749,824 parameters" in result.stdout
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_script_names_a_typo_without_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("lora_rr: 4\n")
    monkeypatch.setattr(sys, "argv", ["sft.py", "--config", str(config)])
    with pytest.raises(SystemExit, match=r"recipes/sft.py: the config file's key 'lora_rr' is no field.*'lora_r'"):
        runpy.run_path(str(ROOT / "recipes" / "sft.py"), run_name="__main__")


@pytest.mark.parametrize(("content", "message"), [(None, "No such file"), ("lora_r: [", "while parsing")])
def test_a_config_file_that_cannot_be_read_takes_one_line(content: str | None, message: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    if content is not None:
        config.write_text(content)
    with pytest.raises(SystemExit, match=rf"^recipes/sft\.py: .*{message}"):
        load_sft().main(["--config", str(config)])


def test_every_regulariser_at_once(no_network: None) -> None:
    text = describe("--config", str(ROOT / "recipes" / "configs" / "quickstart_all.yaml"))
    assert "DReS        weight 10.0, token placement through model.layers.3.mlp, K = 8, N = 10" in text
    assert "0.5 of the groups" in text
    assert "ICP         weight 0.5, 1 step(s) of 0.03 from block 0" in text and "comparing blocks [0, 1, 2, 3]" in text


def test_the_validation_examples_are_counted() -> None:
    pytest.importorskip("reasoning_gym")
    config = str(ROOT / "recipes" / "configs" / "quickstart.yaml")
    text = describe("--config", config, "--train_size", "3", "--eval_size", "2", "--eval_strategy", "epoch")
    assert "12 rows from families" in text and "and 8 rows to evaluate on" in text


def local_run(tmp_path: Path, rows: int, *argv: str) -> list[str]:
    data = tmp_path / "rows.jsonl"
    data.write_text((json.dumps({"prompt": "How many?", "completion": " One."}) + "\n") * rows)
    return [
        *("--model_name_or_path", str(save_small_model(tmp_path / "model")), "--dataset_name", str(data)),
        *("--output_dir", str(tmp_path / "out"), "--use_cpu", "--bf16", "false", "--adapter", "none", *argv),
    ]


@pytest.mark.parametrize("drop_last", ["false", "true"])
@pytest.mark.parametrize(("rows", "accumulated"), [(10, 1), (10, 2), (8, 2), (9, 2)])
def test_the_number_of_steps_is_that_of_a_real_trainer(
    rows: int, accumulated: int, drop_last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    argv = local_run(tmp_path, rows, "--per_device_train_batch_size", "4", "--num_train_epochs", "2")
    argv += ["--gradient_accumulation_steps", str(accumulated), "--dataloader_drop_last", drop_last]
    trainer = load_sft().make_trainer(*SFTParser().parse_recipe(argv))
    trainer.train()
    assert f"steps       {trainer.state.max_steps} (2 epochs)" in describe(*argv)


def test_the_dtype_that_model_init_kwargs_gives(tmp_path: Path) -> None:
    assert "MiB in bfloat16" in describe(*local_run(tmp_path, 4, "--model_init_kwargs", '{"dtype": "bfloat16"}'))


@pytest.mark.parametrize("argv", [["--dataset_train_split", "test"], ["--dataset_name", "you/own"]])
def test_the_size_of_no_other_dataset_is_claimed(argv: list[str], no_network: None) -> None:
    text = describe("--config", str(ROOT / "recipes" / "configs" / "gsm8k_qwen2.5_3b.yaml"), *argv)
    assert "as published" not in text and "the number of steps is known once the data is loaded" in text


def test_a_push_of_an_adapter_on_a_local_base(tmp_path: Path) -> None:
    argv = local_run(tmp_path, 4, "--adapter", "lora", "--lora_target_modules", "all-linear", "--push_to_hub", "true")
    with pytest.raises(ValueError, match=r"push_to_hub=True, but the base .* is a local folder"):
        describe(*argv)


def test_a_damaged_model_is_refused_and_one_without_weights_described(tmp_path: Path) -> None:
    argv = local_run(tmp_path, 4)
    weights = tmp_path / "model" / "model.safetensors"
    os.truncate(weights, 1000)
    with pytest.raises(ValueError, match=r"model_name_or_path: .*model\.safetensors is missing, truncated or damaged"):
        describe(*argv)
    weights.unlink()
    shards = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(shards))
    assert "weights missing: no *.safetensors there" in describe(*argv)
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"model_name_or_path=.* holds neither an adapter .* nor a model"):
        describe(*argv)
