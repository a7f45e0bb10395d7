"""Runs on a failing disk, unreadable files and dead ranks end with one line, and complete files stay."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.hostile import arguments, refused, room, template  # noqa: F401
from helpers.runs import Run, rows_of, tiny_argv
from helpers.training import ROOT

from promptkd.checkpointing.integrity import verified_state
from promptkd.errors import RunError
from promptkd.training.setup import build_trainer
from train import resolve

SHORT = ["--max-length", "104", "--batch-size", "2", "--total-iters", "5", "--checkpoint-every", "2"]


@contextlib.contextmanager
def largest_file(size: int):
    """No file grows beyond `size` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def failing_at(step: int, argv: list[str], fail) -> str:
    """Train in this process; `fail()` is called within step `step`. What the run says in the end."""
    trainer = build_trainer(resolve(argv))
    inner = trainer.method.step

    def method_step(window):
        if window.step == step:
            fail()
        return inner(window)

    trainer.method.step = method_step
    with pytest.raises(RunError) as error:
        trainer.fit()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_run_on_a_full_disk_keeps_complete_files(tmp_path):
    """At a checkpoint, at the last model, and at a row of the metrics: what was whole before is whole still."""
    argv = tiny_argv("sft", tmp_path / "run", *SHORT)
    with contextlib.ExitStack() as disk:
        said = failing_at(3, argv, lambda: disk.enter_context(largest_file(20_000)))
    assert "checkpoints/step-4 cannot be written (File too large): make room" in said
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-2"]
    assert verified_state(tmp_path / "run/checkpoints/step-2")["step"] == 2

    without = [*argv, "--keep-checkpoints", "0", "--overwrite"]
    with contextlib.ExitStack() as disk:
        said = failing_at(3, without, lambda: disk.enter_context(largest_file(20_000)))
    assert "run/last cannot be written (" in said and "too large" in said
    assert not list((tmp_path / "run").glob("*last*")) and len(rows_of(tmp_path / "run")) == 5

    with contextlib.ExitStack() as disk:
        full = (tmp_path / "run/metrics.jsonl").stat().st_size // 2
        said = failing_at(1, without, lambda: disk.enter_context(largest_file(full)))
    assert "metrics.jsonl cannot be written (File too large)" in said and "--resume" in said
    assert rows_of(tmp_path / "run") != []


def test_run_whose_folder_vanishes_ends_with_one_line(tmp_path):
    argv = tiny_argv("sft", tmp_path / "run", *SHORT)
    said = failing_at(3, argv, lambda: shutil.rmtree(tmp_path / "run"))
    assert "metrics.jsonl has been removed during the run" in said and not (tmp_path / "run").exists()
    moved = tmp_path / "moved"
    said = failing_at(4, argv, lambda: (tmp_path / "run").rename(moved))
    assert "checkpoints/step-4 cannot be written (No such file or directory)" in said
    assert not (tmp_path / "run").exists() and verified_state(moved / "checkpoints/step-2")["step"] == 2


def test_run_whose_folder_becomes_read_only_ends_with_one_line(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    argv = tiny_argv("sft", tmp_path / "run", *SHORT)
    said = failing_at(3, argv, lambda: monkeypatch.setattr(Path, "mkdir", read_only))
    assert "step-4 cannot be written (Read-only file system): make room" in said


def test_a_picture_that_cannot_be_drawn_stops_nothing(tmp_path, capfd):
    trainer = build_trainer(resolve(tiny_argv("sft", tmp_path / "run", *SHORT)))
    (tmp_path / "run/curves.png").mkdir()
    trainer.fit()
    assert "curves.png cannot be drawn" in capfd.readouterr().err and (tmp_path / "run/last").is_dir()


UNREADABLE = [
    ("train", "data/train_0.idx"), ("train", "data/train_0.bin"), ("plain", "text/train.jsonl"),
    ("train", "student/config.json"), ("train", "ds.json"), ("prompt", "prompt/adapter_config.json"),
    ("resume", "run/checkpoints/step-2/manifest.json"), ("resume", "run/metrics.jsonl"),
    ("report", "sft/eval/results.json"), ("report", "sft/metrics.jsonl"), ("generate", "gen/generation.json"),
    ("join", "mp/config.json"), ("downloads", "downloads.json"), ("instructions", "raw.jsonl"),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "file"), UNREADABLE)
def test_unreadable_file_is_named_in_one_line(entry, file, room, monkeypatch, capfd):  # noqa: F811
    """Stands for mode 000, which does not keep root from reading."""
    if entry == "generate":
        (room / file).write_text("{}")
    usual, closed = io.open, str(room / file)

    def guarded(path, *arguments, **how):
        if not isinstance(path, int) and os.fspath(path) == closed:
            raise PermissionError(13, "Permission denied", closed)
        return usual(path, *arguments, **how)

    monkeypatch.setattr(builtins, "open", guarded)
    monkeypatch.setattr(io, "open", guarded)
    monkeypatch.setattr("helpers.hostile.snapshot", lambda room: None)
    said = refused(entry, arguments(entry, room), room, monkeypatch, capfd)
    assert "Permission denied" in said and Path(file).name in said


def test_ranks_end_when_another_rank_dies(tmp_path):
    """Started without a launcher: the rank that is left sees it at once."""
    argv = tiny_argv("promptkd", tmp_path / "run", "--batch-size", "1", "--total-iters", "1000")
    run = Run(argv, tmp_path / "log", ranks=2)
    run.wait_for(lambda: len(rows_of(tmp_path / "run")) >= 2)
    os.kill(run.processes[1].pid, signal.SIGKILL)
    began = time.monotonic()
    assert run.wait(60) == [1, -9], run.log.read_text()
    assert time.monotonic() - began < 60
    assert "another rank has ended" in run.log.read_text() and "Traceback" not in run.log.read_text()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells which process is which rank")
def test_torchrun_ends_when_a_rank_dies(tmp_path):
    argv = tiny_argv("sft", tmp_path / "run", "--batch-size", "1", "--total-iters", "100000")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    job = subprocess.Popen(
        [*launcher, "--rdzv-endpoint", "127.0.0.1:0", str(ROOT / "train.py"), *argv],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while len(rows_of(tmp_path / "run")) < 2 and job.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        ranks = {rank_of(pid): int(pid) for pid in children}
        os.kill(ranks["1"], signal.SIGKILL)
        _, said = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode not in (0, None) and "SIGKILL" in said, said


def rank_of(pid: str) -> str | None:
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((entry[5:].decode() for entry in entries if entry.startswith(b"RANK=")), None)
