"""From checkpoints to a report: the library, recipes/evaluate.py, and the stock lm_eval command."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dip_hf.evaluation.checkpoints import Checkpoint, weight_digests
from dip_hf.evaluation.report import make_report
from dip_hf.evaluation.results import CheckpointScores, EvaluationSettings
from dip_hf.evaluation.run import evaluate_checkpoints, load_model, prepare_tasks


ROOT = Path(__file__).parents[2]
TASKS = ("dip_unseen_products", "dip_pretraining_gcd")


def settings_for(base: str, **changes: object) -> EvaluationSettings:
    options = {"tasks": TASKS, "include_path": str(ROOT / "evals"), "limit": 4, "batch_size": 8, "device": "cpu"}
    return EvaluationSettings(model=base, **{**options, **changes})  # type: ignore[arg-type]


def evaluate(settings: EvaluationSettings, checkpoints: list[Checkpoint]) -> list[CheckpointScores]:
    return list(evaluate_checkpoints(settings, checkpoints, prepare_tasks(settings, checkpoints)))


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipes_evaluate", ROOT / "recipes" / "evaluate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_checkpoints_are_scored_on_the_same_items(
    base_folder: str, lora_folder: str, dipnet_folder: str, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoints = [Checkpoint("base"), Checkpoint("lora", lora_folder), Checkpoint("dipnet", dipnet_folder)]
    results = evaluate(settings_for(base_folder, num_samples=2), checkpoints)
    assert [result.kind for result in results] == ["base", "LORA", "DIPNET"]
    assert [result.num_samples for result in results] == [0, 0, 2]
    digests = [weight_digests(folder) for folder in (base_folder, lora_folder, dipnet_folder)]
    assert [result.weights for result in results] == [(one,) for one in digests]
    for result in results:
        assert [task.task for task in result.tasks] == list(TASKS)
        assert [task.items for task in result.tasks] == [task.items for task in results[0].tasks]
        assert all(len(task.scores) == len(set(task.items)) == 4 for task in result.tasks)
    output = capfd.readouterr()
    assert "[2/3] lora: LORA" in output.out
    assert "Running generate_until requests" in output.err


def test_a_graded_score_stops_a_calibration_after_the_first_checkpoint(
    base_folder: str, lora_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "graded.py").write_text("def grade(doc, results):\n    return {'grade': 0.5}\n")
    (tmp_path / "docs.json").write_text(json.dumps([{"question": "1 + 1 =", "answer": "2"}]))
    (tmp_path / "graded.yaml").write_text(
        f"""
