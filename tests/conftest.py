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
os.environ["PYTHONPATH"] = str(ROOT)  # the programs that tests start import this checkout
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Where the tests train: "cpu", so that results do not depend on the machine, or "cuda".
DEVICE = os.environ.setdefault("PROMPTKD_TEST_DEVICE", "cpu")
os.environ["DS_ACCELERATOR"] = DEVICE
# Jobs that a shell starts in the background ignore SIGINT, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the longest tests, too (some ten minutes more)")


def pytest_configure(config):
    if DEVICE not in ("cpu", "cuda"):
        raise pytest.UsageError(f"PROMPTKD_TEST_DEVICE={DEVICE}: set it to cpu or cuda")
    if DEVICE == "cuda" and gpu_count() == 0:
        raise pytest.UsageError("PROMPTKD_TEST_DEVICE=cuda, and torch finds no GPU: unset it")


def pytest_collection_modifyitems(config, items):
    reasons = {} if config.getoption("--slow") else {"slow": "--slow runs it"}
    if DEVICE == "cuda":
        reasons["cpu"] = "it is about runs on a CPU, and PROMPTKD_TEST_DEVICE is cuda"
    else:
        reasons["gpu"] = "it needs a GPU: set PROMPTKD_TEST_DEVICE=cuda on a machine with one"
    for item in items:
        for name, reason in reasons.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def need_gpus(ranks: int) -> None:
    """Skip a test whose ranks are more than the GPUs, where tests train on GPUs."""
    if DEVICE == "cuda" and ranks > gpu_count():
        pytest.skip(f"{ranks} ranks need {ranks} GPUs")


def golden_argv(method: str, save: Path, *extra: str) -> list[str]:
    """Options of a short run on the golden models and data, in float32 on every device."""
    argv = ["--method", method, "--model-path", str(GOLDEN / "models/gpt2_student"), "--save", str(save)]
    if method != "sft":
        argv += ["--teacher-model-path", str(GOLDEN / "models/gpt2_teacher")]
    data = ["--data-dir", str(GOLDEN / "processed/dolly/full/gpt2"), "--max-length", "128", "--max-prompt-length", "96"]
    device = []
    if DEVICE == "cuda":
        # Without a file a GPU gets bf16. The recordings and the tests' tolerances are of float32, bit for bit.
        device = ["--deepspeed_config", str(ROOT / "configs/deepspeed/ds_config_fp32.json"), "--deterministic"]
    return [*argv, *data, "--lr", "0.001", "--dev-num", "0", *device, *extra]


def metrics_of(save: Path, event: str = "train") -> list[dict]:
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == event]


def train_here(argv: list[str]):
    """Train in this process; returns the trainer."""
    from promptkd.training.setup import build_trainer
    from train import read_settings

    trainer = build_trainer(read_settings(argv))
    trainer.fit()
    return trainer


def start(argv: list[str], ranks: int = 1, script: str = "train.py", **environment: str) -> subprocess.CompletedProcess:
    """Run a script of the project as a user does; with torchrun when there are several ranks (or `ranks=0`: one)."""
    need_gpus(ranks)
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
