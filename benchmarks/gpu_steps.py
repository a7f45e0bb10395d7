"""Seconds of a PromptKD step on a GPU by phase, and peak memory against the plan, on random GPT-2 models.

    python benchmarks/gpu_steps.py --rows FILE --work DIR [--pairs gpt2-base:gpt2-xlarge:bf16] [--trl]

A step takes 32 prompts of 41 - 161 tokens and generates 256 new tokens for each, through train.py in a process of its
own. The first step carries the warm-up; the medians are of the others. With --trl, TRL's DistillationTrainer takes
steps on the same prompts instead. It tunes no prompt, so it runs the teacher once and not three times.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from gpu_common import DEVICE, ROOT, Rows, prompt_texts, write_model

from promptkd.cli.plan import make
from promptkd.planning.held import GPU_FRAMEWORK
from promptkd.planning.memory import memory_of

PHASES = ("rollout", "prompt", "student")
FILES = {"bf16": "ds_config_bf16", "fp16": "ds_config", "fp32": "ds_config_fp32"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="file that the table's rows are appended to")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and runs, 5 GB")
    base, large = "gpt2-base:gpt2-xlarge", "gpt2-large:gpt2-xlarge"
    default = [f"{base}:bf16", f"{base}:bf16:16384", f"{base}:fp16", f"{large}:bf16"]
    parser.add_argument("--pairs", nargs="+", default=default, help="student:teacher:precision[:token budget]")
    parser.add_argument("--trl", action="store_true")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--new", type=int, default=256, help="new tokens")
    parser.add_argument("--layers", type=int, help="fewer layers, to try this script")
    parser.add_argument("--limit", type=float, default=80, help="seconds of one run")
    return parser.parse_args()


def run(command: list, limit: float) -> str:
    """Run a command within a time limit and return what it printed. After a failure, print its end."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    began = time.perf_counter()
    try:
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env=environment, timeout=limit, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        print(f"{command[1]}: not finished after {limit:.0f} s", flush=True)
        return ""
    print(f"{command[1]}: status {done.returncode}, {time.perf_counter() - began:.0f} s", flush=True)
    if done.returncode:
        print(done.stderr[-3000:], flush=True)
    return done.stdout


def measure_pair(args: argparse.Namespace, rows: Rows, pair: str) -> None:
    """Run train.py on a pair of models and add its rows."""
    student, teacher, precision, *budget = pair.split(":")
    save = args.work / pair.replace(":", "_")
    options = [
        "--method", "promptkd", "--model-path", args.work / student, "--teacher-model-path", args.work / teacher,
        "--data-dir", args.work, "--dev-num", "0", "--batch-size", args.batch, "--total-iters", args.steps,
        "--max-prompt-length", 256, "--max-length", 256 + args.new, "--keep-checkpoints", "0",
        "--deepspeed_config", ROOT / f"configs/deepspeed/{FILES[precision]}.json",
    ]  # fmt: skip
    options = [*map(str, options), *(["--token-budget", *budget] if budget else [])]
    run([sys.executable, ROOT / "train.py", *options, "--save", save, "--overwrite"], args.limit)
    metrics = save / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    steps = [json.loads(line) for line in lines]
    for step in steps:
        print({key: round(value, 3) for key, value in step.items() if isinstance(value, float)}, flush=True)
    if len(steps) < 2:
        return
    what = f"PromptKD step, {student} <- {teacher}, {precision}" + (f", token budget {budget[0]}" if budget else "")
    median = {key: statistics.median(step[f"{key}_seconds"] for step in steps[1:]) for key in (*PHASES, "step")}
    rows.add(what, median.pop("step"), "s", **median, **{"first step": steps[0]["step_seconds"]})
    peak = steps[-1]["peak_memory_gb"]
    total = torch.cuda.get_device_properties(0).total_memory if DEVICE == "cuda" else 80e9
    setting = make(["--gpus", "1", "--gpu-memory", f"{total / 1e9:.0f}GB", *options])[0]
    plan = memory_of(setting).peak - GPU_FRAMEWORK
    rows.add(f"{what}: peak memory", peak, "GB", plan=plan / 1e9)


def measure_trl(args: argparse.Namespace, rows: Rows, pair: str) -> None:
    """Run TRL's trainer on the same models and prompts."""
    student, teacher, precision = pair.split(":")[:3]
    command = [sys.executable, ROOT / "benchmarks/gpu_trl.py", args.work / student, args.work / teacher]
    command += ["--steps", args.steps, "--batch", args.batch, "--new", args.new, "--precision", precision]
    output = run(command, args.limit).strip().splitlines()
    if output and output[-1].startswith("{"):
        told = json.loads(output[-1])
        print(told, flush=True)
        seconds, generation = (statistics.median(told[key][1:]) for key in ("seconds", "generation_seconds"))
        what = f"TRL DistillationTrainer step, {student} <- {teacher}, {precision}"
        rows.add(what, seconds, "s", rollout=generation, **{"first step": told["seconds"][0]})
        rows.add(f"{what}: peak memory", told["peak_gb"], "GB")


def main() -> None:
    args = arguments()
    rows = Rows(args.rows)
    args.work.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": text, "response": "word"}) for text in prompt_texts(args.batch * args.steps)]
    (args.work / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    if args.trl and not (DEVICE == "cuda" and importlib.util.find_spec("trl")):
        raise SystemExit("TRL needs a GPU and the package trl: leave this part out")
    for pair in args.pairs:
        for name in pair.split(":")[:2]:
            write_model(name, args.work / name, args.layers)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()  # the runs are to see all memory as free
        (measure_trl if args.trl else measure_pair)(args, rows, pair)


if __name__ == "__main__":
    main()
