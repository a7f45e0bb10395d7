"""What tools that turn files into files share: worker processes in order, output that is whole or not there."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from promptkd.errors import UserError
from promptkd.utils.machine import exit_with_parent, start_method

Lines = list[tuple[int, bytes]]
Result = TypeVar("Result")
_AHEAD = 4  # chunks per worker in flight: bounds memory, keeps workers busy
_STOPPING = {signal.SIGINT, signal.SIGTERM}
_job: Callable[[Any], Any]


def chunks_of_lines(
    lines: Iterable[tuple[Any, Any]], most_lines: int = 128, most_bytes: int = 1 << 19
) -> Iterator[list[tuple[Any, Any]]]:
    """Lines or rows and their places in lists of a size that is worth a message to another process."""
    chunk: list[tuple[Any, Any]] = []
    size = 0
    for number, line in lines:
        chunk.append((number, line))
        size += len(line)
        if len(chunk) == most_lines or size >= most_bytes:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def ordered_map(job: Callable[[Any], Result], chunks: Iterable[Any], workers: int) -> Iterator[Result]:
    """`map(job, chunks)` over worker processes, in order, reading only a little ahead of what was consumed.

    `job` reaches the workers once, when they start. The first error in the chunks' order is raised, whatever
    the number of workers. Close the iterator (or run it to its end) to stop them.
    """
    if workers == 1:
        yield from map(job, chunks)
        return
    # Nothing in this process runs threads that hold locks, so that it may be forked.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(start_method()), _start_worker, (job,))
    pending: deque = deque()
    try:
        for chunk in chunks:
            with _signals_held():  # workers are forked here
                pending.append(pool.submit(_run_job, chunk))
            if len(pending) >= _AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process died, perhaps for want of memory: lower --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait: what they raise amid a fork would be swallowed by Python's fork hooks."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(job: Callable[[Any], Any]) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which stops us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    exit_with_parent()


def _run_job(chunk: Any) -> Any:
    return _job(chunk)
