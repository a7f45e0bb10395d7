"""Legal values at the edge of what an option takes: the run ends, its numbers are finite, its pictures are drawn."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers.runs import tiny_argv
from helpers.training import GOLDEN, ROOT, metrics_of, train_here

import evaluate
from promptkd.engine.optim import OptimizerConfig, make_schedule
from promptkd.evaluation.exposure_files import draw
from promptkd.generation.sampling import Sampling, sample_token
from promptkd.training.curves import draw_curves
from promptkd.utils.machine import usable_cores
from promptkd.utils.progress import Progress

HUGE_SEED = str(2**63 - 1)
VALID = GOLDEN / "processed/dolly/full/gpt2/valid.jsonl"
NAMES = ["$x", "$\\frac$", "a_b^c\\d", "100 %s", "two words", "名前-é", "n" * 200, "_hidden", "new\nline", "\udcff"]

RUNS = [  # method, options besides two short steps
    ("promptkd", "--teacher-lr 0 --lr-decay-style noam --base-coef 0"),
    ("promptkd", "--teacher-lr 0 --lr-decay-style cosine --clip-grad 0 --weight-decay 0"),
    ("promptkd", "--teacher-lr 1e-7 --lr-decay-style noam --warmup-iters 1"),
    ("promptkd", "--lr 0 --lr-decay-style noam"),
    ("promptkd", "--lr 1e-300 --lr-decay-style cosine --lr-min 0"),
    ("promptkd", "--lr-decay-style noam --warmup-iters 2"),  # as long as the run
    ("promptkd", "--lr-decay-style noam --warmup-iters 1000000000000 --clip-grad 1e-300"),
    ("sft", "--lr-decay-style noam --total-iters 1"),
    ("sft", "--lr-decay-style cosine --total-iters 1"),
    ("promptkd", "--temperature 1e-300"),
    ("promptkd", "--temperature 1e-40 --top-p 1e-300"),
    ("promptkd", "--temperature 1e300 --top-k 9223372036854775807"),
    ("promptkd", "--top-p 1e-50 --top-k 1"),
    ("promptkd", "--max-length 97 --prompt-len 1 --prompt-init-text PAD"),  # a token of response
    ("promptkd", f"--prompt-init-text random --seed {HUGE_SEED} --seed-order {HUGE_SEED}"),
    ("promptkd", "--token-budget 1 --rollout-token-budget 1"),
    ("promptkd", "--token-budget 9223372036854775807 --rollout-token-budget 9223372036854775807"),
    ("promptkd", "--log-interval 9223372036854775807 --dev-num 1 --exposure-bias-every 1000 --exposure-bias-rows 1000"),
    ("promptkd", "--dev-num 9223372036854775807 --eval-batch-size 9223372036854775807 --max-length 98"),
    ("promptkd", "--checkpoint-every 1 --keep-checkpoints 9223372036854775807 --checkpoint-minutes 1e-300"),
    ("promptkd", "--keep-checkpoints 0 --skip-nonfinite 9223372036854775807 --eval-interval 9223372036854775807"),
    ("kd", "--kd-ratio 0"),
    ("kd", "--kd-ratio 1"),
    ("seqkd", "--kd-ratio 1"),
    ("sft", "--epochs 9223372036854775807"),
    ("sft", "--batch-size 34 --total-iters 3"),  # all the examples in each step
    ("minillm", "--kd-ratio 0 --lm-coef 0 --gamma 0"),
    ("minillm", "--kd-ratio 1 --gamma 1 --teacher-mixed-alpha 1"),
    ("minillm", "--teacher-mixed-alpha 0 --cliprange 0 --cliprange-reward 0"),
    ("minillm", "--max-length 97 --lm-data-dir="),  # a token of response
    ("minillm", "--scheduler-name cosine_trm --warmup-iters 2 --dev-num 1"),
    ("minillm", f"--seed-ppo {HUGE_SEED} --seed-lm {HUGE_SEED} --chunk-size 1000 --whiten published"),
    ("minillm", "--reward-scaling 1e-30 --num-rollouts 2 --ppo-epochs 1000"),
]


@pytest.mark.parametrize(("method", "options"), RUNS, ids=[f"{method} {options}"[:70] for method, options in RUNS])
def test_run_with_extreme_option_ends_with_finite_numbers(method, options, save):
    short = ["--batch-size", "2", "--max-length", "100", "--total-iters", "2", "--checkpoint-minutes", "0"]
    trainer = train_here(tiny_argv(method, save, *short, *options.split()))
    rows = metrics_of(save)
    assert rows[-1]["step"] == trainer.total and (save / "last/model.safetensors").is_file()
    numbers = {key: value for row in rows for key, value in row.items() if isinstance(value, float)}
    assert all(map(math.isfinite, numbers.values())), numbers
    assert (save / "curves.png").read_bytes().startswith(b"\x89PNG")
    for learner, rate in (("prompt", "--teacher-lr 0"), ("student", "--lr 0 ")):
        if rate in f"{options} ":
            start = trainer.method.initial_prompt if learner == "prompt" else None
            assert trainer.method.learners()[learner].lr == 0
            assert start is None or torch.equal(trainer.method.prompt(), start)


@pytest.mark.parametrize("style", ["constant", "cosine", "noam", "cosine_trm"])
@pytest.mark.parametrize(("lr", "total", "warmup"), [(0, 3, 0), (1e-8, 3, 1), (1e-3, 1, 0), (1e-3, 2, 2), (1e-3, 2, 9)])
def test_schedule_stays_between_zero_and_the_peak(style, lr, total, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    schedule = make_schedule(optimizer, OptimizerConfig(lr, total, style, warmup=warmup))
    rates = [schedule.get_last_lr()[0]]
    for _ in range(total):
        optimizer.step()
        schedule.step()
        rates += schedule.get_last_lr()
    assert all(0 <= rate <= lr for rate in rates)
    if warmup >= total and style != "cosine" and lr == 1e-3:
        assert rates == pytest.approx([lr * step / warmup for step in range(total + 1)])


@pytest.mark.parametrize("how", [{"temperature": 1e-300}, {"temperature": 1e-40}, {"top_p": 1e-300}, {"top_p": 1e-9}])
def test_choose_with_tiny_temperature_or_top_p_takes_the_likeliest(how):
    logits = torch.randn(7, 1000, generator=torch.Generator().manual_seed(0)) * 50
    tokens = sample_token(logits, Sampling(**how), torch.linspace(0, 0.999, 7))
    assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_can_stand_over_a_picture(name, tmp_path, recwarn):
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "curves.png"
    metrics.write_text(json.dumps({"event": "train", "step": 1, "loss": 1.0, "student_loss": 2.0}) + "\n")
    draw_curves(metrics, picture, f"promptkd: {name} $")
    assert picture.read_bytes().startswith(b"\x89PNG")
    keys = ("ex_acc_err", "ex_acc_err_low", "ex_acc_err_high", "mean_R", "mean_eps")
    draw({key: [1.0, 2.0] for key in keys}, tmp_path / "bias.png", f"{name} on $")
    assert not [each for each in recwarn if issubclass(each.category, UserWarning)]  # Matplotlib's


@pytest.mark.parametrize("name", ["$x$_^\\ 100 %s é 名前", "$\\frac", "_" + "n" * 180])
def test_run_evaluation_and_report_with_unusual_folder_names(name, tmp_path, capsys, monkeypatch):
    from promptkd.cli import report

    root = tmp_path / name
    shutil.copytree(GOLDEN / "models/gpt2_student", root / "student")
    run = tiny_argv("sft", root / "run", "--model-path", str(root / "student"), "--batch-size", "2")
    trainer = train_here([*run, "--max-length", "98", "--total-iters", "1", "--dev-num", "1"])
    trainer.checkpoints.unlock()
    (root / "one").mkdir()
    (root / "one/valid.jsonl").write_text(VALID.read_text().splitlines()[0] + "\n")  # a set of one row
    scored = ["--model-path", str(root / "run/last"), "--data-dir", str(root), "--data-names", "one"]
    sizes = ["--max-length", "98", "--max-prompt-length", "96"]
    for script, argv in (
        (evaluate, [*scored, *sizes, "--save", str(root / "run/eval")]),
        (report, [str(root / "run"), "--save", str(root / "report"), "--samples", "3"]),
    ):
        monkeypatch.setattr(sys, "argv", ["script", *argv])
        script.main()
    assert (root / "report/report.html").stat().st_size and "nan" not in (root / "run/eval/results.md").read_text()


@pytest.mark.parametrize(("total", "left"), [(2**63 - 1, "left"), (101, "50:00:00 left"), (2, "00:30:00 left")])
def test_progress_tells_the_time_that_is_left_of_a_run_of_any_length(total, left, monkeypatch, capsys):
    progress = Progress("sft", total, show=True)
    monkeypatch.setattr("time.monotonic", lambda: progress.began + 1800)
    progress.update(values={"loss": 1.0})
    assert left in capsys.readouterr().err


def test_process_data_runs_without_what_only_linux_has(tmp_path, monkeypatch, capsys):
    for name in ("sched_getaffinity", "sched_setaffinity", "posix_fadvise", "posix_fallocate", "copy_file_range"):
        monkeypatch.delattr(os, name, raising=False)
    spec = importlib.util.spec_from_file_location("process_data_elsewhere", ROOT / "promptkd/cli/data.py")
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, tool)
    spec.loader.exec_module(tool)
    argv = ["--raw", GOLDEN / "data/raw.jsonl", "--tokenizer", GOLDEN / "models/gpt2_student", "--dev-num", "12"]
    argv += ["--save", tmp_path / "out", "--workers", "1", "--max-prompt-length", "96"]
    monkeypatch.setattr(sys, "argv", ["process_data.py", "instructions", *map(str, argv)])
    tool.main()
    assert (tmp_path / "out/train_0.bin").is_file() and usable_cores() == os.cpu_count()
    assert tool.Common.__dataclass_fields__["workers"].default == os.cpu_count()


def test_worker_processes_can_be_spawned(monkeypatch):
    """As on macOS, where a fork is not safe."""
    from promptkd.data.workers import ordered_map
    from promptkd.utils.machine import start_method

    monkeypatch.setattr(sys, "platform", "darwin")
    assert start_method() == "spawn"
    assert list(ordered_map(len, [["a"], ["b", "c"]], workers=2)) == [1, 2]


def test_commit_of_without_git_is_none(monkeypatch):
    from promptkd.training.run_folder import commit_of

    monkeypatch.setenv("PATH", "")
    assert commit_of(Path(ROOT)) is None
