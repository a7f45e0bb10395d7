"""The training loop and what it needs around a method."""
