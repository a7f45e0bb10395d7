"""Evaluate a model on test sets: the same as `promptkd evaluate`. --help lists the options."""

from promptkd.cli.evaluate import main, read_settings
from promptkd.errors import exit_with

__all__ = ["main", "read_settings"]

if __name__ == "__main__":
    exit_with(main)
