"""Answers of a model on test sets, and their scores."""
