"""PromptKD: a frozen teacher with a few trainable prompt embeddings, tuned so that its teaching suits the student."""

__version__ = "0.1.0"
