"""The style of all pictures: fonts, colors, grid and legends, and user-chosen names as text."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LONGEST_NAME = 90  # characters that fit across a picture
# The palette of Okabe and Ito, which color-blind readers can distinguish. Markers distinguish the lines in grayscale.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
MARKERS = "osD^vP"
GRAY = "#777777"  # of baselines and reference lines
STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 130,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "savefig.dpi": "figure",  # one resolution for layout and picture, so that a figure needs one canvas
    "text.parse_math": False,  # Otherwise a `$` in a folder's name starts a formula.
}


@contextlib.contextmanager
def new_figure(
    size: tuple[float, float], rows: int = 1, columns: int = 1, style: dict[Any, Any] | None = None
) -> Iterator[tuple[Figure, np.ndarray]]:
    """Open a figure in the project's style. Draw and save it inside of the `with` block.

    Characters that the font lacks are drawn as boxes, without one warning for each of them.

    Args:
        size: Width and height in inches.
        rows: Rows of axes.
        columns: Columns of axes.
        style: Entries of matplotlib's rcParams that differ from STYLE.

    Yields:
        The figure, and its axes as an array of shape `(rows, columns)`.
    """
    import matplotlib

    with matplotlib.rc_context({**STYLE, **(style or {})}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from")
        figure = _figure()
        figure.clear()
        figure.set_layout_engine("constrained")
        figure.set_size_inches(*size)
        yield figure, figure.subplots(rows, columns, squeeze=False)


@functools.cache
def _figure() -> Figure:
    """Return the process's only figure, which is cleared for each picture.

    A figure consists of reference cycles. Each new one would keep megabytes until Python's garbage collector looks
    for cycles among old objects, which is rare in a process with as many objects as training has.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure()
    FigureCanvasAgg(figure)
    return figure


def label_axes(axes: Axes, title: str, xlabel: str) -> None:
    """Set the title of axes and the label of an x axis that has integer ticks, and show a legend of the lines."""
    axes.set(title=title, xlabel=xlabel)
    axes.locator_params(axis="x", integer=True)
    if lines := axes.get_legend_handles_labels()[0]:
        axes.legend(ncols=1 + (len(lines) > 4))


def shown(name: str) -> str:
    """Return a name for a picture: on one line, without what cannot be drawn, shortened in the middle."""
    text = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name)
    if len(text) > LONGEST_NAME:
        half = (LONGEST_NAME - 3) // 2
        text = f"{text[:half]}...{text[-half:]}"
    return f" {text}" if text.startswith("_") else text  # matplotlib leaves labels that begin with _ out of legends
