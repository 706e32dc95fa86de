"""Probabilities of answers under an lm-eval model: what calibration and a fitted temperature are computed from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dip_hf.evaluation.calibration import fit_temperature
from dip_hf.evaluation.lm import DIPLM


WHOLE_ANSWER = "whole_answer"
"""Metadata of a task with a scorer of its own: true where the generated text is the answer, with nothing before it."""

_HARMLESS_FILTERS = {"take_first", "remove_whitespace"}


def check_output_types(tasks: Iterable[Any]) -> None:
    """Refuse lm-eval tasks whose answers have no probability that could be calibrated.

    Where an answer is looked for in the generated text, behind a chain of thought as a rule, the probability of the
    text is not that of the answer.

    Raises:
        ValueError: a task neither generates nor chooses; or a generated text is not, or may not be, the answer itself.
    """
    for task in tasks:
        if task.OUTPUT_TYPE not in ("generate_until", "multiple_choice"):
            raise ValueError(
                f"calibration: task {task.task_name} is of type {task.OUTPUT_TYPE}; leave it out, or turn calibration "
                "off (generate_until and multiple_choice have it)"
            )
        if task.OUTPUT_TYPE == "generate_until":
            _check_whole_answer(task)


def _check_whole_answer(task: Any) -> None:
    used = [step["function"] for pipeline in task.config.filter_list or () for step in pipeline["filter"]]
    extracting = [name for name in used if name not in _HARMLESS_FILTERS]
    if extracting:
        raise ValueError(
            f"calibration: task {task.task_name} extracts its answers from generated text (filter {extracting[0]}), "
            "whose probability is not that of the answer; leave it out, or turn calibration off"
        )
    if task.config.process_results is not None and not (task.config.metadata or {}).get(WHOLE_ANSWER):
        raise ValueError(
            f"calibration: task {task.task_name} scores generated text by a function of its own (process_results), "
            "which may look for the answer in it; leave it out, turn calibration off, or, where the text is the "
            f"answer, write `{WHOLE_ANSWER}: true` into the task's metadata"
        )


def check_choices(tasks: Iterable[Any], limit: int | None) -> None:
    """Refuse tasks of choices with an item whose right answer is none of them, and so has no probability.

    Args:
        tasks: lm-eval's.
        limit: the first so many items of each task; None: all of them.

    Raises:
        ValueError: names the task, the answer and the choices.
    """
    for task in tasks:
        if task.OUTPUT_TYPE == "multiple_choice":
            for doc in islice(task.eval_docs, limit):
                _right(task, {"doc": doc, "target": task.doc_to_target(doc)})


def check_right_or_wrong(task: str, metric: str, scores: Iterable[float]) -> None:
    """Refuse graded scores: a confidence is the probability of being right, so there must be right and wrong.

    Raises:
        ValueError: a score that is neither 0 nor 1.
    """
    for score in scores:
        if score not in (0, 1):
            raise ValueError(
                f"calibration: task {task} has {metric}={score:g} for an item, which is neither right nor wrong; "
                "leave the task out, or turn calibration off"
            )


def choice_scores(log_likelihoods: ArrayLike, chosen: int, right: Sequence[int]) -> tuple[float, float]:
    """The softmax over choices: probability of the chosen one, and -ln of the right ones' probability in nats.

    Args:
        log_likelihoods: of each choice, shape (choices,).
        chosen: index of the model's own choice.
        right: indices of the right choices, which are added up.

    >>> choice_scores([0.0, 0.0], 1, [0])
    (0.5, 0.6931471805599453)
    """
    values = np.asarray(log_likelihoods, dtype=np.float64)
    normalised = values - np.logaddexp.reduce(values)
    return float(np.exp(normalised[chosen])), float(max(0.0, -np.logaddexp.reduce(normalised[list(right)])))


def answer_likelihoods(
    model: DIPLM, task: Any, samples: Sequence[dict[str, Any]], metric: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Confidence and negative log-likelihood of every item; see `TaskScores`.

    Args:
        model: which answered.
        task: lm-eval's.
        samples: its logged samples, one per item.
        metric: name of the score, which says how a choice is made among choices.

    Raises:
        ValueError: a multiple-choice score other than "acc" and "acc_norm", or as `check_choices`.
    """
    if task.OUTPUT_TYPE == "multiple_choice":
        pairs = [_choice(task, sample, metric) for sample in samples]
        return tuple(confidence for confidence, _ in pairs), tuple(nll for _, nll in pairs)
    own = [(*_prompt(sample), sample["resps"][0][0]) for sample in samples]
    references = [(*_prompt(sample), _reference(task, sample)) for sample in samples]
    logs = model.answer_log_probabilities([(prompt, answer, until) for prompt, until, answer in own + references])
    return tuple(float(np.exp(log)) for log in logs[: len(own)]), tuple(-log for log in logs[len(own) :])


