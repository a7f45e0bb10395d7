"""Values of options before they mean anything: numbers that are numbers, texts that are texts."""

from __future__ import annotations

import argparse
import math
from typing import Literal

from promptkd.errors import UserError

LONGEST_ARGUMENT = 4096  # as long as a path may be
SpecialTokensRule = Literal["auto", "own", "none", "published"]  # of every command that makes prompts
SPECIAL_TOKENS_HELP = (
    "special tokens in front of prompts. own: once those that the tokenizer begins texts with; none: no tokens; "
    "published: none in training, all in evaluation; auto: as the token files or the model's training have it, else own"
)


def is_text(value: str) -> bool:
    """Whether all of it are characters; an argument's stray bytes and a half of a character are not."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def whole_number(text: str) -> int:
    """An option's value that fits 64 bits."""
    value = int(text) if len(text) < 32 else None
    if value is None or not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text[:32]} is beyond 64 bits")
    return value


def finite_number(text: str) -> float:
    """An option's value; infinity and nan are refused."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text[:32]} is not a finite number")
    return value


TYPES = {int: whole_number, float: finite_number}


def check_arguments(argv: list[str]) -> None:
    """Raise `UserError` for what no path and no option can be: a NUL, half a character, thousands of letters."""
    option = ""
    for argument in argv:
        option = argument.partition("=")[0] if argument.startswith("--") else option or argument
        if "\0" in argument or len(argument) > LONGEST_ARGUMENT:
            raise UserError(f"{option[:64]!r}: a value with a NUL or over {LONGEST_ARGUMENT} characters: correct it")
