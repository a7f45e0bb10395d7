"""A run's checkpoints: one run at a time, damaged checkpoints are skipped, and settings have to fit."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers.deepspeed_files import zero_file
from helpers.runs import Run, crash_at, rows_of, whole_lines
from helpers.training import train_here

from promptkd.errors import RunError, UserError
from promptkd.training.setup import build_trainer
from promptkd.weights.safetensors_io import TensorFile, write_tensors
from train import resolve


def test_lock_refuses_a_second_run_in_the_folder(options, tmp_path):
    run = Run(options(tmp_path / "run", "--total-iters", "1000"), tmp_path / "log")
    run.wait_for(lambda: len(whole_lines(tmp_path / "run")) >= 1)
    for extra in (["--resume", "auto"], ["--overwrite"]):
        with pytest.raises(UserError, match="in use by another run"):
            train_here(options(tmp_path / "run", *extra))
    run.signal(signal.SIGKILL)
    run.wait()
    train_here(options(tmp_path / "run", "--overwrite", "--total-iters", "1"))


@pytest.fixture
def interrupted(options, tmp_path):
    """A run with checkpoints of steps 2 and 4."""
    crash_at(5, options(tmp_path / "run", method="sft"))
    return tmp_path / "run"


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-2]),  # the last byte is a newline
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-9] + b"#" + path.read_bytes()[-8:]),
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "student-rank0.safetensors"])
def test_resume_reports_and_skips_a_damaged_checkpoint(name, damage, options, interrupted, capfd):
    DAMAGE[damage](interrupted / "checkpoints/step-4" / name)
    trainer = build_trainer(resolve(options(interrupted, "--resume", method="sft")))
    trainer.checkpoints.unlock()
    assert trainer.done == 2 and "step-4 is damaged" in capfd.readouterr().err
    assert len(rows_of(interrupted)) == 2


def test_resume_without_an_intact_checkpoint_is_refused(options, interrupted, tmp_path):
    with pytest.raises(UserError, match="--resume continues it"):
        train_here(options(interrupted, method="sft"))
    for step in (2, 4):
        (interrupted / f"checkpoints/step-{step}/manifest.json").write_text("[]")
    with pytest.raises(UserError, match=r"is intact: step-4 .*manifest.json.*: --overwrite starts a new run"):
        train_here(options(interrupted, "--resume", "auto", method="sft"))
    shutil.rmtree(interrupted / "checkpoints")
    with pytest.raises(UserError, match="--resume auto"):
        train_here(options(interrupted, "--resume", method="sft"))
    train_here(options(interrupted, "--resume", "auto", method="sft"))  # killed before its first checkpoint
    assert [row["step"] for row in rows_of(interrupted)] == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="--resume"):
        train_here(options(tmp_path / "nothing", "--resume", method="sft"))
    assert not (tmp_path / "nothing").exists()


def test_resume_refuses_other_settings_by_name(options, interrupted, tmp_path, capfd):
    other = ["--lr", "0.5", "--clip-grad", "2"]
    with pytest.raises(UserError, match=r"--clip-grad 2.0 \(there: 1.0\), --lr 0.5 \(there: 0.001\)"):
        train_here(options(interrupted, "--resume", *other, method="sft"))
    with pytest.raises(UserError, match="--deepspeed_config"):
        train_here(options(interrupted, "--resume", "--deepspeed_config", zero_file(tmp_path, 3), method="sft"))
    argv = options(interrupted, method="sft")
    data = shutil.copytree(argv[argv.index("--data-dir") + 1], tmp_path / "data")
    tokens = next(data.glob("train_0.bin"))
    tokens.write_bytes(tokens.read_bytes()[:-2] + b"\1\0")
    with pytest.raises(UserError, match=r"--data-dir \(other content\)"):
        train_here(options(interrupted, "--resume", "--data-dir", str(data), method="sft"))
    moved = shutil.copytree(options(interrupted, method="sft")[options(interrupted).index("--model-path") + 1],
                            tmp_path / "moved")  # fmt: skip
    free = ["--model-path", str(moved), "--keep-checkpoints", "1"]
    train_here(options(interrupted, "--resume-anyway", "--resume", *free, *other, method="sft"))
    assert "--lr 0.5" in capfd.readouterr().err and rows_of(interrupted)[-1]["step"] == 5
    assert [path.name for path in (interrupted / "checkpoints").iterdir()] == ["step-5"]


def test_write_on_a_full_disk_keeps_the_last_checkpoint(options, interrupted, monkeypatch):
    def full(path, tensors):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("promptkd.checkpointing.manager.write_tensors", full)
    with pytest.raises(RunError, match="No space left"):
        train_here(options(interrupted, "--resume", method="sft"))
    assert sorted(path.name for path in (interrupted / "checkpoints").iterdir()) == ["step-2", "step-4"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells which file is synced")
def test_folders_are_synced_before_they_are_renamed(options, tmp_path, monkeypatch):
    run, synced, missing = tmp_path / "run", set(), {}
    fsync, rename = os.fsync, Path.rename

    def noted(handle):
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def checked(path, target):
        if path.suffix == ".new":
            missing[Path(target).name] = {str(file) for file in (path, *path.iterdir())} - synced
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", checked)
    train_here(options(run, "--total-iters", "2", method="sft"))
    assert missing == {"step-2": set(), "last": set()}
    assert {str(run / name) for name in ("", "checkpoints", "metrics.jsonl")} <= synced  # the new names, too


def test_write_removes_leftovers_of_a_kill(options, interrupted):
    for name in (".step-5.new", ".step-1.old"):
        shutil.copytree(interrupted / "checkpoints/step-2", interrupted / "checkpoints" / name)
    (interrupted / ".last.new").mkdir()
    train_here(options(interrupted, "--resume", method="sft"))
    assert [path.name for path in (interrupted / "checkpoints").iterdir()] == ["step-5"]
    assert not [path for path in interrupted.glob(".*") if path.name != ".lock"]


def test_checkpoint_minutes_writes_when_the_last_one_is_old(options, tmp_path):
    """--checkpoint-minutes: here any is too old by the next step."""
    often = ["--checkpoint-every", "0", "--checkpoint-minutes", "1e-9", "--keep-checkpoints", "9"]
    crash_at(4, options(tmp_path / "run", *often, method="sft"))
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-1", "step-2", "step-3"]


def test_write_tensors_writes_safetensors(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.setattr("promptkd.weights.safetensors_io.BLOCK_BYTES", 12)
    tensors = {"a": torch.randn(4, 5).bfloat16(), "b": torch.tensor(7.0), "c": torch.arange(7), "d": torch.empty(0)}
    write_tensors(tmp_path / "x.safetensors", tensors)
    loaded = load_file(tmp_path / "x.safetensors")
    assert {name: (t.dtype, t.tolist()) for name, t in loaded.items()} == {
        name: (t.dtype, t.tolist()) for name, t in tensors.items()
    }
    assert set(TensorFile(tmp_path / "x.safetensors")) == set(tensors)
