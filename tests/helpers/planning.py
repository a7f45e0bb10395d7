"""Settings of plans for tests."""

from __future__ import annotations

from helpers.training import GOLDEN
from promptkd.cli import plan as tool

STUDENT, TEACHER = (str(GOLDEN / "models" / name) for name in ("gpt2_student", "gpt2_teacher"))


def make(*options: str, student: str = STUDENT, teacher: str = TEACHER, method: str = "promptkd"):
    models = ["--method", method, "--model-path", student, *(["--teacher-model-path", teacher] if teacher else [])]
    return tool.make([*models, "--max-length", "128", "--max-prompt-length", "64", *options])[0]
