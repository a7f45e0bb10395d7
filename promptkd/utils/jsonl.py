"""jsonl files made by others: one JSON object per line, every error with its line number."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from promptkd.errors import UserError
from promptkd.utils.strict_json import parse_json

LONGEST_LINE = 1 << 26  # bytes; more is no line of text, and would be read into memory whole


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a jsonl file; row i stands on line i + 1. UserError names file and line of what is broken."""
    rows = [parse_line(line, f"{path}, line {number}") for number, line in json_lines(path)]
    if not rows:
        raise UserError(f"{path}: the file is empty: it needs one JSON object per line")
    return rows


def json_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of a jsonl file. Blank lines are allowed at the end alone: row i is line i + 1."""
    blank = 0
    for number, line in numbered_lines(path):
        if not line.strip():
            blank = blank or number
        elif blank:
            raise UserError(f"{path}, line {blank}: it is empty, but rows follow: delete the line")
        else:
            yield number, line


def numbered_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line with its newline) of a regular file, without a byte order mark."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file: correct the path")
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
                if len(line) > LONGEST_LINE:
                    raise UserError(f"{path}, line {number}: it is longer than {LONGEST_LINE} bytes: split it")
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """One line of jsonl."""
    text = decode(line, where)
    try:
        row = parse_json(text)
    except ValueError as error:
        raise UserError(f"{where}: this is no JSON ({error}): one object per line is needed") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON object is needed, not {type(row).__name__}")
    return row


def decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8: save the file as UTF-8") from None
