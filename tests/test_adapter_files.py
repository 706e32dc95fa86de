"""An adapter folder that cannot be loaded whole and safely is refused with the file's name and a remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

from dip_hf.adapter_files import (
    CONFIG_NAME,
    CONVERSION,
    PICKLED_NAME,
    WEIGHTS_NAME,
    base_revision,
    check_adapter_folder,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"peft_type": "DIPNET"}))
    save_file({"weight": torch.zeros(64)}, tmp_path / WEIGHTS_NAME)
    return tmp_path


def test_a_whole_folder_passes(folder: Path) -> None:
    check_adapter_folder(folder)
    check_adapter_folder(str(folder))


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No adapter_config.json in .*nowhere: give the folder"):
        check_adapter_folder(tmp_path / "nowhere")


def test_a_config_alone(folder: Path) -> None:
    (folder / WEIGHTS_NAME).unlink()
    check_adapter_folder(folder, require_weights=False)
    with pytest.raises(ValueError, match=r"No adapter_model.safetensors in .*weights are missing"):
        check_adapter_folder(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"peft_type": ', "no valid JSON"), (b"\xff\xfe", "no valid JSON"), (b"[]", "no JSON object")],
)
def test_a_damaged_config(folder: Path, content: bytes, message: str) -> None:
    (folder / CONFIG_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=rf"adapter_config.json .*{message}.*again"):
        check_adapter_folder(folder)


@pytest.mark.parametrize("keep", [0, 4, 20, -1], ids=["empty", "in the length", "in the header", "one byte short"])
def test_a_truncated_weight_file(folder: Path, keep: int) -> None:
    weights = folder / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is truncated or damaged .*again"):
        check_adapter_folder(folder)


def test_a_pickle_under_the_name_of_a_safetensors_file(folder: Path) -> None:
    torch.save({"weight": torch.zeros(64)}, folder / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="truncated or damaged"):
        check_adapter_folder(folder, require_weights=False)


@pytest.mark.parametrize("require_weights", [True, False])
def test_a_pickled_weight_file(folder: Path, require_weights: bool) -> None:
    (folder / WEIGHTS_NAME).unlink()
    torch.save({"weight": torch.zeros(64)}, folder / PICKLED_NAME)
    with pytest.raises(
        ValueError, match=r"adapter_model.bin is a pickled .*only safetensors.*Save it again, or convert it"
    ):
        check_adapter_folder(folder, require_weights)


def test_the_remedy_for_a_pickled_weight_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / WEIGHTS_NAME).unlink()
    torch.save({"weight": torch.ones(64)}, folder / PICKLED_NAME)
    monkeypatch.chdir(folder)
    exec(CONVERSION.removeprefix("convert it with "), {"torch": torch, "safetensors": safetensors})
    check_adapter_folder(folder)
    assert torch.equal(load_file(folder / WEIGHTS_NAME)["weight"], torch.ones(64))


def test_a_pickle_beside_a_safetensors_file_is_not_read(folder: Path) -> None:
    (folder / PICKLED_NAME).write_bytes(b"anything")
    check_adapter_folder(folder)


def test_the_revision_of_a_base_is_none_but_a_name() -> None:
    assert base_revision({}) is base_revision({"revision": None}) is base_revision({"revision": "main"}) is None
    for revision in ("v2.0", "refs/pr/1", "0" * 40):
        assert base_revision({"revision": revision}) == revision
    for revision in (2, ["v2"], "", "../../v2", "/v2", "v2/", "--v2", 'v2")', "v2\n", "v 2"):
        with pytest.raises(ValueError, match=r"revision=.* in adapter_config.json is no branch.*; correct it, or set"):
            base_revision({"revision": revision})
