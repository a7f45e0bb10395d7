"""Runs of tools/process_data.py within the process."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from promptkd.cli import data as process_data
from promptkd.errors import exit_with

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENIZER = GOLDEN / "models/gpt2_student"
RAW, TEXT = GOLDEN / "data/raw.jsonl", GOLDEN / "data/corpus.txt"


def command(*arguments):
    return [sys.executable, "tools/process_data.py", *map(str, arguments)]


def instructions(save, *more, raw=RAW, tokenizer=TOKENIZER, prompt=96, dev=12):
    numbers = ("--max-prompt-length", prompt, "--dev-num", dev)
    return "instructions", "--raw", raw, "--tokenizer", tokenizer, "--save", save, *numbers, *more


@pytest.fixture
def run(monkeypatch, capsys):
    """The tool within this process (a new one takes seconds): (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["process_data.py", *map(str, arguments)])
        before = signal.getsignal(signal.SIGTERM)
        try:
            exit_with(process_data.main)
            status = 0
        except SystemExit as leaving:
            status = leaving.code
        finally:
            signal.signal(signal.SIGTERM, before)
        return status, *capsys.readouterr()

    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
