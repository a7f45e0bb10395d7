"""PromptKD: a frozen teacher with a few trainable prompt embeddings, tuned so that its teaching suits the student.

The functions here are the command line for Python. Each is imported when it is first used, because that takes seconds.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from promptkd.errors import PromptKDError, RunError, UserError

if TYPE_CHECKING:
    from promptkd.api import Results, Run, evaluate, load_prompted_teacher, train
    from promptkd.methods.registry import register_method

# transformers imports bitsandbytes, which warns of a missing CPU kernel and of casts in each layer.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"
__all__ = [
    "PromptKDError", "Results", "Run", "RunError", "UserError",
    "evaluate", "load_prompted_teacher", "register_method", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "promptkd.methods.registry" if name == "register_method" else "promptkd.api"
    return getattr(importlib.import_module(module), name)
