"""Build an argparse command line from the fields of option classes (`promptkd.config.values.option`)."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, NoReturn

from promptkd.config.option_file import config_arguments, split_config
from promptkd.config.removed import REMOVED_OPTIONS, check_removed
from promptkd.config.values import TYPES, check_arguments
from promptkd.errors import UserError


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help texts that end with the default, unless it is empty or the text states it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        empty = action.default is None or action.default == ""
        return action.help if empty else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists the options)")


def parse(
    groups: dict[str, type],
    argv: list[str],
    prog: str,
    dry_run: bool = True,
    choice: dict[str, str] | None = None,
    check: Callable[[types.SimpleNamespace], Any] = lambda options: options,
    description: str | None = None,
) -> Any:
    """Make one instance of each dataclass in `groups` from the command line.

    Underscores in option names are read as hyphens. `--config FILE` gives options that the command line overrides
    (`promptkd.config.option_file`). `--dry-run` prints all values as one JSON object and exits with status 0.

    Args:
        groups: The dataclasses by name. Each is a section of the help text.
        argv: The arguments.
        prog: The program's name.
        dry_run: Whether there is `--dry-run`.
        choice: Options that were read before because they decide the groups (`--method`).
        check: Turns the groups into what is returned, and raises UserError for values that do not go together.
        description: Text above the options in `--help`, printed without wrapping.

    Returns:
        What `check` returns. The default is a namespace with the groups and `choice`.

    Raises:
        UserError: An option is unknown, and the message names the nearest one, or a value cannot be used.
    """
    parser = _build(groups, prog, dry_run, choice or {}, description)
    path, argv = split_config(argv)
    in_file = config_arguments(path) if path is not None else []
    check_arguments([*in_file, *argv])
    known = {text for action in parser._actions for text in action.option_strings}
    for name in REMOVED_OPTIONS if choice else ():
        parser.add_argument(f"--{name.replace('_', '-')}", type=partial(check_removed, name), help=argparse.SUPPRESS)
    argv = [_hyphens(argument) for argument in (*in_file, *argv)]
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        where = f"--config {path}: " if unknown[0] in map(_hyphens, in_file) else ""
        raise UserError(where + _explain_unknown(unknown[0], argv, known))
    instances: dict[str, Any] = {}
    for name, group in groups.items():
        fields = {field.name: getattr(values, field.name) for field in dataclasses.fields(group)}
        instances[name] = group(**{key: _joined(group, key, value) for key, value in fields.items()})
    checked = check(types.SimpleNamespace(**(choice or {}), **instances))
    if dry_run and values.dry_run:
        print(json.dumps({**(choice or {}), **flat(instances)}, indent=1))
        sys.exit(0)
    return checked


def _build(
    groups: dict[str, type], prog: str, dry_run: bool, choice: dict[str, str], description: str | None
) -> argparse.ArgumentParser:
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, formatter_class=_HelpFormatter)
    for name in choice:
        parser.add_argument(f"--{name}", help=f"{name}, which decides the other options")
    parser.add_argument("--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # deepspeed's launcher
    if dry_run:
        parser.add_argument("--dry-run", action="store_true", help="print the resolved options as JSON and exit")
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of options. The command line overrides it")
    for name, group in groups.items():
        _add_group(parser.add_argument_group(name.replace("_", " ")), group, published=False)
    compatibility = parser.add_argument_group("compatibility with the published code (docs/fidelity.md)")
    for group in groups.values():
        _add_group(compatibility, group, published=True)
    return parser


def flat(groups: dict[str, Any]) -> dict[str, Any]:
    """Return all options of all groups by name, with underscores."""
    return {key: value for group in groups.values() for key, value in dataclasses.asdict(group).items()}


def declared_options(groups: Iterable[type]) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields of option classes by name."""
    return {field.name: field for group in groups for field in dataclasses.fields(group)}


def _add_group(target: Any, group: type, published: bool) -> None:
    """Add the options of a dataclass that are for compatibility with the published code, or the others."""
    hints = typing.get_type_hints(group)
    for field in dataclasses.fields(group):
        if field.metadata["published"] != published:
            continue
        flag, hint = "--" + field.name.replace("_", "-"), hints[field.name]
        extras = {"default": field.default, "help": field.metadata["help"], **field.metadata["extras"]}
        if isinstance(hint, types.UnionType):
            hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
        if hint is bool:
            extras["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is Literal:
            extras["choices"] = typing.get_args(hint)
        elif typing.get_origin(hint) is list:
            kind = typing.get_args(hint)[0]
            extras.update(type=TYPES.get(kind, kind), nargs="+")
        else:
            extras.setdefault("type", TYPES.get(typing.get_origin(hint) or hint, hint))
        try:
            target.add_argument(flag, **extras)
        except argparse.ArgumentError as error:  # of a method from another package
            raise UserError(f"{group.__name__}: the option {flag} exists already: rename the field") from error


def _joined(group: type, name: str, value: Any) -> Any:
    """Join the words of a text option that the shell has split."""
    is_text = typing.get_type_hints(group)[name] is str
    return " ".join(value) if is_text and isinstance(value, list) else value


def _hyphens(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _explain_unknown(argument: str, argv: list[str], known: set[str]) -> str:
    name = argument.partition("=")[0]
    if not name.startswith("--"):
        places = [place for place, word in enumerate(argv) if word == argument]
        extra = next((place for place in places if argv[place - 1] not in known), places[0])
        options = [word.partition("=")[0] for word in argv[:extra] if word.startswith("--")]
        return f"{options[-1] if options else 'the command'} has the value {argument!r} too many: leave it out"
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown option {name}" + (f": did you mean {near[0]}?" if near else ": --help lists the options")
