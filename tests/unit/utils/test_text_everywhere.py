"""Names and texts of other scripts in sets, files, screens and pictures, whatever the locale."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import unicodedata

import pytest
from helpers.evaluating import MODEL, SIZES, write_set
from helpers.training import ROOT

from promptkd.errors import UserError
from promptkd.evaluation.options import EvaluationSettings
from promptkd.evaluation.test_sets import SET_NAME, find_sets

READERS = {"open", "read_text", "write_text"}


@pytest.mark.parametrize("name", ["中文", "हिन्दी", "עברית", unicodedata.normalize("NFD", "über"), "ไทยที่", "a.b-c+d"])
def test_find_sets_accepts_names_of_any_script(name, tmp_path):
    write_set(tmp_path / name)
    assert list(find_sets(str(tmp_path), [name])[0]) == [name]


@pytest.mark.parametrize("name", ["", ".x", "-x", "a/b", "a b", "a\u202eb", "../a", "a\nb"])
def test_find_sets_refuses_names_that_are_paths(name):
    assert not SET_NAME.fullmatch(name)


def test_evaluation_settings_refuse_an_empty_save():
    with pytest.raises(UserError, match="--save is empty"):
        EvaluationSettings("model", save="")
    assert EvaluationSettings("model").save == "results/eval_main"


def calls_without_encoding(source: str) -> list[int]:
    """Lines of open(), read_text() and write_text() calls for text that leave the encoding to the locale."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        owner = getattr(getattr(function, "value", None), "id", "")
        # Path.open and open have a mode, the project's own functions of that name do not.
        if (
            name not in READERS
            or owner in ("os", "ExampleSet", "TeacherCache", "connection")
            or (isinstance(function, ast.Name) and name != "open")
        ):
            continue
        values = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
        texts = [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
        binary = any("b" in text and set(text) <= set("rwaxb+") for text in texts)
        encoded = any(keyword.arg == "encoding" for keyword in node.keywords) or "utf-8" in texts
        if not binary and not encoded:
            lines.append(node.lineno)
    return lines


def test_calls_without_encoding_are_seen():
    source = 'open(a)\nopen(a, "rb")\np.read_text()\np.write_text(x, encoding="utf-8")\np.open("w")\nwrite_text(p, x)\n'
    assert calls_without_encoding(source) == [1, 3, 5]


def test_every_text_file_is_opened_with_its_encoding():
    folders = ("promptkd", "minillm_baselines", "tools", "benchmarks")
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    found = {str(path): calls_without_encoding(path.read_text(encoding="utf-8")) for path in files}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_evaluation_runs_where_the_screen_has_ascii_only(tmp_path):
    write_set(tmp_path / "data/中文", rows=2, output="首都是巴黎")
    argv = ["--model-path", str(MODEL), "--data-dir", str(tmp_path / "data"), "--data-names", "中文", *SIZES]
    save = tmp_path / "élan"
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "evaluate.py"), *argv, "--save", str(save), "--seeds", "1", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "| \\u4e2d\\u6587 | 2 |" in done.stdout and "Traceback" not in done.stderr
    assert "| 中文 | 2 |" in (save / "results.md").read_text(encoding="utf-8")
    assert (save / "中文/seed1/answers.jsonl").exists()
