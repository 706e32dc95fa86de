"""A run's record: what another run would repeat, and nothing of the machine or the account."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dip_hf import DIPSFTConfig
from dip_hf.evaluation.report import make_report, to_json
from dip_hf.hub.record import scrub, training_config, write_record
from tests.evaluation.test_report import LORA, SETTINGS


def test_a_config_comes_back_from_its_record(tmp_path: Path) -> None:
    token = "hf_" + "s" * 34
    options = {
        "learning_rate": 3e-4,
        "icp_weight": 0.25,
        "icp_steps": 2,
        "eos_token": "</s>",
        "seed": 7,
        "max_length": None,
        "lr_scheduler_type": "cosine",
        "bf16": False,
        "use_cpu": True,
    }
    args = DIPSFTConfig(
        output_dir=str(tmp_path / "private"),
        run_name="on my machine",
        hub_token=token,
        hub_model_id="me/secret",
        model_init_kwargs={"trust_remote_code": False, "token": token, "dtype": "float32"},
        chat_template_path=str(tmp_path / "template.jinja"),
        **options,  # type: ignore[arg-type]
    )
    write_record(tmp_path, args, DIPSFTConfig.__annotations__)
    text = (tmp_path / "training_config.yaml").read_text()
    for private in (token, "trust_remote_code", str(tmp_path), "my machine", "me/secret"):
        assert private not in text
    found = yaml.safe_load(text)
    assert found["model_init_kwargs"] == {"dtype": "float32"}
    assert found["chat_template_path"] == "template.jinja"
    assert set(DIPSFTConfig.__annotations__) <= set(found)  # every regulariser's, those that are off too
    again = DIPSFTConfig(output_dir="elsewhere", **found)
    for name, value in options.items():
        assert found[name] == value and getattr(again, name) == value
    assert training_config(again, DIPSFTConfig.__annotations__) == found
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["packages"]["trl"]
    assert environment["device"] == "cpu"  # which was used, whatever there is


def test_a_pickled_config_has_no_token(tmp_path: Path) -> None:
    """Trainer pickles it into training_args.bin, and pushes that with every checkpoint."""
    token = "hf_" + "s" * 34
    args = DIPSFTConfig(output_dir=str(tmp_path), hub_token=token, hub_model_id="you/run", bf16=False, use_cpu=True)
    torch.save(args, tmp_path / "training_args.bin")
    pickled = (tmp_path / "training_args.bin").read_bytes()
    assert b"you/run" in pickled and token.encode() not in pickled
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert asdict(loaded) == {**asdict(args), "hub_token": None}
    for copied in (copy.copy(args), copy.deepcopy(args), replace(args), args):
        assert copied.hub_token == token
        assert asdict(copied) == asdict(args)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/me/models/base", "base"),
        ("~/models/base", "base"),
        ("C:\\Users\\me\\base", "base"),
        ("\\\\server\\share\\me\\base", "base"),
        ("file:///home/me/base", "base"),
        ("../../home/alice/dip/evals", "evals"),
        ("runs/../../alice/base", "base"),
        ("..\\..\\alice\\base", "base"),
        ("..", ".."),
        ("runs/a+/home/alice/b", "runs/a+b"),
        ("/home/alice/a+../../alice/b+~/c+runs/d", "a+b+d"),  # the last one may be a folder called "c+runs"
        ("/home/alice+work/base", "base"),
        ("runs/a+runs/b", "runs/a+runs/b"),
        ("./runs/a", "./runs/a"),
        ("you/base", "you/base"),
        ("you/base..v2", "you/base..v2"),
        ("https://example.org/a/../b+c", "https://example.org/a/../b+c"),
        ("s3://bucket/base+/home/alice/c", "s3://bucket/base+c"),
        ("s3://bucket/base", "s3://bucket/base"),
        ("layers\\..\\.[a-z]+\\.q_proj", "layers\\..\\.[a-z]+\\.q_proj"),
        ("C:base", "C:base"),
        ("5 + 3 ... 8", "5 + 3 ... 8"),
        (".*\\.(q|v)_proj", ".*\\.(q|v)_proj"),
        (Path("/home/me/x"), "x"),
        (
            {"hub_token": 1, "pad_token": "p", "nested": [{"API_KEY": 2, "r": 3}]},
            {"pad_token": "p", "nested": [{"r": 3}]},
        ),
        pytest.param({"b", "a"}, ["a", "b"], id="a set, whose order is that of no run"),
        (True, True),
    ],
    ids=str,
)
def test_scrub(value: object, expected: object) -> None:
    assert scrub(value) == expected


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("HERE/own/evals", "own/evals"),
        ("own/evals", "own/evals"),
        ("HERE/../alice/evals", "evals"),
        ("../../alice/evals", "evals"),
        ("..", ".."),
    ],
)
def test_a_report_keeps_paths_below_the_current_folder_only(
    folder: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = replace(SETTINGS, include_path=folder.replace("HERE", str(tmp_path)))
    content = json.loads(to_json(make_report(settings, [LORA])))
    assert content["settings"]["include_path"] == expected


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | st.text() | st.text("/\\.~+:C"),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("hub_token"), inner),
        max_leaves=10,
    )
)
def test_what_is_scrubbed_is_plain_and_stays(value: object) -> None:
    once = scrub(value)
    assert scrub(once) == once
    assert yaml.safe_load(yaml.safe_dump(once)) == once
    assert "hub_token" not in json.dumps(list(once) if isinstance(once, dict) else [])
