"""PromptKD: a frozen teacher carries a few trainable prompt embeddings, tuned so that it teaches what suits the student."""

__version__ = "0.1.0"
