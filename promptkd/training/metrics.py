"""The run's log: rows of metrics.jsonl, mean times of steps, and peak memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from promptkd.distributed.device import peak_memory_gb
from promptkd.errors import RunError
from promptkd.training.trackers import Trackers

REMEDY = "make room and start it again with --resume"


class MetricsFile:
    """Append rows to metrics.jsonl: one JSON object a line, each written completely before the next.

    Args:
        path: The file.
        write: Whether this rank writes. The others do nothing.
        trackers: What gets the numbers of each row after it is written.
    """

    def __init__(self, path: Path, write: bool, trackers: Trackers | None = None) -> None:
        self.path, self.trackers = path, trackers or Trackers()
        self.file = path.open("ab", buffering=0) if write else None

    def row(self, event: str, step: int, **values: Any) -> None:
        """Append a row.

        Raises:
            RunError: The row cannot be kept: the disk is full, or the folder is gone.
        """
        if self.file is None:
            return
        line = f"{json.dumps({'event': event, 'step': step, **values})}\n".encode()
        try:
            while line:
                line = line[self.file.write(line) :]
        except OSError as error:
            raise RunError(f"{self.path} cannot be written ({error.strerror}): {REMEDY}") from None
        self._check_place(self.file.fileno())
        self.trackers.log(event, step, values)

    def synced_size(self) -> int:
        """Flush the file to disk and return its size in bytes. Raises RunError as `row` does."""
        if self.file is None:
            return 0
        handle = self.file.fileno()
        self._check_place(handle)
        try:
            os.fsync(handle)
        except OSError as error:
            raise RunError(f"{self.path} cannot be written ({error.strerror}): {REMEDY}") from None
        return os.fstat(handle).st_size

    def close(self) -> None:
        """Close the file. Trackers have their own end."""
        if self.file is not None:
            self.file.close()

    def _check_place(self, handle: int) -> None:
        if os.fstat(handle).st_nlink == 0:
            raise RunError(f"{self.path} has been removed during the run: start a new one")


class StepTimes:
    """Collect the seconds of steps between two rows of the log.

    Work that is done in one of several steps, such as a collection of rollouts, counts in the row that it falls into.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def add(self, seconds: dict[str, float]) -> None:
        """Add a step's seconds by phase."""
        self.steps.append(seconds)

    def means(self) -> dict[str, float]:
        """Return each phase's mean over the steps since the last call."""
        steps, self.steps = self.steps, []
        names = dict.fromkeys(name for step in steps for name in step)
        return {name: fmean(step.get(name, 0.0) for step in steps) for name in names}


def logged_memory_gb(device: torch.device) -> float:
    """Return `peak_memory_gb` for a metrics row, rounded to half a gigabyte on a CPU.

    How much of a CPU process is resident is not repeatable, and a resumed run should log what an undisturbed one logs.
    """
    peak = peak_memory_gb(device)
    return peak if device.type == "cuda" else round(2 * peak) / 2
