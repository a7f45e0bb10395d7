"""Format results of exposure bias: results.md and a figure of the curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from promptkd.evaluation.tables import protocol_line
from promptkd.utils.plotting import COLORS, GRAY, label_axes, new_figure, shown
from promptkd.utils.tables import Table


def markdown(results: dict[str, Any]) -> str:
    """Format results.md: a line for each set with the values at the last position, then the protocol."""
    teacher, protocol = results["teacher"], results["protocol"]
    times = "once" if protocol["sample_times"] == 1 else f"{protocol['sample_times']} times"
    prompted = f" with the soft prompt {teacher['prompt']}" if teacher["prompt"] else ""
    table = Table(["set", "rows", "excess accumulated error, %", "95 % interval", "R", "eps", "seconds"])
    for name, entry in results["sets"].items():
        table.add(*_cells(name, entry))
    for lost in results["missing"]:
        table.add(lost["name"], "missing")
    lines = [
        f"# Exposure bias of {results['model']['path']}",
        "",
        table.markdown(),
        "",
        f"Teacher: {teacher['path']}{prompted}. R and eps: KL(teacher || student) accumulated over "
        f"{protocol['max_length'] - protocol['max_prompt_length']} response tokens, on answers of the student and of "
        f"the teacher; excess: (R - eps) / eps. Each model answers each prompt {times}. The interval "
        "resamples examples." + (" The published code's arithmetic." if protocol["published"] else ""),
        "",
        protocol_line(results),
    ]
    return "\n".join(lines) + "\n"


def _cells(name: str, entry: dict[str, Any]) -> list[str]:
    if entry["partial"]:
        name += f" (partial: {entry['rows']:,} of {entry['published_rows']:,})"
    excess, low, high = (
        "-" if entry[key] is None else f"{entry[key]:.2f}"
        for key in ("ex_acc_err", "ex_acc_err_low", "ex_acc_err_high")
    )
    sums = [f"{entry[key]:.4g}" for key in ("mean_R", "mean_eps")]
    return [name, f"{entry['rows']:,}", excess, f"{low} to {high}", *sums, f"{entry['seconds']:.1f}"]


def draw(curves: dict[str, list[float | None]], picture: Path, title: str) -> None:
    """Draw the excess error with its interval, and beside it the accumulated KL divergences that it compares."""
    values = {name: np.array(curve, dtype=float) for name, curve in curves.items()}
    tokens = np.arange(1, len(values["mean_R"]) + 1)
    with new_figure((10, 3.9), columns=2) as (figure, grid):
        left, right = grid[0]
        left.fill_between(tokens, values["ex_acc_err_low"], values["ex_acc_err_high"], color=COLORS[0], alpha=0.2, lw=0)
        left.plot(tokens, values["ex_acc_err"], color=COLORS[0])
        left.axhline(0, color=GRAY, lw=0.8)
        left.set_ylabel("%")
        right.plot(tokens, values["mean_R"], color=COLORS[4], label="R: on the student's answers")
        right.plot(tokens, values["mean_eps"], color=COLORS[2], ls="--", label="eps: on the teacher's answers")
        right.set_ylabel("nats")
        right.set_ylim(bottom=0)
        label_axes(left, "excess accumulated error, 95 % interval over rows", "response token")
        label_axes(right, "accumulated KL(teacher || student)", "response token")
        figure.suptitle(shown(title))
        figure.savefig(picture)
