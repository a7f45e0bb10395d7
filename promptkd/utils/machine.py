"""Processes and cores, with the differences between Linux and macOS in one place."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading


def usable_cores() -> int:
    """Return the number of cores that this process may use, or the machine's where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start_method() -> str:
    """Return how to start worker processes that need nothing but their job.

    A fork saves the second import of torch in each worker. macOS can fork too, but its system libraries may crash
    in the child, which is why Python does not fork there by default.
    """
    return "fork" if sys.platform.startswith("linux") else "spawn"


def exit_with_parent() -> None:
    """Let this worker process end when its parent does.

    A killed parent cannot tell its workers. Without this call they would wait for tasks forever.
    """
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
