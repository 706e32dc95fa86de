"""A run's record: what another run would repeat, and nothing of the machine or the account."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dip_hf import DIPSFTConfig
from dip_hf.hub.record import scrub, training_config, write_record


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
    assert json.loads((tmp_path / "environment.json").read_text())["packages"]["trl"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/me/models/base", "base"),
        ("~/models/base", "base"),
        ("C:\\Users\\me\\base", "base"),
        ("\\\\server\\share\\me\\base", "base"),
        ("file:///home/me/base", "base"),
        ("you/base", "you/base"),
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


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("hub_token"), inner),
        max_leaves=10,
    )
)
def test_what_is_scrubbed_is_plain_and_stays(value: object) -> None:
    once = scrub(value)
    assert scrub(once) == once
    assert yaml.safe_load(yaml.safe_dump(once)) == once
    assert "hub_token" not in json.dumps(list(once) if isinstance(once, dict) else [])
