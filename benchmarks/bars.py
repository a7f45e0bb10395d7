"""The picture of a benchmark that compares sides: a bar for each side, its spread over rounds, and its number."""

from __future__ import annotations

import statistics
from pathlib import Path

from promptkd.utils.plotting import COLORS, GRAY, new_figure

OTHERS = "#b8bec6"


def draw_bars(measured: dict[str, list[float]], unit: str, path: Path) -> None:
    """Draw a bar for the median of each side, with a line from the smallest to the largest value.

    Args:
        measured: Side -> values. Names that begin with "ours" are highlighted.
        unit: Label of the values.
        path: The picture to write.
    """
    sides = list(measured)[::-1]  # the first one on top
    medians = [statistics.median(measured[side]) for side in sides]
    spreads = [(median - min(measured[side]), max(measured[side]) - median) for side, median in zip(sides, medians)]
    colors = [COLORS[0] if side.startswith("ours") else OTHERS for side in sides]
    style = {"axes.grid": False, "axes.spines.left": False, "ytick.left": False}
    with new_figure((7, 0.8 + 0.4 * len(sides)), style=style) as (figure, grid):
        axes = grid[0, 0]
        axes.barh(sides, medians, xerr=list(zip(*spreads)), color=colors, ecolor=GRAY, height=0.7, capsize=2)
        for y, (side, median) in enumerate(zip(sides, medians)):
            axes.annotate(f"{median:.1f}", (max(measured[side]), y), (6, 0), textcoords="offset points", va="center")
        axes.set(xlabel=unit, xlim=(0, 1.12 * max(map(max, measured.values()))))
        figure.savefig(path)
