"""Options of earlier versions that are gone, so that files and commands that name them stay readable."""

from __future__ import annotations

from promptkd.errors import UserError

# Name of the option -> the one value that is still accepted, because the program now always behaves that way.
REMOVED_OPTIONS = {"rollout_engine": "hf"}
LAST_VERSION = "0.1.0"


def describe_removal(name: str, value: object) -> str:
    """Describe a removed option, for an error message."""
    return f"--{name.replace('_', '-')} {value} (removed after version {LAST_VERSION})"


def check_removed(name: str, value: str) -> str:
    """Accept the value that a removed option may still have.

    Raises:
        UserError: If the option has another value.
    """
    if value != REMOVED_OPTIONS[name]:
        raise UserError(f"{describe_removal(name, value)}: leave the option out, or install that version")
    return value
