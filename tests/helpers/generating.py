"""Runs of tools/generate.py on the golden models."""

from __future__ import annotations

from helpers.training import GOLDEN
from promptkd.cli import generate
from promptkd.cli.data import PseudoSettings, pseudo
from promptkd.utils.jsonl import read_jsonl

FULL = GOLDEN / "processed/dolly/full/gpt2"
TEACHER, STUDENT = GOLDEN / "models/gpt2_teacher", GOLDEN / "models/gpt2_student"
SIZES = ["--max-length", "128", "--max-prompt-length", "96"]


def generate_argv(save, *extra: str, data=FULL) -> list[str]:
    return ["--model-path", str(TEACHER), "--data-dir", str(data), "--save", str(save), *SIZES, *extra]


def generated(save, *extra: str, data=FULL) -> list[dict]:
    generate.run(generate.read_settings(generate_argv(save, *extra, data=data)))
    return read_jsonl(save / "generated.jsonl")


def made_pseudo(file, save, data=FULL):
    return pseudo(PseudoSettings(str(file), str(data), str(STUDENT), str(save), max_prompt_length=96))
