"""Quantization of frozen weights to 8 or 4 bits with the optional library bitsandbytes.

8bit is LLM.int8 (Dettmers et al., 2022) and 4bit is NF4 (QLoRA, Dettmers et al., 2023). Both pass on the gradient with
respect to the inputs, which soft prompts and LoRA adapters need. Embeddings, norms and head keep the model's precision,
because the losses read the head. Both run on GPUs and CPUs.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from promptkd.errors import UserError


def check_installed(kind: str, option: str) -> None:
    """Raise UserError if bitsandbytes is needed and missing.

    Args:
        kind: Value of the option.
        option: The option, for the error message.
    """
    spec = importlib.util.find_spec("bitsandbytes")
    if kind != "none" and getattr(spec, "origin", None) is None:  # a folder of that name is no package
        raise UserError(
            f"{option} {kind} needs bitsandbytes, which is not installed: .venv/bin/pip install bitsandbytes"
        )


def loading_options(kind: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantize weights as they are read, directly on `device`."""
    if kind == "none":
        return {}
    import bitsandbytes.nn.modules

    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False  # such a CPU would run 4bit layers without a gradient
    bits: dict[str, Any] = {"load_in_4bit": kind == "4bit", "load_in_8bit": kind == "8bit"}
    config = BitsAndBytesConfig(**bits, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": device}}
