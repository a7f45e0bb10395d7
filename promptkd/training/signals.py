"""Being asked to stop: the step is finished, a checkpoint written, and the exit status says which signal it was."""

from __future__ import annotations

import signal
import threading

# Later ones win where ranks received different ones. 0: Slurm's warning, after which it requeues the job.
STATUS = {signal.SIGUSR1: 0, signal.SIGINT: 130, signal.SIGTERM: 143}


class StopSignals:
    """While entered, SIGTERM, SIGINT and SIGUSR1 are remembered; a second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.place = 0  # 0: none; else 1 + its place in STATUS
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = {number: signal.signal(number, self._received) for number in STATUS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _received(self, number: int, _frame) -> None:
        self.place = max(self.place, 1 + list(STATUS).index(signal.Signals(number)))
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def status_of(place: int) -> int:
    """The exit status for a `StopSignals.place`, this rank's or another's."""
    return list(STATUS.values())[place - 1]


def name_of(place: int) -> str:
    return list(STATUS)[place - 1].name
