"""Bad input ends with one clear line and exit status 2; a traceback is a bug of ours, not a message to the user."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

BAD_INPUT = 2
FAILED = 1
# What gloo says in the collectives of the ranks that are left.
PEER_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "connectFullMesh failed",
)


class _OneLine(Exception):
    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class UserError(_OneLine):
    """Something the user gave cannot be used. The text names the thing and the remedy, in one line."""


class RunError(_OneLine):
    """A run cannot go on, through no fault of what the user gave. One line."""


def exit_with(main: Callable[[], None]) -> None:
    """Run an entry point; turn errors into one line on stderr and an exit status, Ctrl-C into 130.

    2: bad input, or a file or folder that cannot be read or written. 1: a run that cannot go on (`RunError`, no
    memory, another rank that has ended).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a screen without some character shows its escape, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except (UserError, RunError) as error:
        _leave(str(error), BAD_INPUT if isinstance(error, UserError) else FAILED)
    except MemoryError:
        _leave("there is not enough memory: lower --token-budget or take a smaller model", FAILED)
    except OSError as error:
        if error.filename is None:
            raise
        _leave(f"{error.filename}: {error.strerror}: correct the path, its permissions or make room", BAD_INPUT)
    except RuntimeError as error:
        if not any(words in str(error) for words in PEER_LOST):
            raise
        _leave("another rank has ended: what it said last tells why", FAILED)
    except KeyboardInterrupt:
        sys.exit(130)


def _leave(text: str, status: int) -> NoReturn:
    print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr, flush=True)
    sys.exit(status)
