#!/usr/bin/env python
"""Push a model to the Hugging Face hub: the same as `promptkd push`. --help lists the options."""

from promptkd.cli.push import main
from promptkd.errors import exit_with

if __name__ == "__main__":
    exit_with(main)
