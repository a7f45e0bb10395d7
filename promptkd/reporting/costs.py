"""What runs took: time, memory, trained parameters; from metrics.jsonl, memory.json and config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from promptkd.errors import UserError
from promptkd.reporting.results import Result
from promptkd.reporting.table import label
from promptkd.utils.strict_json import is_kind
from promptkd.utils.tables import Cell, Table

ROUNDED_GB = 0.25  # how far a CPU's peak memory in metrics.jsonl may be from the real one
IDLE = 1e-3  # a phase that takes less of a step than this has done nothing in it


@dataclass(frozen=True)
class Cost:
    """What a run took. seconds: of its steps, without evaluations; parameters: counts by model, from config.json."""

    steps: int
    seconds: float
    peak_memory_gb: float | None
    parameters: dict[str, int]

    @property
    def prompt_share(self) -> float | None:
        """Trained embeddings of the prompt in per cent of the teacher's parameters."""
        prompt, teacher = self.parameters.get("prompt"), self.parameters.get("teacher")
        return 100 * prompt / teacher if prompt and teacher else None


def cost(result: Result) -> Cost | None:
    """None for a model without a run."""
    steps, _ = result.series("step_seconds")
    seconds, parameters = step_seconds(result), result.config.get("parameters", {})
    if seconds is None:
        return None
    if not is_kind(parameters, {...: (int, None)}):
        raise UserError(f"{result.folder}/config.json: its parameters are no numbers: repeat the run")
    return Cost(steps[-1], seconds * steps[-1], _peak_memory(result), parameters)


def step_seconds(result: Result) -> float | None:
    """Seconds of a typical step: the medians of its phases, each times the share of steps in which it works.

    A run that was stopped for a while, or had to share the machine, has some long steps and the same medians.
    MiniLLM's rollouts, table for several steps in one of them, count with their share. A row's seconds are means over
    the steps since the row before (metrics.StepTimes), so --log-interval hides nothing. None without a logged step.
    """
    whole = _seconds(result, "step_seconds")
    if not whole:
        return None
    names = {name for row in result.metrics if row["event"] == "train" for name in row if name.endswith("_seconds")}
    phases = [_seconds(result, name) for name in sorted(names - {"step_seconds"})]
    others = [seconds - sum(phase.get(step, 0.0) for phase in phases) for step, seconds in whole.items()]
    least = IDLE * median(whole.values())
    worked = [[seconds for seconds in phase.values() if seconds > least] for phase in phases]
    return max(0.0, median(others)) + sum(median(each) * len(each) / len(whole) for each in worked if each)


def _seconds(result: Result, key: str) -> dict[int, float]:
    """Step -> what was measured in it."""
    return {step: value for step, value in zip(*result.series(key)) if value is not None and math.isfinite(value)}


def _peak_memory(result: Result) -> float | None:
    """memory.json's, which holds the last process' exact peak, unless one that was interrupted had a higher one."""
    logged = max((gb for gb in result.series("peak_memory_gb")[1] if gb is not None), default=None)
    exact = max(result.memory, default=None)
    if exact is None or logged is None:
        return exact if logged is None else logged
    return logged if logged > exact + ROUNDED_GB else exact


def costs(results: list[Result]) -> Table:
    """Student, teacher and prompt are numbers of parameters; share is the prompt's of the teacher's."""
    heads = ["model", "steps", "time", "s per step", "peak memory, GB", "student", "teacher", "prompt", "share, %"]
    table = Table(heads)
    for result in results:
        if (one := cost(result)) is None:
            continue
        counts = [
            f"{one.parameters[key]:,}" if one.parameters.get(key) else "-" for key in ("student", "teacher", "prompt")
        ]
        memory = "-" if one.peak_memory_gb is None else f"{one.peak_memory_gb:.2f}"
        share = "-" if one.prompt_share is None else f"{one.prompt_share:.2g}"
        cells = [f"{one.steps:,}", duration(one.seconds), f"{one.seconds / one.steps:.2f}", memory, *counts, share]
        table.rows.append([Cell(label(result)), *map(Cell, cells)])
    return table


def duration(seconds: float) -> str:
    """Seconds below two minutes, then minutes, then hours and minutes."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
