"""Where a step's time goes: a table by phase and part, and a trace for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

PHASE, PART = "phase: ", "part: "


def phase(name: str) -> record_function:
    """Mark a phase of the step (rollout, prompt, student); costs next to nothing when no profile is taken."""
    return record_function(PHASE + name)


def part(name: str) -> record_function:
    """Mark a part of a phase: fixed forward, forward and loss, backward, optimizer."""
    return record_function(PART + name)


@contextlib.contextmanager
def profile_step(folder: Path, wanted: bool) -> Iterator[None]:
    """Profile what runs inside, if `wanted`: <folder>/profile.md and <folder>/trace.json.gz."""
    if not wanted:
        yield
        return
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with profile(activities=kinds, acc_events=True) as taken, record_function("step"):
        yield
    taken.export_chrome_trace(str(folder / "trace.json.gz"))
    (folder / "profile.md").write_text(describe(taken), encoding="utf-8")


def describe(taken: profile) -> str:
    """Seconds of each phase and its parts, and the operators that took most, in Markdown."""
    seconds, times = _marked(taken)
    whole = seconds.pop("step")
    lines = [
        f"A step of {whole:.2f} s under the profiler, which slows many small operations (decoding) down.",
        "",
        "| phase | part | seconds | of the step | times |",
        "|---|---|---|---|---|",
    ]
    for name in sorted(seconds, key=lambda name: name.partition("|")[0]):
        title, _, inner = name.partition("|")
        lines.append(f"| {title} | {inner} | {seconds[name]:.3f} | {seconds[name] / whole:.0%} | {times[name]} |")
    by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    operators = taken.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=40)
    return "\n".join([*lines, "", "```", operators, "```", ""])


def _marked(taken: profile) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds and counts of "step", "<phase>" and "<phase>|<part>"; on a GPU the host's, which waits for it."""
    seconds: dict[str, float] = defaultdict(float)
    times: dict[str, int] = defaultdict(int)
    for event in taken.events():
        if event.name != "step" and not event.name.startswith((PHASE, PART)):
            continue
        name = event.name.removeprefix(PHASE)
        if name.startswith(PART):
            above = event.cpu_parent
            while above is not None and not above.name.startswith(PHASE):
                above = above.cpu_parent
            name = f"{above.name.removeprefix(PHASE) if above else ''}|{name.removeprefix(PART)}"
        seconds[name] += event.cpu_time_total / 1e6
        times[name] += 1
    return seconds, times
