"""The methods by name: this project's, those that `register_method` adds, and entry points of installed packages."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from promptkd.errors import UserError
from promptkd.methods.base import Method

# Where packages name their methods: [project.entry-points."promptkd.methods"] my_kd = "my_package.my_kd:MyKD"
ENTRY_POINTS = "promptkd.methods"
METHODS: dict[str, str | type[Method]] = {
    "promptkd": "promptkd.methods.promptkd:PromptKD",
    "sft": "minillm_baselines.sft:SFT",
    "kd": "minillm_baselines.kd:KD",
    "seqkd": "minillm_baselines.seqkd:SeqKD",
    "gkd": "minillm_baselines.gkd:GKD",
    "distillm": "minillm_baselines.distillm:DistiLLM",
    "distillm2": "minillm_baselines.distillm2:DistiLLM2",
    "minillm": "minillm_baselines.minillm:MiniLLM",
}
AnyMethod = TypeVar("AnyMethod", bound=type[Method])


def register_method(name: str) -> Callable[[AnyMethod], AnyMethod]:
    """Register a class as the method `name`, for this process. Use it as a decorator.

    A class replaces an earlier version of itself, so that a cell of a notebook can run again.

    Args:
        name: The name for `--method`.

    Raises:
        UserError: The name is taken or cannot be one, or the class is not a method.
    """
    if not (isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name)):
        raise UserError(f'register_method({name!r}): give a name first, as in @register_method("my_kd")')

    def register(kind: AnyMethod) -> AnyMethod:
        _check(kind, f"register_method({name!r})")
        if name in METHODS and _place(METHODS[name]) != _place(kind):
            raise UserError(f"the method {name} exists already: register {kind.__qualname__} under another name")
        METHODS[name] = kind
        return kind

    return register


def method_names() -> list[str]:
    """Return the names of all methods that `method_class` knows."""
    return list(dict.fromkeys([*METHODS, *(entry.name for entry in entry_points(group=ENTRY_POINTS))]))


def method_class(name: str) -> type[Method]:
    """Return the class of a method.

    Args:
        name: One of `method_names`.

    Raises:
        UserError: There is no such method, there are several, or the package that has it cannot be imported.
    """
    entries = list(entry_points(group=ENTRY_POINTS, name=name))
    places = {_place(METHODS[name])} if name in METHODS else set()
    if len(places | {entry.value for entry in entries}) > 1:
        packages = ", ".join(_package(entry) for entry in entries)
        raise UserError(f"--method {name}: there are several of this name ({packages}): uninstall or rename one")
    if name in METHODS:
        kind = METHODS[name]
        if isinstance(kind, str):
            module, _, attribute = kind.partition(":")
            kind = getattr(importlib.import_module(module), attribute)
        assert isinstance(kind, type)
        return kind
    if entries:
        return _load(entries[0])
    names = method_names()
    near = get_close_matches(name, names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise UserError(f"--method {name}: choose one of {', '.join(names)}{hint}")


def _load(entry: EntryPoint) -> type[Method]:
    """Import the method of an installed package."""
    try:
        kind = entry.load()
    except Exception as error:  # the code of others may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"--method {entry.name}: {entry.value} of the package {_package(entry)} cannot be imported ({reason}): "
            "repair or uninstall the package"
        ) from error
    return _check(kind, f"--method {entry.name}: {entry.value} of the package {_package(entry)}")


def _check(kind: type[Method], source: str) -> type[Method]:
    """Return a class that can be a method. Raise UserError for another object."""
    if not (isinstance(kind, type) and issubclass(kind, Method)) or inspect.isabstract(kind):
        raise UserError(f"{source}: it has to be a class with a step, derived from promptkd.methods.base.Method")
    settings = kind.Settings
    fields = dataclasses.fields(settings) if dataclasses.is_dataclass(settings) else None
    if fields is None or any("help" not in field.metadata for field in fields):
        raise UserError(f"{source}: its Settings have to be a dataclass of promptkd.config.values.option() fields")
    return kind


def _place(kind: str | type[Method]) -> str:
    """Return where a class is defined, as entry points write it."""
    return kind if isinstance(kind, str) else f"{kind.__module__}:{kind.__qualname__}"


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "(unknown)"
