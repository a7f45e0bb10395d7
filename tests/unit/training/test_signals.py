"""Stop signals: the run finishes its step, writes a checkpoint and exits with a status for the signal."""

import os
import signal
import subprocess
import sys

import pytest
from helpers.runs import Run, rows_of, whole_lines
from helpers.training import ROOT


@pytest.mark.parametrize("number, status", [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 0)])
def test_signal_ends_the_run_after_the_step_with_a_checkpoint(number, status, options, tmp_path):
    save = tmp_path / "run"
    extra = ["--checkpoint-every", "0", "--total-iters", "1000"]
    run = Run(options(save, *extra, method="sft"), tmp_path / "log")
    run.wait_for(lambda: len(whole_lines(save)) >= 2)
    run.signal(getattr(signal, number))
    assert run.wait() == [status], run.log.read_text()
    last = rows_of(save)[-1]["step"]
    assert [path.name for path in (save / "checkpoints").glob("step-*")] == [f"step-{last}"]
    assert number in run.log.read_text() and not (save / "last").exists()


def test_signal_to_one_rank_stops_both(options, tmp_path):
    run = Run(options(tmp_path / "run", "--batch-size", "1", "--total-iters", "1000"), tmp_path / "log", ranks=2)
    run.wait_for(lambda: len(whole_lines(tmp_path / "run")) >= 1)
    os.kill(run.processes[1].pid, signal.SIGUSR1)
    assert run.wait() == [0, 0], run.log.read_text()


def test_second_interrupt_ends_the_process_at_once():
    code = """
import os, signal, time
from promptkd.training.signals import StopSignals
with StopSignals() as signals:
    os.kill(os.getpid(), signal.SIGINT)
    assert signals.place
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30, stderr=subprocess.PIPE)
    assert done.returncode == -signal.SIGINT, done.stderr
