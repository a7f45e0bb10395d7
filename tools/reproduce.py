#!/usr/bin/env python
"""Reproduce the paper's table: the same as `promptkd reproduce`. --help lists the options."""

from promptkd.cli.reproduce import main
from promptkd.errors import exit_with

if __name__ == "__main__":
    exit_with(main)
