"""MiniLLM's golden data."""

from __future__ import annotations

from helpers.training import GOLDEN

PROMPTS, CORPUS = GOLDEN / "processed/dolly/prompt/gpt2", GOLDEN / "processed/corpus/gpt2"
