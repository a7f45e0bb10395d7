"""The report's curves: dev loss and ROUGE-L, the soft prompt's losses and distance, exposure bias."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from promptkd.reporting.results import Result
from promptkd.utils.plotting import COLORS, GRAY, MARKERS, label_axes, new_figure, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REFERENCE_LINES = ("--", ":", "-.")
INK = "#010203"  # placeholder for the color of text and axes, which a page replaces with its own
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
EXPOSURE_CURVES = ("ex_acc_err", "ex_acc_err_low", "ex_acc_err_high")  # the excess and its interval
DEV_PANELS = {"dev_loss": "dev loss (nats per token)", "rougeL": "dev ROUGE-L"}
PROMPT_LOSSES = {
    "prompt_kd_loss": "prompted teacher against student",
    "prompt_base_loss": "prompted against unprompted teacher, weighted",
    "student_loss": "student against prompted teacher",
}
SMOOTHED = 25  # points per drawn loss curve; more would show the noise of single steps


@dataclass(frozen=True)
class Panel:
    """One plot: its title, the function that draws it, and the label of its x axis."""

    title: str
    draw: Callable[[Axes], None]
    xlabel: str = "optimizer step"


def panels_of(compared: list[Result], references: list[Result]) -> list[Panel]:
    """List the panels for which at least one result has data."""
    panels = [
        Panel(title, partial(_draw_dev, key, compared, references))
        for key, title in DEV_PANELS.items()
        if any(result.series(key, "eval")[0] for result in compared)
    ]
    if prompted := next((result for result in compared if result.series("prompt_drift")[0]), None):
        panels += [
            Panel(f"{shown(prompted.label)}: KL, nats per response token", partial(_draw_losses, prompted)),
            Panel("distance of the soft prompt from its start", partial(_draw_drift, compared)),
        ]
    for name in dict.fromkeys(name for result in [*compared, *references] for name in result.exposure):
        title = "excess accumulated error, %" + (f": {shown(name)}" if name else "")
        panels.append(Panel(title, partial(_draw_exposure, name, compared, references), "response token"))
    if any(result.series("ex_acc_err", "exposure_bias")[0] for result in compared):
        draw = partial(_draw_series, "ex_acc_err", "exposure_bias", compared)
        panels.append(Panel("excess accumulated error during training, %", draw))
    return panels


def draw_picture(panels: list[Panel], picture: Path) -> None:
    """Draw all panels, at least one, into one PNG with two columns."""
    rows = -(-len(panels) // 2)
    with new_figure((10, 3.9 * rows), rows, columns=2) as (figure, grid):
        for axes, panel in zip(grid.flat, panels):
            _draw(panel, axes)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        figure.savefig(picture)


def draw_svg(panel: Panel) -> str:
    """Draw a panel as an SVG element whose text and axes have the color of the surrounding page."""
    text = io.StringIO()
    style = {**dict.fromkeys(INKED, INK), "svg.fonttype": "none", "svg.hashsalt": panel.title}
    with new_figure((5, 3.4), style=style) as (figure, grid):
        _draw(panel, grid[0, 0])
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'<metadata>.*?</metadata>|(?<=<g) id="[^"]*"', "", svg, flags=re.DOTALL)
    return re.sub(r' width="[^"]*pt" height="[^"]*pt"|(?<=<svg) height="[^"]*pt" width="[^"]*pt"', "", svg, count=1)


def _draw(panel: Panel, axes: Axes) -> None:
    panel.draw(axes)
    label_axes(axes, panel.title, panel.xlabel)


def _color(index: int) -> str:
    """Return the color of the compared model with this index, which is the same in all panels."""
    return COLORS[index % len(COLORS)]


def _draw_series(key: str, event: str, results: list[Result], axes: Axes) -> None:
    for index, result in enumerate(results):
        steps, values = result.series(key, event)
        if steps:
            marker, numbers = MARKERS[index % len(MARKERS)], np.array(values, dtype=float)
            axes.plot(steps, numbers, color=_color(index), marker=marker, label=shown(result.label))


def _draw_dev(key: str, compared: list[Result], references: list[Result], axes: Axes) -> None:
    _draw_series(key, "eval", compared, axes)
    for result in references:
        _, values = result.series(key, "eval")
        if values:
            axes.axhline(values[-1], color=GRAY, ls="--", lw=1)
            axes.annotate(
                shown(result.label),
                xy=(1, values[-1]),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 3),
                textcoords="offset points",
                ha="right",
                color=GRAY,
            )


def _draw_losses(result: Result, axes: Axes) -> None:
    for (key, name), color, style in zip(PROMPT_LOSSES.items(), COLORS, ("-", "--", "-.")):
        steps, values = result.series(key)
        if steps:
            axes.plot(_smoothed(steps), _smoothed(values), color=color, ls=style, label=name)
    axes.set_ylim(bottom=0)


def _smoothed(values: list[int] | list[float]) -> list[float]:
    """Return the means of at most SMOOTHED groups of neighboring points."""
    groups = np.array_split(np.array(values, dtype=float), min(SMOOTHED, len(values)))
    return [float(group.mean()) for group in groups]


def _draw_drift(compared: list[Result], axes: Axes) -> None:
    for index, result in enumerate(compared):
        steps, values = result.series("prompt_drift")
        if steps:
            axes.plot(steps, values, color=_color(index), label=shown(result.label))
    axes.set_ylim(bottom=0)


def _draw_exposure(name: str, compared: list[Result], references: list[Result], axes: Axes) -> None:
    """Draw the excess error at each token. Tokens without a value, which no answer reaches, leave a gap."""
    lines: list[dict[str, Any]] = [{"color": _color(index)} for index in range(len(compared))]
    lines += [{"color": GRAY, "ls": REFERENCE_LINES[index % 3], "lw": 1.2} for index in range(len(references))]
    for result, line in zip([*compared, *references], lines):
        if name not in result.exposure:
            continue
        curves = {key: np.array(result.exposure[name].get(key) or [], dtype=float) for key in EXPOSURE_CURVES}
        value, low, high = curves.values()
        tokens = np.arange(1, len(value) + 1)
        axes.plot(tokens, value, label=shown(result.label), **line)
        if result in compared and len(low) and len(high):
            axes.fill_between(tokens, low, high, color=line["color"], alpha=0.1, lw=0)
    axes.axhline(0, color=GRAY, lw=0.8)
