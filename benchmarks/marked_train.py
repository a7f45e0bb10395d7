"""train.py that tells from outside what it is doing: for benchmarks/kill.py, which aims its kills by it.

Each rank writes the name of the part it is in to its place in <save>.parts, a file that survives the kill; at a
run's end the first rank writes each part's median seconds to <save>.seconds.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from promptkd.checkpointing.manager import Checkpoints
from promptkd.cli import train
from promptkd.training import setup as build
from promptkd.training import trainer
from promptkd.utils import profiling
from promptkd.utils.files import write_json

WIDTH = 64  # bytes of a rank's place
# What of the profiler's marks counts as a part here; the other marks are inside or around these.
PROFILED = {"phase: rollout": "rollout", "part: backward": "backward", "part: optimizer": "optimizer"}
ELSEWHERE = "between the parts"


class Marks:
    """The parts that this rank is in, the innermost last."""

    def __init__(self, path: Path, rank: int) -> None:
        with open(path, "r+b") as file:
            self.place = mmap.mmap(file.fileno(), 0)
        self.start, self.inside = WIDTH * rank, [ELSEWHERE]
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._tell()

    def _tell(self) -> None:
        self.place[self.start : self.start + WIDTH] = self.inside[-1].encode().ljust(WIDTH)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.inside.append(name)
        self._tell()
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name].append(time.perf_counter() - began)
            self.inside.pop()
            self._tell()

    def around(self, owner, function: str, name: str) -> None:
        """Count all of a function as a part."""
        inner = getattr(owner, function)

        @functools.wraps(inner)
        def marked(*arguments, **named):
            with self.part(name):
                return inner(*arguments, **named)

        setattr(owner, function, marked)


def read_marks(path: Path) -> list[str]:
    """Each rank's part."""
    content = path.read_bytes()
    return [content[at : at + WIDTH].strip(b" \0").decode() for at in range(0, len(content), WIDTH)]


def main() -> None:
    save = sys.argv[sys.argv.index("--save") + 1]
    rank = int(os.environ["RANK"])
    marks = Marks(Path(f"{save}.parts"), rank)
    record = profiling.record_function

    def marked_record(name: str):
        return marks.part(PROFILED[name]) if name in PROFILED else record(name)

    profiling.record_function = marked_record
    marks.around(trainer.Trainer, "evaluate", "evaluation")
    marks.around(trainer, "save_model", "saving a model")
    marks.around(Checkpoints, "write", "saving a checkpoint")
    marks.around(Checkpoints, "load", "reading a checkpoint")
    marks.around(build, "begin_files", "cutting the metrics")
    train.main()
    if rank == 0:
        medians = {name: statistics.median(seconds) for name, seconds in marks.seconds.items()}
        write_json(Path(f"{save}.seconds"), medians)
