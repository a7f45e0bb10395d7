"""Errors end a script with one clear line and an exit status. A traceback is a bug, not a message to the user."""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

BAD_INPUT = 2
FAILED = 1
PIPE_CLOSED = 128 + signal.SIGPIPE  # the status that a shell reports for a program ended by SIGPIPE

# What a collective says on the ranks that are left when another rank has ended. Matched without regard to case.
PEER_LOST = (
    # gloo
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out waiting",
    "connectfullmesh failed",
    "socket closed",
    # NCCL, and torch's process group for it
    "ncclremoteerror",
    "remote process exited or there was a network error",
    "nccl communicator was aborted",
    "watchdog caught collective operation timeout",
    "failed to receive a response from the remote",
    # torch's store, through which ranks connect
    "failed to recv, got 0 bytes",
)
# What the host, CUDA and its libraries say when memory is used up. torch.OutOfMemoryError is a RuntimeError, too.
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "not enough memory",
)
# The options of each script that lower memory, the most useful one first.
LESS_MEMORY = {
    "train.py": (
        "lower --token-budget or --rollout-token-budget, add --gradient-checkpointing, lower --eval-batch-size or "
        "--max-length, or use a --deepspeed_config with more ZeRO (configs/deepspeed/ds_config_zero2_offload.json)"
    ),
    "evaluate.py": "lower --token-budget or --eval-batch-size, or use --dtype bf16",
    "generate.py": "lower --token-budget or --eval-batch-size, or use --dtype bf16",
}


class PromptKDError(Exception):
    """The base of this package's errors. Their text is one line."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class UserError(PromptKDError):
    """Something the user gave cannot be used. The text names the thing and the remedy, in one line."""


class RunError(PromptKDError):
    """A run cannot continue, through no fault of what the user gave. One line."""


def exit_with(main: Callable[[], None]) -> None:
    """Run an entry point. Turn errors into one line on stderr and an exit status, Ctrl-C into 130.

    Status 2: bad input, or a file or folder that cannot be read or written. Status 1: a run that cannot continue
    (`RunError`, no memory on the host or the GPU, another rank that has ended). Status 141: nobody reads the output
    any more, as in `promptkd download --list | head`. Then no message is printed, as with other Unix tools.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a screen without some character shows its escape, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _report_errors(main)
    finally:
        _flush_stdout()


def _report_errors(main: Callable[[], None]) -> None:
    try:
        main()
    except BrokenPipeError:
        if not _stdout_is_closed():  # a connection has broken, not the output
            raise
        sys.exit(PIPE_CLOSED)
    except (UserError, RunError) as error:
        _leave(str(error), BAD_INPUT if isinstance(error, UserError) else FAILED)
    except MemoryError:
        _leave(_no_memory(""), FAILED)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            _leave(_no_memory(""), FAILED)
        if error.filename is None:
            raise
        _leave(f"{error.filename}: {error.strerror}: correct the path, its permissions or make room", BAD_INPUT)
    except RuntimeError as error:
        text = str(error)
        if is_out_of_memory(error):  # first: NCCL reports missing memory as a failure of its own
            _leave(_no_memory(text), FAILED)
        if _mentions(text, PEER_LOST):
            _leave("another rank has ended: its last line says why", FAILED)
        raise
    except KeyboardInterrupt:
        sys.exit(130)


def _stdout_is_closed() -> bool:
    """Whether the program that reads the output through a pipe has ended."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # no event to wait for: errors are always reported
    return bool(poll.poll(0))


def _flush_stdout() -> None:
    """Write out what `print` has buffered, and discard it if nobody reads it any more."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
        sys.exit(PIPE_CLOSED)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception reports that memory is used up, on the host or a GPU. Do not catch such errors."""
    return isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, OSError)) and _mentions(str(error), OUT_OF_MEMORY)
    )


def _mentions(text: str, phrases: tuple[str, ...]) -> bool:
    return any(phrase in text.lower() for phrase in phrases)


def _no_memory(text: str) -> str:
    """One line for memory that is used up, with the options that lower it. `text` is the library's message."""
    place = "the GPU" if any(word in text.lower() for word in ("cuda", "cublas", "cudnn", "nccl")) else "this machine"
    program = os.path.basename(sys.argv[0])
    script = program if program.endswith(".py") else program.removeprefix("promptkd ") + ".py"
    remedy = LESS_MEMORY.get(script, "use smaller models or batches")
    return f"{place} has not enough memory: {remedy}"


def _leave(text: str, status: int) -> NoReturn:
    print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr, flush=True)
    sys.exit(status)
