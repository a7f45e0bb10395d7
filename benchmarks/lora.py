"""Measure memory and time of LoRA and QLoRA against training all weights, in PromptKD or SFT steps on a CPU.

    python benchmarks/lora.py --student S [--teacher T] --data D [--steps 3] [options of train.py]

Without a teacher, the steps are of SFT. D has train.jsonl. Each side runs in a process of its own with one thread, one
after another. The first step is left out. The processor's time is measured, not the clock's, so that other work on the
machine matters less. The table also has the sizes of the student in a checkpoint and of the saved model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LORA = ["--lora-r", "16"]
SIDES = {
    "all weights": [],
    "LoRA": LORA,
    "LoRA, gradient checkpointing": [*LORA, "--gradient-checkpointing"],
    "QLoRA, 8 bits": [*LORA, "--student-quantization", "8bit"],
    "QLoRA, 4 bits": [*LORA, "--student-quantization", "4bit"],
}


def options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True)
    parser.add_argument("--teacher")
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser.parse_known_args()


def measure(o: argparse.Namespace, further: list[str]) -> dict[str, float]:
    """Train one side in this process."""
    from promptkd.cli.train import resolve
    from promptkd.distributed.device import peak_memory_gb
    from promptkd.training.setup import build_trainer

    with tempfile.TemporaryDirectory() as folder:
        kind = ["--method", "promptkd", "--teacher-model-path", o.teacher] if o.teacher else ["--method", "sft"]
        argv = [*kind, "--model-path", o.student]
        argv += ["--data-dir", o.data, "--save", folder, "--dev-num", "0", "--total-iters", str(o.steps)]
        trainer = build_trainer(resolve([*argv, *SIDES[o.side], *further]))
        step, seconds = trainer.method.step, []

        def timed(batch):
            began = time.process_time()
            row = step(batch)
            seconds.append(time.process_time() - began)
            return row

        trainer.method.step = timed
        trainer.fit()
        model = trainer.method.student.module.model
        [checkpoint] = Path(folder, "checkpoints").iterdir()
        saved = sum(file.stat().st_size for file in Path(folder, "last").glob("*.safetensors"))
        return {
            "seconds": statistics.mean(seconds[1:]),
            "peak_gb": peak_memory_gb(trainer.ranks.device),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "checkpoint_mb": (checkpoint / "student-rank0.safetensors").stat().st_size / 1e6,
            "saved_mb": saved / 1e6,
        }


def main() -> None:
    o, further = options()
    if o.side:
        print(json.dumps(measure(o, further)))
        return
    print("| student | trained parameters | CPU seconds per step | peak GB | checkpoint MB | saved MB |")
    print("|---|--:|--:|--:|--:|--:|", flush=True)
    for side in SIDES:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        cells = f"{row['trained'] / 1e6:.2f}M | {row['seconds']:.1f} | {row['peak_gb']:.2f}"
        print(f"| {side} | {cells} | {row['checkpoint_mb']:.1f} | {row['saved_mb']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
