"""Interrupted runs: bit for bit where the undisturbed one ends, whatever stopped them."""

import json
import os
import random
import shutil
import signal

import pytest
import torch
from conftest import GOLDEN, train_here
from runs import Run, assert_same_run, rows_of, student_with_dropout, tiny_argv
from test_engine import zero_file

from promptkd.build import build_trainer
from promptkd.errors import RunError, UserError
from promptkd.tensor_file import TensorFile, write_tensors
from train import read_settings

# ZeRO stage, bf16, offload. The other combinations are benchmarks/kill.py's.
ENGINES = [(0, False, False), (1, True, False), (2, False, True), (3, False, False), (3, True, True)]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return student_with_dropout(tmp_path_factory.mktemp("models") / "student")


@pytest.fixture
def options(student):
    """argv of a run of 5 short steps, dropout and sampling on, a checkpoint after each second step."""

    def make(save, *extra: str, method: str = "promptkd") -> list[str]:
        short = ["--model-path", str(student), "--max-length", "104", "--batch-size", "2", "--total-iters", "5"]
        often = ["--checkpoint-every", "2", "--lr-decay-style", "cosine"]
        return tiny_argv(method, save, *short, *often, *extra)

    return make


class Crash(Exception):
    """What stands for a kill within this process."""


def crash_at(step: int, argv: list[str]) -> None:
    """Train in this process and end in the middle of a step, after its update."""
    trainer = build_trainer(read_settings(argv))
    inner = trainer.method.step

    def method_step(window):
        row = inner(window)
        if window.step == step:
            raise Crash
        return row

    trainer.method.step = method_step
    with pytest.raises(Crash):
        trainer.fit()


def check_resume(options, tmp_path, *extra: str, method: str = "promptkd") -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_here(options(whole, *extra, method=method))
    crash_at(4, options(cut, *extra, method=method))
    assert [row["step"] for row in rows_of(cut) if row["event"] == "train"] == [1, 2, 3]
    train_here(options(cut, *extra, "--resume", method=method))
    assert_same_run(whole, cut)


@pytest.mark.parametrize("stage, bf16, offload", ENGINES)
def test_resume_is_bitwise_with_each_engine(stage, bf16, offload, options, tmp_path):
    check_resume(options, tmp_path, "--deepspeed_config", zero_file(tmp_path, stage, bf16, offload))


@pytest.mark.parametrize("method", ["sft", "kd", "minillm"])
def test_resume_is_bitwise_for_other_methods_and_with_evaluation(method, options, tmp_path):
    often = ["--dev-num", "2", "--eval-interval", "3"]
    if method != "sft":
        often += ["--exposure-bias-every", "2", "--exposure-bias-rows", "2"]
    check_resume(options, tmp_path, *often, method=method)


