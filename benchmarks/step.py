"""Seconds and memory of a PromptKD step: this project, the published flow (emulated), TRL, a sketch; interleaved.

    python benchmarks/step.py --models MODELS --data PROCESSED \\
        --raw RAW --bench BENCH [--trl-python ENV/bin/python] [--rounds 4]
    python benchmarks/step.py --models MODELS --data PROCESSED --sides ours --against REVISION

Every side runs in a process of its own, one after another, round by round, with two threads, 32 prompts a step and
up to 256 new tokens. `--malloc keep` gives all sides glibc's setting that keeps freed memory; `system` leaves the
allocator as it comes. `--against` adds this project at an earlier commit (side "before"). The first step of each
process carries its warm-up on all sides. Nothing else may run.
Writes <method>_step.json, .md and .png to --save.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bars import draw_bars

from promptkd.utils.memory import KEEP
from promptkd.utils.tables import Table

ROOT = Path(__file__).parents[1]

TEACHER, STUDENT = "gpt2-dolly-teacher", "gpt2-dolly-student"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--raw", type=Path)
    parser.add_argument("--against", metavar="REVISION", help="commit of this repository that is measured, too")
    parser.add_argument("--bench", type=Path, help="folder with trl_step.py and whole_window_step.py")
    parser.add_argument("--trl-python")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="steps of each process; the published flow takes one")
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    parser.add_argument("--malloc", nargs="+", default=["keep"], choices=["keep", "system"])
    parser.add_argument("--sides", nargs="+", default=["ours", "sketch", "trl", "published"])
    parser.add_argument(
        "--method", choices=["promptkd", "kd"], default="promptkd", help="with kd, only ours and published"
    )
    parser.add_argument("--save", type=Path, default=ROOT / "results/benchmarks")
    return parser.parse_args()


def ours(o: argparse.Namespace, precision: str, malloc: str, seed: int, root: Path = ROOT) -> dict:
    with tempfile.TemporaryDirectory() as save:
        run(
            [sys.executable, root / "train.py", "--method", o.method, "--model-path", o.models / STUDENT,
             "--teacher-model-path", o.models / TEACHER, "--data-dir", o.data, "--save", Path(save) / "run",
             "--batch-size", 2, "--gradient-accumulation-steps", 16, "--total-iters", o.steps, "--dev-num", 0,
             "--seed", seed, "--seed-order", seed, "--overwrite",
             "--deepspeed_config", root / f"configs/deepspeed/ds_config_{precision}.json"],
            malloc,
        )  # fmt: skip
        peaks = json.loads((Path(save) / "run/memory.json").read_text(encoding="utf-8"))["peak_memory_gb"]
        rows = [
            json.loads(line) for line in (Path(save) / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
    return {
        "seconds_per_step": [row["step_seconds"] for row in rows],
        "response_tokens_per_step": [row["response_tokens"] for row in rows],
        "peak_rss_gb": max(peaks),
        "phases": [{key: value for key, value in row.items() if key.endswith("_seconds")} for row in rows],
    }


def other(o: argparse.Namespace, side: str, precision: str, malloc: str, seed: int) -> dict:
    pair = [o.models / STUDENT, o.models / TEACHER]
    if side == "published":
        command = [sys.executable, ROOT / "benchmarks/published_flow.py", *pair, o.data, "--seed", seed]
        command += ["--method", o.method]
    elif side == "sketch":
        command = [sys.executable, o.bench / "whole_window_step.py", *pair, o.data, "--seed", seed]
        command += ["--steps", o.steps, "--precision", precision]
    else:
        command = [o.trl_python, o.bench / "trl_step.py", *pair, o.raw, "--seed", seed, "--steps", o.steps]
        command += ["--precision", precision, "--malloc", malloc]
    return json.loads(run(command, malloc).strip().splitlines()[-1])


def run(command: list, malloc: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in KEEP}
    environment.update(
        OMP_NUM_THREADS="2", PROMPTKD_MALLOC=malloc, HF_HUB_OFFLINE="1", **(KEEP if malloc == "keep" else {})
    )
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{command[1]} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


@contextlib.contextmanager
def checkout(revision: str | None) -> Iterator[Path | None]:
    """Provide a temporary folder with an earlier commit of this repository, or None without a revision."""
    if revision is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "before"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", "-q", tree, revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)


def middle(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def make_table(results: dict[str, list[dict]]) -> Table:
    """Build the table of all sides."""
    table = Table(["side", "seconds per step", "ms per response token", "peak GB", "seconds: side / ours"])
    for name, rounds in results.items():
        seconds = [statistics.mean(r["seconds_per_step"]) for r in rounds]
        tokens = [1000 * sum(r["seconds_per_step"]) / sum(r["response_tokens_per_step"]) for r in rounds]
        ours_rounds = results.get("ours " + name.split(" ", 1)[1], rounds)
        ratios = [a / statistics.mean(b["seconds_per_step"]) for a, b in zip(seconds, ours_rounds)]
        peak = max(r["peak_rss_gb"] for r in rounds)
        table.add(name, middle(seconds), middle(tokens), f"{peak:.2f}", middle(ratios))
    return table


def measure_rounds(o: argparse.Namespace, sides: list[str], before: Path | None) -> dict[str, list[dict]]:
    """Measure all sides one after another, round by round."""
    results: dict[str, list[dict]] = {}
    for round_, malloc, precision, side in itertools.product(range(o.rounds), o.malloc, o.precision, sides):
        if side == "published" and precision != "fp32":
            continue  # it computes in float32 on a CPU
        if side in ("ours", "before"):
            assert before is not None or side == "ours"
            measured = ours(o, precision, malloc, round_, before if side == "before" else ROOT)
        else:
            measured = other(o, side, precision, malloc, round_)
        results.setdefault(f"{side} {precision} {malloc}", []).append(measured)
        seconds = [round(each, 2) for each in measured["seconds_per_step"]]
        print(round_ + 1, side, precision, malloc, seconds, flush=True)
    return results


def main() -> None:
    o = options()
    possible = {"ours", "published"} if o.method == "kd" else {"ours", "published", "sketch", "trl"}
    sides = [side for side in o.sides if side in possible and (side != "trl" or o.trl_python)]
    with checkout(o.against) as before:
        results = measure_rounds(o, sides + ["before"] * (before is not None), before)
    o.save.mkdir(parents=True, exist_ok=True)
    (o.save / f"{o.method}_step.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    (o.save / f"{o.method}_step.md").write_text(make_table(results).markdown() + "\n", encoding="utf-8")
    seconds = {name: [statistics.mean(r["seconds_per_step"]) for r in rounds] for name, rounds in results.items()}
    draw_bars(seconds, f"seconds of a {o.method} step", o.save / f"{o.method}_step.png")
    print(make_table(results).markdown())


if __name__ == "__main__":
    main()
