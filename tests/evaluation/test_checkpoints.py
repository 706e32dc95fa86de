"""Checkpoints that cannot be evaluated are refused before anything is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dip_hf.evaluation.checkpoints import Checkpoint, check_checkpoints


def test_a_name_alone_is_the_base_and_a_folder_may_hold_an_equals_sign() -> None:
    assert Checkpoint.parse("base") == Checkpoint("base", None)
    assert Checkpoint.parse("lora=runs/lr=2e-4") == Checkpoint("lora", "runs/lr=2e-4")


def test_how_a_checkpoint_predicts_stands_behind_its_folder() -> None:
    assert Checkpoint.parse("a=x,samples=10") == Checkpoint("a", "x", samples=10)
    assert Checkpoint.parse("a=x,dropout,samples=3") == Checkpoint("a", "x", samples=3, dropout=True)
    assert Checkpoint.parse("base,temperature") == Checkpoint("base", temperature=True)
    assert Checkpoint.parse("a=x+y+z").folders == ("x", "y", "z")
    assert Checkpoint("base").folders == ()


@pytest.mark.parametrize("text", ["", "=runs/lora", "lora=", "lora=a+", "lora=+a", ",dropout"])
def test_half_a_checkpoint_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be `name`"):
        Checkpoint.parse(text)


def test_a_folder_without_a_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("out/checkpoint-6", "out/checkpoint-6,temperature"):
        with pytest.raises(ValueError, match=r"spelled like a folder, .* base; write NAME=out/checkpoint-6 for a"):
            Checkpoint.parse(text)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    assert Checkpoint.parse("base").path is None
    for file in ("adapter_config.json", "config.json"):
        (tmp_path / "base" / file).write_text("{}")
        with pytest.raises(ValueError, match=r"write NAME=base for a folder"):
            Checkpoint.parse("base")
        (tmp_path / "base" / file).unlink()


@pytest.mark.parametrize("option", ["samples", "samples=", "samples=-1", "samples=1.5", "droput", "dropout=0.1", ""])
def test_an_option_that_is_none_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"'{option}' is no option; spell a checkpoint `name`"):
        Checkpoint.parse(f"lora=folder,{option}")


def test_an_option_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="gives 'samples' twice"):
        Checkpoint.parse("a=x,samples=1,samples=2")


def test_samples_are_those_of_the_evaluation_where_there_is_something_to_sample(
    dipnet_folder: str, lora_folder: str
) -> None:
    assert Checkpoint("a", dipnet_folder).num_samples(5) == 5
    assert Checkpoint("a", dipnet_folder, samples=0).num_samples(5) == 0
    assert Checkpoint("a", lora_folder).num_samples(5) == Checkpoint("base").num_samples(5) == 0
    assert Checkpoint("a", lora_folder, dropout=True).num_samples(5) == 5


def test_every_way_to_predict_passes(
    base_folder: str, lora_folder: str, other_lora_folder: str, dropout_folder: str, posterior_folder: str
) -> None:
    spelled = [
        f"ensemble={lora_folder}+{other_lora_folder}",
        f"dropout={dropout_folder},dropout",
        f"mean={posterior_folder},samples=0",
        f"ibvi={posterior_folder},samples=10",
        f"temperature={lora_folder},temperature",
    ]
    check_checkpoints([Checkpoint.parse(text) for text in spelled], base_folder, num_samples=3)


@pytest.mark.parametrize(
    ("spelled", "num_samples", "message"),
    [
        ("a={lora}+{dipnet}", 0, "an ensemble is made of LoRA adapters .* is DIPNET"),
        ("a={lora}+{base}", 0, "an ensemble is made of LoRA adapters .* is whole model"),
        ("a={lora}+nowhere", 0, "a='nowhere' does not exist"),
        ("a={lora}+{lora},temperature", 0, "cannot be combined"),
        ("a={dipnet},samples=2,temperature", 0, "cannot be combined"),
        ("a={dropout},dropout", 0, "dropout needs a number of samples"),
        ("a={lora},dropout,samples=2", 0, "dropout needs a LoRA adapter .* got LORA with lora_dropout=0.0"),
        ("a={dipnet},dropout,samples=2", 0, "dropout needs a LoRA adapter .* got DIPNET"),
        ("base,dropout,samples=2", 0, "dropout needs a LoRA adapter .* got base with lora_dropout=none"),
        ("a={lora},samples=2", 0, "samples=2 needs a DIPNet adapter, got LORA"),
        ("base,samples=2", 0, "samples=2 needs a DIPNet adapter, got base"),
        ("a={lora}", 4, "num_samples=4 needs a checkpoint with a DIPNet adapter or `,dropout`, got LORA"),
        ("a={dipnet},samples=2", 4, "num_samples=4 needs"),
    ],
)
def test_a_prediction_that_cannot_be_made_is_refused(
    spelled: str,
    num_samples: int,
    message: str,
    base_folder: str,
    lora_folder: str,
    dropout_folder: str,
    dipnet_folder: str,
) -> None:
    folders = {"base": base_folder, "lora": lora_folder, "dropout": dropout_folder, "dipnet": dipnet_folder}
    with pytest.raises(ValueError, match=message):
        check_checkpoints([Checkpoint.parse(spelled.format(**folders))], base_folder, num_samples)


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
