"""A run of the SmolLM2 scripts with stand-ins."""

from __future__ import annotations

import pytest


def run(tool, *argv: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [tool.__name__, *map(str, argv)])
        tool.main()
