"""PromptKD: a frozen teacher carries a few trainable prompt embeddings, tuned so that what it teaches suits the student."""

__version__ = "0.1.0"
