"""Runs of train.py that may be killed: forked from a process that has imported everything, so that one takes a second.

A run is a process of its own (or one for each rank) that gets real signals.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.forked_python import PRELOAD, serve
from helpers.training import DEVICE, GOLDEN, ROOT, free_port, golden_argv, need_gpus

UNREPEATABLE = ("seconds", "peak_memory_gb")


def _start(script: str, argv: list[str], environment: dict[str, str], log: str) -> None:
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.path[:0] = [str(ROOT)]
    sys.argv = [f"{script}.py", *argv]
    from promptkd.errors import exit_with

    exit_with(importlib.import_module(script).main)


class Run:
    """A training run in the background, or one of another script. log: what it printed, all ranks."""

    def __init__(self, argv: list[str], log: Path, ranks: int = 1, script: str = "train") -> None:
        need_gpus(ranks)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        port = free_port()
        self.log, self.processes = log, []
        for rank in range(ranks):
            names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = context.Process(target=_start, args=(script, argv, {**names, "OMP_NUM_THREADS": "1"}, str(log)))
            process.start()
            self.processes.append(process)

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Exit statuses by rank; negative: killed by that signal."""
        for process in self.processes:
            process.join(seconds)
        return [process.exitcode for process in self.processes]

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60, pause: float = 0.01) -> None:
        """Wait until something is so, or all ranks have ended; looks every `pause` seconds."""
        end = time.monotonic() + seconds
        while not condition() and any(process.is_alive() for process in self.processes):
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(pause)

    def signal(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)


def rows_of(save: Path) -> list[dict]:
    """The rows of metrics.jsonl without what no two runs have in common."""
    path = save / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    return [{key: value for key, value in row.items() if not key.endswith(UNREPEATABLE)} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    """Metrics and final weights are equal to the last bit."""
    assert rows_of(one) == rows_of(other)
    for pattern in ("last/*.safetensors", "prompt/*.safetensors", "best_*/*.safetensors"):
        names = [path.relative_to(one) for path in sorted(one.glob(pattern))]
        assert names == [path.relative_to(other) for path in sorted(other.glob(pattern))]
        for name in names:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def tiny_argv(method: str, save: Path, *extra: str) -> list[str]:
    """Options of a run of any method on the golden models and data."""
    argv = golden_argv(method, save)
    if method == "minillm":
        place = argv.index("--data-dir")
        argv[place : place + 2] = ["--prompt-data-dir", str(GOLDEN / "processed/dolly/prompt/gpt2")]
        argv += ["--lm-data-dir", str(GOLDEN / "processed/corpus/gpt2")]
        argv += ["--num-rollouts", "8", "--chunk-size", "4", "--ppo-epochs", "2"]
    return [*argv, *extra]


def student_with_dropout(folder: Path) -> Path:
    """The golden student, with dropout."""
    shutil.copytree(GOLDEN / "models/gpt2_student", folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def short_argv(student: Path, save: Path, *extra: str, method: str = "promptkd") -> list[str]:
    """Options of a run of 5 short steps, sampling on, a checkpoint after each second step."""
    short = ["--model-path", str(student), "--max-length", "104", "--batch-size", "2", "--total-iters", "5"]
    often = ["--checkpoint-every", "2", "--lr-decay-style", "cosine"]
    return tiny_argv(method, save, *short, *often, *extra)


class Crash(Exception):
    """What stands for a kill within this process."""


def crash_at(step: int, argv: list[str]) -> None:
    """Train in this process and end in the middle of a step, after its update."""
    from promptkd.training.setup import build_trainer
    from train import resolve

    crash(build_trainer(resolve(argv)), step)


def crash(trainer, step: int) -> None:
    """`crash_at` for a trainer that was made before."""
    inner = trainer.method.step

    def method_step(window):
        row = inner(window)
        if window.step == step:
            raise Crash
        return row

    trainer.method.step = method_step
    with pytest.raises(Crash):
        trainer.fit()


def whole_lines(save: Path) -> list[str]:
    """The lines of metrics.jsonl that are written whole by now."""
    path = save / "metrics.jsonl"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def run_script(
    script: str, *arguments: str, cwd: Path = ROOT, fresh: bool = False, **environment: str
) -> subprocess.CompletedProcess:
    """Run a shell script as a user does, on the tests' device.

    Its Python is forked where that is possible and neither `fresh` nor PROMPTKD_PYTHON asks for another one.
    """
    dropped = {"NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"}
    dropped |= {"MAX_RESTARTS", "PROMPTKD_LAUNCHER"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    variables = {"PROMPTKD_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    if DEVICE == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    command = ["bash", str(ROOT / script), *arguments]
    with contextlib.ExitStack() as stack:
        if not fresh and "PROMPTKD_PYTHON" not in environment and Path("/proc/self/fd").exists():
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            variables["PROMPTKD_PYTHON"] = str(stack.enter_context(serve(Path(folder))))
        return subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, env={**kept, **variables, **environment}, timeout=600
        )
