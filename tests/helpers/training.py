"""Paths, options of short runs on the golden models, and ways to start a script: in this process, or as a user does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from helpers.forked_python import fork_script

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The programs that tests start import this checkout, and whatever the user has put on the path.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
# Where the tests train: "cpu", so that results do not depend on the machine, or "cuda".
DEVICE = os.environ.setdefault("PROMPTKD_TEST_DEVICE", "cpu")
os.environ["DS_ACCELERATOR"] = DEVICE


def gpu_count() -> int:
    """Return the number of GPUs that torch can use."""
    import torch

    return torch.cuda.device_count()


def need_gpus(ranks: int) -> None:
    """Skip a test that has more ranks than there are GPUs, where tests train on GPUs."""
    if DEVICE == "cuda" and ranks > gpu_count():
        pytest.skip(f"{ranks} ranks need {ranks} GPUs")


def golden_argv(method: str, save: Path, *extra: str) -> list[str]:
    """Return options of a short run on the golden models and data, in float32 on every device."""
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
    """Return the rows of metrics.jsonl that record this event."""
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == event]


def train_here(argv: list[str]):
    """Train in this process and return the trainer."""
    from promptkd.training.setup import build_trainer
    from train import resolve

    trainer = build_trainer(resolve(argv))
    trainer.fit()
    return trainer


def free_port() -> str:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(argv: list[str], ranks: int = 1, script: str = "train.py", **environment: str) -> subprocess.CompletedProcess:
    """Run a script of the project in processes of its own, one for each rank, and wait for them."""
    need_gpus(ranks)
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
    with tempfile.TemporaryDirectory() as folder:
        output, errors = (Path(folder) / name for name in ("stdout", "stderr"))
        processes = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            command = [str(ROOT / script), *argv]
            processes.append(
                fork_script(command, {**variables, **meet, **place}, os.getcwd(), str(output), str(errors))
            )
        for process in processes:
            process.join(600)
        status = next((process.exitcode for process in processes if process.exitcode), 0)
        return subprocess.CompletedProcess(argv, status, output.read_text(), errors.read_text())


def start_fresh(argv: list[str], torchrun: bool = False, script: str = "train.py") -> subprocess.CompletedProcess:
    """Run a script exactly as a user does, in a new interpreter, with torchrun in front if asked to."""
    launcher = [sys.executable]
    if torchrun:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", "1"]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, str(ROOT / script), *argv], capture_output=True, text=True, env=variables, timeout=600
    )
