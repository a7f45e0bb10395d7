"""The report's curves: dev loss and ROUGE-L, what the soft prompt did, exposure bias. One panel, one question."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from promptkd.reporting.results import Result
from promptkd.reporting.table import label
from promptkd.utils.plotting import plain_text, shown

# Okabe and Ito's colours, told apart by colour-blind readers; markers tell the lines apart in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
MARKERS = "osD^vP"
GREY = "#777777"
REFERENCE_LINES = ("--", ":", "-.")
INK = "#010203"  # of text and axes; in a page it becomes the page's own colour
DEV_PANELS = {"dev_loss": "dev loss (nats per token)", "rougeL": "dev ROUGE-L"}
PROMPT_LOSSES = {
    "prompt_kd_loss": "prompted teacher against student",
    "prompt_base_loss": "prompted against unprompted teacher, weighted",
    "student_loss": "student against prompted teacher",
}
SMOOTHED = 25  # points per drawn line: more is noise of single windows


@dataclass(frozen=True)
class Panel:
    """title, and what draws on a matplotlib axis."""

    title: str
    draw: Callable
    across: str = "optimizer step"


def panels_of(compared: list[Result], references: list[Result]) -> list[Panel]:
    """The panels for which there is something to draw."""
    made = [
        Panel(title, lambda axis, key=key: _draw_dev(axis, key, compared, references))
        for key, title in DEV_PANELS.items()
        if any(result.series(key, "eval")[0] for result in compared)
    ]
    prompted = [result for result in compared if result.series("prompt_drift")[0]]
    for result in prompted[:1]:
        made.append(
            Panel(
                f"{_name(result)}: KL, nats per response token",
                lambda axis: _draw_losses(axis, prompted[0]),
            )
        )
    if prompted:
        title = "distance of the soft prompt from its start"
        made.append(Panel(title, lambda axis: _draw_drift(axis, compared)))
    for name in dict.fromkeys(name for result in [*compared, *references] for name in result.exposure):
        title = "excess accumulated error, %" + (f": {shown(name)}" if name else "")
        made.append(
            Panel(title, lambda axis, name=name: _draw_exposure(axis, name, compared, references), "response token")
        )
    if any(result.series("ex_acc_err", "exposure_bias")[0] for result in compared):
        title = "excess accumulated error during training, %"
        made.append(Panel(title, lambda axis: _draw_series(axis, "ex_acc_err", "exposure_bias", compared)))
    return made


@plain_text()
def draw_picture(panels: list[Panel], picture: Path) -> None:
    """All panels, at least one, in one PNG, two in a row."""
    plt = _pyplot()
    rows = -(-len(panels) // 2)
    with plt.rc_context({"figure.dpi": 130}):
        figure, axes = plt.subplots(rows, 2, figsize=(10, 3.9 * rows), squeeze=False, layout="constrained")
        for axis, panel in zip(axes.flat, panels):
            _draw(axis, panel)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        figure.savefig(picture)
        plt.close(figure)


@plain_text()
def draw_svg(panel: Panel) -> str:
    """The panel as an SVG element that takes its text's and axes' colour from the page around it."""
    plt, text = _pyplot(), io.StringIO()
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    style = {**ink, "svg.fonttype": "none", "svg.hashsalt": panel.title, "font.size": 10, "grid.color": INK}
    with plt.rc_context(style):
        figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
        _draw(axis, panel)
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'<metadata>.*?</metadata>|(?<=<g) id="[^"]*"', "", svg, flags=re.DOTALL)
    return re.sub(r' width="[^"]*pt" height="[^"]*pt"|(?<=<svg) height="[^"]*pt" width="[^"]*pt"', "", svg, count=1)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _draw(axis, panel: Panel) -> None:
    panel.draw(axis)
    axis.set(title=panel.title, xlabel=panel.across)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.2)
    axis.spines[["top", "right"]].set_visible(False)
    if lines := axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, ncols=1 + (len(lines) > 4))


def _draw_dev(axis, key: str, compared: list[Result], references: list[Result]) -> None:
    _draw_series(axis, key, "eval", compared)
    for result in references:
        _, values = result.series(key, "eval")
        if values:
            axis.axhline(values[-1], color=GREY, ls="--", lw=1)
            place = {"xy": (1, values[-1]), "xycoords": ("axes fraction", "data")}
            axis.annotate(_name(result), **place, xytext=(-2, 3), textcoords="offset points", ha="right", color=GREY)


def _draw_series(axis, key: str, event: str, results: list[Result]) -> None:
    for place, result in enumerate(results):
        steps, values = result.series(key, event)
        if steps:
            marker = {"marker": MARKERS[place % len(MARKERS)], "ms": 4}
            axis.plot(steps, np.array(values, dtype=float), label=_name(result), color=_colour(place), lw=1.6, **marker)


def _name(result: Result) -> str:
    return shown(label(result))


def _colour(place: int) -> str:
    """A compared model has the same colour in all panels."""
    return COLOURS[place % len(COLOURS)]


def _draw_losses(axis, result: Result) -> None:
    for (key, name), colour, style in zip(PROMPT_LOSSES.items(), COLOURS, ("-", "--", "-.")):
        steps, values = result.series(key)
        if steps:
            axis.plot(*_smoothed(steps, values), color=colour, ls=style, lw=1.6, label=name)
    axis.set_ylim(bottom=0)


def _draw_drift(axis, compared: list[Result]) -> None:
    for place, result in enumerate(compared):
        steps, values = result.series("prompt_drift")
        if steps:
            axis.plot(steps, values, color=_colour(place), lw=1.6, label=_name(result))
    axis.set_ylim(bottom=0)


def _draw_exposure(axis, name: str, compared: list[Result], references: list[Result]) -> None:
    """Entries without a value (no token of any answer reaches the position) leave a gap."""
    styles = [{"color": _colour(place), "lw": 1.6} for place in range(len(compared))]
    styles += [{"color": GREY, "ls": REFERENCE_LINES[place % 3], "lw": 1.2} for place in range(len(references))]
    for result, style in zip([*compared, *references], styles):
        if name not in result.exposure:
            continue
        values = np.array(result.exposure[name]["ex_acc_err"], dtype=float)
        tokens = np.arange(1, len(values) + 1)
        axis.plot(tokens, values, label=_name(result), **style)
        around = [result.exposure[name].get(f"ex_acc_err_{side}") for side in ("low", "high")]
        if result in compared and None not in around:
            low, high = (np.array(side, dtype=float) for side in around)
            axis.fill_between(tokens, low, high, color=style["color"], alpha=0.1, lw=0)
    axis.axhline(0, color=GREY, lw=0.8)


def _smoothed(steps: list[int], values: list[float]) -> tuple[list[float], list[float]]:
    """Means of neighbouring points, at most SMOOTHED of them."""
    groups = min(SMOOTHED, len(steps))
    return (
        [float(part.mean()) for part in np.array_split(np.array(steps), groups)],
        [float(part.mean()) for part in np.array_split(np.array(values), groups)],
    )
