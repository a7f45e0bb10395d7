"""One picture of several runs: dev loss, dev ROUGE-L, and what the soft prompt did."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from promptkd.reporting.results import Result
from promptkd.reporting.table import label

# Okabe and Ito's colours, told apart by colour-blind readers; markers tell the lines apart in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
MARKERS = "osD^vP"
GREY = "#777777"
DEV_PANELS = {"dev_loss": "dev loss (nats per token)", "rougeL": "dev ROUGE-L"}
PROMPT_LOSSES = {
    "prompt_kd_loss": "prompted teacher against student",
    "prompt_base_loss": "prompted against unprompted teacher, weighted",
    "student_loss": "student against prompted teacher",
}
SMOOTHED = 25  # points per drawn line: more is noise of single windows


def draw_comparison(compared: list[Result], references: list[Result], picture: Path) -> None:
    """Draw `compared` over optimizer steps, `references` as dashed levels; two more panels if a run has a prompt."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    prompted = [result for result in compared if result.series("prompt_drift")[0]]
    rows = 2 if prompted else 1
    figure, axes = plt.subplots(rows, 2, figsize=(10, 3.9 * rows), squeeze=False, layout="constrained")
    for axis, (key, title) in zip(axes[0], DEV_PANELS.items()):
        _draw_dev(axis, key, title, compared, references)
    if prompted:
        _draw_prompt_losses(axes[1][0], prompted[0])
        _draw_drift(axes[1][1], prompted)
    for axis in axes.flat:
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)
    plt.close(figure)


def _draw_dev(axis, key: str, title: str, compared: list[Result], references: list[Result]) -> None:
    for result, colour, marker in zip(compared, COLOURS, MARKERS):
        axis.plot(*result.series(key, "eval"), color=colour, marker=marker, ms=4, lw=1.6, label=label(result))
    for result in references:
        _, values = result.series(key, "eval")
        if values:
            axis.axhline(values[-1], color=GREY, ls="--", lw=1)
            place = {"xy": (1, values[-1]), "xycoords": ("axes fraction", "data")}
            axis.annotate(label(result), **place, xytext=(-2, 3), textcoords="offset points", ha="right", color=GREY)
    axis.set_title(title)
    axis.legend(frameon=False)


def _draw_prompt_losses(axis, result: Result) -> None:
    for (key, name), colour, style in zip(PROMPT_LOSSES.items(), COLOURS, ("-", "--", "-.")):
        axis.plot(*_smoothed(*result.series(key)), color=colour, ls=style, lw=1.6, label=name)
    axis.set_title(f"{label(result)}: losses per response token")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, title="KL divergence of", alignment="left")


def _draw_drift(axis, prompted: list[Result]) -> None:
    for result, colour in zip(prompted, COLOURS):
        axis.plot(*result.series("prompt_drift"), color=colour, lw=1.6, label=label(result))
    axis.set_title("distance of the soft prompt from its start")
    axis.set_ylim(bottom=0)
    if len(prompted) > 1:
        axis.legend(frameon=False)


def _smoothed(steps: list[int], values: list[float]) -> tuple[list[float], list[float]]:
    """Means of neighbouring points, at most SMOOTHED of them."""
    groups = min(SMOOTHED, len(steps))
    return (
        [float(part.mean()) for part in np.array_split(np.array(steps), groups)],
        [float(part.mean()) for part in np.array_split(np.array(values), groups)],
    )
