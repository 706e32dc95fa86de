"""The pretraining recipe: tokenizer, order of examples, optimizer, configuration, and the model it made."""

from __future__ import annotations

import copy
import functools
import json
import string
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import TrainerState
from trl import SFTConfig, SFTTrainer, TrlParser


pytest.importorskip("reasoning_gym")

from dip_hf.reasoning import ANSWER_CUE, FAMILIES, INSTRUCTIONS, PRETRAINING, make_split, score_answer


RECIPES = Path(__file__).parents[2] / "recipes"
BASE = RECIPES / "base_model"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    """recipes/pretrain.py, which finds its neighbour muon.py as a script does."""
    sys.path.insert(0, str(RECIPES))
    try:
        import pretrain
    finally:
        sys.path.remove(str(RECIPES))
    return pretrain


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": {"nope": 1.0}}, r"weights: \['nope'\] are no pretraining families"),
        ({"weights": {"copying": -1.0}}, "must not be negative; 0 leaves a family out"),
        ({"hidden_size": 100}, "hidden_size=100 must be an even multiple of num_attention_heads=6"),
        ({"accuracy_examples": 0}, "accuracy_examples=0 must be at least 1"),
        ({"hidden_size": 18}, "hidden_size=18 must be an even multiple"),
    ],
)
def test_settings_that_cannot_work(recipe: ModuleType, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe.PretrainingArguments(**values)


def test_the_number_of_steps_is_needed(recipe: ModuleType, tmp_path: Path) -> None:
    training = SFTConfig(output_dir=str(tmp_path / "out"), bf16=False, use_cpu=True)
    with pytest.raises(SystemExit, match="max_steps=-1 must be at least 1"):
        recipe.main(recipe.PretrainingArguments(), training)
    assert not (tmp_path / "out").exists()


def test_tokenizer_keeps_characters_apart_and_gives_back_the_text(recipe: ModuleType) -> None:
    rows = [row for family in PRETRAINING for row in make_split(family.name, "train", 60)]
    tokenizer = recipe.build_tokenizer([row["prompt"] + row["completion"] for row in rows], 400)
    assert tokenizer.tokenize("Spell backward: word42" + ANSWER_CUE) == ["Spell backward: ", *"word42", ANSWER_CUE]
    for row in rows:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        # Completion-only training needs the prompt's tokens to be a prefix of the whole's.
        assert ids[: len(tokenizer(row["prompt"])["input_ids"])] == tokenizer(row["prompt"])["input_ids"]
        assert tokenizer.decode(ids) == row["prompt"] + row["completion"]
    assert len(tokenizer) <= 400


def test_copying_shows_every_character_and_instruction(recipe: ModuleType) -> None:
    pairs = recipe.copying_pairs(2000, seed=3)
    assert pairs == recipe.copying_pairs(2000, seed=3) != recipe.copying_pairs(2000, seed=4)
    for prompt, completion in pairs:
        text = completion.removeprefix(" ")
        assert prompt == f"Copy: {text}{ANSWER_CUE}" and text == text.strip() != ""
    shown = "".join(completion for _, completion in pairs)
    printable = string.ascii_letters + string.digits + string.punctuation
    assert not [piece for piece in (*printable, *INSTRUCTIONS) if piece not in shown]


def test_batches_are_sorted_weighted_and_stable_under_more_steps(recipe: ModuleType) -> None:
    names = [*(family.name for family in PRETRAINING), recipe.COPYING]
    lengths = np.random.default_rng(0).integers(5, 40, size=60 * len(names))
    pool = Dataset.from_dict(
        {
            "input_ids": [[index] * int(length) for index, length in enumerate(lengths)],
            "labels": [[0]] * len(lengths),
            "family": np.repeat(names, 60),
            "length": lengths,
        }
    )
    weights = {names[0]: 3.0, names[1]: 0.0}
    short, long = (recipe.order_examples(pool, weights, steps, 16, seed=1)["input_ids"] for steps in (20, 40))
    short, long = list(short), list(long)
    assert short == long[: 20 * 16]
    for start in range(0, len(short), 16):
        sizes = [len(ids) for ids in short[start : start + 16]]
        assert sizes == sorted(sizes)
    counts = np.bincount([ids[0] // 60 for ids in long], minlength=len(names))
    assert counts[1] == 0
    assert counts[0] > 2 * counts[2:].mean()


def test_orthogonalize_brings_singular_values_near_one(recipe: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((8, 8), (8, 24), (24, 8)):
        values = torch.linalg.svdvals(recipe.muon.orthogonalize(torch.randn(shape, generator=generator)))
        assert values.min() > 0.3 and values.max() < 1.3


def test_optimizer_groups_every_parameter_once_and_learns(recipe: ModuleType) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(4, 8), "layer": nn.Linear(8, 4)})
    optimizer = recipe.muon.Muon.for_model(model, lr=0.02)
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()} and len(grouped) == 3
    assert [group["muon"] for group in optimizer.param_groups] == [True, False, False]
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model["layer"](model["embed"](torch.arange(4))), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_optimizer_goes_on_exactly_after_its_state_is_restored(recipe: ModuleType) -> None:
    torch.manual_seed(0)
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer, restored = (recipe.muon.Muon.for_model(m, lr=0.01) for m in (model, other))
    inputs = torch.randn(3, 4)

    def step(m: nn.Module, o: torch.optim.Optimizer) -> None:
        o.zero_grad()
        m(inputs).square().sum().backward()
        o.step()

    step(model, optimizer)
    other.load_state_dict(model.state_dict())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # loading shares tensors
    step(model, optimizer)
    step(other, restored)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)


