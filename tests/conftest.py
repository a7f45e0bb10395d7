"""Tiny models and data, and ways to start training: in this process, or several ranks over gloo."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Jobs that a shell starts in the background ignore SIGINT, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the longest tests, too (some ten minutes more)")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="--slow runs it"))


def golden_argv(method: str, save: Path, *extra: str) -> list[str]:
    """Options of a short run on the golden models and data."""
    argv = ["--method", method, "--model-path", str(GOLDEN / "models/gpt2_student"), "--save", str(save)]
    if method != "sft":
        argv += ["--teacher-model-path", str(GOLDEN / "models/gpt2_teacher")]
    data = ["--data-dir", str(GOLDEN / "processed/dolly/full/gpt2"), "--max-length", "128", "--max-prompt-length", "96"]
    return [*argv, *data, "--lr", "0.001", "--dev-num", "0", *extra]


def metrics_of(save: Path, event: str = "train") -> list[dict]:
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == event]


def train_here(argv: list[str]):
    """Train in this process; returns the trainer."""
    from promptkd.build import build_trainer
    from train import read_settings

    trainer = build_trainer(read_settings(argv))
    trainer.fit()
    return trainer


def start(argv: list[str], ranks: int = 1, script: str = "train.py", **environment: str) -> subprocess.CompletedProcess:
    """Run a script of the project as a user does; with torchrun when there are several ranks (or `ranks=0`: one)."""
    launcher = [sys.executable]
    if ranks != 1:
        port = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks or 1), *port]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [*launcher, str(ROOT / script), *argv], capture_output=True, text=True, env=variables, timeout=600
    )


@pytest.fixture
def save(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="session")
def dropout_student(tmp_path_factory) -> Path:
    from runs import student_with_dropout

    return student_with_dropout(tmp_path_factory.mktemp("models") / "student")


@pytest.fixture
def options(dropout_student):
    """argv of a short run, dropout and sampling on: `options(save, *extra, method=...)`."""
    from runs import short_argv

    return functools.partial(short_argv, dropout_student)
