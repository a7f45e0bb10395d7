"""What a run leaves to read: metrics.jsonl, a progress bar or plain lines, curves.png."""

from __future__ import annotations

import json
import os
import re
import resource
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from promptkd.errors import RunError, UserError
from promptkd.utils.jsonl import numbered_lines

LARGEST = 1 << 53  # of a whole number in a row: up to there a float holds it
RESUME = "make room and start it again with --resume"


class MetricsFile:
    """One JSON object a line, each written whole and flushed."""

    def __init__(self, path: Path, write: bool) -> None:
        self.path = path
        self.file = path.open("ab", buffering=0) if write else None

    def row(self, event: str, step: int, **values: Any) -> None:
        """Append a row. Raises RunError when it cannot be kept: the disk is full, the folder gone."""
        if self.file is None:
            return
        line = f"{json.dumps({'event': event, 'step': step, **values})}\n".encode()
        try:
            while line:
                line = line[self.file.write(line) :]
        except OSError as error:
            raise RunError(f"{self.path} cannot be written ({error.strerror}): {RESUME}") from None
        self._check_place()

    def synced_size(self) -> int:
        """Bytes so far, all of them on disk. Raises RunError as `row` does."""
        if self.file is None:
            return 0
        self._check_place()
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise RunError(f"{self.path} cannot be written ({error.strerror}): {RESUME}") from None
        return os.fstat(self.file.fileno()).st_size

    def _check_place(self) -> None:
        if os.fstat(self.file.fileno()).st_nlink == 0:
            raise RunError(f"{self.path} has been removed during the run: start it anew")


def read_metrics(path: Path, size: int | None = None) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, or of its first `size` bytes.

    A last line that a kill cut short is left out; any other broken line is a UserError that names it.
    """
    rows, place = [], 0
    for number, line in numbered_lines(path):
        if not line.endswith(b"\n") or (size is not None and place >= size):
            break
        rows.append(_metrics_row(line, f"{path}, line {number}"))
        place += len(line)
    if size is not None and place != size:
        raise UserError(f"{path} is not what it was at the checkpoint: --overwrite starts anew")
    return rows


def _metrics_row(line: bytes, where: str) -> dict[str, Any]:
    """One row: "event" and "step", the others numbers, texts or lists. Norms may be infinite."""
    try:
        row = json.loads(line)
        huge = [key for key, value in row.items() if isinstance(value, int) and abs(value) > LARGEST]
        if isinstance(row["event"], str) and isinstance(row["step"], int) and not huge:
            return row
        reason = f"{huge[0]} is beyond what it counts" if huge else '"event" is a text and "step" a whole number'
    except (ValueError, RecursionError):
        reason = "no readable JSON"
    except (AttributeError, KeyError, TypeError):
        reason = 'it needs an object with "event" and "step"'
    raise UserError(f"{where}: {reason}: not a line of train.py's; restore the file or train anew")


class StepTimes:
    """Seconds of the steps since the last row, or since a resumed run began: what is done in one of several steps, such
    as a collection of rollouts, counts in whichever row it falls."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def add(self, seconds: dict[str, float]) -> None:
        self.steps.append(seconds)

    def means(self) -> dict[str, float]:
        """Mean of each phase over the steps since the last call."""
        taken, self.steps = self.steps, []
        names = dict.fromkeys(name for step in taken for name in step)
        return {name: fmean(step.get(name, 0.0) for step in taken) for name in names}


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far, 1e9 bytes: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")  # on Linux ru_maxrss begins with what the process had that started this one
    if status.exists() and (peak := re.search(r"VmHWM:\s+(\d+) kB", status.read_text("utf-8", "replace"))):
        return int(peak[1]) * 1024 / 1e9
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9


def logged_memory_gb(device: torch.device) -> float:
    """`peak_memory_gb` for a row of the metrics. A CPU process' is told to the nearest half gigabyte: how much of it
    is resident is not repeatable, and the rows of a resumed run should be those of an undisturbed one."""
    peak = peak_memory_gb(device)
    return peak if device.type == "cuda" else round(2 * peak) / 2
