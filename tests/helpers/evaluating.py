"""Runs of evaluate.py on small test sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluate import read_settings
from helpers.training import GOLDEN
from promptkd.errors import exit_with
from promptkd.evaluation.evaluate import run

MODEL = GOLDEN / "models" / "gpt2_student"
SIZES = ["--max-length", "48", "--max-prompt-length", "32"]


def write_set(folder: Path, rows: int = 6, **extra) -> None:
    folder.mkdir(parents=True)
    lines = [
        {"instruction": f"List {i + 1} words.", "input": "", "output": [f"word {i}", "token"]} for i in range(rows)
    ]
    (folder / "valid.jsonl").write_text("".join(json.dumps({**line, **extra}) + "\n" for line in lines))


def options(data: Path, save: Path, *extra: str) -> list[str]:
    return ["--model-path", str(MODEL), "--data-dir", str(data), "--save", str(save), *SIZES, *extra]


def evaluated(argv: list[str]) -> dict:
    settings = read_settings(argv)
    run(settings)
    return json.loads((Path(settings.evaluation.save) / "results.json").read_text())


def refused(argv: list[str], capsys) -> str:
    """The one line that bad input ends with."""
    with pytest.raises(SystemExit) as ended:
        exit_with(lambda: run(read_settings(argv)))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error
