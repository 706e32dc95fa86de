"""Probabilities of answers and of choices, and a temperature fitted on them."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dip_hf.evaluation.calibration import TEMPERATURES
from dip_hf.evaluation.likelihoods import (
    answer_likelihoods,
    check_choices,
    check_output_types,
    check_right_or_wrong,
    check_validation,
    choice_scores,
    fit_to_validation,
)
from dip_hf.evaluation.lm import DIPLM
from dip_hf.evaluation.tasks import load_tasks


EVALS = Path(__file__).parents[2] / "evals"
PROMPTS = ["Compute: 7 + 9\nAnswer:", "Spell backward: dipolar\nAnswer:", "Compute: 1 + 1\nAnswer:"]


def load(base: str, adapter: str | None, **options: object) -> DIPLM:
    return DIPLM(pretrained=base, peft=adapter, device="cpu", batch_size=4, **options)


def plain_probability(model: DIPLM, prompt: str, answer: str, ends: list[str]) -> float:
    """The chain rule, token by token, one pass for each."""
    text = model.tok_encode(prompt)
    total = 1.0
    for token in model.tok_encode(answer) if answer else []:
        total *= model._model_call(torch.tensor([text])).softmax(-1)[0, -1, token].item()
        text.append(token)
    last = model._model_call(torch.tensor([text])).softmax(-1)[0, -1]
    stops = {model.tok_encode(end)[0] for end in ends} | {model.eot_token_id}
    return total * sum(last[stop].item() for stop in stops)


@pytest.mark.parametrize(("adapter", "samples"), [("lora_folder", 0), ("posterior_folder", 3)])
def test_an_answer_ends_with_the_end_token_or_a_stop_sequence(
    base_folder: str, adapter: str, samples: int, request: pytest.FixtureRequest
) -> None:
    model = load(base_folder, request.getfixturevalue(adapter), num_samples=samples)
    answers = [(PROMPTS[0], " 16", ("\n",)), (PROMPTS[1], "", ("\n",)), (PROMPTS[2], " 2", ())]
    logs = model.answer_log_probabilities([*answers, answers[0]], disable_tqdm=True)
    for log, (prompt, answer, until) in zip(logs, [*answers, answers[0]], strict=True):
        assert math.isclose(log, math.log(plain_probability(model, prompt, answer, list(until))), rel_tol=1e-3)
    assert model.answer_log_probabilities([(PROMPTS[0], " 16", ())])[0] < logs[0]


def test_all_one_token_answers_and_their_ends_add_up_to_less_than_one(base_folder: str, lora_folder: str) -> None:
    model = load(base_folder, lora_folder)
    letters = [chr(code) for code in range(33, 127)]
    logs = model.answer_log_probabilities([(PROMPTS[0], letter, ("\n",)) for letter in letters], disable_tqdm=True)
    assert 0 < sum(map(math.exp, logs)) < 1


def test_a_stop_sequence_that_begins_with_another_is_not_counted_twice(base_folder: str) -> None:
    model = load(base_folder, None)
    one = model.answer_log_probabilities([(PROMPTS[0], " 16", ("\n",))], disable_tqdm=True)
    two = model.answer_log_probabilities([(PROMPTS[0], " 16", ("\n\n", "\n", "\n"))], disable_tqdm=True)
    assert math.isclose(one[0], two[0], rel_tol=1e-5)


GENERATING = SimpleNamespace(OUTPUT_TYPE="generate_until", config=SimpleNamespace(target_delimiter=" "))


def test_the_confidence_is_the_own_answers_and_the_loss_the_references() -> None:
    logs = {" 16": math.log(0.95), " 17": math.log(0.03)}
    model = SimpleNamespace(answer_log_probabilities=lambda answers: [logs[answer] for _, answer, _ in answers])
    sample = {"arguments": [(PROMPTS[0], {"until": "\n"})], "resps": [[" 16"]], "target": "17"}
    (confidence,), (nll,) = answer_likelihoods(model, GENERATING, [sample], "exact_match")
    assert math.isclose(confidence, 0.95) and math.isclose(nll, -math.log(0.03))


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter, as Llama 2's does it: a space before every text, of which the decoder takes one away."""
    letters = ["<s>", "</s>", *(f"<0x{code:02X}>" for code in range(256)), "▁", *map(chr, range(33, 127))]
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[], byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def test_a_tokenizer_whose_decoder_takes_a_leading_space_away() -> None:
    """A model that knows one answer is sure of it, and its own answer is the reference's."""
    tokenizer, prompt = sentencepiece_tokenizer(), PROMPTS[0]
    text = torch.tensor([[*tokenizer(f"{prompt} 16").input_ids, tokenizer.eos_token_id]])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes))
    optimizer = torch.optim.Adam(base.parameters(), 1e-2)
    for _ in range(100):
        base(input_ids=text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model = DIPLM(pretrained=base.eval(), tokenizer=tokenizer, device="cpu", batch_size=1)
    settings = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    request = Instance("generate_until", {}, (prompt, settings), 0)
    (answer,) = model.generate_until([request], disable_tqdm=True)
    assert answer == " 16"
    sample = {"arguments": [request.args], "resps": [[answer]], "target": "16"}
    (confidence,), (nll,) = answer_likelihoods(model, GENERATING, [sample], "exact_match")
    assert confidence > 0.9 and math.isclose(confidence, math.exp(-nll), rel_tol=1e-4)
    assert model._ends(["\n", "Question:"]) == [[1], [2 + 10], tokenizer("xQuestion:").input_ids[2:]]


def test_choices_are_a_softmax() -> None:
    logs = [math.log(value) - 50 for value in (0.5, 0.3, 0.2)]
    confidence, nll = choice_scores(logs, 0, [1])
    assert math.isclose(confidence, 0.5)
    assert math.isclose(nll, -math.log(0.3))
    assert math.isclose(choice_scores(logs, 2, [0, 1])[1], -math.log(0.8))
    assert choice_scores([0.0, -2000.0], 0, [1]) == (1.0, 2000.0)
    assert choice_scores([0.0], 0, [0]) == (1.0, 0.0)


def choice_task(**changes: object) -> SimpleNamespace:
    fields = {
        "OUTPUT_TYPE": "multiple_choice",
        "task_name": "colours",
        "multiple_input": False,
        "doc_to_choice": lambda doc: doc["choices"],
        "doc_to_text": lambda doc: doc["text"],
    }
    return SimpleNamespace(**{**fields, **changes})


def test_multiple_choice_takes_lm_evals_likelihoods() -> None:
    responses = [[(math.log(0.4), False)], [(math.log(0.6), True)], [(-7.0, False)], [(-9.0, False)]]
    doc = {"choices": ["a", "a long one"], "text": 1}
    sample = {"doc": doc, "target": 0, "resps": responses}  # the last two are for mutual information
    (confidence,), (nll,) = answer_likelihoods(None, choice_task(), [sample], "acc")
    assert math.isclose(confidence, 0.6) and math.isclose(nll, -math.log(0.4))
    # Per letter the long one is the likelier by far; then the short one's share counts
    (confidence,), _ = answer_likelihoods(None, choice_task(), [sample | {"resps": responses[::-1][2:]}], "acc_norm")
    assert math.isclose(confidence, 0.4)
    by_name = {**sample, "target": "a long one"}
    assert math.isclose(answer_likelihoods(None, choice_task(), [by_name], "acc")[1][0], -math.log(0.6))
    (_, [nll]) = answer_likelihoods(None, choice_task(multiple_input=True), [sample], "acc")
    assert math.isclose(nll, -math.log(0.6))  # with several inputs, the text field names the right one
    with pytest.raises(ValueError, match="'exact_match' of task colours is no score of a choice"):
        answer_likelihoods(None, choice_task(), [sample], "exact_match")


@pytest.mark.parametrize("target", ["C", 2, -1, [0, 2], []])
def test_a_right_answer_that_is_no_choice_is_refused_before_a_model_is_loaded(target: object) -> None:
    docs = [{"choices": ["A", "B"], "target": right} for right in ("B", 0, [0, 1], target)]
    task = choice_task(eval_docs=docs, doc_to_target=lambda doc: doc["target"])
    tasks = [task, SimpleNamespace(OUTPUT_TYPE="generate_until")]
    check_choices(tasks, 3)
    message = re.escape(f"calibration: task colours has an item whose right answer {target!r} is none of its choices")
    with pytest.raises(ValueError, match=message):
        check_choices(tasks, None)


def test_a_fitted_temperature_has_the_least_loss_on_the_validation_split(base_folder: str, lora_folder: str) -> None:
    model = load(base_folder, lora_folder)
    [task] = load_tasks(["dip_pretraining_gcd"], "evals", limit=1, validation_items=3)["tasks"].values()
    fitted = fit_to_validation(model, [task], 3)
    assert fitted == model.temperature != 1.0
    rows = [(doc["prompt"], doc["completion"], ("\n",)) for doc in task.validation_docs()]
    assert len(rows) == 3

    def loss(temperature: float) -> float:
        model.temperature = temperature
        return -sum(model.answer_log_probabilities(rows, disable_tqdm=True))

    losses = [loss(float(other)) for other in np.geomspace(*TEMPERATURES, 12)]
    assert loss(fitted) < 1.0001 * min(losses) < 0.9 * max(losses)


def test_a_temperature_fitted_on_choices_makes_them_as_sure_as_they_are_right() -> None:
    """Log-odds of 2/T, right in three of four: 2/T = ln 3. Behind the choices are requests for mutual information."""
    docs = [{"choices": ["A", "B"], "target": target} for target in (0, 0, 1, 0, 1)]  # the last is beyond the limit
    task = choice_task(
        config=SimpleNamespace(num_fewshot=0),
        has_validation_docs=lambda: True,
        has_test_docs=lambda: True,
        validation_docs=lambda: docs,
        fewshot_context=lambda doc, num_fewshot: "",
        construct_requests=lambda doc, context, metadata: [2.0, 0.0, 9.0, -9.0],
        doc_to_target=lambda doc: doc["target"],
    )
    model = SimpleNamespace(answer_log_probabilities=lambda answers, disable_tqdm: [])
    model.loglikelihood = lambda requests, disable_tqdm: [(value / model.temperature, False) for value in requests]
    assert fit_to_validation(model, [task], 4) == pytest.approx(2 / math.log(3), rel=1e-3)


def test_tasks_without_probabilities_or_validation_items_are_refused() -> None:
    with pytest.raises(ValueError, match="task words is of type loglikelihood_rolling"):
        check_output_types([choice_task(), SimpleNamespace(OUTPUT_TYPE="loglikelihood_rolling", task_name="words")])
    evaluated = choice_task(has_validation_docs=lambda: True, has_test_docs=lambda: False)
    with pytest.raises(ValueError, match="temperature: task colours has no validation split besides"):
        check_validation([evaluated])


SCORER = "def score(doc, results):\n    return {'exact_match': float(results[0] == doc['a'])}\n"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, None),
        ({"filter_list": [["remove_whitespace", "take_first"]]}, None),
        (
            {"filter_list": [["take_first"], ["regex", "take_first"]]},
            r"task sums extracts .*\(filter regex\).*turn cal",
        ),
        (
            {"process_results": True},
            r"task sums scores .* function of its own.*turn calibration off.*whole_answer: true",
        ),
        ({"process_results": True, "metadata": {"whole_answer": True}}, None),
        ({"include": str(EVALS / "standard" / "dip_gsm8k.yaml")}, r"calibration: task sums scores .* leave it out"),
    ],
)
def test_answers_that_are_looked_for_in_a_text_are_refused(
    fields: dict, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows.json").write_text('{"question": "1 + 1", "a": "2", "answer": "#### 2"}\n')
    (tmp_path / "scorer.py").write_text(SCORER)
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "output_type": "generate_until",
        "test_split": "test",
    }
    if "include" not in fields:
        task |= {"doc_to_text": "{{question}}", "doc_to_target": "{{a}}", "metric_list": [{"metric": "exact_match"}]}
    task |= {name: value for name, value in fields.items() if name != "process_results"}
    if "filter_list" in fields:
        task["filter_list"] = [
            {"name": str(index), "filter": [{"function": name} for name in steps]}
            for index, steps in enumerate(fields["filter_list"])
        ]
    text = yaml.safe_dump(task) + ("process_results: !function scorer.score\n" if "process_results" in fields else "")
    (tmp_path / "sums.yaml").write_text(text)
    tasks = load_tasks(["sums"], tmp_path)["tasks"].values()
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        check_output_types(tasks)


def test_this_projects_families_are_whole_answers() -> None:
    check_output_types(load_tasks(["dip_reasoning", "dip_reasoning_pretraining"], EVALS, limit=1)["tasks"].values())


def test_graded_scores_are_refused_by_name() -> None:
    check_right_or_wrong("words", "exact_match", [0.0, 1.0, True])
    with pytest.raises(ValueError, match=r"calibration: task words has f1=0\.5 for an item.*turn calibration off"):
        check_right_or_wrong("words", "f1", [1.0, 0.5])
