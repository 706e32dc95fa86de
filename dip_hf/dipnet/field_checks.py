"""What a field of an adapter's configuration may hold: an adapter_config.json can come from a stranger."""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from peft import LoraConfig

from dip_hf.adapter_files import Shapes
from dip_hf.peft_compat import MONTECLORA_SAMPLER


LARGEST_INT = 2**63 - 1
"""A tensor's integers have 64 bits."""
LONGEST_PATTERN = 1000
MOST_STEPS = 10**8
"""Bound on the ways in which a pattern can be tried on a module name of `NAME_LENGTH` characters."""
NAME_LENGTH = 64

_PATTERN_FIELDS = (
    *("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"),
    *("rank_pattern", "alpha_pattern", "noise_blocks", "variational_blocks"),
)
_OWN_CHECKS = ("dip_format", "noise_blocks", "variational_blocks")  # DIPNetConfig says more about their types
_OPEN_LITERALS = ("init_lora_weights",)  # PEFT takes "pissa_niter_16" and the like
_TOKEN = re.compile(
    r"\\(?P<escape>.)|(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])|(?P<open>\((?:\?(?::|=|!|<=|<!|P<\w+>))?)|(?P<close>\))"
    r"|(?P<repeat>(?:[*+]|\{\d*,?\d*\})[?+]?)|(?P<optional>\?[?+]?)|(?P<bar>\|)|(?P<other>.)",
    re.DOTALL,
)


def check_fields(config: LoraConfig) -> None:
    """Refuse values that PEFT would trip over later, or that name code to import.

    Raises:
        ValueError: a value of a wrong type, an integer beyond 64 bits, a number of PEFT's that is not finite, a
            pattern that is none or may take for ever, `megatron_config`. Names field, value and remedy.
    """
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        if name not in _OWN_CHECKS and not _fits(value, str | bool if name in _OPEN_LITERALS else hint):
            raise ValueError(f"{name}={_short(value)} is not of the type {_describe(hint)}; correct or remove it.")
    for name in (field.name for field in dataclasses.fields(LoraConfig)):
        if any(not math.isfinite(number) for number in _floats(getattr(config, name))):
            raise ValueError(f"{name}={_short(getattr(config, name))} must be finite; correct or remove it.")
    for name, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        if not isinstance(pattern, dict) or not all(_fits(value, float) for value in pattern.values()):
            raise ValueError(f"{name}={_short(pattern)} must be a dictionary of numbers; correct or remove it.")
    ranks = {"r": config.r, **{f"rank_pattern[{key!r}]": rank for key, rank in config.rank_pattern.items()}}
    for name, rank in ranks.items():
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"{name}={_short(rank)} must be a whole number of at least 1.")
    if config.megatron_config is not None or config.megatron_core not in (None, "megatron.core"):
        raise ValueError(
            f"megatron_config={_short(config.megatron_config)}, megatron_core={_short(config.megatron_core)}: PEFT "
            "would import the module of that name, which a DIPNet adapter may not choose; remove both."
        )
    for name in _PATTERN_FIELDS:
        value = getattr(config, name)
        lists_are_names = name in ("target_modules", "exclude_modules")  # compared, not matched
        patterns = [value] if isinstance(value, str) else [] if lists_are_names or value is None else value
        for pattern in patterns if isinstance(patterns, list | tuple | set | dict) else ():
            if isinstance(pattern, str):
                check_pattern(name, pattern)


