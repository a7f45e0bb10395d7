"""Names that users choose, as text in pictures."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

LONGEST_NAME = 90  # characters that fit across a picture


@contextlib.contextmanager
def plain_text() -> Iterator[None]:
    """Draw text as it is: without this, matplotlib reads `$` in a folder's name as the start of a formula.

    Characters that the font lacks are drawn as boxes, without one warning for each of them.
    """
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from")
        yield


def shown(name: str) -> str:
    """Return a name for a picture: on one line, without what cannot be drawn, shortened in the middle."""
    text = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name)
    if len(text) > LONGEST_NAME:
        half = (LONGEST_NAME - 3) // 2
        text = f"{text[:half]}...{text[-half:]}"
    return f" {text}" if text.startswith("_") else text  # matplotlib leaves labels that begin with _ out of legends
