"""Checkpoints that cannot be evaluated are refused before anything is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dip_hf.evaluation.checkpoints import Checkpoint, check_checkpoints


def test_a_name_alone_is_the_base_and_a_folder_may_hold_an_equals_sign() -> None:
    assert Checkpoint.parse("base") == Checkpoint("base", None)
    assert Checkpoint.parse("lora=runs/lr=2e-4") == Checkpoint("lora", "runs/lr=2e-4")


@pytest.mark.parametrize("text", ["", "=runs/lora", "lora="])
def test_half_a_checkpoint_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a name alone"):
        Checkpoint.parse(text)


def test_kinds(base_folder: str, lora_folder: str, dipnet_folder: str) -> None:
    checkpoints = [Checkpoint("a"), *(Checkpoint("b", folder) for folder in (base_folder, lora_folder, dipnet_folder))]
    assert [checkpoint.kind for checkpoint in checkpoints] == ["base", "model", "LORA", "DIPNET"]


def test_good_checkpoints_pass(base_folder: str, lora_folder: str, dipnet_folder: str) -> None:
    folders = {"whole": base_folder, "lora": lora_folder, "dipnet": dipnet_folder}
    check_checkpoints([Checkpoint("base"), *(Checkpoint(*pair) for pair in folders.items())], base_folder)


def test_no_checkpoint_and_one_name_twice_are_refused(base_folder: str) -> None:
    with pytest.raises(ValueError, match="checkpoints is empty"):
        check_checkpoints([], base_folder)
    with pytest.raises(ValueError, match="'a' is given twice"):
        check_checkpoints([Checkpoint("a"), Checkpoint("a")], base_folder)


def test_missing_folders_are_refused(base_folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoints: lora='.*nowhere' does not exist"):
        check_checkpoints([Checkpoint("lora", str(tmp_path / "nowhere"))], base_folder)
    with pytest.raises(ValueError, match="neither an adapter"):
        check_checkpoints([Checkpoint("lora", str(tmp_path))], base_folder)
    with pytest.raises(ValueError, match=r"model='\./nowhere' is no folder"):
        check_checkpoints([Checkpoint("base")], "./nowhere")


@pytest.mark.parametrize("kind", ["lora_folder", "base_folder"])
def test_pickled_and_truncated_weights_are_refused(
    kind: str, base_folder: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(request.getfixturevalue(kind), folder)
    [weights] = folder.glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated or damaged"):
        check_checkpoints([Checkpoint("x", str(folder))], base_folder)
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"pickled.*can execute code|only .*bin, and pickled"):
        check_checkpoints([Checkpoint("x", str(folder))], base_folder)
