"""Reads a study's YAML file and checks what it declares."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from studies.spec import OWNED, TASK_SETS, Arm, Evaluation, Selection, Study


def load_study(path: str | Path) -> Study:
    """Read a study's file; keys that it leaves out are those of the file that it `extends`, beside it.

    Raises:
        ValueError: an unknown or missing key, or a value that makes no sense; names file, key, value and remedy.
            Whether a field is one of the recipe's is for `studies.arguments.check_fields` to say.
    """
    path = Path(path)
    content = _read(path)
    if "extends" in content:
        other = path.with_name(str(content.pop("extends")))
        extended = _read(other)
        if "extends" in extended:
            raise ValueError(f"{path}: extends={other.name!r} itself extends a file; name that one")
        content = {**extended, **content}
    try:
        return _study(path.stem, content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a study's YAML file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(content).__name__}")
    return content


def _study(name: str, content: dict[str, Any]) -> Study:
    keys = [field.name for field in fields(Study) if field.name != "name"]
    _check_keys("", content, keys, required=[key for key in keys if key != "weights"])
    arms = content["arms"]
    if not isinstance(arms, dict) or len(arms) < 2:
        raise ValueError("arms must map at least two names to their overrides")
    sizes = content["sizes"]
    if not isinstance(sizes, dict) or not sizes:
        raise ValueError(f"sizes={sizes!r} must map training examples per family to overrides, such as {{200: {{}}}}")
    seeds = _whole_numbers("seeds", content["seeds"])
    selection, evaluation = content["selection"], content["evaluation"]
    _check_keys("selection", selection, ["seeds", "examples"], required=["seeds"])
    _check_keys("evaluation", evaluation, [field.name for field in fields(Evaluation)], required=["items"])
    study = Study(
        name=name,
        model=content["model"],
        families=tuple(content["families"]),
        sizes={size: dict(own or {}) for size, own in sizes.items()},
        seeds=seeds,
        reference=content["reference"],
        selection=Selection(**{**selection, "seeds": _whole_numbers("selection.seeds", selection["seeds"])}),
        evaluation=Evaluation(**evaluation),
        common=dict(content["common"]),
        arms=tuple(_arm(arm, dict(given or {})) for arm, given in arms.items()),
        output_dir=content["output_dir"],
        weights=content.get("weights"),
    )
    _check(study)
    return study


def _arm(name: str, given: dict[str, Any]) -> Arm:
    own = {field.name: given.pop(field.name) for field in fields(Arm) if field.name in given and field.name != "name"}
    if "overrides" in own:
        raise ValueError(f"arms.{name}: write the recipe's fields beside `trials`, not under `overrides`")
    trials = own.pop("trials", [{}])
    if not isinstance(trials, list) or not trials or not all(isinstance(trial, dict) for trial in trials):
        raise ValueError(f"arms.{name}.trials={trials!r} must be a list of mappings; leave it out for one setting")
    return Arm(name=str(name), overrides=given, trials=tuple(trials), **own)


def _check(study: Study) -> None:
    for name in ("model", "output_dir"):
        if not isinstance(getattr(study, name), str):
            raise ValueError(f"{name}={getattr(study, name)!r} must be a text")
    for family in study.families:
        if study.families.count(family) > 1:
            raise ValueError(f"families: {family!r} is named twice")
    for size in study.sizes:
        if type(size) is not int or size < 1:
            raise ValueError(f"sizes: {size!r} must be a number of training examples, at least 1")
    extra = sorted(set(study.selection.seeds) - set(study.seeds))
    if extra:
        raise ValueError(f"selection.seeds: {extra[0]} is none of seeds={list(study.seeds)}; its runs would be wasted")
    evaluation = study.evaluation
    _check_count("selection.examples", study.selection.examples, 1)
    _check_count("evaluation.batch_size", evaluation.batch_size, 1)
    for name in ("probe_items", "smoothness_items"):  # 0 turns it off
        _check_count(f"evaluation.{name}", getattr(evaluation, name), 0)
    _check_keys("evaluation.items", study.evaluation.items, TASK_SETS, required=["standard"])
    for name, value in study.evaluation.items.items():
        _check_count(f"evaluation.items.{name}", value, 1)
    if evaluation.split not in ("test", "validation"):
        raise ValueError(f"evaluation.split={evaluation.split!r} must be 'test' or 'validation'")
    tempered = [arm.name for arm in study.arms if arm.temperature]
    if evaluation.split == "validation" and tempered:
        raise ValueError(
            f"arms.{tempered[0]}.temperature is fitted on the validation split: remove the arm, or evaluation.split"
        )
    if not 0 <= study.evaluation.typo_rate <= 1:
        raise ValueError(
            f"evaluation.typo_rate={study.evaluation.typo_rate} must be a share, at least 0 and at most 1"
        )
    names = [arm.name for arm in study.arms]
    if study.reference not in names or study.arm(study.reference).untrained:
        raise ValueError(f"reference={study.reference!r} is no trained arm{close_to(str(study.reference), names)}")
    budget = max(len(arm.trials) for arm in study.arms)
    for arm in study.arms:
        if arm.untrained and (arm.overrides or arm.trials != ({},)):
            raise ValueError(f"arms.{arm.name}: untrained leaves nothing to override; remove {sorted(arm.overrides)}")
        if len(arm.trials) not in (1, budget):
            raise ValueError(
                f"arms.{arm.name}.trials has {len(arm.trials)} settings and another arm's has {budget}: give "
                "every arm the same number of trials, or one"
            )
        if not arm.epochs_factor > 0:
            raise ValueError(f"arms.{arm.name}.epochs_factor={arm.epochs_factor} must be positive")
        _check_prediction(arm)
    given = study.weights  # of any type
    if given is not None and not (isinstance(given, str) and re.fullmatch(r"[0-9a-f]{64}", given)):
        raise ValueError(
            f"weights={study.weights!r} must be the SHA-256 of the base's weights, 64 hex digits in lower case as "
            "sha256sum prints it; leave it out for a base that comes with the repository"
        )
    if "+" in study.output_dir:  # which joins the folders of an ensemble
        raise ValueError(f"output_dir={study.output_dir!r} must not contain '+'; choose another folder")
    for where, overrides in _all_overrides(study):
        for key in overrides:
            if key in OWNED:
                raise ValueError(f"{where}: the study itself sets {key!r}; remove it")
            if key == "max_steps" and any(arm.epochs_factor != 1 for arm in study.arms):
                raise ValueError(f"{where}.max_steps={overrides[key]} would hide epochs_factor, which scales epochs")


def _check_prediction(arm: Arm) -> None:
    """Refuse ways to predict that are none, or that cannot be combined."""
    where = f"arms.{arm.name}"
    for name, least in (("num_samples", 0), ("ensemble", 1)):
        _check_count(f"{where}.{name}", getattr(arm, name), least)
    for name in ("dropout_at_test", "temperature", "untrained"):
        if type(getattr(arm, name)) is not bool:
            raise ValueError(f"{where}.{name}={getattr(arm, name)!r} must be true or false")
    if arm.dropout_at_test and arm.num_samples == 0:
        raise ValueError(f"{where}.dropout_at_test needs a number of samples: set num_samples, such as 10")
    ways = {"ensemble": arm.ensemble > 1, "num_samples": arm.num_samples > 0, "temperature": arm.temperature}
    given = [name for name, is_on in ways.items() if is_on]
    if len(given) > 1:
        raise ValueError(f"{where}: {' and '.join(given)} cannot be combined; choose one of them")
    if arm.untrained and given and given != ["temperature"]:
        raise ValueError(f"{where}: untrained leaves nothing for {given[0]}; remove it")


def _all_overrides(study: Study) -> Iterable[tuple[str, Mapping[str, Any]]]:
    yield "common", study.common
    for size, overrides in study.sizes.items():
        yield f"sizes.{size}", overrides
    for arm in study.arms:
        yield f"arms.{arm.name}", arm.overrides
        for index, trial in enumerate(arm.trials):
            yield f"arms.{arm.name}.trials[{index}]", trial


def _check_count(name: str, value: Any, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


def _whole_numbers(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(type(number) is int for number in value):
        raise ValueError(f"{name}={value!r} must be a list of at least one whole number, such as [0, 1, 2, 3, 4]")
    if len(set(value)) != len(value):
        raise ValueError(f"{name}={value!r} names a seed twice")
    return tuple(value)


def _check_keys(where: str, given: Any, known: Iterable[str], required: Iterable[str]) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"{where or 'the file'} must be a mapping, got {given!r}")
    known, label = list(known), f"{where}: " if where else ""
    for key in given:
        if key not in known:
            raise ValueError(f"{label}the key {key!r} is unknown{close_to(str(key), known)}")
    for key in required:
        if given.get(key) is None:
            raise ValueError(f"{label}the key {key!r} is missing")


def close_to(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name."""
    known = sorted(known)
    matches = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {', '.join(map(repr, matches or known))}?"
