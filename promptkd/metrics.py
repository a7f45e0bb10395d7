"""What a run leaves to read: metrics.jsonl, a progress bar or plain lines, curves.png."""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from promptkd.data.jsonl import numbered_lines
from promptkd.errors import RunError, UserError

LARGEST = 1 << 53  # of a whole number in a row: up to there a float holds it
RESUME = "make room and start it again with --resume"

CURVES = {  # panel title -> keys drawn in it, in order
    "loss per response token": ["student_loss", "loss", "pt_loss", "prompt_kd_loss", "prompt_base_loss"],
    "policy": ["pg_loss", "reg_loss", "rev_kl"],
    "reward": ["reward"],
    "dev loss": ["dev_loss"],
    "dev ROUGE-L": ["rougeL"],
    "excess accumulated error (%)": ["ex_acc_err"],
    "distance of the prompt from its start": ["prompt_drift"],
}
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]  # told apart by colour-blind readers too


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


class Progress:
    """A bar with rate, remaining time and the last losses; plain lines, at most one in ten seconds, in a log."""

    def __init__(self, name: str, total: int, show: bool, done: int = 0) -> None:
        self.name, self.total, self.show = name, total, show
        self.bar = tqdm(desc=name, total=total, initial=done, unit="step", disable=not (show and sys.stderr.isatty()))
        self.began, self.first, self.spoke = time.monotonic(), done, 0.0

    def step(self, step: int, shown: dict[str, float]) -> None:
        losses = "  ".join(f"{key} {value:.4g}" for key, value in shown.items())
        self.bar.set_postfix_str(losses, refresh=False)
        self.bar.update(1)
        now = time.monotonic()
        if self.bar.disable and self.show and (now - self.spoke >= 10 or step == self.total):
            self.spoke = now
            rate = (now - self.began) / (step - self.first)
            left = time.strftime("%H:%M:%S", time.gmtime(rate * (self.total - step)))
            self.line(f"{self.name}  step {step}/{self.total}  {losses}  {rate:.3g} s/step  {left} left")

    def line(self, text: str) -> None:
        if self.show:
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        self.bar.close()


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


def draw_curves(metrics: Path, picture: Path, title: str) -> None:
    """Draw what metrics.jsonl holds: a panel for each kind of curve that has points."""
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in read_metrics(metrics):
        for key, value in row.items():
            if isinstance(value, (int, float)) and key != "step":
                series[key].append((row["step"], value))
    panels = {name: [key for key in keys if series[key]] for name, keys in CURVES.items()}
    panels = {name: keys for name, keys in panels.items() if keys}
    figure = _figure()
    figure.clear()
    figure.set_size_inches(4.2 * max(len(panels), 1), 3.4)
    axes = figure.subplots(1, max(len(panels), 1), squeeze=False)
    for axis, (name, keys) in zip(axes[0], panels.items()):
        for key, colour in zip(keys, COLOURS):
            steps, values = zip(*series[key])
            axis.plot(steps, values, color=colour, label=key, marker="o" if len(steps) < 30 else None, ms=3, lw=1.4)
        axis.set(title=name, xlabel="optimizer step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if len(keys) > 1:
            axis.legend(frameon=False)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(picture)


@functools.cache
def _figure():
    """The process' one figure, drawn on again and again.

    A figure is full of cycles: each new one would keep its picture's megabytes until Python looks for cycles among the
    old objects, which it does seldom where there are as many as here.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(dpi=130)  # of layout and picture alike, or each drawing would need two canvases
    FigureCanvasAgg(figure)
    return figure
