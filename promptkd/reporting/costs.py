"""The cost of runs: time, memory and trained parameters, from metrics.jsonl, memory.json and config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from promptkd.errors import UserError
from promptkd.reporting.results import Result
from promptkd.utils.format import format_duration
from promptkd.utils.strict_json import is_kind
from promptkd.utils.tables import Table

ROUNDED_GB = 0.25  # largest error of a CPU's peak memory in metrics.jsonl
IDLE = 1e-3  # A phase that takes a smaller part of a step did no work in it.


@dataclass(frozen=True)
class Cost:
    """The cost of a run."""

    steps: int
    seconds: float  # of all steps, without evaluations
    peak_memory_gb: float | None
    parameters: dict[str, int]  # model -> number of parameters, from config.json

    @property
    def prompt_share(self) -> float | None:
        """The soft prompt's trained embeddings in percent of the teacher's parameters."""
        prompt, teacher = self.parameters.get("prompt"), self.parameters.get("teacher")
        return 100 * prompt / teacher if prompt and teacher else None


def cost(result: Result) -> Cost | None:
    """Compute what a result's run cost. Returns None for a model without a run."""
    steps, _ = result.series("step_seconds")
    seconds, parameters = step_seconds(result), result.config.get("parameters", {})
    if seconds is None:
        return None
    if not is_kind(parameters, {...: (int, None)}):
        raise UserError(f"{result.folder}/config.json: its parameters are not numbers: repeat the run")
    return Cost(steps[-1], seconds * steps[-1], _peak_memory(result), parameters)


def step_seconds(result: Result) -> float | None:
    """Compute the seconds of a typical step: the sum of its phases' medians.

    The median of a phase counts with the share of the steps in which the phase works, because MiniLLM generates the
    rollouts of several steps in one of them. Medians ignore the few long steps of a run that was paused or shared the
    machine. The seconds of a row are means over the steps since the previous row (`metrics.StepTimes`), so that
    --log-interval does not change the result.

    Returns:
        The seconds, or None if no step was logged.
    """
    total = _seconds(result, "step_seconds")
    if not total:
        return None
    names = {name for row in result.metrics if row["event"] == "train" for name in row if name.endswith("_seconds")}
    phases = [_seconds(result, name) for name in sorted(names - {"step_seconds"})]
    others = [seconds - sum(phase.get(step, 0.0) for phase in phases) for step, seconds in total.items()]
    idle = IDLE * median(total.values())
    active = [[seconds for seconds in phase.values() if seconds > idle] for phase in phases]
    return max(0.0, median(others)) + sum(median(phase) * len(phase) / len(total) for phase in active if phase)


def _seconds(result: Result, key: str) -> dict[int, float]:
    """Map each step to a measured time, without missing values."""
    return {step: value for step, value in zip(*result.series(key)) if value is not None and math.isfinite(value)}


def _peak_memory(result: Result) -> float | None:
    """Return the last process's exact peak in memory.json, or the logged one if an interrupted process had more."""
    logged = max((gb for gb in result.series("peak_memory_gb")[1] if gb is not None), default=None)
    exact = max(result.memory, default=None)
    if exact is None or logged is None:
        return exact if logged is None else logged
    return logged if logged > exact + ROUNDED_GB else exact


def cost_table(results: list[Result]) -> Table:
    """Build the table of costs. Student, teacher and prompt are numbers of parameters."""
    counted = ("student", "teacher", "prompt")
    table = Table(["model", "steps", "time", "s per step", "peak memory, GB", *counted, "share, %"])
    for result in results:
        if (spent := cost(result)) is None:
            continue
        table.add(
            result.label,
            f"{spent.steps:,}",
            format_duration(spent.seconds),
            f"{spent.seconds / spent.steps:.2f}",
            "-" if spent.peak_memory_gb is None else f"{spent.peak_memory_gb:.2f}",
            *(f"{spent.parameters[key]:,}" if spent.parameters.get(key) else "-" for key in counted),
            "-" if spent.prompt_share is None else f"{spent.prompt_share:.2g}",
        )
    return table
