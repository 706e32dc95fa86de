"""Which checkpoint a run goes on from; recipes/sft.py's and recipes/pretrain.py's own runs are tested with them."""

from pathlib import Path

import pytest
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerState

from dip_hf.recipe.resume import resumed_checkpoint


def asked(folder: Path, value: str | None) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), resume_from_checkpoint=value, use_cpu=True)


def test_the_named_the_last_or_none(tmp_path: Path) -> None:
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        TrainerState(global_step=step).save_to_json(str(tmp_path / f"checkpoint-{step}" / "trainer_state.json"))
    assert resumed_checkpoint(asked(tmp_path, str(tmp_path / "checkpoint-2"))) == str(tmp_path / "checkpoint-2")
    assert resumed_checkpoint(asked(tmp_path, "true")) == str(tmp_path / "checkpoint-10")
    assert resumed_checkpoint(asked(tmp_path, None)) is resumed_checkpoint(asked(tmp_path, "false")) is None


@pytest.mark.parametrize(
    ("value", "said"),
    [("true", "True: no whole checkpoint in .*empty"), ("gone", "gone: no whole checkpoint in gone")],
)
def test_a_checkpoint_that_is_not_there(value: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"resume_from_checkpoint={said}; leave it out"):
        resumed_checkpoint(asked(tmp_path / "empty", value))


@pytest.mark.parametrize("left", [None, "", '{"epoch": 1.0, "glob'], ids=["missing", "empty", "cut"])
def test_a_checkpoint_that_a_kill_cut_short(left: str | None, tmp_path: Path) -> None:
    """trainer_state.json is what Trainer writes last."""
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 11:
            TrainerState(global_step=step).save_to_json(str(tmp_path / f"checkpoint-{step}" / "trainer_state.json"))
    if left is not None:
        (tmp_path / "checkpoint-11" / "trainer_state.json").write_text(left)
    assert resumed_checkpoint(asked(tmp_path, "true")) == str(tmp_path / "checkpoint-10")
    with pytest.raises(ValueError, match=r"resume_from_checkpoint=.*11 was not written to its end.*name an earlier"):
        resumed_checkpoint(asked(tmp_path, str(tmp_path / "checkpoint-11")))
