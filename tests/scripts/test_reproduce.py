"""scripts/<family>/reproduce.sh: its rows and commands, and a small table from models to report, interrupted once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.forked_python import serve
from helpers.runs import run_script
from helpers.training import GOLDEN, ROOT, metrics_of

from promptkd.errors import UserError
from promptkd.reproduction.rows import FAMILIES, PAPER_METHODS, make_rows
from promptkd.reproduction.stages import Record, Stage, run_stages

GPT2 = "scripts/gpt2/reproduce.sh"


@pytest.fixture
def base(tmp_path):
    """A base path with the golden models and data in the places of the downloads."""
    models, data = tmp_path / "checkpoints/gpt2", tmp_path / "data"
    links = {
        models / "train/sft/gpt2-xlarge": "gpt2_teacher",
        models / "train/minillm_init/gpt2-base": "gpt2_student",
    }
    for folder, name in links.items():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(GOLDEN / "models" / name)
    (tmp_path / "processed_data/dolly/full").mkdir(parents=True)
    (tmp_path / "processed_data/dolly/full/gpt2").symlink_to(GOLDEN / "processed/dolly/full/gpt2")
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"word {i}"} for i in range(2)]
    for name in ("dolly", "self-inst", "vicuna", "sinst/11_", "uinst/11_"):
        (data / name).mkdir(parents=True)
        (data / name / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "dolly/raw.jsonl").symlink_to(GOLDEN / "data/raw.jsonl")
    return tmp_path


def reproduce(base: Path, python: str, *options: str) -> subprocess.Popen:
    sizes = "--max-length 104 --max-prompt-length 96"
    train = f"{sizes} --total-iters 12 --batch-size 2 --gradient-accumulation-steps 1 --dev-num 2 --checkpoint-every 1"
    fp32 = "--deepspeed_config configs/deepspeed/ds_config_fp32.json"
    command = [sys.executable, "tools/reproduce.py", "gpt2", str(base), "--gpus", "1", "--sizes", "base"]
    command += [
        "--methods",
        "gkd",
        f"--train-options={train} {fp32}",
        f"--eval-options={sizes} --seeds 10 --data-names dolly vicuna",
    ]
    environment = {**os.environ, "PROMPTKD_PYTHON": python, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *options], cwd=ROOT, env=environment, **streams)


def test_reproduce_makes_a_table_and_resumes_after_an_interruption(base):
    run = base / "results/gpt2/train/gkd/gpt2-base-xlarge"
    first, began = reproduce(base, sys.executable), time.monotonic()
    while first.poll() is None and not (run.is_dir() and any(run.glob("metrics.jsonl")) and metrics_of(run)):
        assert time.monotonic() - began < 120
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    output = first.communicate(timeout=60)[0]
    assert first.returncode == 143, output
    assert not (run / "last").exists() and not (base / "results/gpt2/reproduce/stages.json").exists()
    taken = len(metrics_of(run))
    assert 0 < taken < 12

    with serve(base) as python:
        again = reproduce(base, str(python))
        output = again.communicate(timeout=300)[0]
    assert again.returncode == 0, output
    assert f"resumes after step {taken}/12" in output and output.count("done before") == 8
    assert [row["step"] for row in metrics_of(run)] == list(range(1, 13))
    report = base / "results/gpt2/reproduce/base/report.md"
    text = report.read_text()
    assert str(report) in output and all(label in text for label in ("GKD", "teacher", "vicuna"))


def test_reproduce_dry_run_prints_each_command_and_writes_nothing(tmp_path):
    done = run_script(GPT2, str(tmp_path), "--dry-run", "--sizes", "base", "--train-seeds", "1", "2")
    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (0, "", [])
    commands = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    for method in PAPER_METHODS:
        trained = [line for line in commands if f"scripts/gpt2/{method}/{method}_base.sh" in line]
        assert [f"--seed {seed} --seed-order {seed}" in line for seed, line in zip((1, 2), trained)] == [True, True]
    for part in ("--only data/dolly", "--only processed/openwebtext", "generate_data_seqkd.sh", "tools/report.py"):
        assert sum(part in line for line in commands) == 1
    assert sum("run_eval.sh" in line for line in commands) == 13  # 6 methods, 2 seeds each, and the teacher


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name == "gpt2" else pytest.mark.slow) for name in FAMILIES]
)
def test_reproduce_plan_shows_memory_and_steps(family, tmp_path):
    size = FAMILIES[family].sizes()[0]
    options = ["--plan", "--methods", "gkd", "minillm", "--sizes", size]
    done = run_script(f"scripts/{family}/reproduce.sh", str(tmp_path), *options)
    assert (done.returncode, done.stderr) == (0, "")
    table = {words[0]: words[1:] for line in done.stdout.splitlines() if (words := line.split())}
    gpus, steps, peak, fits, hours = table[f"gkd-{size}"]
    assert int(gpus) == 4 and int(steps) > 1000 and float(peak) > 5 and fits in ("yes", "no") and hours == "-"
    assert table[f"minillm-{size}"][1:4] == ["-"] * 3
    assert f"minillm-{size}: MiniLLM cannot be planned" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "huge"], "--sizes huge: choose from base, medium, large"),
        (["--methods", "gdk"], "gpt2 has scripts for abkd, distillm, distillm2, gkd"),
        (["--methods", "kd", "kd"], "--methods names kd twice"),
        (["--train-seeds", "-1"], "--train-seeds"),
        (["--gpus", "0"], "--gpus"),
        (["--train-options='"], "--train-options"),
        (["--plann"], "did you mean --plan"),
    ],
)
def test_reproduce_bad_input_is_one_line(options, message, tmp_path):
    done = run_script(GPT2, str(tmp_path), "--dry-run", *options)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and message in done.stderr


def test_make_rows_finds_scripts_of_recipes_in_other_folders():
    (row,) = make_rows(FAMILIES["gpt2"], ["on_policy"], ["medium"], [3])
    assert row.script.parent.name == "gkd" and row.name == "on_policy-medium-seed3"
    assert row.run == "results/gpt2/train/on_policy/gpt2-medium-xlarge-seed3"
    with pytest.raises(UserError, match="--sizes 13B: choose from"):
        make_rows(FAMILIES["opt"], ["sft"], ["13B"], [None])


def test_record_repeats_a_stage_whose_command_or_predecessor_changed(tmp_path):
    def stages(word: str) -> list[Stage]:
        first, second = tmp_path / "first", tmp_path / "second"
        write = f"echo {word} >{first}; echo x >>{tmp_path}/count"
        copy = Stage("second", ("bash", "-c", f"cp {first} {second}; echo y >>{tmp_path}/count"), (second,), ("first",))
        return [Stage("first", ("bash", "-c", write), (first,)), copy]

    for word, runs in (("a", 2), ("a", 2), ("b", 4)):
        listed = stages(word)
        run_stages(listed, Record(tmp_path / "stages.json", listed))
        assert (tmp_path / "second").read_text().strip() == word
        assert len((tmp_path / "count").read_text().split()) == runs
