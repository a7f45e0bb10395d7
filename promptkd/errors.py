"""Bad input ends with one clear line and exit status 2; a traceback is a bug of ours, not a message to the user."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

BAD_INPUT = 2
FAILED = 1


class UserError(Exception):
    """Something the user gave cannot be used. The text names the thing and the remedy, in one line."""


class RunError(Exception):
    """A run cannot go on, through no fault of what the user gave. One line."""


def exit_with(main: Callable[[], None]) -> None:
    """Run an entry point; turn errors into one line on stderr and exit status 2 (`RunError`: 1), Ctrl-C into 130."""
    try:
        main()
    except (UserError, RunError) as error:
        program = os.path.basename(sys.argv[0])
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(BAD_INPUT if isinstance(error, UserError) else FAILED)
    except KeyboardInterrupt:
        sys.exit(130)
