"""Types and checks of single option values."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
from typing import Any, Literal

from promptkd.errors import UserError
from promptkd.utils.strict_json import parse_json

LONGEST_ARGUMENT = 4096  # as long as a path may be
SpecialTokensRule = Literal["auto", "own", "none", "published"]  # of every command that makes prompts
SPECIAL_TOKENS_HELP = (
    "special tokens in front of prompts. own: those that the tokenizer puts before a text, once. none: no tokens. "
    "published: none in training, all in evaluation. auto: the rule of the token files or of the model's training, "
    "else own"
)


def is_text(value: str) -> bool:
    """Return whether a text has no lone surrogates, which are how Python reads bytes that are not UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def whole_number(text: str) -> int:
    """Convert an option's value to an integer of at most 64 bits."""
    value = int(text) if len(text) < 32 else None
    if value is None or not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text[:32]} is beyond 64 bits")
    return value


def finite_number(text: str) -> float:
    """Convert an option's value to a float. Infinity and NaN are refused."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text[:32]} is not a finite number")
    return value


def json_object(text: str) -> dict[str, Any]:
    """Parse an option's value as a JSON object, such as '{"enable_thinking": false}'."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:32]!r} is not a JSON object ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text[:32]!r} is not a JSON object, but a {type(value).__name__}")
    return value


def moment(text: str) -> str:
    """Parse an option's value as a time, such as 2026-11-25T18:00:00 or 2026-11-25."""
    try:
        return datetime.datetime.fromisoformat(text).strftime("%Y-%m-%dT%H:%M:%S")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:32]!r} is not a time like 2026-11-25T18:00:00") from None


TYPES = {int: whole_number, float: finite_number, dict: json_object}


def check_arguments(argv: list[str]) -> None:
    """Raise UserError for arguments that no file name or text may be: with NUL, not UTF-8, or longer than any path."""
    option = ""
    for argument in argv:
        option = argument.partition("=")[0] if argument.startswith("--") else option or argument
        if "\0" in argument or len(argument) > LONGEST_ARGUMENT or not is_text(argument):
            problem = f"a value with a NUL, over {LONGEST_ARGUMENT} characters or not in UTF-8"
            raise UserError(f"{option[:64]!r}: {problem}: correct it, or rename the file")


def option(default: Any, help: str, *, numbers: bool = True, published: bool = False, **argparse_extras: Any) -> Any:
    """Return a dataclass field that is also a command-line option `--field-name`.

    Args:
        default: The option's value unless it is given.
        help: The help text.
        numbers: Whether a change of the option can change the numbers that training computes. A run is resumed
            only with the same values of such options. A path counts as False: what it names is compared instead.
        published: Whether the option only exists for compatibility with the published code. `--help` lists such
            options last.
        **argparse_extras: Passed to `argparse.ArgumentParser.add_argument`.
    """
    metadata = {"help": help, "numbers": numbers, "published": published, "extras": argparse_extras}
    return dataclasses.field(default=default, metadata=metadata)


def at_least(least: float, **values: float) -> None:
    """Raise UserError naming the first option whose value is below `least` or not a number."""
    for name, value in values.items():
        if not value >= least:
            raise UserError(f"--{name.replace('_', '-')} {value} is under {least:g}")


def fraction(**values: float) -> None:
    """Raise UserError naming the first option whose value is not between 0 and 1."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UserError(f"--{name.replace('_', '-')} {value} is not between 0 and 1")
