"""Answers that are being generated: appended batch by batch, so that an interrupted run can go on."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from promptkd.config.values import moment
from promptkd.distributed.ranks import Ranks
from promptkd.errors import UserError
from promptkd.training.run_folder import lock_folder
from promptkd.utils.jsonl import numbered_lines
from promptkd.utils.run_files import write_json
from promptkd.utils.strict_json import check_kind, parse_json, read_object

REMEDY = "pass --overwrite, or name another --save"


class AnswerStore:
    """`answers` holds what earlier runs answered, by row. Each share of the prompts has its own file below `folder`.

    generation.json keeps the identity of the run. Raises UserError when the folder holds answers of another
    identity and `overwrite` was not given.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], overwrite: bool, ranks: Ranks) -> None:
        self.folder, self.file, self.ranks = folder, folder / "generated.jsonl", ranks
        there = not overwrite and os.path.lexists(folder / "generation.json")
        found = read_object(folder / "generation.json", REMEDY) if there else None
        if found is not None and found != identity:
            name = next(key for key in [*identity, *found] if identity.get(key) != found.get(key))
            raise UserError(
                f"--save {folder} holds answers of another run: {name} is {identity.get(name)}, there it was "
                f"{found.get(name)}: name another folder, or pass --overwrite"
            )
        if found is None and self.file.exists() and not overwrite:
            raise UserError(f"{self.file} is there already: name another folder, or pass --overwrite")
        ranks.barrier()  # every rank has looked
        if ranks.is_main:
            self._tidy(identity, keep=found is not None)
        ranks.barrier()
        self.answers = dict(_rows([self._path("done")]))
        self.part = None if ranks.tp_rank else self._path(str(ranks.dp_rank)).open("w", encoding="utf-8")

    def add(self, answers: dict[int, str]) -> None:
        """Write a batch of this rank's answers down."""
        if self.ranks.tp_rank:
            return  # another rank has the same answers
        self.part.writelines(json.dumps([row, text]) + "\n" for row, text in answers.items())
        self.part.flush()

    def in_order(self, count: int) -> list[str]:
        """All ranks' answers, row by row."""
        found = dict(_rows(self._parts()))
        return [found[row] for row in range(count)]

    def finish(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write generated.jsonl in one move. The parts stay: a rerun finds everything answered."""
        beside = self.folder / ".generated.jsonl.new"
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.file)
        self.lock.close()

    def _tidy(self, identity: dict[str, Any], keep: bool) -> None:
        """Bring what earlier runs answered, on however many ranks, into one file without half a line."""
        self.lock = lock_folder(self.folder)  # held as long as this is
        earlier = self._parts()
        answers = dict(_rows(earlier)) if keep else {}
        beside = self._path("new")
        beside.write_text("".join(json.dumps(row) + "\n" for row in answers.items()), encoding="utf-8")
        if not keep:
            self.file.unlink(missing_ok=True)
        os.replace(beside, self._path("done"))
        for path in earlier:
            if path != self._path("done"):
                path.unlink(missing_ok=True)
        write_json(self.folder / "generation.json", identity)

    def _path(self, name: str) -> Path:
        return self.folder / f"answers-{name}.jsonl"

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("answers-*.jsonl"))


def recorded_time(folder: Path) -> str | None:
    """The time that the chat template of an earlier run wrote; None where there is none, or it cannot be read."""
    try:
        return moment(str(read_object(folder / "generation.json", REMEDY).get("template_time")))
    except (UserError, argparse.ArgumentTypeError):
        return None  # AnswerStore names the fault


def _rows(paths: list[Path]) -> Iterator[tuple[int, str]]:
    """(row, answer) of all files; a last line that a kill cut short is left out. UserError names any other fault."""
    for path in paths:
        for number, line in numbered_lines(path):
            if not line.endswith(b"\n"):
                break
            try:
                row, text = parse_json(line.decode("utf-8"))
                check_kind(row, int, "row")
                check_kind(text, str, "answer")
            except (ValueError, TypeError):
                raise UserError(f"{path}, line {number}: not [row, answer]: {REMEDY}") from None
            yield row, text
