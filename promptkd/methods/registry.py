"""The methods by name."""

from __future__ import annotations

import importlib

from promptkd.methods.base import Method

METHODS = {
    "promptkd": "promptkd.methods.promptkd:PromptKD",
    "sft": "minillm_baselines.sft:SFT",
    "kd": "minillm_baselines.kd:KD",
    "seqkd": "minillm_baselines.seqkd:SeqKD",
    "minillm": "minillm_baselines.minillm:MiniLLM",
}


def method_class(name: str) -> type[Method]:
    """The class that METHODS names."""
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
