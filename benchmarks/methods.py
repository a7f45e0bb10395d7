"""Measure the seconds and the peak memory of a step of each method, as ratios to PromptKD in the same run.

    python benchmarks/methods.py --student S --teacher T --data PROCESSED [--rounds 2] [--steps 3]

Each method runs in a process of its own, one after another, round by round. The first step of a process is left out.
DistiLLM samples all of its responses (`--init-threshold 1`), which is its most expensive step. DistiLLM-2 gets the
data's responses twice. MiniLLM collects as many rollouts as a step uses, in one pass. Nothing else may run.
Writes methods.json and methods.md to --save.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from promptkd.utils.tables import Table

ROOT = Path(__file__).parents[1]
BATCH = 32
BASE = "promptkd"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--save", type=Path, default=ROOT / "results/benchmarks")
    return parser.parse_args()


def sides(data: Path) -> dict[str, list[str]]:
    """Return the options of each method beside the common ones."""
    given = ["--data-dir", str(data)]
    rollouts = ["--num-rollouts", str(BATCH), "--chunk-size", str(BATCH), "--ppo-epochs", "1"]
    return {
        BASE: given,
        "sft": given,
        "kd": given,
        "gkd": given,
        "on-policy": ["--method", "gkd", "--student-data-fraction", "1", "--divergence", "reverse_kl", *given],
        "distillm": ["--init-threshold", "1", *given],
        "distillm2": ["--student-data-dir", str(data), *given],
        "minillm": ["--prompt-data-dir", str(data), *rollouts],
    }


def measure(o: argparse.Namespace, name: str, extra: list[str], seed: int) -> tuple[float, float]:
    """Return the mean seconds of the steps after the first, and the peak memory in GB."""
    method = [] if "--method" in extra else ["--method", name]
    teacher = [] if name == "sft" else ["--teacher-model-path", str(o.teacher)]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [
            sys.executable, ROOT / "train.py", *method, "--model-path", o.student, *teacher, *extra, "--save", run,
            "--batch-size", BATCH, "--total-iters", o.steps, "--dev-num", 0, "--seed", seed, "--seed-order", seed,
            "--keep-checkpoints", 0, "--deepspeed_config", ROOT / "configs/deepspeed/ds_config_fp32.json",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
        subprocess.run([*map(str, command)], check=True, env=environment, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        seconds = [row["step_seconds"] for row in rows if row["event"] == "train"][1:]
        peak = json.loads((run / "memory.json").read_text(encoding="utf-8"))["peak_memory_gb"][0]
    return statistics.mean(seconds), peak


def main() -> None:
    o = options()
    rounds: list[dict[str, tuple[float, float]]] = []
    for number in range(o.rounds):
        rounds.append({name: measure(o, name, extra, number) for name, extra in sides(o.data).items()})
    table = Table(["method", "seconds per step", f"ratio to {BASE}", "peak GB"])
    for name in rounds[0]:
        seconds = [each[name][0] for each in rounds]
        ratios = [each[name][0] / each[BASE][0] for each in rounds]
        peak = max(each[name][1] for each in rounds)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
        table.add(name, f"{statistics.median(seconds):.2f}", spread, f"{peak:.2f}")
    o.save.mkdir(parents=True, exist_ok=True)
    (o.save / "methods.json").write_text(json.dumps(rounds, indent=1), encoding="utf-8")
    (o.save / "methods.md").write_text(table.markdown() + "\n", encoding="utf-8")
    print(table.markdown())


if __name__ == "__main__":
    main()