task: graded
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "docs.json"}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
process_results: !function graded.grade
generation_kwargs: {{until: ["\\n"], max_gen_toks: 2}}
metric_list: [{{metric: grade, aggregation: mean, higher_is_better: true}}]
metadata: {{whole_answer: true}}
"""
    )
    settings = settings_for(base_folder, tasks=("graded",), include_path=str(tmp_path), limit=1, calibration=True)
    with pytest.raises(ValueError, match=r"calibration: task graded has grade=0\.5 for an item"):
        evaluate(settings, [Checkpoint("base"), Checkpoint("lora", lora_folder)])
    assert "[2/2]" not in capfd.readouterr().out


def test_every_way_to_predict_is_calibrated_in_one_run(
    base_folder: str, lora_folder: str, other_lora_folder: str, dropout_folder: str, posterior_folder: str
) -> None:
    spelled = [
        f"lora={lora_folder}",
        f"temperature={lora_folder},temperature",
        f"dropout={dropout_folder},dropout,samples=2",
        f"ensemble={lora_folder}+{other_lora_folder}",
        f"mean={posterior_folder}",
        f"ibvi={posterior_folder},samples=2",
    ]
    settings = settings_for(base_folder, limit=2, calibration=True, in_distribution=TASKS[1])
    results = evaluate(settings, [Checkpoint.parse(text) for text in spelled])
    assert [result.num_samples for result in results] == [0, 0, 2, 0, 0, 2]
    lora, tempered, *_, mean, ibvi = results
    assert lora.temperature is None and tempered.temperature not in (None, 1.0)
    for result in results:
        for task in result.tasks:
            assert len(task.confidences) == len(task.nlls) == len(task.scores) == 2
            assert all(0 <= value <= 1 for value in task.confidences) and all(value > 0 for value in task.nlls)
    assert [task.scores for task in lora.tasks] == [task.scores for task in tempered.tasks]
    for one, other in ((lora, tempered), (mean, ibvi)):
        assert [task.nlls for task in one.tasks] != [task.nlls for task in other.tasks]
    blocks = make_report(settings, results).calibration
    assert [block.name for block in blocks] == list(TASKS)
    assert "shift_auroc" in blocks[0].rows[0].measures and "shift_auroc" not in blocks[1].rows[0].measures


def test_an_adapters_own_tokenizer_says_where_a_text_ends(
    base_folder: str, lora_folder: str, other_lora_folder: str, tmp_path: Path
) -> None:
    settings = settings_for(base_folder)
    own = shutil.copytree(lora_folder, tmp_path / "own")
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    assert tokenizer.eos_token != "!"
    tokenizer.eos_token = "!"  # as TRL's eos_token=<|im_end|> does
    tokenizer.save_pretrained(own)
    for path, end in (
        (str(own), "!"),
        (f"{own}+{other_lora_folder}", "!"),
        (f"{other_lora_folder}+{own}", "<|end|>"),
        (lora_folder, "<|end|>"),
        (None, "<|end|>"),
    ):
        model = load_model(settings, Checkpoint("one", path))
        assert model.tokenizer.eos_token == end
        assert model.eot_token_id == model.tokenizer.convert_tokens_to_ids(end)


def test_a_whole_model_without_a_tokenizer_takes_the_bases(base_folder: str, tmp_path: Path) -> None:
    """As full fine-tuning leaves it that saves the model alone."""
    AutoModelForCausalLM.from_pretrained(base_folder).save_pretrained(tmp_path)
    for end in ("<|end|>", "!"):
        model = load_model(settings_for(base_folder), Checkpoint("full", str(tmp_path)))
        assert model.tokenizer.eos_token == end
        own = AutoTokenizer.from_pretrained(base_folder, eos_token="!")
        own.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_tokenizer_of_an_adapter_is_named(
    name: str, content: str, base_folder: str, lora_folder: str, tmp_path: Path
) -> None:
    own = shutil.copytree(lora_folder, tmp_path / "own")
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(own)
    (own / name).write_text(content)
    with pytest.raises(ValueError, match=rf"^checkpoints: one: the tokenizer in {own} cannot be loaded.*save it"):
        load_model(settings_for(base_folder), Checkpoint("one", str(own)))


def test_several_processes_are_refused(base_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2: an evaluation is one process; start it with python"):
        prepare_tasks(settings_for(base_folder), [Checkpoint("base")])


def test_without_calibration_there_are_no_confidences(base_folder: str) -> None:
    settings = settings_for(base_folder, limit=1, tasks=TASKS[:1])
    results = evaluate(settings, [Checkpoint("base")])
    assert results[0].tasks[0].confidences == results[0].tasks[0].nlls == ()
    assert make_report(settings, results).calibration == ()


def test_the_recipe_prints_the_table_and_writes_the_report(
    recipe: ModuleType, base_folder: str, lora_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "evaluation.yaml"
    config.write_text(f"model: {base_folder}\ntasks: [dip_unseen_products]\nlimit: 50\nbatch_size: 8\n")
    arguments = ["--config", str(config), "--limit", "2", "--checkpoints", "base", f"lora={lora_folder}"]
    recipe.main([*arguments, "--output_dir", str(tmp_path / "out"), "--device", "cpu"])
    assert "dip_unseen_products" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["task_sets"][0]["items"] == 2
    assert [checkpoint["name"] for checkpoint in content["checkpoints"]] == ["base", "lora"]
    assert (tmp_path / "out" / "report.md").is_file()
    assert (tmp_path / "out" / "report.png").is_file()


def test_what_is_finished_is_kept_when_a_later_checkpoint_fails(
    recipe: ModuleType, base_folder: str, lora_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_and_no_more(settings: EvaluationSettings, checkpoints: list[Checkpoint], tasks: dict) -> Iterator[Any]:
        yield from evaluate_checkpoints(settings, checkpoints[:1], tasks)
        raise MemoryError

    monkeypatch.setattr(recipe, "evaluate_checkpoints", one_and_no_more)
    arguments = ["--tasks", "dip_unseen_products", "--limit", "2", "--checkpoints", "base", f"lora={lora_folder}"]
    with pytest.raises(MemoryError):
        recipe.main(["--model", base_folder, *arguments, "--output_dir", str(tmp_path), "--device", "cpu"])
    content = json.loads((tmp_path / "report.json").read_text())
    assert [checkpoint["name"] for checkpoint in content["checkpoints"]] == ["base"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "0"], "limit=0 must be at least 1"),
        (["--batch_size", "0"], "batch_size=0 must be at least 1"),
        (["--split", "train"], "split='train' must be 'test' or 'validation'"),
        (
            ["--calibration", "true", "--split", "validation", "--checkpoints", "base,temperature"],
            "split='validation': base's temperature is fitted on it",
        ),
        (["--num_samples", "-1"], "num_samples=-1 must be 0"),
        (["--num_samples", "4"], "num_samples=4 needs a checkpoint with a DIPNet adapter or `,dropout`, got base"),
        (["--checkpoints", "base,temperature"], "base: a temperature changes calibration alone"),
        (["--in_distribution", "dip_reasoning_unseen"], "is used by calibration only"),
        (["--calibration", "true", "--in_distribution", "x"], "in_distribution='x' is none of the task sets dip_un"),
        (["--checkpoints", "lora=nowhere"], "checkpoints: lora='nowhere' does not exist"),
        (["--checkpoints", "a", "a"], "'a' is given twice"),
        (["--include_path", "nowhere"], "include_path='nowhere' is no folder"),
        (["--families", "gcd"], "families: 'gcd' is no fine-tuning family"),
        (["--device", "nosuch"], "device='nosuch' cannot be used here"),
        (["--dtype", "bf16"], "dtype='bf16' must be one of auto, float32, bfloat16, float16"),
        (["--output_dir", __file__], f"output_dir={__file__!r} cannot be written"),
        (["--chekpoints", "base"], "--chekpoints"),
    ],
)
def test_bad_input_ends_the_recipe_before_a_model_is_loaded(
    recipe: ModuleType, base_folder: str, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(recipe, "evaluate_checkpoints", refuse)
    with pytest.raises(SystemExit) as stop:
        recipe.main(["--model", base_folder, "--tasks", "dip_unseen_products", *arguments])
    assert message in str(stop.value)


def test_a_base_that_cannot_be_loaded_ends_the_recipe_in_one_line(
    recipe: ModuleType, base_folder: str, tmp_path: Path
) -> None:
    damaged = shutil.copytree(base_folder, tmp_path / "damaged")
    (damaged / "config.json").write_text("{")
    arguments = ["--tasks", "dip_unseen_products", "--limit", "1", "--output_dir", str(tmp_path), "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        recipe.main(["--model", str(damaged), *arguments])
    assert str(stop.value).startswith(f"recipes/evaluate.py: model={str(damaged)!r} cannot be loaded (")
    assert "\n" not in str(stop.value)


def test_without_math_verify_gsm8k_stops_before_its_data_is_loaded(
    recipe: ModuleType, base_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    # What an earlier test of this process has imported; lm-eval keeps the modules that tasks refer to as well
    utilities = str(ROOT / "evals" / "standard" / "utils.py")
    kept = [name for name, module in sys.modules.items() if getattr(module, "__file__", None) == utilities]
    for name in ("dip_hf.evaluation.answers", *kept):
        monkeypatch.delitem(sys.modules, name, raising=False)
    arguments = ["--tasks", "dip_gsm8k", "--output_dir", str(tmp_path), "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        recipe.main(["--model", base_folder, *arguments])
    assert "scoring numeric answers needs Math-Verify: pip install 'dip_hf[eval]'" in str(stop.value)


def test_the_help_says_how_samples_are_averaged(recipe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipe.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "given the tokens before it" in text
    assert "num_samples x batch_size rows" in text


def test_an_unknown_key_of_a_config_file_is_refused(recipe: ModuleType, base_folder: str, tmp_path: Path) -> None:
    config = tmp_path / "evaluation.yaml"
    config.write_text(f"model: {base_folder}\ntask: [dip_unseen_products]\n")
    with pytest.raises(SystemExit) as stop:
        recipe.main(["--config", str(config)])
    assert "task" in str(stop.value)


# The stock command, but for its index of lm-eval's own tasks, which takes half a minute to read and is not tested here
COMMAND = """
import sys
import lm_eval.tasks.manager
lm_eval.tasks.manager.__file__ = sys.argv.pop(1) + "/manager.py"
from lm_eval.__main__ import cli_evaluate
assert "dip_hf" not in sys.modules
cli_evaluate()
"""


@pytest.mark.parametrize(("model", "more"), [("hf", ""), ("hf-dip", ",num_samples=2")])
def test_the_stock_command_loads_the_adapter(
    model: str, more: str, base_folder: str, dipnet_folder: str, tmp_path: Path
) -> None:
    """With evals/register.yaml the stock command knows the model and the adapter; nothing else imports dip_hf."""
    arguments = f"pretrained={base_folder},peft={dipnet_folder}{more}"
    command = [sys.executable, "-c", COMMAND, str(tmp_path), "--model", model, "--model_args", arguments]
    command += ["--include_path", "evals", "--tasks", "evals/register.yaml,dip_unseen_products"]
    command += ["--limit", "2", "--batch_size", "2", "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "|dip_unseen_products|" in finished.stdout.replace(" ", "")
