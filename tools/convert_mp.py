#!/usr/bin/env python
"""Convert a model between tensor-parallel sizes: the same as `promptkd convert`. --help lists the options."""

from promptkd.cli.convert import main
from promptkd.errors import exit_with

if __name__ == "__main__":
    exit_with(main)
