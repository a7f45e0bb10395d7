"""README.md and docs/: links lead somewhere, named files exist, code runs, and the README keeps its length."""

from __future__ import annotations

import re

import pytest
from helpers.training import GOLDEN, ROOT, metrics_of, train_here

from promptkd.methods.registry import METHODS

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), GOLDEN / "README.md"]
NAMED_PATH = re.compile(
    r"(?<![\w/.<>-])((?:promptkd|minillm_baselines|tests|benchmarks|scripts|tools|configs|docs)/[\w./-]+\w"
    r"|(?:train|evaluate)\.py|\w+\.sh)(?![\w/*{<])"
)


def prose_and_code(document) -> str:
    return document.read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_document_relative_links_exist(document):
    links = re.findall(r"\]\(([^)\s]+)\)", prose_and_code(document))
    missing = [
        link
        for link in links
        if not re.match(r"https?://", link) and not (document.parent / link.partition("#")[0]).exists()
    ]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_document_named_paths_exist(document):
    text = re.sub(r"https?://\S+", "", prose_and_code(document))
    created = {"minillm_baselines/on_policy_kd.py"}  # docs/adding_a_method.md tells the reader to create it
    missing = {
        path
        for path in NAMED_PATH.findall(text)
        if path not in created
        and not any((base / path).exists() for base in (ROOT, document.parent, ROOT / "scripts"))
        and not list(ROOT.glob(f"{path}.*"))
        and not list((ROOT / "scripts").rglob(path))
    }
    assert not missing


def test_readme_is_short_and_prints_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    assert "\nbash scripts/demo.sh\nbash scripts/test.sh\n" in text


def test_adding_a_method_code_trains_on_golden_models(tmp_path, monkeypatch):
    text = (ROOT / "docs/adding_a_method.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    body = code[code.index("class ") :].strip().splitlines()
    assert len([line for line in body if line.strip()]) <= 15
    (tmp_path / "documented_method.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "on_policy_kd", "documented_method:OnPolicyKD")
    short = ["--batch-size", "4", "--total-iters", "3"]
    argv = ["--method", "on_policy_kd", "--model-path", str(GOLDEN / "models/gpt2_student")]
    argv += ["--teacher-model-path", str(GOLDEN / "models/gpt2_teacher"), "--save", str(tmp_path / "run")]
    argv += ["--data-dir", str(GOLDEN / "processed/dolly/full/gpt2"), "--max-length", "128", "--dev-num", "0"]
    train_here([*argv, "--max-prompt-length", "96", "--lr", "0.001", *short])
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(0 < row["loss"] < 20 and row["response_tokens"] > 0 for row in rows)


def test_training_document_lists_every_method():
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)`", text, re.MULTILINE)
    assert sorted(listed) == sorted(METHODS)
