"""Draw a run's metrics."""

from __future__ import annotations

import functools
from collections import defaultdict
from pathlib import Path
from typing import Any

from promptkd.utils.jsonl import read_metrics
from promptkd.utils.plotting import plain_text, shown

CURVES = {  # panel title -> keys drawn in it, in order
    "loss per response token": ["student_loss", "loss", "pt_loss", "prompt_kd_loss", "prompt_base_loss"],
    "policy": ["pg_loss", "reg_loss", "rev_kl"],
    "reward": ["reward"],
    "dev loss": ["dev_loss"],
    "dev ROUGE-L": ["rougeL"],
    "excess accumulated error (%)": ["ex_acc_err"],
    "distance of the prompt from its start": ["prompt_drift"],
}
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]  # distinct for color-blind readers


@plain_text()
def draw_curves(metrics: Path, picture: Path, title: str) -> None:
    """Draw metrics.jsonl: one panel for each kind of curve that has points."""
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
        for key, color in zip(keys, COLORS):
            steps, values = zip(*series[key])
            axis.plot(steps, values, color=color, label=key, marker="o" if len(steps) < 30 else None, ms=3, lw=1.4)
        axis.set(title=name, xlabel="optimizer step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if len(keys) > 1:
            axis.legend(frameon=False)
    figure.suptitle(shown(title))
    figure.tight_layout()
    figure.savefig(picture)


@functools.cache
def _figure() -> Any:
    """Return the one figure of this process, which each picture is drawn on.

    Figures consist of reference cycles. New ones would keep megabytes until Python collects its oldest generation,
    which is rare in a process with so many objects.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(dpi=130)  # also the layout's, or each drawing would need two canvases
    FigureCanvasAgg(figure)
    return figure
