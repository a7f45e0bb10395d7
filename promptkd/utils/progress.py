"""Progress bars with rate and remaining time."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Progress:
    """A bar with rate, remaining time and the last losses; plain lines, at most one in ten seconds, in a log."""

    def __init__(self, name: str, total: int, show: bool, done: int = 0) -> None:
        self.name, self.total, self.show = name, total, show
        self.bar = tqdm(desc=name, total=total, initial=done, unit="step", disable=not (show and sys.stderr.isatty()))
        self.began, self.first, self.spoke = time.monotonic(), done, 0.0

    def step(self, step: int, shown: dict[str, float]) -> None:
        losses = "  ".join(f"{key} {value:.4g}" for key, value in shown.items())
        self.bar.set_postfix_str(losses, refresh=False)
        self.bar.update(1)
        now = time.monotonic()
        if self.bar.disable and self.show and (now - self.spoke >= 10 or step == self.total):
            self.spoke = now
            rate = (now - self.began) / (step - self.first)
            minutes, seconds = divmod(round(rate * (self.total - step)), 60)
            left = f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"  # hours beyond a day are still hours
            self.line(f"{self.name}  step {step}/{self.total}  {losses}  {rate:.3g} s/step  {left} left")

    def line(self, text: str) -> None:
        if self.show:
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        self.bar.close()
