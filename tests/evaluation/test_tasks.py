"""The task files under evals/, as lm-eval reads them."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import lm_eval.tasks
import pytest
import yaml
from lm_eval.tasks import TaskManager

from dip_hf.evaluation.tasks import _members, _missing, item_scores, keep_families, load_tasks, task_sets
from dip_hf.reasoning import FINETUNING, PRETRAINING, UNSEEN, make_split


EVALS = Path(__file__).parents[2] / "evals"


def module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"evals_{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loaded() -> dict[str, Any]:
    return load_tasks(["dip_reasoning", "dip_reasoning_pretraining"], EVALS, limit=3)


def test_there_is_a_task_for_every_family_and_level(loaded: dict[str, Any]) -> None:
    names = [f"dip_{level}_{family.name}" for level in ("standard", "harder") for family in FINETUNING]
    names += [f"dip_unseen_{family.name}" for family in UNSEEN]
    names += [f"dip_pretraining_{family.name}" for family in PRETRAINING]
    assert sorted(loaded["tasks"]) == sorted(names)


def test_the_task_files_are_what_the_families_give(tmp_path: Path) -> None:
    module_of(EVALS / "reasoning" / "generate.py").write_tasks(tmp_path)
    written = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.glob("*/*.yaml")}
    there = {
        path.relative_to(EVALS / "reasoning"): path.read_text() for path in (EVALS / "reasoning").glob("*/*.yaml")
    }
    assert there == written, "run `python evals/reasoning/generate.py`"


def test_every_right_answer_scores_and_survives_the_stop_sequence(loaded: dict[str, Any]) -> None:
    for name, task in loaded["tasks"].items():
        for doc in task.test_docs():
            assert task.doc_to_text(doc) == doc["prompt"]
            assert task.process_results(doc, [doc["completion"]]) == {"exact_match": 1.0}, name
            assert task.process_results(doc, [""]) == {"exact_match": 0.0}, name
            assert not any(stop in doc["completion"] for stop in task.config.generation_kwargs["until"]), name


def test_generation_is_greedy_and_zero_shot(loaded: dict[str, Any]) -> None:
    for task in loaded["tasks"].values():
        assert task.config.generation_kwargs["do_sample"] is False
        assert task.config.num_fewshot == 0


def test_tasks_are_averaged_in_their_innermost_group(loaded: dict[str, Any]) -> None:
    sets = task_sets(loaded)
    assert set(sets.values()) == {f"dip_reasoning_{name}" for name in ("standard", "harder", "unseen", "pretraining")}
    assert sets[f"dip_harder_{FINETUNING[0].name}"] == "dip_reasoning_harder"
    assert task_sets(load_tasks([f"dip_unseen_{UNSEEN[0].name}"], EVALS, limit=2)) == {
        f"dip_unseen_{UNSEEN[0].name}": f"dip_unseen_{UNSEEN[0].name}"
    }


@pytest.mark.parametrize(
    "names", [["dip_reasoning*"], ["dip_reasoning_unseen", "dip_reasoning", f"dip_unseen_{UNSEEN[0].name}"]]
)
def test_what_a_named_group_holds_may_be_named_too(names: list[str], loaded: dict[str, Any]) -> None:
    own = load_tasks(names, EVALS, limit=2)
    sets = set(task_sets(own).values())
    assert sets == set(task_sets(loaded).values()) - (set() if "*" in names[0] else {"dip_reasoning_pretraining"})


def test_members_of_tags_and_of_groups_made_in_a_list(tmp_path: Path) -> None:
    """As lm-eval's own groups have them."""
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "tag": "numbers"}))
    inner = [{"group": "inner", "task": ["numbers"]}, {"task": "four", "num_fewshot": 1}]
    (tmp_path / "outer.yaml").write_text(yaml.safe_dump({"group": "outer", "task": inner}))
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    assert sorted(_members("outer", manager)) == ["four", "numbers", "one", "three", "two"]
    assert list(_missing("outer", manager)) == ["four"] and list(_missing("five", manager)) == ["five"]


def test_families_leave_the_other_shifts_alone() -> None:
    family = FINETUNING[0].name
    loaded = load_tasks(["dip_reasoning"], EVALS, limit=2)
    keep_families(loaded, [family])
    names = [f"dip_standard_{family}", f"dip_harder_{family}", *(f"dip_unseen_{other.name}" for other in UNSEEN)]
    assert sorted(loaded["tasks"]) == sorted(names)
    assert {task.task_name for group in loaded["groups"].values() for task in group.get_all_tasks()} == set(names)


