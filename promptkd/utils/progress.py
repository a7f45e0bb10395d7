"""Progress bars with rate and remaining time."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from tqdm.auto import tqdm

PAUSE = 10.0  # seconds between two lines in a log
IS_NOTEBOOK = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)


class Progress:
    """Show a bar on a terminal or in a notebook, or a plain line at most every ten seconds in a log.

    Args:
        name: The text in front.
        total: How many units there are.
        show: Whether this process shows anything.
        unit: What is counted.
        done: Units that an earlier process has done.
    """

    def __init__(self, name: str, total: int, show: bool, unit: str = "step", done: int = 0) -> None:
        self.name, self.total, self.show, self.unit = name, total, show, unit
        self.done = self.first = done
        has_bar = show and (sys.stderr.isatty() or IS_NOTEBOOK)
        self.bar = tqdm(desc=name, total=total, initial=done, unit=unit, disable=not has_bar)
        self.began, self.last_line = time.monotonic(), 0.0

    def start(self, name: str) -> None:
        """Change the text in front."""
        self.name = name
        self.bar.set_description(name)

    def update(self, count: int = 1, values: Mapping[str, float] | None = None) -> None:
        """Count finished units. `values` are shown behind the count."""
        self.done += count
        shown = "  ".join(f"{key} {value:.4g}" for key, value in (values or {}).items())
        if shown:
            self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update(count)
        now = time.monotonic()
        if self.show and self.bar.disable and (now - self.last_line >= PAUSE or self.done == self.total):
            self.last_line = now
            seconds = (now - self.began) / max(self.done - self.first, 1)
            rate = f"{1 / seconds:.3g} {self.unit}s/s" if 0 < seconds < 0.1 else f"{seconds:.3g} s/{self.unit}"
            count_text = f"{self.unit} {self.done}/{self.total}"
            left = f"{_hours(seconds * (self.total - self.done))} left"
            self.line("  ".join(filter(None, (self.name, count_text, shown, rate, left))))

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        if self.show:
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        """End the bar."""
        self.bar.close()


def _hours(seconds: float) -> str:
    """Format a duration as `hours:minutes:seconds`; hours do not wrap at a day."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest:02}"