def test_config_parses_and_the_command_line_wins(recipe: ModuleType, tmp_path: Path) -> None:
    path = RECIPES / "configs" / "pretrain.yaml"
    names = {recipe.COPYING, *(family.name for family in PRETRAINING)}
    assert set(yaml.safe_load(path.read_text())["weights"]) <= names
    parser = TrlParser([recipe.PretrainingArguments, SFTConfig])
    options = ["--config", str(path), "--max_steps", "7", "--output_dir", str(tmp_path)]
    arguments, training = parser.parse_args_and_config(options)
    assert training.max_steps == 7 and training.output_dir == str(tmp_path)
    assert arguments.hidden_size == 192 and not training.bf16


def run(recipe: ModuleType, folder: Path, *options: str) -> None:
    """Pretrain a model of one block for six steps, with a checkpoint after every second."""
    values = {
        **{"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
        **{"vocab_size": 400, "examples_per_family": 20, "accuracy_examples": 1, "disable_tqdm": True},
        **{"max_steps": 6, "save_steps": 2, "logging_steps": 1, "warmup_steps": 1},
        **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        "lr_scheduler_kwargs": '{"num_decay_steps": 3, "decay_type": "cosine"}',
    }
    fields = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    config = str(RECIPES / "configs" / "pretrain.yaml")
    parser = TrlParser([recipe.PretrainingArguments, SFTConfig])
    recipe.main(*parser.parse_args_and_config(["--config", config, "--output_dir", str(folder), *fields, *options]))


def logged_losses(folder: Path) -> dict[int, float]:
    history = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


class Kill(TrainerCallback):
    """Ends the run behind its first checkpoint."""

    def on_save(self, *_: object, **__: object) -> None:
        raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_with_the_losses_of_a_whole_one(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recipe, "SFTTrainer", functools.partial(SFTTrainer, callbacks=[Kill()]))
        run(recipe, tmp_path / "cut")
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-2"]
    run(recipe, tmp_path / "cut")
    whole = logged_losses(tmp_path / "whole")
    assert sorted(whole) == [1, 2, 3, 4, 5, 6] and len(set(whole.values())) == 6
    assert logged_losses(tmp_path / "cut") == whole
    weights = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name).get_input_embeddings().weight
        for name in ("whole", "cut")
    ]
    assert torch.equal(*weights)
    assert json.loads((tmp_path / "cut" / "accuracy.json").read_text()).keys() == {f.name for f in PRETRAINING}


