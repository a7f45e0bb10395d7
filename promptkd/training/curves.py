"""Draw a run's metrics."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from promptkd.utils.jsonl import read_metrics
from promptkd.utils.plotting import COLORS, label_axes, new_figure, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOKENS_PER_SECOND = "response tokens per second"
# Panel title -> keys drawn in it, in order. Keys that are neither here nor below have a panel of their own, except
# that losses go to the first panel: they are the terms of a method that this table does not know.
LOSSES = "loss per response token"
PANELS = {
    LOSSES: ["student_loss", "loss", "pt_loss", "prompt_kd_loss", "prompt_base_loss"],
    "policy": ["tot_loss", "rl_loss", "pg_loss", "reg_loss", "rev_kl"],
    "reward": ["reward"],
    "dev loss": ["dev_loss"],
    "dev ROUGE-L": ["rougeL"],
    "excess accumulated error (%)": ["ex_acc_err"],
    "distance of the prompt from its start": ["prompt_drift"],
    "response tokens per prompt": ["response_length", "stu_lens", "mixed_lens"],
    TOKENS_PER_SECOND: [TOKENS_PER_SECOND],
    "gradient norm": ["grad_norm", "prompt_grad_norm"],
}
OMITTED = {"step", "epoch", "lr", "base_coef_now", "response_tokens", "peak_memory_gb", "mean_R", "mean_eps", "rows"}
OMITTED_ENDS = ("seconds", "_low", "_high", "loss_scale", "skipped_steps")
COLUMNS = 4
PANEL = (4.1, 3.1)  # inches
FEW_POINTS = 30  # Shorter curves show a marker at each point.
SMOOTHED = 40  # Points of the bold line over a longer curve, each the mean of its neighbors.


def draw_curves(metrics: Path, picture: Path, title: str) -> None:
    """Draw the content of metrics.jsonl, with a panel for each kind of curve that has points."""
    series = read_series(metrics)
    panels = arrange(series)
    columns = min(max(len(panels), 1), COLUMNS)
    rows = max(-(-len(panels) // columns), 1)
    width, height = PANEL[0] * columns, PANEL[1] * rows + 0.4
    with new_figure((width, height), rows, columns) as (figure, grid):
        figure.set_layout_engine(None)  # panels of one size need no search for a layout, which takes half the time
        figure.subplots_adjust(0.6 / width, 0.55 / height, 1 - 0.15 / width, 1 - 0.75 / height, 0.24, 0.42)
        for axes, (name, keys) in zip(grid.flat, panels.items()):
            for index, key in enumerate(keys):
                axes.set_prop_cycle(color=[COLORS[index % len(COLORS)]], ls=["--" if index >= len(COLORS) else "-"])
                _draw(axes, *series[key], label=key if len(keys) > 1 else None)
            label_axes(axes, shown(name), "optimizer step")
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        figure.suptitle(shown(title), y=1 - 0.08 / height, va="top")
        figure.savefig(picture)


def read_series(metrics: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Return the steps and values of each key of metrics.jsonl, and the speed that follows from them."""
    series: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    for row in read_metrics(metrics):
        if row.get("step_seconds") and "response_tokens" in row:
            row[TOKENS_PER_SECOND] = row["response_tokens"] / row["step_seconds"]
        for key, value in row.items():
            if isinstance(value, (int, float)) and key not in OMITTED and not key.endswith(OMITTED_ENDS):
                series[key][0].append(row["step"])
                series[key][1].append(value)
    return dict(series)


def arrange(series: dict[str, Any]) -> dict[str, list[str]]:
    """Return the keys of each panel that has any."""
    known = {key for keys in PANELS.values() for key in keys}
    panels = {name: [key for key in keys if key in series] for name, keys in PANELS.items()}
    for key in series:
        if key not in known:
            panels.setdefault(LOSSES if key.endswith("loss") else key, []).append(key)
    return {name: keys for name, keys in panels.items() if keys}


def _draw(axes: Axes, steps: list[int], values: list[float], label: str | None) -> None:
    """Draw a curve. A long one is pale, under a bold line of means."""
    if len(steps) <= 2 * SMOOTHED:
        axes.plot(steps, values, marker="o" if len(steps) < FEW_POINTS else None, label=label)
        return
    axes.plot(steps, values, alpha=0.25, linewidth=0.8)
    groups = (np.array_split(np.array(each, dtype=float), SMOOTHED) for each in (steps, values))
    axes.plot(*([group.mean() for group in each] for each in groups), label=label)
