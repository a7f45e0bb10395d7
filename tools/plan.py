#!/usr/bin/env python
"""Plan the memory of a run: the same as `promptkd plan`. --help lists the options."""

from promptkd.cli.plan import main
from promptkd.errors import exit_with

if __name__ == "__main__":
    exit_with(main)
