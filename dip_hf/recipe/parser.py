"""How recipes read their command lines and YAML files."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from trl import TrlParser


_REFUSED: dict[Any, tuple[type, ...]] = {
    str: (bool, list, dict),
    int: (bool, float, list, dict),
    float: (bool, list, dict),
}
"""What a file may not give for a field of a type; the command line's words are read by the type itself."""
_WORDS: dict[Any, str] = {
    str: "a text (in quotes, where YAML reads something else)",
    int: "a whole number",
    float: "a number",
}


class RecipeParser(TrlParser):
    """[`~trl.TrlParser`] that raises `ValueError` with the close matches of an unknown name, before anything loads.

    Args:
        dataclass_types: whose fields are the options, and the keys of a file.
    """

    def __init__(self, dataclass_types: Iterable[Any]) -> None:
        # A shortened option would silently mean another field after a new one is added
        super().__init__(dataclass_types, allow_abbrev=False)
        hints = [hint for kind in self.dataclass_types for hint in get_type_hints(kind).items()]
        self._kinds = {
            name: set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint} for name, hint in hints
        }
        for action in self._actions:
            if action.nargs == "+":
                action.nargs = "*"  # an option without a value is an empty list, as a file can give it

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the several hundred options that the parser knows."""
        raise ValueError(message)

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Take the defaults from a config file's mapping, all of whose keys must be fields.

        A text where a list belongs is a list of one, and a number where a text belongs its digits, as on the command
        line.

        Raises:
            ValueError: a key that is no field, or a value of a kind that its field cannot have or that is none of its
                choices.
        """
        actions = {action.dest: action for action in self._actions}
        for key, value in config.items():
            if key not in self._kinds:
                raise ValueError(f"the config file's key {key!r} is no field{_close_to(str(key), self._kinds)}")
            read = _list if actions[key].nargs == "*" else _scalar
            config[key] = read(key, value, self._kinds[key])
            # argparse compares the command line's words with the choices, but no defaults
            if (choices := actions[key].choices) and config[key] is not None and config[key] not in choices:
                raise ValueError(
                    f"the config file's {key}={config[key]!r} is not one of {', '.join(map(repr, choices))}"
                )
        return super().set_defaults_with_config(**config)

    def parse_recipe(self, argv: list[str] | None = None) -> tuple[Any, ...]:
        """Parse `--config FILE` and the options after or before it, which override the file's values.

        Raises:
            ValueError: an unknown key or option (with its close matches), or a value that its field refuses.
        """
        argv = sys.argv[1:] if argv is None else argv
        known = {option.removeprefix("--") for option in self._option_string_actions} | {"config"}
        for option in (argument.partition("=")[0] for argument in argv if argument.startswith("--")):
            if option.removeprefix("--") not in known:
                raise ValueError(f"the option {option!r} is no field{_close_to(option.removeprefix('--'), known)}")
        if argv[-1:] == ["--config"]:
            raise ValueError("--config needs the path of a YAML file")
        # TRL looks for the two words only
        words = [word for argument in argv for word in _split_config_option(argument)]
        try:
            return tuple(self.parse_args_and_config(words))
        except TypeError as error:  # of a key that is no text, or of a value's own check
            raise ValueError(f"the config file or an option: {error}") from error


def _list(key: str, value: Any, kinds: set[Any]) -> Any:
    """A file's value for a field that is a list."""
    entries = [value] if isinstance(value, str) else value
    if entries is None:
        return None
    if not isinstance(entries, list) or any(type(entry) not in (str, int, float) for entry in entries):
        raise ValueError(
            f"the config file's key {key!r} must be a list of words or numbers, got {value!r}; write each on a line "
            "of its own, as `- NAME`, or for checkpoints `- NAME=FOLDER`"
        )
    return [str(entry) for entry in entries] if list[str] in kinds else entries


def _scalar(key: str, value: Any, kinds: set[Any]) -> Any:
    """A file's value for a field that is no list, of one of these types."""
    if value is None and NoneType not in kinds:
        raise ValueError(f"the config file's key {key!r} has no value; give one, or remove the key")
    if key.endswith("_strategy") and value is False:
        return "no"  # which YAML reads as false where it is not quoted
    if key.endswith("_blocks") and isinstance(value, list):
        return value  # indices
    kind = next(iter(kinds - {NoneType})) if len(kinds - {NoneType}) == 1 else None
    if kind is str and type(value) in (int, float):
        return str(value)
    if kind in _REFUSED and isinstance(value, _REFUSED[kind]):
        raise ValueError(f"the config file's key {key!r} must be {_WORDS[kind]}, got {value!r}")
    return value


def _split_config_option(argument: str) -> list[str]:
    return ["--config", argument.removeprefix("--config=")] if argument.startswith("--config=") else [argument]


def _close_to(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name.replace("-", "_"), sorted(known), n=3)
    return f"; did you mean {', '.join(map(repr, matches))}?" if matches else "; `--help` lists the fields"
