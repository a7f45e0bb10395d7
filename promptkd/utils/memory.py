"""glibc's allocator, told to keep freed memory: a fifth of a step on a CPU was page faults of blocks given back."""

from __future__ import annotations

import ctypes
import os
import sys

# Read by glibc when a process starts; `keep_freed_memory` sets the same in a process that runs already.
KEEP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
    "MALLOC_ARENA_MAX": "1",  # what one thread has freed, another can take: a tenth of a step's memory
}
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # malloc.h


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed; elsewhere do nothing. PROMPTKD_MALLOC=system leaves it as it comes."""
    if not sys.platform.startswith("linux") or os.environ.get("PROMPTKD_MALLOC") == "system":
        return
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)  # an int here: two gigabytes
        mallopt(_TOP_PAD, 1 << 28)


def give_back_freed_memory() -> None:
    """Have glibc return all that is free at this moment, in spite of `keep_freed_memory`; elsewhere do nothing."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str):
    """A function of the C library, None where that is another than glibc."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
