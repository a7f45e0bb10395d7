"""promptkd/utils/progress.py: one progress bar for steps and answers."""

from __future__ import annotations

import pytest

from promptkd.utils import progress as module
from promptkd.utils.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """The seconds that `time.monotonic` returns, to be changed."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_progress_line_has_name_count_values_rate_and_remaining_time(clock, capsys):
    progress = Progress("sft", 10, show=True)
    clock[0] += 20
    progress.update(4, {"loss": 1.5})
    assert capsys.readouterr().err == "sft  step 4/10  loss 1.5  5 s/step  00:00:30 left\n"


def test_progress_remaining_time_does_not_wrap_at_a_day(clock, capsys):
    progress = Progress("dolly", 1001, show=True, unit="answer")
    clock[0] += 180
    progress.update()
    assert capsys.readouterr().err == "dolly  answer 1/1001  180 s/answer  50:00:00 left\n"


def test_progress_line_of_a_fast_run_counts_units_per_second(clock, capsys):
    progress = Progress("dolly", 500, show=True, unit="answer")
    clock[0] += 10
    progress.update(200)
    assert capsys.readouterr().err == "dolly  answer 200/500  20 answers/s  00:00:15 left\n"


def test_progress_survives_an_update_without_count_or_time(clock, capsys):
    progress = Progress("vicuna", 3, show=True, unit="answer")
    progress.update(0)
    progress.update(3)
    assert capsys.readouterr().err.endswith("vicuna  answer 3/3  0 s/answer  00:00:00 left\n")


def test_progress_prints_at_most_every_ten_seconds_and_at_the_end(clock, capsys):
    progress = Progress("uinst", 4, show=True, unit="answer")
    for _ in range(4):
        clock[0] += 4
        progress.update()
    counts = [line.split()[2] for line in capsys.readouterr().err.splitlines()]
    assert counts == ["1/4", "4/4"]


def test_progress_rate_excludes_steps_of_an_earlier_process(clock, capsys):
    progress = Progress("kd", 20, show=True, done=10)
    clock[0] += 30
    progress.update()
    assert "step 11/20  30 s/step  00:04:30 left" in capsys.readouterr().err


def test_progress_hidden_ranks_print_nothing(clock, capsys):
    progress = Progress("sft", 1, show=False)
    progress.update()
    progress.line("text")
    progress.close()
    assert capsys.readouterr().err == ""


def test_progress_in_a_notebook_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(module, "IS_NOTEBOOK", True)
    progress = Progress("sft", 3, show=True)
    progress.update(3)
    assert not progress.bar.disable
    progress.close()
    assert "step 3/3" not in capsys.readouterr().err
    assert Progress("sft", 3, show=False).bar.disable
