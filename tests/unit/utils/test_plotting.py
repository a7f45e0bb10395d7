"""Test the style of pictures and user-chosen names in them."""

from __future__ import annotations

import matplotlib

from promptkd.utils.plotting import LONGEST_NAME, label_axes, new_figure, shown


def test_new_figure_clears_the_previous_picture_and_restores_the_style(tmp_path):
    before = matplotlib.rcParams["axes.grid"]
    for columns in (2, 1):
        with new_figure((4, 3), columns=columns) as (figure, grid):
            grid[0, 0].plot([1, 2], label="$x")
            label_axes(grid[0, 0], "a $ b", "step")
            figure.savefig(tmp_path / "picture.png")
            assert len(figure.axes) == columns
    assert matplotlib.rcParams["axes.grid"] == before
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_shown_shortens_names_and_replaces_unprintable_characters():
    assert shown("a\nb") == "a\N{REPLACEMENT CHARACTER}b"
    assert shown("_hidden") == " _hidden"
    assert len(shown("x" * 500)) <= LONGEST_NAME