def test_the_best_models_and_a_kill_between_their_saves(options, tmp_path):
    """Each folder holds the model of its best evaluation, an interrupted save included; a new run starts without."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def build(save, *extra):
        often = ["--dev-num", "2", "--eval-interval", "2", "--total-iters", "4", "--checkpoint-every", "1"]
        trainer = build_trainer(read_settings(options(save, *often, *extra, method="sft")))
        trainer.dev.loss = lambda student: 1.0 if student.engine.global_steps == 2 else 2.0  # worse at the end
        return trainer

    trainer = build(whole)
    trainer.fit()
    scores = [row["rougeL"] for row in rows_of(whole) if row["event"] == "eval" and row["step"]]
    assert trainer.best == {"best_rougeL": max(scores), "best_loss": 1.0}
    last, best = ((whole / name / "model.safetensors").read_bytes() for name in ("last", "best_loss"))
    assert last != best

    trainer = build(cut)
    save = trainer.save

    def killed_at_the_second(name: str) -> None:
        if name == "best_loss":
            raise Crash
        save(name)

    trainer.save = killed_at_the_second
    with pytest.raises(Crash):
        trainer.fit()
    assert (cut / "best_rougeL").exists() and not (cut / "best_loss").exists()
    build(cut, "--resume").fit()
    assert_same_run(whole, cut)
    train_here(options(cut, "--overwrite", "--total-iters", "1", method="sft"))
    assert not list(cut.glob("best_*"))


@pytest.mark.parametrize("stage, bf16", [(2, True), (3, False)])
def test_two_ranks_killed_and_resumed(stage, bf16, options, tmp_path):
    extra = ["--batch-size", "1", "--deepspeed_config", zero_file(tmp_path, stage, bf16)]
    argv = options(tmp_path / "cut", *extra)
    run = Run(argv, tmp_path / "cut.log", ranks=2)
    run.wait_for(lambda: len(rows_of(tmp_path / "cut")) >= 3)
    run.signal(signal.SIGKILL)
    assert run.wait() == [-9, -9], run.log.read_text()
    runs = [Run([*argv, "--resume"], tmp_path / "cut.log", 2), Run(options(tmp_path / "whole", *extra), run.log, 2)]
    assert [run.wait() for run in runs] == [[0, 0], [0, 0]], run.log.read_text()
    assert "goes on after step 2/5" in run.log.read_text()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("stage, before, after", [(1, 2, 1), (3, 1, 2)])
def test_another_number_of_ranks(stage, before, after, options, tmp_path):
    """Goes on with the same examples; the numbers are those of the undisturbed run but for rounding."""
    save, log = tmp_path / "run", tmp_path / "log"
    extra = ["--no-do-sample", "--deepspeed_config", zero_file(tmp_path, stage), "--checkpoint-every", "1"]
    model = ["--model-path", str(GOLDEN / "models/gpt2_student")]  # dropout differs from rank to rank
    train_here(options(tmp_path / "whole", *extra, *model))

    def argv(ranks: int, *more: str) -> list[str]:
        return options(save, *extra, *model, "--batch-size", str(2 // ranks), *more)

    run = Run(argv(before, "--total-iters", "5"), log, before)
    run.wait_for(lambda: (save / "checkpoints/step-2").exists())
    run.signal(signal.SIGKILL)
    run.wait()
    assert Run(argv(after, "--resume"), log, after).wait() == [0] * after, log.read_text()
    assert f"is of {before} ranks, these are {after}" in log.read_text()
    for row, expected in zip(rows_of(save), rows_of(tmp_path / "whole"), strict=True):
        assert row.pop("event") == expected.pop("event")
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_killed_at_random_moments(options, tmp_path):
    extra = ["--dev-num", "2", "--eval-interval", "3", "--checkpoint-every", "1", "--resume", "auto"]
    whole, cut, log = tmp_path / "whole", tmp_path / "cut", tmp_path / "log"
    run = Run(options(whole, *extra), log)
    assert run.wait() == [0], log.read_text()
    chance, rows = random.Random(6), len(rows_of(whole))
    for kill in range(4):
        run = Run(options(cut, *extra), log)
        wanted = rows * (kill + 1) // 5
        run.wait_for(lambda wanted=wanted: len(read_whole_lines(cut)) >= wanted)
        run.wait(chance.random() * 0.3)
        run.signal(signal.SIGKILL)
        assert run.wait() in ([-9], [0]), log.read_text()
    assert Run(options(cut, *extra), log).wait() == [0], log.read_text()
    assert_same_run(whole, cut)
    assert Run(options(cut, *extra), log).wait() == [0], "a finished run has nothing left to do"
    assert_same_run(whole, cut)


def read_whole_lines(save) -> list[str]:
    path = save / "metrics.jsonl"
    return path.read_text().split("\n")[:-1] if path.exists() else []


@pytest.mark.parametrize("number, status", [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 0)])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(number, status, options, tmp_path):
    save = tmp_path / "run"
    extra = ["--checkpoint-every", "0", "--total-iters", "1000"]
    run = Run(options(save, *extra, method="sft"), tmp_path / "log")
    run.wait_for(lambda: len(read_whole_lines(save)) >= 2)
    run.signal(getattr(signal, number))
    assert run.wait() == [status], run.log.read_text()
    last = rows_of(save)[-1]["step"]
    assert [path.name for path in (save / "checkpoints").glob("step-*")] == [f"step-{last}"]
    assert number in run.log.read_text() and not (save / "last").exists()


def test_one_rank_is_told_to_stop_and_both_do(options, tmp_path):
    run = Run(options(tmp_path / "run", "--batch-size", "1", "--total-iters", "1000"), tmp_path / "log", ranks=2)
    run.wait_for(lambda: len(read_whole_lines(tmp_path / "run")) >= 1)
    os.kill(run.processes[1].pid, signal.SIGUSR1)
    assert run.wait() == [0, 0], run.log.read_text()


def test_two_runs_cannot_share_a_folder(options, tmp_path):
    run = Run(options(tmp_path / "run", "--total-iters", "1000"), tmp_path / "log")
    run.wait_for(lambda: len(read_whole_lines(tmp_path / "run")) >= 1)
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
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-9] + b"#" + path.read_bytes()[-8:]),
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "student-rank0.safetensors"])
def test_a_damaged_checkpoint_is_named_and_passed_over(name, damage, options, interrupted, capfd):
    DAMAGE[damage](interrupted / "checkpoints/step-4" / name)
    trainer = build_trainer(read_settings(options(interrupted, "--resume", method="sft")))
    trainer.checkpoints.unlock()
    assert trainer.done == 2 and "step-4 is damaged" in capfd.readouterr().err
    assert len(rows_of(interrupted)) == 2


def test_without_a_whole_checkpoint(options, interrupted, tmp_path):
    with pytest.raises(UserError, match="--resume goes on with it"):
        train_here(options(interrupted, method="sft"))
    for step in (2, 4):
        (interrupted / f"checkpoints/step-{step}/manifest.json").write_text("[]")
    with pytest.raises(UserError, match=r"is whole: step-4 .*manifest.json.*: --overwrite starts anew"):
        train_here(options(interrupted, "--resume", "auto", method="sft"))
    shutil.rmtree(interrupted / "checkpoints")
    with pytest.raises(UserError, match="--resume auto"):
        train_here(options(interrupted, "--resume", method="sft"))
    train_here(options(interrupted, "--resume", "auto", method="sft"))  # killed before its first checkpoint
    assert [row["step"] for row in rows_of(interrupted)] == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="--resume"):
        train_here(options(tmp_path / "nothing", "--resume", method="sft"))
    assert not (tmp_path / "nothing").exists()


def test_other_settings_are_refused_by_name(options, interrupted, tmp_path, capfd):
    other = ["--lr", "0.5", "--clip-grad", "2"]
    with pytest.raises(UserError, match=r"--clip-grad 2.0 \(there: 1.0\), --lr 0.5 \(there: 0.001\)"):
        train_here(options(interrupted, "--resume", *other, method="sft"))
    with pytest.raises(UserError, match="--deepspeed_config"):
        train_here(options(interrupted, "--resume", "--deepspeed_config", zero_file(tmp_path, 3), method="sft"))
    moved = shutil.copytree(options(interrupted, method="sft")[options(interrupted).index("--model-path") + 1],
                            tmp_path / "moved")  # fmt: skip
    free = ["--model-path", str(moved), "--keep-checkpoints", "1"]
    train_here(options(interrupted, "--resume-anyway", "--resume", *free, *other, method="sft"))
    assert "--lr 0.5" in capfd.readouterr().err and rows_of(interrupted)[-1]["step"] == 5
    assert [path.name for path in (interrupted / "checkpoints").iterdir()] == ["step-5"]


def test_a_full_disk_keeps_the_last_checkpoint(options, interrupted, monkeypatch):
    def full(path, tensors):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("promptkd.resume.write_tensors", full)
    with pytest.raises(RunError, match="No space left"):
        train_here(options(interrupted, "--resume", method="sft"))
    assert sorted(path.name for path in (interrupted / "checkpoints").iterdir()) == ["step-2", "step-4"]


def poison(step: int, argv: list[str]):
    """A run in which the loss of one step is not finite."""
    trainer = build_trainer(read_settings(argv))
    batches = trainer.method.micro_batches

    def micro_batches(window, responses):
        made, tokens = batches(window, responses)
        if window.step == step:
            made[0].weights[0] = float("nan")
        return made, tokens

    trainer.method.micro_batches = micro_batches
    return trainer


@pytest.mark.parametrize("stage, bf16", [(0, False), (1, True), (3, False)])
def test_a_loss_that_is_not_finite(stage, bf16, options, tmp_path):
    config = ["--deepspeed_config", zero_file(tmp_path, stage, bf16)]
    trainer = poison(2, options(tmp_path / "run", *config))
    indices = [example.index for example in trainer.window(2).examples]
    with pytest.raises(RunError, match=r"promptkd, step 2: not finite: .*student_loss.*prompt gradient.*examples"):
        trainer.fit()
    saved = json.loads((tmp_path / "run/nonfinite-step-2.json").read_text())
    assert [example["index"] for example in saved["examples"]] == indices and "student gradient" in saved["values"]
    before = poison(2, options(tmp_path / "skips", *config, "--skip-nonfinite", "1"))
    before.fit()
    rows = rows_of(tmp_path / "skips")
    assert [row["event"] for row in rows] == ["train", "skipped", "train", "train", "train"]
    assert all(bool(torch.isfinite(p).all()) for p in before.method.student.module.parameters())


def test_tensor_files_are_safetensors(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.setattr("promptkd.tensor_file.BLOCK", 3)
    tensors = {"a": torch.randn(4, 5).bfloat16(), "b": torch.tensor(7.0), "c": torch.arange(7), "d": torch.empty(0)}
    write_tensors(tmp_path / "x.safetensors", tensors)
    loaded = load_file(tmp_path / "x.safetensors")
    assert {name: (t.dtype, t.tolist()) for name, t in loaded.items()} == {
        name: (t.dtype, t.tolist()) for name, t in tensors.items()
    }
    assert set(TensorFile(tmp_path / "x.safetensors")) == set(tensors)
