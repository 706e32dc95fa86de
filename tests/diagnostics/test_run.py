from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dip_hf.cli import main
from dip_hf.diagnostics import make_batches, robustness, smoothness
from dip_hf.diagnostics.run import DiagnoseSettings, load_checkpoint
from tests.dipnet import models
from tests.hub_cache import cache_model


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"add {i} and {i}:", "completion": f" {2 * i}"} for i in range(5)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize("kind", ["lora_folder", "dipnet_folder", "base_folder"])
def test_every_kind_of_checkpoint(
    kind: str, request: pytest.FixtureRequest, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = request.getfixturevalue(kind)
    out = tmp_path / "out"
    assert main(["diagnose", folder, "--dataset", dataset, "--limit", "4", "--output_dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["diagnose.json", "diagnose.png"]
    assert (out / "diagnose.png").read_bytes()[:4] == b"\x89PNG"
    result = json.loads((out / "diagnose.json").read_text())
    model, tokenizer = load_checkpoint(folder, None, "cpu")
    rows = [json.loads(line) for line in Path(dataset).read_text().splitlines()[:4]]
    batches = make_batches(rows, tokenizer, 16)
    assert result["smoothness"] == pytest.approx(smoothness(model, batches), rel=1e-4)
    expected = robustness(model, batches)
    assert list(result["robustness"]) == list(expected)
    assert result["robustness"]["fgsm_0.1"] == pytest.approx(expected["fgsm_0.1"], rel=1e-4)
    assert list(result["reconstruction"]) == ["10", "12", "16", "24"] and result["posterior"] == {}
    for text in ("4 examples", "spectral norm of the Hessian", "N = 10, K = 8", "fgsm 0.1"):
        assert text in printed


def test_reasoning_families_with_typos(lora_folder: str, tmp_path: Path) -> None:
    arguments = ["--families", "number_sorting", "gcd", "--limit", "2", "--split", "test", "--typo_rates", "1"]
    nothing = ["--noise_scales", "--fgsm_scales", "--coded_sizes"]
    assert main(["diagnose", lora_folder, *arguments, *nothing, "--output_dir", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "diagnose.json").read_text())
    assert list(result["robustness"]) == ["none", "typos_1"] and result["reconstruction"] == {}
    assert result["robustness"]["typos_1"]["nll"] != result["robustness"]["none"]["nll"]
    assert result["smoothness"]["examples"] == 4 and result["settings"]["split"] == "test"


def test_the_seed_draws_the_questions_too(
    lora_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*arguments: object) -> None:
        raise ValueError(f"asked for {arguments}")

    monkeypatch.setattr("dip_hf.diagnostics.run.suite_rows", refuse)
    assert main(["diagnose", lora_folder, "--families", "gcd", "--seed", "3"]) == 2
    assert "asked for (['gcd'], 'validation', 32, 'standard', 3)" in capsys.readouterr().err


def test_a_posteriors_distance_is_printed(
    base_folder: str, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    models.adapt(base, noise_blocks=[], variational_rank=2).save_pretrained(tmp_path / "ibvi")
    out = str(tmp_path / "out")
    arguments = ["--base", base_folder, "--dataset", dataset, "--coded_sizes", "--output_dir", out]
    # The adapter folder has no tokenizer, so the base's is taken
    assert main(["diagnose", str(tmp_path / "ibvi"), *arguments]) == 0
    assert "covariance, from its start" in capsys.readouterr().out
    posterior = json.loads((tmp_path / "out" / "diagnose.json").read_text())["posterior"]
    assert posterior["covariance_distance"] == pytest.approx(0, abs=1e-6) and posterior["start_spread"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--families", "nosuch"], "unknown reasoning family 'nosuch'"),
        (["--coded_sizes", "10", "6"], "coded_sizes=.10, 6.: coded_size=6 is below group_size=8"),
        (["--coded_sizes", "17"], "coded_sizes=.17.*always 0"),
        (["--limit", "0"], "limit=0"),
        (["--batch_size", "0"], "batch_size=0"),
        (["--device", "nosuch"], "device='nosuch' cannot be used here"),
        (["--noise_scales", "0"], "noise_scales"),
        (["--fgsm_scales", "nan"], "fgsm_scales"),
        (["--typo_rates", "1.5"], "typo_rates"),
        (["--dataset", "nosuch.jsonl"], "dataset='nosuch.jsonl' is no file"),
        (["--dataset", "x.jsonl", "--families", "gcd"], "families.*dataset='x.jsonl' replaces"),
        (["--dataset", "x.jsonl", "--typo_rates", "1"], "typo_rates.*dataset='x.jsonl' replaces"),
        (["--base", "./nosuch", "--families", "gcd", "--limit", "1"], "nosuch"),
    ],
)
def test_bad_options_are_named_and_write_nothing(
    options: list[str], message: str, lora_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["diagnose", lora_folder, "--output_dir", str(tmp_path / "out"), *options]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("dip-hf diagnose: ")
    assert re.search(message, printed), printed
    assert not (tmp_path / "out").exists()


def test_a_row_beyond_the_models_positions(base_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "a" * 512, "completion": "b"}))
    assert main(["diagnose", base_folder, "--dataset", str(path), "--output_dir", str(tmp_path / "out")]) == 2
    assert "has 514 tokens, and the model 512 positions" in capsys.readouterr().err


def test_bad_checkpoints(lora_folder: str, base_folder: str, dataset: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nosuch.*no folder"):
        load_checkpoint(str(tmp_path / "nosuch"), None, "cpu")
    with pytest.raises(ValueError, match="leave base out"):
        load_checkpoint(base_folder, base_folder, "cpu")
    copy = tmp_path / "copy"
    shutil.copytree(lora_folder, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no base model"):
        load_checkpoint(str(copy), None, "cpu")
    (copy / "adapter_model.safetensors").unlink()
    torch.save({}, copy / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickled"):
        load_checkpoint(str(copy), base_folder, "cpu")
    (tmp_path / "file").write_text("")
    for place in ("file", "file/within/it"):
        with pytest.raises(ValueError, match=r"output_dir='.*': .*file is a file; name a folder"):
            DiagnoseSettings(lora_folder, output_dir=str(tmp_path / place))


def test_a_base_on_the_hub_is_loaded_at_its_revision(
    lora_folder: str, base_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_model("you/base", "v2", Path(base_folder), tmp_path / "cache", monkeypatch)
    folder = Path(shutil.copytree(lora_folder, tmp_path / "trained"))
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "you/base", "revision": "v2"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model, _ = load_checkpoint(str(folder), None, "cpu")
    assert model.peft_type == "LORA"


def test_results_go_to_a_folder_of_the_adapters_name() -> None:
    assert DiagnoseSettings("runs/quickstart/lora/").folder == "diagnose/lora"
    assert DiagnoseSettings("runs/a/checkpoint-20").folder == "diagnose/a-checkpoint-20"


def test_a_folder_with_a_plus_in_its_name(lora_folder: str, base_folder: str, tmp_path: Path) -> None:
    folder = shutil.copytree(lora_folder, tmp_path / "lora+drop")
    model, _ = load_checkpoint(str(folder), base_folder, "cpu")
    assert model.peft_type == "LORA"


def test_a_tokenizers_own_code_is_not_run(
    lora_folder: str, base_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(shutil.copytree(lora_folder, tmp_path / "own"))
    (own / "tok.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tok: pass\n")
    (own / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": [None, "tok.Tok"]}}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers would ask
    with pytest.raises(ValueError, match=r"tokenizer in adapter=.*own.* cannot be loaded"):
        load_checkpoint(str(own), base_folder, "cpu")
    assert not (tmp_path / "ran").exists()


def test_an_adapter_with_tokens_of_its_own(base_folder: str, tmp_path: Path) -> None:
    base, tokenizer = AutoModelForCausalLM.from_pretrained(base_folder), AutoTokenizer.from_pretrained(base_folder)
    tokenizer.add_tokens(["<one>", "<two>"])
    base.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(base, config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_checkpoint(str(tmp_path), base_folder, "cpu")
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
