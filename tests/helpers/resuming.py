"""A run that is stopped and resumed, compared with one that is not."""

from __future__ import annotations

from helpers.runs import assert_same_run, crash_at, rows_of
from helpers.training import train_here


def check_resume(options, tmp_path, *extra: str, method: str = "promptkd") -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_here(options(whole, *extra, method=method))
    crash_at(4, options(cut, *extra, method=method))
    assert [row["step"] for row in rows_of(cut) if row["event"] == "train"] == [1, 2, 3]
    train_here(options(cut, *extra, "--resume", method=method))
    assert_same_run(whole, cut)
