"""Loading, checking and wrapping causal language models."""
