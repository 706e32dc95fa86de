"""What can be loaded safely and whole of a model's folder, and what it holds."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from dip_hf.model_files import check_base, check_model_folder, model_weights, weight_digests
from tests.trainer.tiny import base_model


def save_adapter(folder: Path) -> None:
    get_peft_model(base_model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """The weight files of a model that was saved in parts."""
    base_model().save_pretrained(tmp_path, max_shard_size="5KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 1
    return files


@pytest.mark.parametrize("is_adapter", [False, True])
def test_digests_are_those_of_the_weights(is_adapter: bool, tmp_path: Path) -> None:
    if is_adapter:
        save_adapter(tmp_path)
    else:
        base_model().save_pretrained(tmp_path)
    name = "adapter_model.safetensors" if is_adapter else "model.safetensors"
    content = (tmp_path / name).read_bytes()
    assert weight_digests(tmp_path) == {name: hashlib.sha256(content).hexdigest()}
    (tmp_path / "training_args.bin").write_bytes(b"another file")
    (tmp_path / name).write_bytes(content[:-1])
    assert weight_digests(tmp_path) == {name: hashlib.sha256(content[:-1]).hexdigest()}


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    with pytest.raises(ValueError, match=r"model='.*' is an adapter: give the model that it was trained on"):
        check_base("model", str(tmp_path))


def test_a_name_may_be_the_hubs_and_a_path_may_not(tmp_path: Path) -> None:
    check_base("model", "you/base")
    (tmp_path / "file").touch()
    for base in ("./nowhere", "~/base", str(tmp_path / "file")):
        with pytest.raises(
            ValueError, match=r"model='.*' is no folder: give a model's folder, or its name on the Hub"
        ):
            check_base("model", base)


def test_a_model_in_parts(parts: list[Path]) -> None:
    folder = parts[0].parent
    (folder / "other.safetensors").write_bytes(b"not the model's")
    check_model_folder("model", folder)
    assert model_weights(folder) == parts and list(weight_digests(folder)) == [part.name for part in parts]
    parts[0].unlink()
    with pytest.raises(ValueError, match=rf"model: .*{parts[0].name} is missing, truncated or damaged"):
        check_model_folder("model", folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "names files outside its folder"),
        ('{"weight_map": {"a": 1}}', "names files outside its folder"),
    ],
)
def test_a_damaged_index_of_parts(index: str, message: str, parts: list[Path]) -> None:
    (parts[0].parent / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        check_model_folder("model", parts[0].parent)


def test_a_stray_safetensors_file_does_not_make_a_pickle_safe(tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "extra.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match=r"only pytorch_model\.bin, and pickled weights can execute code"):
        check_model_folder("model", tmp_path)
    assert weight_digests(tmp_path) == {}
