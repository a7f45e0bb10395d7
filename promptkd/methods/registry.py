"""The methods by name."""

from __future__ import annotations

import importlib
from difflib import get_close_matches

from promptkd.errors import UserError
from promptkd.methods.base import Method

METHODS = {
    "promptkd": "promptkd.methods.promptkd:PromptKD",
    "sft": "minillm_baselines.sft:SFT",
    "kd": "minillm_baselines.kd:KD",
    "seqkd": "minillm_baselines.seqkd:SeqKD",
    "gkd": "minillm_baselines.gkd:GKD",
    "distillm": "minillm_baselines.distillm:DistiLLM",
    "distillm2": "minillm_baselines.distillm2:DistiLLM2",
    "minillm": "minillm_baselines.minillm:MiniLLM",
}


def method_class(name: str) -> type[Method]:
    """Return the class of a method.

    Args:
        name: A key of `METHODS`.

    Raises:
        UserError: There is no such method.
    """
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"--method {name}: choose one of {', '.join(METHODS)}{hint}")
    module, _, attribute = METHODS[name].partition(":")
    kind: type[Method] = getattr(importlib.import_module(module), attribute)
    return kind
