#!/usr/bin/env python
"""Download the published checkpoints and data: the same as `promptkd download`. --help lists the options."""

from promptkd.cli.download import main
from promptkd.errors import exit_with

if __name__ == "__main__":
    exit_with(main)
