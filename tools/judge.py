#!/usr/bin/env python
"""Compare two result folders by a judge: the same as `promptkd judge`. --help lists the options."""

from promptkd.cli.judge import main
from promptkd.errors import exit_with

if __name__ == "__main__":
    exit_with(main)
