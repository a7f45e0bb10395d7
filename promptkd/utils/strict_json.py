"""Read JSON from anyone, with errors of one line that name the place.

The reader is stricter than Python's own. It refuses repeated keys, NaN, infinity, numbers beyond a float's range and
lone surrogates, because other programs read them differently.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NoReturn

from promptkd.errors import UserError

LARGEST = 1 << 26  # bytes; settings, manifests and tables of results are far smaller


def parse_json(text: str) -> Any:
    """Parse a JSON text. Raises ValueError with a few words about what is wrong."""
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise ValueError(f"{error.msg} at {place}") from None
    except ValueError as error:  # Python refuses to read a number of thousands of digits
        raise ValueError("a number of too many digits" if "digits" in str(error) else str(error)) from None
    if "\\ud" in text.lower():
        _check_characters(value)
    return value


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Read a file that holds one JSON object. Raises UserError: "<path>: <what is wrong>: <remedy>"."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}: {remedy}")
    try:
        if (size := os.path.getsize(path)) > LARGEST:
            raise UserError(f"{path}: {size} bytes are too many for a settings file: {remedy}")
        value = parse_json(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {remedy}") from None
    except ValueError as error:  # UnicodeDecodeError is one
        reason = "not UTF-8" if isinstance(error, UnicodeError) else error
        raise UserError(f"{path}: no readable JSON ({reason}): {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: it holds no JSON object but a {type(value).__name__}: {remedy}")
    return value


def read_record(path: Path, kind: Any, remedy: str) -> dict[str, Any]:
    """Read a JSON object in which every value is of a kind. A file that does not exist is an empty object.

    Args:
        path: The file.
        kind: The kind of the values (see `check_kind`).
        remedy: The end of error messages.

    Raises:
        UserError: The file cannot be read, or holds something else.
    """
    if not path.exists():
        return {}
    content = read_object(path, remedy)
    try:
        check_kind(content, {...: kind}, path.name)
    except ValueError as error:
        raise UserError(f"{path}: {error}: {remedy}") from None
    return content


def check_kind(value: Any, kind: Any, where: str) -> None:
    """Raise ValueError unless `value` is of a kind. Keys that the kind does not name are allowed.

    Args:
        value: A value that was read from JSON.
        kind: A type (`object`: any value, `float`: any number), None, a tuple of which one kind is enough,
            `[kind of all items]`, `{key: kind}` or `{...: kind of all values}`.
        where: What the value is, for the error.
    """
    if isinstance(kind, tuple):
        if not any(is_kind(value, one) for one in kind):
            check_kind(value, kind[0], where)
        return
    outer: Any = kind if kind is None or isinstance(kind, type) else type(kind)
    wanted: Any = {None: type(None), float: (int, float)}.get(outer, outer)
    if not isinstance(value, wanted) or (isinstance(value, bool) and outer not in (bool, object)):
        raise ValueError(f"{where}: {getattr(outer, '__name__', 'null')} expected, not {type(value).__name__}")
    if isinstance(kind, list):
        for item in value:
            check_kind(item, kind[0], where)
    if isinstance(kind, dict):
        for key in value if ... in kind else kind:
            if key not in value:
                raise ValueError(f"{where} lacks {key!r}")
            check_kind(value[key], kind[...] if ... in kind else kind[key], f"{where}, {key}")


def is_kind(value: Any, kind: Any) -> bool:
    """Return whether `check_kind` accepts the value."""
    try:
        check_kind(value, kind, "")
    except ValueError:
        return False
    return True


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:40]!r} occurs twice")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is beyond any float")
    return value


def _check_characters(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("half a character (a lone surrogate)") from None
