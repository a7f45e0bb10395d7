"""Distill a teacher into a student: the same as `promptkd train`. --help lists the options."""

from promptkd.cli.train import main, read_settings
from promptkd.errors import exit_with

__all__ = ["main", "read_settings"]

if __name__ == "__main__":
    exit_with(main)
