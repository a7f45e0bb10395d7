#!/usr/bin/env python
"""Turn text into token files: the same as `promptkd data`. --help lists the options."""

from promptkd.cli.data import main
from promptkd.errors import exit_with

if __name__ == "__main__":
    exit_with(main)