def check_pattern(field: str, pattern: str) -> None:
    """Refuse what is no regular expression, or one that backtracking may keep busy for ever.

    Python's `re` has no limit on time. A pattern here has at most `LONGEST_PATTERN` characters; repeats single
    characters and sets, no groups; refers back to nothing; and the number of ways to try it, counted from above as
    C(n + k, k) · alternatives · 2^optional with k repeats and n = `NAME_LENGTH`, is at most `MOST_STEPS` (this
    project's choice: four wildcards and 120 alternatives pass).

    Raises:
        ValueError: names the field, the pattern and the remedy.
    """
    remedy = f"in {field}={_short(pattern)}; list the modules' names instead."
    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"More than {LONGEST_PATTERN} characters {remedy}")
    levels: list[list[tuple[int, int]]] = [[(0, 1)]]  # open groups: their alternatives' (repeats, other choices)
    previous = ""
    for token in _TOKEN.finditer(pattern):
        kind = str(token.lastgroup)
        repeats, choices = levels[-1][-1]
        if kind == "repeat":
            if previous == "close":
                raise ValueError(f"A repeated group can take for ever to match, {remedy}")
            levels[-1][-1] = (repeats + 1, choices)
        elif kind == "optional":
            if previous == "open":
                raise ValueError(f"A flag, comment, condition or back-reference {remedy}")
            levels[-1][-1] = (repeats, 2 * choices)
        elif kind == "escape" and token["escape"] in "123456789":
            raise ValueError(f"A back-reference {remedy}")
        elif kind == "bar":
            levels[-1].append((0, 1))
        elif kind == "open":
            levels.append([(0, 1)])
        elif kind == "close" and len(levels) > 1:
            inner = levels.pop()
            repeats, choices = levels[-1][-1]
            levels[-1][-1] = (repeats + max(k for k, _ in inner), choices * sum(f for _, f in inner))
        previous = kind
    repeats, choices = max(k for k, _ in levels[0]), sum(f for _, f in levels[0])
    if math.comb(NAME_LENGTH + repeats, repeats) * choices > MOST_STEPS:
        raise ValueError(f"{repeats} repeats and {choices} alternatives can take for ever to match, {remedy}")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"No regular expression ({error}) {remedy}") from error


def _hints(config_class: type[LoraConfig]) -> dict[str, Any]:
    hints = get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value, from Python or from JSON, is of a type; lists, tuples, sets and ranges count as one kind."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin in (list, set, tuple):
        parts = arguments[:1] if origin is tuple else arguments
        return isinstance(value, list | tuple | set | range) and all(_fits(item, parts[0]) for item in value)
    if origin is dict or hint is dict:
        key, content = arguments or (str, Any)
        return isinstance(value, dict) and all(_fits(k, key) and _fits(v, content) for k, v in value.items())
    if hint is Any:
        return True
    if hint in (int, float):  # PEFT annotates lora_alpha as int, and takes 16.5
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_INT
        return whole or isinstance(value, float)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict | hint)
    return isinstance(value, hint)


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list | tuple | set):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _floats(item)


def _describe(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _short(value: Any) -> str:
    """A value's text, cut where a stranger made it long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        text = "an integer of thousands of digits"
    return text if len(text) <= 100 else f"{text[:97]}..."


def check_declared(config: LoraConfig, shapes: Shapes) -> None:
    """Refuse a configuration that asks for more than its weight file holds, as far as can be told without the model.

    Raises:
        ValueError: `trainable_token_indices` or `monteclora_config` asks for weights that the file has not.
    """
    remedy = "correct it, or save or download the adapter again."
    if (indices := config.trainable_token_indices) is not None:
        rows = {shape[0] for key, shape in shapes.items() if "trainable_tokens_" in key and shape}
        for tokens in indices.values() if isinstance(indices, dict) else [indices]:
            if len(tokens) not in rows:
                raise ValueError(
                    f"trainable_token_indices names {len(tokens)} tokens, of which the weight file has no rows; "
                    f"{remedy}"
                )
    if (samples := config.monteclora_config) is not None:
        drawn = {shape for key, shape in shapes.items() if key.endswith(f"{MONTECLORA_SAMPLER}.expert_weights")}
        if drawn != {(samples.num_samples,)}:
            raise ValueError(
                f"monteclora_config.num_samples={samples.num_samples}: the weight file has {sorted(drawn)}; {remedy}"
            )
