"""Reproduce the paper's table: the rows, the commands that make them, and running these."""
