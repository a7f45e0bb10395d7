"""The picture of a benchmark that compares sides: a bar for each, its spread over rounds, and its figure."""

from __future__ import annotations

import statistics
from pathlib import Path

OURS, OTHERS = "#0072b2", "#b8bec6"


def draw_bars(measured: dict[str, list[float]], unit: str, path: Path) -> None:
    """One bar for each side: the median of its values; a line from the smallest to the largest. Ours has a colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sides = list(measured)[::-1]  # the first one on top
    middles = [statistics.median(measured[side]) for side in sides]
    ends = [(middle - min(measured[side]), max(measured[side]) - middle) for side, middle in zip(sides, middles)]
    figure, axis = plt.subplots(figsize=(7, 0.8 + 0.4 * len(sides)), layout="constrained")
    colours = [OURS if side.startswith("ours") else OTHERS for side in sides]
    axis.barh(sides, middles, xerr=list(zip(*ends)), color=colours, ecolor="#555555", height=0.7, capsize=2)
    for place, (side, middle) in enumerate(zip(sides, middles)):
        axis.annotate(f"{middle:.1f}", (max(measured[side]), place), (6, 0), textcoords="offset points", va="center")
    axis.set(xlabel=unit, xlim=(0, 1.12 * max(map(max, measured.values()))))
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(left=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
