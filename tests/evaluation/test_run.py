"""From checkpoints to scores: the library, and the stock lm_eval command."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dip_hf.evaluation.checkpoints import Checkpoint
from dip_hf.evaluation.report import make_report, to_json, to_markdown
from dip_hf.evaluation.results import CheckpointScores, EvaluationSettings
from dip_hf.evaluation.run import evaluate_checkpoints, load_model, prepare_tasks
from dip_hf.model_files import weight_digests
from tests.hub_cache import cache_model


ROOT = Path(__file__).parents[2]
TASKS = ("dip_unseen_products", "dip_pretraining_gcd")


def settings_for(base: str, **changes: object) -> EvaluationSettings:
    options = {"tasks": TASKS, "include_path": str(ROOT / "evals"), "limit": 4, "batch_size": 8, "device": "cpu"}
    return EvaluationSettings(model=base, **{**options, **changes})  # type: ignore[arg-type]


def evaluate(settings: EvaluationSettings, checkpoints: list[Checkpoint]) -> list[CheckpointScores]:
    return list(evaluate_checkpoints(settings, checkpoints, prepare_tasks(settings, checkpoints)))


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


def test_a_base_on_the_hub_is_loaded_at_the_revision_of_its_adapters(
    base_folder: str,
    lora_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache_model("you/base", "v2", Path(base_folder), tmp_path / "cache", monkeypatch)
    trained = Path(shutil.copytree(lora_folder, tmp_path / "trained"))
    config = json.loads((trained / "adapter_config.json").read_text())
    (trained / "adapter_config.json").write_text(json.dumps({**config, "revision": "v2"}))
    settings = settings_for("you/base", tasks=TASKS[:1], limit=1)
    results = evaluate(settings, [Checkpoint("base"), Checkpoint("lora", str(trained))])
    assert [result.revision for result in results] == ["v2", "v2"]
    assert "[1/2] base: base, you/base at v2" in capsys.readouterr().out
    report = make_report(settings, results)
    assert "Base `you/base` at `v2`;" in to_markdown(report) and json.loads(to_json(report))["revision"] == "v2"
    both = [Checkpoint("one", str(trained)), Checkpoint("other", lora_folder)]
    with pytest.raises(ValueError, match=r"trained was trained on revision v2 of its base, and .* on main: evaluate"):
        prepare_tasks(settings, both)
    prepare_tasks(settings_for(base_folder), both)  # a folder has none


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


@pytest.mark.parametrize("device", ["meta", "cpu:0"])
def test_a_device_that_lm_eval_would_exchange_for_another(device: str, base_folder: str) -> None:
    with pytest.raises(ValueError, match=rf"device='{device}': lm-eval, .* took '(cpu|cuda)'; name one that it knows"):
        load_model(settings_for(base_folder, device=device), Checkpoint("base"))


def test_several_processes_are_refused(base_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2: an evaluation is one process; start it with python"):
        prepare_tasks(settings_for(base_folder), [Checkpoint("base")])


@pytest.mark.parametrize(("package", "calibration"), [("matplotlib", False), ("torchmetrics", True)])
def test_what_the_report_needs_is_missed_before_a_model_is_loaded(
    package: str, calibration: bool, base_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"the report needs {package}: install dip_hf with its extra 'eval'"):
        prepare_tasks(settings_for(base_folder, calibration=calibration), [Checkpoint("base")])


def test_without_calibration_there_are_no_confidences(base_folder: str) -> None:
    settings = settings_for(base_folder, limit=1, tasks=TASKS[:1])
    results = evaluate(settings, [Checkpoint("base")])
    assert results[0].tasks[0].confidences == results[0].tasks[0].nlls == ()
    assert make_report(settings, results).calibration == ()


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


def test_a_tokenizers_own_code_is_not_run(
    base_folder: str, lora_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(shutil.copytree(lora_folder, tmp_path / "own"))
    (own / "tok.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tok: pass\n")
    (own / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": [None, "tok.Tok"]}}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers would ask
    with pytest.raises(ValueError, match=r"checkpoints: one: the tokenizer in .*own cannot be loaded"):
        load_model(settings_for(base_folder), Checkpoint("one", str(own)))
    assert not (tmp_path / "ran").exists()


def few_shot(folder: Path) -> None:
    """A task with examples in front of its questions, and choices in an order that Python's generator gives."""
    for name in ("train", "test"):
        rows = [{"question": f"{name} {n} is", "answer": f" {n}"} for n in range(20)]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    (folder / "shuffle.py").write_text(
        "import random\n\n\ndef shuffle(docs):\n"
        "    return docs.map(lambda doc: {'choices': random.sample([doc['answer'], ' none', ' two'], 3)})\n"
    )
    (folder / "few.yaml").write_text(
        f"""
task: few
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder / "train.json"}, test: {folder / "test.json"}}}}}
fewshot_split: train
test_split: test
process_docs: !function shuffle.shuffle
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{choices.index(answer)}}}}"
target_delimiter: ""
num_fewshot: 2
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )


def test_every_checkpoint_sees_the_same_examples_and_choices(base_folder: str, tmp_path: Path) -> None:
    """A base that is given twice has twice the same prompts; lm-eval's sampler goes on from where it was."""
    few_shot(tmp_path)
    settings = settings_for(base_folder, tasks=("few",), include_path=str(tmp_path), limit=20)
    checkpoints = [Checkpoint("one"), Checkpoint("two")]
    seen = []
    for _ in range(2):  # as in two runs
        random.seed(len(seen))
        tasks = prepare_tasks(settings, checkpoints)
        for _scores in evaluate_checkpoints(settings, checkpoints, tasks):
            seen.append([instance.args for instance in tasks["tasks"]["few"].instances])
    assert seen[0] == seen[1] == seen[2] == seen[3]
    assert len({prompt.rpartition("test")[0] for prompt, _ in seen[0]}) > 1  # the examples differ by question


def test_an_adapter_of_another_base(base_folder: str, tmp_path: Path) -> None:
    """PEFT leaves out what fits nothing without a word."""
    deeper = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base_folder, num_hidden_layers=3))
    get_peft_model(deeper, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    checkpoints = [Checkpoint("lora", str(tmp_path))]
    with pytest.raises(ValueError, match=r"does not fit the base model .*load it on the base that it was trained on"):
        evaluate(settings_for(base_folder), checkpoints)
