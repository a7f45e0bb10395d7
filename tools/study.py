#!/usr/bin/env python
"""Run a declared study of methods: the same as `promptkd study`. --help lists the options."""

from promptkd.cli.study import main
from promptkd.errors import exit_with

if __name__ == "__main__":
    exit_with(main)