def test_the_validation_split_can_stand_in_for_the_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FINETUNING[0].name
    (task,) = load_tasks([f"dip_harder_{family}"], EVALS, limit=3, split="validation")["tasks"].values()
    expected = make_split(family, "validation", 3, level="harder")["prompt"]
    assert [doc["prompt"] for doc in task.test_docs()] == list(expected)
    # A task with data of its own, as lm-eval's are
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows.json").write_text('{"q": "1", "a": "2"}\n')
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}}}
    text = {"task": "other", "test_split": "test", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}", **data}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(text))
    assert list(load_tasks(["other"], tmp_path)["tasks"]) == ["other"]
    with pytest.raises(ValueError, match="split='validation': task other is lm-eval's own"):
        load_tasks(["other"], tmp_path, split="validation")


def test_families_that_are_none_are_refused(loaded: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"families: 'gcd' is no fine-tuning family; known: "):
        keep_families(loaded, ["gcd"])


def test_bad_task_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="tasks is empty"):
        load_tasks([], EVALS)
    with pytest.raises(ValueError, match=r"include_path='.*nowhere' is no folder"):
        load_tasks(["dip_reasoning"], tmp_path / "nowhere")
    # Without lm-eval's own index, which takes long to read
    original = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, **options: original(self, **{**options, "include_defaults": False})
    )
    with pytest.raises(ValueError, match=r"tasks: 'dip_reasonning' is neither .* did you mean dip_reasoning"):
        load_tasks(["dip_reasonning"], EVALS)


def test_the_commands_in_the_readme_name_what_is_there() -> None:
    """And those for an adapter that PEFT does not know name the file that registers it."""
    blocks = re.findall(r"```bash\n(.*?)```", (EVALS / "README.md").read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [words for words in map(shlex.split, lines) if words[:1] == ["lm_eval"]]
    known = TaskManager(include_path=EVALS, include_defaults=False).all_tasks
    kinds = set()
    for words in commands:
        options = dict(zip(words[1::2], words[2::2], strict=True))
        adapter = options["--model_args"].partition("peft=")[2].partition(",")[0]
        kinds.add((options["--model"], adapter))
        register, *tasks = options["--tasks"].split(",")
        if adapter != "ADAPTER":
            register, tasks = "evals/register.yaml", [register, *tasks]
        assert (register, options["--include_path"]) == ("evals/register.yaml", "evals")
        assert tasks and set(tasks) <= set(known)
    assert kinds == {("hf", ""), ("hf", "LORA"), ("hf", "ADAPTER"), ("hf-dip", "ADAPTER")}


def test_the_standard_group_names_tasks_that_lm_eval_has() -> None:
    own = Path(lm_eval.tasks.__file__).parent
    folders = ["gsm_plus", "minerva_math", "arc", "bbh", "mmlu_pro", "leaderboard/musr"]
    manager = TaskManager(include_path=[EVALS, *(own / folder for folder in folders)], include_defaults=False)
    members = manager.task_index["dip_standard"].cfg["task"]
    assert {"dip_gsm8k", "minerva_math500", "arc_challenge", "bbh", "mmlu_pro"} <= set(members)
    assert set(members) <= set(manager.all_tasks)


def test_gsm8k_prompts_as_in_training_and_scores_with_math_verify() -> None:
    utils = module_of(EVALS / "standard" / "utils.py")
    doc = {"question": "How many? ", "answer": "3 + 15 = <<3+15=18>>18 and more\n#### 1,018"}
    assert utils.doc_to_text(doc) == "Q: How many?\nA: Let's think step by step."
    assert utils.doc_to_target(doc) == "1,018"
    assert utils.process_results(doc, [" ... The answer is 1018."]) == {"math_verify": 1.0}
    assert utils.process_results(doc, [" ... The answer is 18."]) == {"math_verify": 0.0}


def test_item_scores_prefer_math_verify_and_the_last_filter() -> None:
    def sample(doc_id: int, kind: str, **scores: float) -> dict[str, Any]:
        return {"doc_id": doc_id, "filter": kind, "metrics": list(scores), **scores}

    both = [sample(1, "none", exact_match=0.0, math_verify=1.0), sample(0, "none", exact_match=0.0, math_verify=0.0)]
    assert item_scores(both) == ("math_verify", [0.0, 1.0])
    filters = [sample(0, kind, exact_match=value) for kind, value in (("strict", 0.0), ("flexible", 1.0))]
    assert item_scores(filters) == ("exact_match (flexible)", [1.0])
    with pytest.raises(ValueError, match="'perplexity' is not a number per item"):
        item_scores([{"doc_id": 0, "filter": "none", "metrics": ["perplexity"], "perplexity": (1.0, 2)}])