@pytest.mark.parametrize("value", ["true", "gone"])
def test_a_missing_checkpoint_is_refused_before_any_example_is_drawn(
    recipe: ModuleType, tmp_path: Path, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "build_pool", lambda *_: pytest.fail("drew examples"))
    with pytest.raises(
        SystemExit, match=rf"^recipes/pretrain\.py: resume_from_checkpoint=(?i:{value}): no whole checkpoint in"
    ):
        run(recipe, tmp_path / "out", "--resume_from_checkpoint", value)


def test_the_checkpoint_asked_for_is_gone_on_from(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def train(self: SFTTrainer, resume_from_checkpoint: str | None) -> None:
        raise Stop(resume_from_checkpoint)

    folders = [tmp_path / f"checkpoint-{step}" for step in (2, 4)]
    for folder in folders:
        folder.mkdir()
        TrainerState().save_to_json(str(folder / "trainer_state.json"))
    monkeypatch.setattr(SFTTrainer, "train", train)
    for options, expected in (([], str(folders[1])), ([str(folders[0])], str(folders[0])), (["false"], None)):
        with pytest.raises(Stop) as stop:
            run(recipe, tmp_path, *(["--resume_from_checkpoint", *options] if options else []))
        assert stop.value.args == (expected,)


def test_base_model_loads_and_answers(recipe: ModuleType) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    assert model.num_parameters() <= 6_000_000
    assert (BASE / "model.safetensors").stat().st_size <= 12 * 2**20
    for name in FAMILIES:
        row = make_split(name, "test", 1)[0]
        assert len(tokenizer.tokenize(row["prompt"])) < len(row["prompt"])  # the instruction is one token
    rows = make_split("spell_backward", "test", 20)
    inputs = tokenizer(list(rows["prompt"]), return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    scores = [score_answer("spell_backward", answer, row) for answer, row in zip(answers, rows, strict=True)]
    assert scores.count(1.0) >= 14


def test_the_base_tells_all_tokens_of_the_suite_apart() -> None:
    """Tokens that pretraining never shows have the same embedding, which adapters on the linear layers cannot mend."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    embeddings = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).get_input_embeddings().weight
    directions = nn.functional.normalize(embeddings.detach(), dim=-1)
    cosines = (directions @ directions.T).fill_diagonal_(-1).amax(dim=-1)
    rows = [row for name in FAMILIES for row in make_split(name, "test", 40)]
    used = {token for row in rows for token in tokenizer(row["prompt"] + row["completion"])["input_ids"]}
    assert {tokenizer.decode([token]): cosines[token].item() for token in used if cosines[token] > 0.9} == {}


def test_other_settings_do_not_take_over_a_folders_examples(recipe: ModuleType, tmp_path: Path) -> None:
    arguments = recipe.PretrainingArguments(examples_per_family=60, vocab_size=400)
    pool, tokenizer = recipe.build_pool(arguments, 0, tmp_path)
    again, same = recipe.build_pool(arguments, 0, tmp_path)
    assert again["input_ids"] == pool["input_ids"] and len(same) == len(tokenizer)
    for changed, seed in ((arguments, 1), (recipe.PretrainingArguments(examples_per_family=61, vocab_size=400), 0)):
        with pytest.raises(ValueError, match=r"holds examples made with .* is asked for; give another output_dir"):
            recipe.build_pool(changed, seed, tmp_path)


def test_weights_of_no_family_are_refused(recipe: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"weights: \['chain_sums'\] are no pretraining families; those"):
        recipe.PretrainingArguments(weights={"chain_sums": 2.0})
