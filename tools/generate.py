#!/usr/bin/env python
"""Let a teacher answer the training prompts: the same as `promptkd generate`. --help lists the options."""

from promptkd.cli.generate import main, read_settings
from promptkd.errors import exit_with

__all__ = ["main", "read_settings"]

if __name__ == "__main__":
    exit_with(main)
