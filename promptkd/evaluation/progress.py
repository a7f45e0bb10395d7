"""How far an evaluation is: a bar on a terminal, a plain line every ten seconds in a log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class AnswerBar:
    """Counts answers: call it with how many were finished."""

    def __init__(self, total: int, show: bool) -> None:
        self.total, self.show, self.done, self.what = total, show, 0, ""
        self.bar = tqdm(total=total, unit="answer", disable=not (show and sys.stderr.isatty()))
        self.began = self.spoke = time.monotonic()

    def start(self, what: str) -> None:
        """Name what the next answers belong to."""
        self.what = what
        self.bar.set_description(what)

    def __call__(self, count: int) -> None:
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if self.show and self.bar.disable and (now - self.spoke >= 10 or self.done == self.total):
            self.spoke = now
            rate = self.done / max(now - self.began, 1e-9)
            left = time.strftime("%H:%M:%S", time.gmtime((self.total - self.done) / rate))
            line = f"{self.what}  answer {self.done}/{self.total}  {rate:.3g} answers/s  {left} left"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()
