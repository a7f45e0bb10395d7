"""Worker processes that keep the order of their input."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from typing import Any, TypeVar

from tqdm import tqdm

from promptkd.errors import UserError
from promptkd.utils.machine import exit_with_parent, start_method

Result = TypeVar("Result")
_AHEAD = 4  # chunks per worker in flight: bounds memory, keeps workers busy
_STOPPING = {signal.SIGINT, signal.SIGTERM}
_job: Callable[[Any], Any]


def map_lines(
    job: Callable[[Any], Result], lines: Iterable[tuple[Any, Any]], path: str, workers: int, stack: ExitStack
) -> Iterator[Result]:
    """Apply `job` to chunks of lines, with a progress bar on a terminal.

    Args:
        job: Takes a list of (place, line). It has to be picklable.
        lines: Lines or rows with their places.
        path: The file that they come from; its size is the length of the bar.
        workers: The number of worker processes.
        stack: Ends the workers and the bar.
    """
    size = os.path.getsize(path) if os.path.isfile(path) else None
    bar = tqdm(total=size, unit="B", unit_scale=True, disable=not sys.stderr.isatty())

    def watched() -> Iterator[tuple[Any, Any]]:
        for place, line in lines:
            bar.update(len(line) if isinstance(line, bytes) else 0)
            yield place, line

    results = ordered_map(job, _chunks(watched()), workers)
    stack.callback(bar.close)
    stack.callback(results.close)
    return results


def ordered_map(job: Callable[[Any], Result], chunks: Iterable[Any], workers: int) -> Generator[Result, None, None]:
    """Yield `job(chunk)` of all chunks from worker processes, in order, reading only a little ahead.

    `job` is sent to the workers once, when they start. The first error in the chunks' order is raised, whatever the
    number of workers. Close the generator (or exhaust it) to stop them.
    """
    if workers == 1:
        yield from map(job, chunks)
        return
    # Nothing in this process runs threads that hold locks, so that it may be forked.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(start_method()), _start_worker, (job,))
    pending: deque[Future[Result]] = deque()
    try:
        for chunk in chunks:
            with _signals_held():  # workers are forked here
                pending.append(pool.submit(_run_job, chunk))
            if len(pending) >= _AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process died, perhaps of too little memory: lower --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(
    lines: Iterable[tuple[Any, Any]], most_lines: int = 128, most_bytes: int = 1 << 19
) -> Iterator[list[tuple[Any, Any]]]:
    """Group lines so that a chunk is worth a message to another process."""
    chunk: list[tuple[Any, Any]] = []
    size = 0
    for place, line in lines:
        chunk.append((place, line))
        size += len(line)
        if len(chunk) == most_lines or size >= most_bytes:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM: Python's fork hooks would swallow what they raise during a fork."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(job: Callable[[Any], Any]) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which stops its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    exit_with_parent()


def _run_job(chunk: Any) -> Any:
    return _job(chunk)