def fit_to_validation(model: DIPLM, tasks: Sequence[Any], limit: int) -> float:
    """Set and return the temperature that suits the reference answers of the tasks' validation splits best.

    Args:
        model: whose `temperature` is set.
        tasks: lm-eval's; every item counts once, whichever task it is of.
        limit: the first so many items of each task.

    Raises:
        ValueError: a task has no validation split, or is evaluated on it; or as `check_choices`.
    """
    check_validation(tasks)
    generated: list[tuple[str, str, Sequence[str]]] = []
    choices: list[tuple[Any, dict[str, Any], list[Any]]] = []
    for task in tasks:
        for doc in list(task.validation_docs())[:limit]:
            context = task.fewshot_context(doc, task.config.num_fewshot)
            made = task.construct_requests(doc, context, metadata=(task.task_name, 0, 1))
            sample = {"doc": doc, "target": task.doc_to_target(doc)}
            if task.OUTPUT_TYPE == "multiple_choice":
                choices.append((task, sample, made))
            else:
                prompt, until = _prompt({"arguments": [made.args]})
                generated.append((prompt, _reference(task, sample), until))

    def negative_log_likelihood(temperature: float) -> float:
        model.temperature = temperature
        total = -sum(model.answer_log_probabilities(generated, disable_tqdm=True))
        requests = [request for _, _, made in choices for request in made]
        answers = iter(model.loglikelihood(requests, disable_tqdm=True) if requests else [])
        for task, sample, made in choices:
            values = [next(answers)[0] for _ in made][: _number_of_choices(task, sample)]
            total += choice_scores(values, 0, _right(task, sample))[1]
        return total / (len(generated) + len(choices))

    model.temperature = fit_temperature(negative_log_likelihood)
    return model.temperature


def check_validation(tasks: Iterable[Any]) -> None:
    """Refuse tasks that have no items to fit a temperature on.

    Raises:
        ValueError: see `fit_to_validation`.
    """
    for task in tasks:
        if not (task.has_validation_docs() and task.has_test_docs()):
            raise ValueError(
                f"temperature: task {task.task_name} has no validation split besides what is evaluated; name another "
                "task set as in_distribution, or leave the temperature out"
            )


def _prompt(sample: dict[str, Any]) -> tuple[str, Sequence[str]]:
    """A generation's prompt and stop sequences."""
    prompt, settings = sample["arguments"][0][:2]
    until = settings.get("until") or ()
    return prompt, (until,) if isinstance(until, str) else tuple(until)


def _reference(task: Any, sample: dict[str, Any]) -> str:
    target = sample["target"]
    return f"{task.config.target_delimiter}{target[0] if isinstance(target, list) else target}"


def _number_of_choices(task: Any, sample: dict[str, Any]) -> int:
    return len(task.doc_to_choice(sample["doc"]))  # requests behind these are for mutual information


def _right(task: Any, sample: dict[str, Any]) -> list[int]:
    target = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    targets = target if isinstance(target, list) else [target]
    choices = task.doc_to_choice(sample["doc"])
    right = [choices.index(one) if isinstance(one, str) and one in choices else one for one in targets]
    if not right or any(index not in range(len(choices)) for index in right):
        raise ValueError(
            f"calibration: task {task.task_name} has an item whose right answer {target!r} is none of its choices "
            f"{choices}; leave the task out, or turn calibration off"
        )
    return right


def _choice(task: Any, sample: dict[str, Any], metric: str) -> tuple[float, float]:
    if metric not in ("acc", "acc_norm"):
        raise ValueError(f"calibration: {metric!r} of task {task.task_name} is no score of a choice (acc or acc_norm)")
    choices = task.doc_to_choice(sample["doc"])
    values = np.array([response[0][0] for response in sample["resps"]][: len(choices)])
    lengths = np.array([float(len(choice)) for choice in choices])
    chosen = int(np.argmax(values / lengths if metric == "acc_norm" else values))
    return choice_scores(values, chosen, _right(task, sample))
