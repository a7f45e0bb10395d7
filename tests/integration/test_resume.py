"""Interrupted runs: bit for bit where the undisturbed one ends, whatever stopped them."""

import random
import signal

import pytest
from helpers.deepspeed_files import zero_file
from helpers.resuming import check_resume
from helpers.runs import Crash, Run, assert_same_run, rows_of, whole_lines
from helpers.training import GOLDEN, train_here

from promptkd.training.setup import build_trainer
from train import resolve

# ZeRO stage, bf16, offload: each in both precisions. --slow runs all of them on one rank and on two.
ENGINES = [
    (stage, bf16, offload)
    for stage, offload in ((1, False), (2, False), (2, True), (3, False), (3, True))
    for bf16 in (False, True)
]
OFTEN = {1: {(1, True, False), (2, False, True), (3, True, True)},
         2: {(2, True, False), (3, False, False)}}  # fmt: skip


def engines(ranks: int) -> list:
    """All of ENGINES as parameters; those that do not run on so many ranks every time are slow tests."""
    return [pytest.param(*engine, marks=() if engine in OFTEN[ranks] else pytest.mark.slow) for engine in ENGINES]


@pytest.mark.parametrize("stage, bf16, offload", [(0, False, False), *engines(1)])
def test_resume_is_bitwise_with_each_engine(stage, bf16, offload, options, tmp_path):
    check_resume(options, tmp_path, "--deepspeed_config", zero_file(tmp_path, stage, bf16, offload))


@pytest.mark.parametrize("method", ["sft", pytest.param("kd", marks=pytest.mark.slow), "minillm"])
def test_resume_is_bitwise_for_other_methods_and_with_evaluation(method, options, tmp_path):
    often = ["--dev-num", "2", "--eval-interval", "3"]
    if method != "sft":
        often += ["--exposure-bias-every", "2", "--exposure-bias-rows", "2"]
    check_resume(options, tmp_path, *often, method=method)


def test_resume_after_a_kill_between_saves_of_the_best_models(options, tmp_path):
    """Each folder holds the model of its best evaluation, an interrupted save included; a new run starts without."""
    whole, cut, late = (tmp_path / name for name in ("whole", "cut", "late"))

    def crash():
        raise Crash

    def build(save, *extra):
        often = ["--dev-num", "2", "--eval-interval", "2", "--total-iters", "4", "--checkpoint-every", "1"]
        trainer = build_trainer(resolve(options(save, *often, *extra, method="sft")))
        trainer.dev.loss = lambda student: 1.0 if student.engine.global_steps == 2 else 2.0  # worse at the end
        return trainer

    trainer = build(whole)
    trainer.fit()
    scores = [row["rougeL"] for row in rows_of(whole) if row["event"] == "eval" and row["step"]]
    assert trainer.best.items() >= {"best_rougeL": max(scores), "best_loss": 1.0}.items()
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

    trainer = build(late)
    loss = trainer.dev.loss
    trainer.dev.loss = lambda student: loss(student) if student.engine.global_steps < 4 else crash()
    with pytest.raises(Crash):
        trainer.fit()
    build(late, "--resume").fit()  # what was best before the kill still is
    assert_same_run(whole, late)
    train_here(options(cut, "--overwrite", "--total-iters", "1", method="sft"))
    assert not list(cut.glob("best_*"))


@pytest.mark.parametrize("stage, bf16, offload", engines(2))
def test_resume_of_two_ranks_is_bitwise(stage, bf16, offload, options, tmp_path):
    extra = ["--batch-size", "1", "--deepspeed_config", zero_file(tmp_path, stage, bf16, offload)]
    argv = options(tmp_path / "cut", *extra)
    run = Run(argv, tmp_path / "cut.log", ranks=2)
    run.wait_for(lambda: len(rows_of(tmp_path / "cut")) >= 3)
    run.signal(signal.SIGKILL)
    assert run.wait() == [-9, -9], run.log.read_text()
    runs = [Run([*argv, "--resume"], tmp_path / "cut.log", 2), Run(options(tmp_path / "whole", *extra), run.log, 2)]
    assert [run.wait() for run in runs] == [[0, 0], [0, 0]], run.log.read_text()
    assert "resumes after step 2/5" in run.log.read_text()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("stage, before, after", [(1, 2, 1), (3, 1, 2)])
def test_resume_on_another_number_of_ranks_matches_up_to_rounding(stage, before, after, options, tmp_path):
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


def test_resume_after_random_kills_is_bitwise(options, tmp_path):
    extra = ["--dev-num", "2", "--eval-interval", "3", "--checkpoint-every", "1", "--resume", "auto"]
    whole, cut, log = tmp_path / "whole", tmp_path / "cut", tmp_path / "log"
    run = Run(options(whole, *extra), log)
    assert run.wait() == [0], log.read_text()
    chance, rows = random.Random(6), len(rows_of(whole))
    for kill in range(3):
        run = Run(options(cut, *extra), log)
        wanted = rows * (kill + 1) // 4
        run.wait_for(lambda wanted=wanted: len(whole_lines(cut)) >= wanted)
        run.wait(chance.random() * 0.3)
        run.signal(signal.SIGKILL)
        assert run.wait() in ([-9], [0]), log.read_text()
    assert Run(options(cut, *extra), log).wait() == [0], log.read_text()
    assert_same_run(whole, cut)
    assert Run(options(cut, *extra), log).wait() == [0], "a finished run has nothing left to do"
    assert_same_run(whole, cut)
