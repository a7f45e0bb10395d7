"""Stop signals: the run finishes its step, writes a checkpoint and exits with a status for the signal."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

# Signal -> exit status. The last of them wins if ranks received different ones. Slurm sends SIGUSR1 before it requeues.
STATUS = {signal.SIGUSR1: 0, signal.SIGINT: 130, signal.SIGTERM: 143}


class StopSignals:
    """Remember SIGTERM, SIGINT and SIGUSR1 within a `with` block. A second SIGINT ends the process at once.

    Attributes:
        place: 0 without a signal, else 1 + its index in STATUS.
        second_interrupt: What handles a second SIGINT.
    """

    def __init__(self) -> None:
        self.place = 0
        self.second_interrupt: Any = signal.SIG_DFL
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            self._before = {number: signal.signal(number, self._received) for number in STATUS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _received(self, number: int, _frame: FrameType | None) -> None:
        self.place = max(self.place, 1 + list(STATUS).index(signal.Signals(number)))
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self.second_interrupt)


def status_of(place: int) -> int:
    """Return the exit status for a `StopSignals.place`."""
    return list(STATUS.values())[place - 1]


def name_of(place: int) -> str:
    """Return the signal's name for a `StopSignals.place`."""
    return list(STATUS)[place - 1].name
