"""Profile a training step: a table by phase and part, and a trace for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

PHASE, PART = "phase: ", "part: "


def phase(name: str) -> record_function:
    """Mark a phase of the step, such as "rollout". It costs next to nothing without a profile."""
    return record_function(PHASE + name)


def part(name: str) -> record_function:
    """Mark a part of a phase, such as "backward"."""
    return record_function(PART + name)


@contextlib.contextmanager
def profile_step(folder: Path, enabled: bool) -> Iterator[None]:
    """Profile the `with` block if `enabled`, and write profile.md and trace.json.gz to a folder."""
    if not enabled:
        yield
        return
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with profile(activities=kinds, acc_events=True) as profiler, record_function("step"):
        yield
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    (folder / "profile.md").write_text(describe(profiler), encoding="utf-8")


def describe(profiler: profile) -> str:
    """Format the seconds of phases and parts, and the slowest operators, as Markdown."""
    seconds, times = _marked(profiler)
    total = seconds.pop("step")
    lines = [
        f"A step of {total:.2f} s under the profiler, which slows down small operations such as those of decoding.",
        "",
        "| phase | part | seconds | of the step | times |",
        "|---|---|---|---|---|",
    ]
    for name in sorted(seconds, key=lambda name: name.partition("|")[0]):
        title, _, inner = name.partition("|")
        lines.append(f"| {title} | {inner} | {seconds[name]:.3f} | {seconds[name] / total:.0%} | {times[name]} |")
    by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    operators = profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=40)
    return "\n".join([*lines, "", "```", operators, "```", ""])


def _marked(profiler: profile) -> tuple[dict[str, float], dict[str, int]]:
    """Return seconds and counts of "step", "<phase>" and "<phase>|<part>", by the host's clock."""
    seconds: dict[str, float] = defaultdict(float)
    times: dict[str, int] = defaultdict(int)
    for event in profiler.events():
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
