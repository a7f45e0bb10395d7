"""Store answers while they are generated, batch by batch, so that an interrupted run can resume."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from promptkd.config.values import moment
from promptkd.distributed.ranks import Ranks
from promptkd.errors import UserError
from promptkd.utils.files import atomic_file, lock_folder, write_json
from promptkd.utils.jsonl import complete_lines
from promptkd.utils.strict_json import check_kind, parse_json, read_object

RECORD = "generation.json"
REMEDY = "pass --overwrite, or name another --save"


class AnswerStore:
    """The answers in a folder. Each data-parallel rank appends to a file of its own.

    Args:
        folder: The folder for the file.
        identity: Everything that the answers depend on, kept in generation.json.
        overwrite: Whether answers of another identity may be replaced.
        ranks: The ranks of the run.
        name: The file that `finish` writes.

    Attributes:
        answers: Index of the prompt -> answer, of earlier runs.

    Raises:
        UserError: The folder holds answers of another identity, or another run uses it.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], overwrite: bool, ranks: Ranks, name: str = "generated.jsonl"
    ) -> None:
        self.folder, self.file, self.ranks = folder, folder / name, ranks
        self.lock: FileLock | None = None  # the first rank's
        self.identity, self.resumes = identity, not overwrite and os.path.lexists(folder / RECORD)
        self.answers: dict[int, str] = {}
        if self.resumes:
            self._check_identity(identity, read_object(folder / RECORD, REMEDY))
        elif self.file.exists() and not overwrite:
            raise UserError(f"{self.file} exists already: {REMEDY}")

    def is_complete(self, count: int) -> bool:
        """Whether earlier runs have stored the answers to all of `count` prompts. Nothing is written."""
        return self.resumes and dict(_read_answers(self._parts())).keys() >= set(range(count))

    def begin(self) -> None:
        """Claim the folder, and read earlier answers. Before, nothing is written."""
        self.ranks.barrier()  # every rank has looked
        if self.ranks.is_main:
            self._merge_parts(self.identity, self.resumes)
        self.ranks.barrier()
        self.answers = dict(_read_answers([self._path("done")]))
        self.part = None if self.ranks.tp_rank else self._path(str(self.ranks.dp_rank)).open("w", encoding="utf-8")

    def add(self, answers: dict[int, str]) -> None:
        """Append a batch of this rank's answers. Ranks that hold a model together have the same; one writes."""
        if self.part is not None:
            self.part.writelines(json.dumps([index, text]) + "\n" for index, text in answers.items())
            self.part.flush()

    def in_order(self, count: int) -> list[str]:
        """Return the answers of all ranks by the index of the prompt."""
        answers = dict(_read_answers(self._parts()))
        return [answers[index] for index in range(count)]

    def finish(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write the file atomically. The answers stay, so that a second run has nothing left to do."""
        with atomic_file(self.file) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        if self.part is not None:
            self.part.close()
        if self.lock is not None:
            self.lock.release()

    def _check_identity(self, identity: dict[str, Any], saved: dict[str, Any]) -> None:
        for name in [*identity, *saved]:
            if identity.get(name) != saved.get(name):
                raise UserError(
                    f"--save {self.folder} holds answers of another run: {name} is {identity.get(name)}, there it was "
                    f"{saved.get(name)}: {REMEDY}"
                )

    def _merge_parts(self, identity: dict[str, Any], resumes: bool) -> None:
        """Merge the answers of earlier runs, on any number of ranks, into one file without cut lines."""
        self.lock = lock_folder(self.folder)
        parts = self._parts()
        answers = dict(_read_answers(parts)) if resumes else {}
        if not resumes:
            self.file.unlink(missing_ok=True)
        with atomic_file(self._path("done")) as file:
            file.writelines(json.dumps(row) + "\n" for row in answers.items())
        for path in parts:
            if path != self._path("done"):
                path.unlink(missing_ok=True)
        write_json(self.folder / RECORD, identity)

    def _path(self, name: str) -> Path:
        return self.folder / f"answers-{name}.jsonl"

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("answers-*.jsonl"))


def recorded_time(folder: Path) -> str | None:
    """Return the time in the prompts of an earlier run, or None without a readable record."""
    try:
        return moment(str(read_object(folder / RECORD, REMEDY).get("template_time")))
    except (UserError, argparse.ArgumentTypeError):
        return None  # AnswerStore reports the reason


def _read_answers(paths: list[Path]) -> Iterator[tuple[int, str]]:
    """Yield (index of the prompt, answer) of files. A last line that a kill cut short is left out."""
    for path in paths:
        for number, line in complete_lines(path):
            try:
                index, text = parse_json(line.decode("utf-8"))
                check_kind(index, int, "index")
                check_kind(text, str, "answer")
            except (ValueError, TypeError):
                raise UserError(f"{path}, line {number}: not [index, answer]: {REMEDY}") from None
            yield index, text
