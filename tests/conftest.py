"""Options, markers and fixtures that all tests share."""

from __future__ import annotations

import functools
import signal
from pathlib import Path

import pytest
from helpers import training

# Jobs that a shell starts in the background ignore SIGINT, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the longest tests, too (some ten minutes more)")


def pytest_configure(config):
    if training.DEVICE not in ("cpu", "cuda"):
        raise pytest.UsageError(f"PROMPTKD_TEST_DEVICE={training.DEVICE}: set it to cpu or cuda")
    if training.DEVICE == "cuda" and training.gpu_count() == 0:
        raise pytest.UsageError("PROMPTKD_TEST_DEVICE=cuda, and torch finds no GPU: unset it")


def pytest_collection_modifyitems(config, items):
    reasons = {} if config.getoption("--slow") else {"slow": "--slow runs it"}
    if training.DEVICE == "cuda":
        reasons["cpu"] = "it is about runs on a CPU, and PROMPTKD_TEST_DEVICE is cuda"
    else:
        reasons["gpu"] = "it needs a GPU: set PROMPTKD_TEST_DEVICE=cuda on a machine with one"
    for item in items:
        for name, reason in reasons.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def save(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="session")
def dropout_student(tmp_path_factory) -> Path:
    from helpers.runs import student_with_dropout

    return student_with_dropout(tmp_path_factory.mktemp("models") / "student")


@pytest.fixture
def options(dropout_student):
    """argv of a short run, dropout and sampling on: `options(save, *extra, method=...)`."""
    from helpers.runs import short_argv

    return functools.partial(short_argv, dropout_student)
