"""Read jsonl files from anyone: one JSON object per line, every error with its line number."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from promptkd.errors import UserError
from promptkd.utils.strict_json import parse_json

LONGEST_LINE = 1 << 26  # bytes; a longer line is not text, and would be read into memory at once
LARGEST_COUNT = 1 << 53  # of an integer in a metrics row: up to here a float is exact


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Return all objects of a jsonl file; item i is on line i + 1.

    Raises:
        UserError: The file is empty, or a line is broken.
    """
    rows = [parse_line(line, f"{path}, line {number}") for number, line in json_lines(path)]
    if not rows:
        raise UserError(f"{path}: the file is empty: it needs one JSON object per line")
    return rows


def json_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield the numbered lines of a jsonl file. Blank lines are allowed at the end only, so item i is line i + 1."""
    blank = 0
    for number, line in numbered_lines(path):
        if not line.strip():
            blank = blank or number
        elif blank:
            raise UserError(f"{path}, line {blank}: it is empty, but rows follow: delete the line")
        else:
            yield number, line


def complete_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield the numbered lines of a file that a kill may have cut: a last line without newline is left out."""
    return ((number, line) for number, line in numbered_lines(path) if line.endswith(b"\n"))


def numbered_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line with its newline) of a regular file, without a byte order mark."""
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
    """Return the JSON object on one line; `where` names file and line in errors."""
    text = decode(line, where)
    try:
        row = parse_json(text)
    except ValueError as error:
        raise UserError(f"{where}: this is no JSON ({error}): one object per line is needed") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON object is needed, not {type(row).__name__}")
    return row


def decode(line: bytes, where: str) -> str:
    """Decode UTF-8; `where` names file and line in errors."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8: save the file as UTF-8") from None


def read_metrics(path: Path, size: int | None = None) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl. A last line that a kill cut short is left out.

    Args:
        path: The file.
        size: Its size at the checkpoint that the run resumes from. Only so many bytes are read.

    Raises:
        UserError: A line is broken, or the file's first `size` bytes do not end with a line.
    """
    rows, place = [], 0
    for number, line in complete_lines(path):
        if size is not None and place >= size:
            break
        rows.append(_metrics_row(line, f"{path}, line {number}"))
        place += len(line)
    if size is not None and place != size:
        raise UserError(f"{path} is not what it was at the checkpoint: --overwrite starts a new run")
    return rows


def _metrics_row(line: bytes, where: str) -> dict[str, Any]:
    """Return one row: "event" and "step", the others numbers, texts or lists. Norms may be infinite."""
    try:
        row = json.loads(line)
        huge = [key for key, value in row.items() if isinstance(value, int) and abs(value) > LARGEST_COUNT]
        if isinstance(row["event"], str) and isinstance(row["step"], int) and not huge:
            return row
        reason = f"{huge[0]} is larger than any count" if huge else '"event" is a text and "step" an integer'
    except (ValueError, RecursionError):
        reason = "no readable JSON"
    except (AttributeError, KeyError, TypeError):
        reason = 'it needs an object with "event" and "step"'
    raise UserError(f"{where}: {reason}: train.py does not write such a line; restore the file or train again")
