"""Bad input ends with one clear line and exit status 2; a traceback is a bug of ours, not a message to the user."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

BAD_INPUT = 2


class UserError(Exception):
    """Something the user gave cannot be used. The text names the thing and the remedy, in one line."""


def exit_with(main: Callable[[], None]) -> None:
    """Run an entry point; turn `UserError` into one line on stderr and exit status 2, Ctrl-C into 130."""
    try:
        main()
    except UserError as error:
        program = os.path.basename(sys.argv[0])
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(130)
