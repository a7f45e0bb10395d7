"""Draw a run's metrics."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from promptkd.utils.jsonl import read_metrics
from promptkd.utils.plotting import COLORS, label_axes, new_figure, shown

CURVES = {  # panel title -> keys drawn in it, in order
    "loss per response token": ["student_loss", "loss", "pt_loss", "prompt_kd_loss", "prompt_base_loss"],
    "policy": ["pg_loss", "reg_loss", "rev_kl"],
    "reward": ["reward"],
    "dev loss": ["dev_loss"],
    "dev ROUGE-L": ["rougeL"],
    "excess accumulated error (%)": ["ex_acc_err"],
    "distance of the prompt from its start": ["prompt_drift"],
}
FEW_POINTS = 30  # Shorter curves show a marker at each point.


def draw_curves(metrics: Path, picture: Path, title: str) -> None:
    """Draw the content of metrics.jsonl, with a panel for each kind of curve that has points."""
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in read_metrics(metrics):
        for key, value in row.items():
            if isinstance(value, (int, float)) and key != "step":
                series[key].append((row["step"], value))
    panels = {name: [key for key in keys if series[key]] for name, keys in CURVES.items()}
    panels = {name: keys for name, keys in panels.items() if keys}
    columns = max(len(panels), 1)
    with new_figure((4.2 * columns, 3.4), columns=columns) as (figure, grid):
        for axes, (name, keys) in zip(grid[0], panels.items()):
            for key, color in zip(keys, COLORS):
                steps, values = zip(*series[key])
                marker = "o" if len(steps) < FEW_POINTS else None
                axes.plot(steps, values, color=color, marker=marker, label=key if len(keys) > 1 else None)
            label_axes(axes, name, "optimizer step")
        figure.suptitle(shown(title))
        figure.savefig(picture)
