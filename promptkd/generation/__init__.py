"""Decoding responses from a causal language model."""
