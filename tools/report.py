#!/usr/bin/env python
"""Compare trained and evaluated models: the same as `promptkd report`. --help lists the options."""

from promptkd.cli.report import main
from promptkd.errors import exit_with

if __name__ == "__main__":
    exit_with(main)
