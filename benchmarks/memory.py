"""Whether memory grows in a long run: resident memory of a run of tiny models, every so many optimizer steps.

PYTHONPATH=tests python benchmarks/memory.py --method promptkd --steps 600

Trains in this process, with evaluations and checkpoints, and prints a table: step, resident memory now, peak so
far, files open. The caches of libraries fill in the first steps; exit status 1 when the last third of the run added
more than --allowed-mb.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from helpers.runs import student_with_dropout, tiny_argv

from promptkd.config.parser import parse
from promptkd.config.values import at_least, option
from promptkd.errors import exit_with


@dataclass
class MemorySettings:
    method: str = option("promptkd", "method to run")
    steps: int = option(600, "optimizer steps of the run")
    every: int = option(50, "steps between two lines of the table")
    allowed_mb: float = option(4.0, "megabytes that the last third of the run may add")

    def __post_init__(self) -> None:
        at_least(1, every=self.every)
        at_least(4 * self.every, steps=self.steps)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def measure(how: MemorySettings, folder: Path) -> dict[int, float]:
    """Resident megabytes by step; prints a line for each."""
    from promptkd.cli.train import read_settings
    from promptkd.distributed.device import peak_memory_gb
    from promptkd.training.setup import build_trainer

    student = student_with_dropout(folder / "student")
    often = ["--eval-interval", str(how.every), "--checkpoint-every", str(how.every), "--dev-num", "3"]
    argv = ["--model-path", str(student), "--batch-size", "2", "--total-iters", str(how.steps), *often]
    trainer = build_trainer(read_settings(tiny_argv(how.method, folder / "run", *argv)))
    found, checkpoint = {}, trainer.maybe_checkpoint

    def watched(step: int) -> None:
        checkpoint(step)
        if step % how.every == 0:
            found[step] = resident_mb()
            peak = peak_memory_gb(trainer.ranks.device) * 1e3
            print(f"{step:6d}  {found[step]:8.1f} MB  peak {peak:8.1f} MB  {open_files()} files", flush=True)

    trainer.maybe_checkpoint = watched
    trainer.fit()
    return found


def main() -> None:
    how = parse({"memory": MemorySettings}, sys.argv[1:], prog="memory.py").memory
    with tempfile.TemporaryDirectory() as where:
        found = measure(how, Path(where))
    start = min(step for step in found if step >= how.steps * 2 / 3)
    added = found[max(found)] - found[start]
    print(f"steps {start} to {max(found)} added {added:.1f} MB")
    sys.exit(0 if added <= how.allowed_mb else 1)


if __name__ == "__main__":
    exit_with(main)
