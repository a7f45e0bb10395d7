"""Distill a teacher into a student: the same as `promptkd train`. --help lists the options."""

from promptkd.cli.train import main, read_settings, resolve
from promptkd.errors import exit_with

__all__ = ["main", "read_settings", "resolve"]

if __name__ == "__main__":
    exit_with(main)
