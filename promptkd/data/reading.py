"""What was read of a source's rows, and what was not, said in one line."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from promptkd.data.rows import NATIVE, Row, key_names, read_row


class Reading:
    """What was read of the rows of a source, and what was not, for one line that says so."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.rows = 0
        self.read: dict[str, None] = {}
        self.unread: Counter[str] = Counter()
        for row in rows:
            self.add(row.read, row.unread)

    def add(self, read: Iterable[str], unread: Iterable[str]) -> None:
        """Count a row."""
        self.rows += 1
        self.read.update(dict.fromkeys(read))
        self.unread.update(unread)

    def line(self, source: str) -> str | None:
        """The line, or None where all was read and the rows have the shapes that this project writes itself."""
        if not self.unread and set(self.read) <= NATIVE:
            return None
        unread = ", ".join(f'"{name}" of {count} rows' for name, count in self.unread.most_common()) or "none"
        return f"{source}: read as {key_names(self.read)}; fields not read: {unread}"


def say_reading(source: str | Path, rows: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, int]:
    """Say once what was read of the rows of a source and what was not, unless there is nothing to say.

    Returns:
        Fields that were not read -> in how many rows.
    """
    reading = Reading(read_row(raw, where) for where, raw in rows)
    if line := reading.line(str(source)):
        say(line)
    return dict(reading.unread)


def say(text: str) -> None:
    """A line on stderr, from the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
