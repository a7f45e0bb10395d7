"""Options from a file: YAML, JSON, or the config.json that a run wrote."""

from __future__ import annotations

import datetime
import json
import os
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

from promptkd.errors import UserError

FLAG = "--config"
LARGEST = 1 << 20  # bytes
REMEDY = "write one option per line, such as 'batch_size: 8'"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """A loader of plain data that refuses a key that occurs twice. PyYAML would drop the first value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [
            key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"
        ]  # YAML's "<<", which others override
        keys = [self.construct_object(key, deep=True) for key in own]
        if twice := next((key for i, key in enumerate(keys) if key in keys[:i]), None):
            raise yaml.YAMLError(f"the key {twice!r} occurs twice")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def split_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """Take `--config PATH` out of the arguments.

    Returns:
        The last path given, or None, and the other arguments.

    Raises:
        UserError: If the path is missing.
    """
    path, rest, words = None, [], iter(argv)
    for word in words:
        if word == FLAG:
            path = next(words, None)
            if path is None:
                raise UserError(f"{FLAG} is the last argument: name a YAML or JSON file after it")
        elif word.startswith(f"{FLAG}="):
            path = word.partition("=")[2]
        else:
            rest.append(word)
    return path, rest


def config_arguments(path: str) -> list[str]:
    """Read a file of options as command-line arguments. Options that are null are left at their defaults.

    Raises:
        UserError: If the file cannot be read, or holds something else than options and their values.
    """
    return as_arguments(_read_options(path), f"{FLAG} {path}")


def as_arguments(options: dict[str, Any], source: str) -> list[str]:
    """Return options as command-line arguments. Options that are None are left out.

    Args:
        options: Values by name.
        source: Where they come from, for error messages.

    Raises:
        UserError: A value is neither a number, a text, nor a list of them.
    """
    return [argument for name, value in options.items() for argument in _arguments(source, name, value)]


def read_yaml(path: str, source: str, remedy: str) -> Any:
    """Read a YAML or JSON file.

    Args:
        path: The file.
        source: What names the file, for error messages.
        remedy: What to do about a file that cannot be parsed, for error messages.

    Raises:
        UserError: The file does not exist, is too large, or cannot be parsed.
    """
    if not os.path.isfile(path):
        raise UserError(f"{source}: no such file: name a YAML or JSON file")
    if os.path.getsize(path) > LARGEST:
        raise UserError(f"{source}: the file has more than {LARGEST} bytes: {remedy}")
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8-sig"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError, TypeError) as error:
        raise UserError(f"{source}: it is neither YAML nor JSON ({error}): {remedy}") from None


def _read_options(path: str) -> dict[str, Any]:
    options = read_yaml(path, f"{FLAG} {path}", REMEDY)
    if isinstance(options, dict) and isinstance(options.get("settings"), dict):
        options = options["settings"]  # a run's own config.json
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise UserError(f"{FLAG} {path}: it holds no options: {REMEDY}")
    return options


def _arguments(source: str, name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, (list, tuple, range)) and all(isinstance(item, (str, Real, os.PathLike)) for item in value):
        return [flag, *map(str, value)]
    if isinstance(value, dict):
        try:
            return [f"{flag}={json.dumps(value)}"]
        except (TypeError, ValueError) as error:
            raise UserError(f"{source}: {name} cannot be written as JSON ({error}): give plain values") from None
    if isinstance(value, (str, Real, datetime.date, os.PathLike)):
        return [f"{flag}={value}"]
    raise UserError(f"{source}: {name} is a {type(value).__name__}: give a number, a text or a list of them")
